"""The cluster of KUBECONFIG as tests see it, by `kubectl`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from typing import Any

KUBECTL = os.environ.get("KUBECTL") or shutil.which("kubectl") or "kubectl"
PULL = os.environ.get("NVR_TEST_PULL", "Never")  # images are on the nodes already


def kubectl(*words: str, stdin: str | None = None, check: bool = True) -> str:
    """One command."""
    done = subprocess.run([KUBECTL, *words], input=stdin, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, f"kubectl {' '.join(words)}: {done.stderr}"
    return done.stdout.strip()


def get(*words: str) -> dict[str, Any]:
    """Objects as JSON; empty where there is none."""
    found = kubectl("get", *words, "--output=json", "--ignore-not-found")
    return dict(json.loads(found)) if found else {}


def apply(*objects: dict[str, Any]) -> None:
    """Make or change objects."""
    kubectl("apply", "--filename=-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))
