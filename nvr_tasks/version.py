"""Which code is running: the package version and, in a git checkout, the commit."""

from __future__ import annotations

import os
import subprocess
from functools import cache
from pathlib import Path

from nvr_tasks import __version__


@cache
def code_version() -> str:
    """`0.1.0+1a2b3c4d5e6f`, with `-dirty` behind it when files differ from the commit.

    An image has no checkout; whoever builds it sets NVR_CODE_COMMIT.
    """
    commit = os.environ.get("NVR_CODE_COMMIT") or _commit_of_checkout()
    return f"{__version__}+{commit}" if commit else __version__


def _commit_of_checkout() -> str | None:
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():  # installed; an enclosing repository would be somebody else's
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
