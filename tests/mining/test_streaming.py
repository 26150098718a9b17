"""Reading ahead: order, errors, and an end when nobody takes any more."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from nvr_tasks.mining.streaming import ahead


def test_items_come_in_order_and_the_next_one_early() -> None:
    made: list[int] = []

    def prepare(n: int) -> int:
        made.append(n)
        return n * n

    coming = ahead(range(6), prepare)
    assert next(coming) == 0
    for _ in range(200):
        if len(made) >= 2:
            break
        time.sleep(0.01)
    assert made[:2] == [0, 1], "the next one is made while this one is worked on"
    assert len(made) <= 3, "but not all of them"
    assert list(coming) == [1, 4, 9, 16, 25]


def test_an_error_comes_where_the_item_would_have() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise OSError("disk")

    coming = ahead(broken(), lambda n: n)
    assert next(coming) == 1
    with pytest.raises(OSError, match="disk"):
        next(coming)


def test_stopping_early_ends_the_thread() -> None:
    before = threading.active_count()
    coming = ahead(range(1000), lambda n: n)
    next(coming)
    coming.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
