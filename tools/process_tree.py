"""Processes of this machine: their families, their command lines, and how to end them. Standard library only."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

PROC = Path("/proc")
ASK_AGAIN_S = 5.0
KILLED_S = 5.0  # how long a killed process may take to be gone


class ProcessError(Exception):
    """The machine does not let us see its processes."""


def end(leaders: list[int], scheduler: int, grace_s: float) -> None:
    """End processes and all that they started, in whatever group: asked politely, then not.

    A leader ends its own children in order, but for the scheduler: its executor waits for running tasks for ever. So
    its workers are asked too, and again, since a worker passes the signal on only to a task that has started.
    """
    family = descendants(set(leaders), parents())  # before anyone is asked: a child of the dead is nobody's
    for pid in leaders:
        _signal(pid, signal.SIGTERM)
    patience, ask_at = time.monotonic() + grace_s, 0.0
    while time.monotonic() < patience + KILLED_S:
        living = parents()
        family = descendants(family, living) & living.keys()
        if not family:
            return
        now = time.monotonic()
        if now > patience:
            for pid in family:
                _signal(pid, signal.SIGKILL)
        elif now > ask_at:
            ask_at = now + ASK_AGAIN_S
            for pid in family:
                if living[pid] == scheduler:
                    _signal(pid, signal.SIGTERM)
        time.sleep(0.1)


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def descendants(roots: set[int], parent_of: dict[int, int]) -> set[int]:
    """The roots and all below them."""
    found, reach = set(roots), 0
    while len(found) > reach:
        reach = len(found)
        found |= {pid for pid, parent in parent_of.items() if parent in found}
    return found


def parents() -> dict[int, int]:
    """Parent of every living process of this machine, zombies left out; empty where processes cannot be listed."""
    if not (PROC / "self" / "stat").exists():
        command = ["ps", "-axo", "pid=,ppid=,stat="]
        try:
            listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            return {}
        rows = [line.split() for line in listed.splitlines()]
        return {int(pid): int(parent) for pid, parent, state in rows if not state.startswith("Z")}
    found = {}
    for stat in PROC.glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = stat.read_text(errors="replace").rpartition(")")[2].split()[:2]
            if state not in ("Z", "X"):
                found[int(stat.parent.name)] = int(parent)
    return found


def command_line(pid: int) -> str:
    """What a process was started with; empty when there is none, or only a zombie."""
    if (PROC / "self" / "cmdline").exists():  # Linux, where `ps` may be missing
        for _ in range(10):
            try:
                shown = (PROC / str(pid) / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                return ""
            except OSError as error:
                raise ProcessError(f"cannot see process {pid}: {error}") from None
            if shown:
                return shown.replace(b"\0", b" ").decode(errors="replace")
            time.sleep(0.02)  # a zombie, or a process that is just being started
        return ""
    command = ["ps", "-o", "command=", "-p", str(pid)]
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False).stdout
    except OSError as error:
        raise ProcessError(f"cannot see process {pid}: `ps` cannot be run ({error.strerror})") from None
