"""The pointer names an index and the model version that it was built by, whatever happens at the same time."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from nvr_tasks.artifacts import Store
from nvr_tasks.errors import NvrError
from nvr_tasks.pointer import Pointer, advance, current, key


def pointer(version: int) -> Pointer:
    return Pointer("m", str(version), f"digest-{version}", f"index-{version}")


def test_it_advances_and_stays_where_nothing_changes(store: Store) -> None:
    assert current(store, "m") is None
    first = advance(store, pointer(1), lambda: True)
    assert first is not None
    assert (first.number, first.version) == (1, "1")
    assert advance(store, pointer(1), lambda: True) == first == current(store, "m")
    assert advance(store, pointer(2), lambda: False) is None
    second = advance(store, pointer(2), lambda: True)
    assert second == current(store, "m")
    assert second is not None
    assert second.number == 2


def test_an_older_swap_never_undoes_a_newer_one(store: Store) -> None:
    """Version 2 is promoted and swapped in between what the swap to version 1 reads and what it writes."""
    champion = ["1"]

    def still_meant() -> bool:
        answer = champion == ["1"]
        if answer:  # and right after the answer
            champion[0] = "2"
            advance(store, pointer(2), lambda: True)
        return answer

    assert advance(store, pointer(1), still_meant) is None
    assert [current(store, "m").version] == ["2"]  # type: ignore[union-attr]


@pytest.mark.parametrize("place", ["file", "s3"])
def test_under_concurrent_promotion(place: str, store: Store, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """One promotes, two swap, one reads: no pointer ever names an index of another version, and the last one wins."""
    if place == "s3":
        store = Store(f"s3://{request.getfixturevalue('bucket')}/r", scratch=tmp_path)
    champion, rounds, seen, wrong = [0], 60 if place == "file" else 15, set[str](), []
    done = threading.Event()

    def swap() -> None:
        while not done.is_set() or (current(store, "m") or pointer(-1)).version != str(champion[0]):
            version = champion[0]
            advance(store, pointer(version), lambda version=version: champion[0] == version)

    def read() -> None:
        while not done.is_set():
            now = current(store, "m")
            if now is not None:
                seen.add(now.version)
                if (now.digest, now.index) != (f"digest-{now.version}", f"index-{now.version}"):
                    wrong.append(now)

    workers = [threading.Thread(target=t) for t in (swap, swap, read)]
    for worker in workers:
        worker.start()
    for version in range(1, rounds):
        champion[0] = version
        if version % 5 == 0:  # let some come into force
            while (current(store, "m") or pointer(-1)).version != str(version):
                pass
    done.set()
    for worker in workers:
        worker.join(60)
    assert not wrong
    assert current(store, "m").version == str(rounds - 1)  # type: ignore[union-attr]
    versions = [int(store.read_record(k)["version"]) for k in store.storage.list("refs/index/m")]
    assert versions == sorted(versions), "an older champion came back"


def test_a_damaged_record_is_named(store: Store) -> None:
    store.write_record(key("m", 1), {"model": "m"})
    with pytest.raises(NvrError, match=r"refs/index/m/00000001.json is damaged .*: delete it and run `nvr swap` again"):
        current(store, "m")
