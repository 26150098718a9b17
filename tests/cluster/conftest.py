"""Tests on a real cluster. They are slow and need one, so only `make test-k8s` collects them."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("NVR_TEST_K8S") else ["test_*.py"]
