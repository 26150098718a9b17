"""What a command says, whoever runs it: lines to the task's log as they come, the result and the last words kept."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from nvr_tasks.stages import RESULT_MARK

LAST_LINES = 8  # of stderr, in a failure's message
MAX_LINE = 1 << 20  # bytes; a longer line is cut, so that a stage gone wild cannot fill the worker's memory


class Story:
    """Takes the two output streams of a command in pieces of any size."""

    def __init__(self, log: Callable[..., object]) -> None:
        self.result: str | None = None
        self._log = log
        self._errors: deque[str] = deque(maxlen=LAST_LINES)
        self._out, self._err = b"", b""

    @property
    def last_words(self) -> str:
        """The end of stderr, from the command's own message on if there is one."""
        return own_words(list(self._errors))

    def out(self, chunk: bytes) -> None:
        """A piece of stdout: to the log, save for the line with the result."""
        self._out = _whole_lines(self._out, chunk, self._stdout)

    def err(self, chunk: bytes) -> None:
        """A piece of stderr: to the log."""
        self._err = _whole_lines(self._err, chunk, self._stderr)

    def end(self) -> None:
        """Both streams have ended, perhaps in the middle of a line."""
        self.out(b"\n")
        self.err(b"\n")

    def _stdout(self, line: str) -> None:
        if line.startswith(RESULT_MARK):
            self.result = line
        else:
            self._log("%s", line)

    def _stderr(self, line: str) -> None:
        self._errors.append(line)
        self._log("%s", line)


def own_words(lines: list[str]) -> str:
    """The last of a command's lines, from its own message on if there is one."""
    last = lines[-LAST_LINES:]
    own = [i for i, line in enumerate(last) if line.startswith("nvr: ")]
    return "\n".join(last[own[-1] :] if own else last) or "it said nothing on stderr"


def _whole_lines(pending: bytes, chunk: bytes, handle: Callable[[str], None]) -> bytes:
    """Hand over the lines that are complete; returns the rest."""
    *lines, rest = (pending + chunk.replace(b"\r", b"\n")).split(b"\n")
    if len(rest) > MAX_LINE:
        lines, rest = [*lines, rest], b""
    for raw in lines:
        line = raw[:MAX_LINE].decode("utf-8", "replace").rstrip()
        if line:
            handle(line)
    return rest
