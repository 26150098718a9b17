"""Where the DAG files are, and code run beside them in a fresh interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def run_python(code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run code in this environment's Python, in dags/."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environ},
        cwd=REPOSITORY / "dags",
        capture_output=True,
        text=True,
        check=False,
    )
