"""Tests on a real Docker engine. They are slow and build images, so only `make test-docker` collects them."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("NVR_TEST_DOCKER") else ["test_*.py"]
