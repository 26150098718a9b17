"""Corpus blocks on their way to a device: the next one is read and copied while the last one is worked on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch  # noqa: TID253 - this package owns the search; nothing light imports it

from nvr_tasks.mining.arrays import Vectors

T = TypeVar("T")
S = TypeVar("S")


@dataclass(frozen=True)
class Staged:
    """A corpus block, and its copy on a device.

    Attributes:
        host: float32 [b, D].
        device: the same where it is worked on; None: there is no other place.
        ready: what the copy must be waited for with; None: it is there.
    """

    host: Vectors
    device: torch.Tensor | None = None
    ready: torch.cuda.Event | None = None

    def on_device(self) -> torch.Tensor:
        """The block where it is worked on, once it is there."""
        if self.device is None:
            return torch.from_numpy(self.host)
        if self.ready is not None:
            stream = torch.cuda.current_stream(self.device.device)
            stream.wait_event(self.ready)
            self.device.record_stream(stream)  # its memory is the copy stream's: not to be reused while this one reads
        return self.device


class Uploader:
    """Copies blocks to a CUDA device through pinned memory, on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, block: Vectors) -> Staged:
        """Begin the copy. torch keeps pinned memory alive, and does not reuse it, until the copy is done."""
        if self.stream is None:
            return Staged(block, torch.from_numpy(block).to(self.device))
        with torch.cuda.stream(self.stream):
            copy = torch.from_numpy(block).pin_memory().to(self.device, non_blocking=True)
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record(self.stream)
        return Staged(block, copy, ready)


def ahead(items: Iterable[T], prepare: Callable[[T], S]) -> Iterator[S]:
    """`prepare` of every item, in order, one item ahead of whoever takes them, in a thread.

    An error of the items or of `prepare` is raised where the item would have come. Whoever stops early (an error, `close`)
    ends the thread after the item it is at.
    """
    ready: queue.Queue[tuple[S | None, BaseException | None, bool]] = queue.Queue(maxsize=1)
    stopped = threading.Event()

    def put(entry: tuple[S | None, BaseException | None, bool]) -> bool:
        while not stopped.is_set():
            try:
                ready.put(entry, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def work() -> None:
        try:
            for item in items:
                if not put((prepare(item), None, False)):
                    return
            put((None, None, True))
        except BaseException as error:  # raised in the other thread
            put((None, error, True))

    thread = threading.Thread(target=work, name="read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            value, error, last = ready.get()
            if error is not None:
                raise error
            if last:
                return
            yield value  # type: ignore[misc]
    finally:
        stopped.set()
        thread.join()
