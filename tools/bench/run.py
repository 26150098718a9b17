"""All benchmarks, one after the other, into docs/benchmarks.md with machine, command and commit: `make bench`."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "benchmarks.md"
SECTIONS = (
    ("Mining", ["mining.py"]),
    ("Embedding", ["embedding.py"]),
    ("Training", ["training.py"]),
    ("Serving", ["serving.py"]),
)


def machine() -> str:
    """Processor, cores, memory."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    model = next((line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")), "CPU")
    flags = next((line.split() for line in info.splitlines() if line.startswith("flags")), [])
    fast = [f for f in ("amx_tile", "amx_bf16", "avx512_bf16", "avx512_vnni", "avx512f", "avx2") if f in flags]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model} ({', '.join(fast)}), {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB, no GPU"


def main() -> None:
    """Write the page; a benchmark that fails leaves the old one as it is."""
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    data = "with" if os.environ.get("NVR_DATA") else "without"
    lines = [
        "# Benchmarks",
        "",
        f"`make bench` ({data} NVR_DATA) at {commit} on {datetime.datetime.now(datetime.UTC):%Y-%m-%d}; {machine()}.",
        "Ratios are of one run on this machine; nothing else ran on it. Mining and embedding end at the rate at which the machine",
        "multiplies matrices of its fastest type: the GEMM rows say how far that is from float32 (on CPUs with AMX, further than here).",
    ]
    for title, command in SECTIONS:
        print(f"» {title.lower()}", file=sys.stderr)
        done = subprocess.run(
            [sys.executable, str(HERE / command[0]), *command[1:]], stdout=subprocess.PIPE, text=True, check=True
        )
        lines += ["", f"## {title}", "", done.stdout.strip()]
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
