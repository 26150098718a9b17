"""All benchmarks, or some, one after the other, into docs/benchmarks.md with machine, command and commit: `make bench`."""

from __future__ import annotations

import argparse
import datetime
import os
import re
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


def sections(page: str) -> dict[str, str]:
    """Title → text of the page as it is."""
    _, *parts = re.split(r"^## (.+)\n", page, flags=re.MULTILINE)
    return {title: text.strip() for title, text in zip(parts[::2], parts[1::2], strict=True)}


def main() -> None:
    """Write the page; a benchmark that fails leaves it as it is, and sections that are not asked for stay."""
    titles = [title for title, _ in SECTIONS]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("only", nargs="*", metavar="SECTION", help=f"{', '.join(titles)}; all by default")
    asked = parser.parse_args().only or titles
    if strange := [title for title in asked if title not in titles]:
        parser.error(f"no section {strange[0]}: there are {', '.join(titles)}")
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    data = "with" if os.environ.get("NVR_DATA") else "without"
    measured = f"Measured {data} NVR_DATA at {commit} on {datetime.datetime.now(datetime.UTC):%Y-%m-%d}; {machine()}."
    found = sections(PAGE.read_text(encoding="utf-8")) if PAGE.exists() else {}
    for title, command in SECTIONS:
        if title in asked:
            print(f"» {title}", file=sys.stderr)
            done = subprocess.run(
                [sys.executable, str(HERE / command[0]), *command[1:]], stdout=subprocess.PIPE, text=True, check=True
            )
            found[title] = f"{measured}\n\n{done.stdout.strip()}"
    lines = [
        "# Benchmarks",
        "",
        "`make bench`, or sections of it: `make bench ONLY=Training`. Ratios are of one run on one machine, on which nothing else",
        "ran. Mining and embedding end at the rate at which the machine multiplies matrices of its fastest type: the GEMM rows say",
        "how far that is from float32 (on CPUs with AMX, further than here).",
    ]
    for title in titles:
        if title in found:
            lines += ["", f"## {title}", "", found[title]]
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
