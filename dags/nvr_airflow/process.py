"""The `process` runner: a stage is a process of the task environment, on the machine where the Airflow worker runs."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import IO, Any

from airflow.sdk.exceptions import AirflowFailException

from nvr_airflow.environment import task_environment
from nvr_airflow.operator import WITHIN_AIRFLOWS_S, StageOperator
from nvr_airflow.story import Story

DRAIN_S = 5.0  # how long output is still read after the process has ended


class ProcessStageOperator(StageOperator):
    """Runs `nvr` as a process group of its own; its stderr is the task's log, live."""

    where_nvr_is_from = "NVR_BIN"

    def __init__(
        self, *, nvr_bin: str, workdir: str, kill_grace_s: float = 20, pass_env: Sequence[str] = (), **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.nvr_bin = nvr_bin
        self.workdir = workdir
        self.kill_grace_s = kill_grace_s
        self.pass_env = tuple(pass_env)
        self._process: subprocess.Popen[bytes] | None = None

    def execute(self, context: Any) -> Any:
        """Run the command to its end."""
        command = [self.nvr_bin, *self.command_line(context)]
        self.log.info("$ %s", " ".join(command))
        try:
            self._process = subprocess.Popen(
                command,
                cwd=self.workdir,
                env=task_environment(os.environ, self.pass_env),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # one group for it and its workers: they are stopped together
                preexec_fn=_die_with_parent(),  # noqa: PLW1509  the task process has one thread
            )
        except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
            raise AirflowFailException(
                f"cannot start {self.nvr_bin} in {self.workdir}: {error.strerror}. "
                "Run `make setup`, or point NVR_BIN at the nvr command of the task environment"
            ) from None
        story = Story(self.log.info)
        try:
            status = _follow(self._process, story, on_end=self._stop_group)
        finally:
            self._stop_group()  # a timeout or an interrupt leaves nobody behind
        return self.conclude(status, story.result, story.last_words, context)

    def on_kill(self) -> None:
        """Airflow's request to stop: SIGTERM to the group, SIGKILL after the grace (at most `WITHIN_AIRFLOWS_S`)."""
        self._stop_group(grace_s=min(self.kill_grace_s, WITHIN_AIRFLOWS_S))

    def _stop_group(self, grace_s: float = 2.0) -> None:
        if self._process is None:
            return
        group = self._process.pid
        if not _signal_group(group, signal.SIGTERM):
            return
        deadline = time.monotonic() + grace_s
        while time.monotonic() < deadline:
            self._process.poll()  # reaps it: a zombie would keep the group alive
            if not _signal_group(group, 0):
                return
            time.sleep(0.05)
        _signal_group(group, signal.SIGKILL)
        self._process.wait()


def _follow(process: subprocess.Popen[bytes], story: Story, on_end: Callable[[], None]) -> int:
    """Read until the process has ended and its output is drained; `on_end` stops what it left running."""
    assert process.stdout is not None  # noqa: S101  both were asked for as pipes
    assert process.stderr is not None  # noqa: S101
    handlers: dict[IO[bytes], Callable[[bytes], None]] = {process.stdout: story.out, process.stderr: story.err}
    give_up: float | None = None
    with selectors.DefaultSelector() as selector:
        for stream in handlers:
            selector.register(stream, selectors.EVENT_READ)
        while selector.get_map() and (give_up is None or time.monotonic() < give_up):
            for key, _ in selector.select(timeout=0.2):
                source: Any = key.fileobj
                chunk = os.read(source.fileno(), 65536)
                if not chunk:
                    selector.unregister(source)
                handlers[source](chunk)
            if give_up is None and process.poll() is not None:
                on_end()  # a worker that outlives the stage would hold the pipes open for ever
                give_up = time.monotonic() + DRAIN_S
    story.end()
    for stream in handlers:
        stream.close()
    return process.wait()


def _signal_group(group: int, number: int) -> bool:
    """Signal a process group; False when none of it is left."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    except PermissionError:  # macOS answers so for a group of zombies
        return False
    return True


def _die_with_parent() -> Callable[[], None] | None:
    """Linux: SIGTERM to the stage when the Airflow task process dies, even by SIGKILL, so that no stage is orphaned."""
    if not sys.platform.startswith("linux"):
        return None
    import ctypes

    libc = ctypes.CDLL(None)  # loaded before the fork: the child may only make the call

    def request() -> None:
        libc.prctl(1, signal.SIGTERM)  # 1 = PR_SET_PDEATHSIG

    return request
