"""What every storage promises, as tests to inherit: a subclass gives the fixture `storage`."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from nvr_tasks.storage import Storage, open_storage

MULTIPART = 9 * 1024 * 1024  # boto3 cuts files above 8 MiB into parts
NAMES = [
    "plain.txt",
    "manual__2026-01-02T03:04:05+00:00.json",
    "two words.txt",
    "100 %.txt",
    "a=b&c?d#e.txt",
    "größe.txt",
]


def claim(root: str, key: str, value: str) -> bool:
    """One racer of another process."""
    return open_storage(root).put_bytes(key, value.encode(), if_absent=True)


class StorageContract:
    """Keys and bytes, whatever holds them."""

    @pytest.mark.parametrize("name", NAMES)
    def test_bytes_come_back_under_any_name(self, storage: Storage, name: str) -> None:
        key = f"runs/{name}"
        assert storage.get_bytes(key) is None
        assert storage.put_bytes(key, b"one") is True
        assert storage.get_bytes(key) == b"one"
        assert storage.list("runs") == [key]
        storage.delete(key)
        assert storage.get_bytes(key) is None
        assert storage.list("runs") == []

    def test_bytes_are_replaced_whole(self, storage: Storage) -> None:
        storage.put_bytes("a/k", b"long content")
        storage.put_bytes("a/k", b"short")
        assert storage.get_bytes("a/k") == b"short"
        storage.put_bytes("a/k", b"")
        assert storage.get_bytes("a/k") == b""

    def test_a_claimed_key_is_not_overwritten(self, storage: Storage) -> None:
        assert storage.put_bytes("a/k", b"first", if_absent=True) is True
        assert storage.put_bytes("a/k", b"second", if_absent=True) is False
        assert storage.get_bytes("a/k") == b"first"
        storage.delete("a/k")
        assert storage.put_bytes("a/k", b"third", if_absent=True) is True

    @pytest.mark.parametrize("size", [0, 17, MULTIPART])
    def test_files_come_back_byte_by_byte(self, storage: Storage, tmp_path: Path, size: int) -> None:
        source, back = tmp_path / "source", tmp_path / "back"
        source.write_bytes(os.urandom(size))
        storage.put_file(source, "kind/fp/file name+1.bin")
        storage.get_file("kind/fp/file name+1.bin", back)
        assert hashlib.sha256(back.read_bytes()).digest() == hashlib.sha256(source.read_bytes()).digest()
        assert source.stat().st_size == size

    def test_a_missing_file_is_a_file_not_found(self, storage: Storage, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            storage.get_file("kind/fp/absent", tmp_path / "back")

    def test_a_file_that_cannot_be_read_leaves_no_key(self, storage: Storage, tmp_path: Path) -> None:
        with pytest.raises(OSError, match="absent"):
            storage.put_file(tmp_path / "absent", "kind/fp/file")
        assert storage.list("kind") == []
        assert storage.get_bytes("kind/fp/file") is None

    def test_lists_are_of_folders_and_sorted(self, storage: Storage) -> None:
        keys = ["a/b/2", "a/b/10", "a/bc/1", "a/b/c/d", "ab/1"]
        for key in keys:
            storage.put_bytes(key, b"x")
        assert storage.list("a/b") == ["a/b/10", "a/b/2", "a/b/c/d"]
        assert storage.list("a/b/") == storage.list("a/b")
        assert storage.list("a") == ["a/b/10", "a/b/2", "a/b/c/d", "a/bc/1"]
        assert storage.list("nothing") == []

    def test_sizes_are_bytes(self, storage: Storage) -> None:
        storage.put_bytes("a/b/1", b"x" * 3)
        storage.put_bytes("a/b/c/2", b"")
        assert storage.sizes("a/b") == {"a/b/1": 3, "a/b/c/2": 0}
        assert storage.sizes("nothing") == {}

    def test_a_deleted_folder_leaves_its_neighbours(self, storage: Storage) -> None:
        for key in ("a/b/1", "a/b/c/2", "a/bc", "a/b.txt"):
            storage.put_bytes(key, b"x")
        storage.delete("a/b")
        assert storage.list("a") == ["a/b.txt", "a/bc"]
        storage.delete("a/b")  # fine when it is gone

    def test_of_racing_threads_one_wins(self, storage: Storage) -> None:
        racers = 8
        for lap in range(5):
            start = Barrier(racers)

            def race(number: int, key: str = f"race/{lap}", start: Barrier = start) -> bool:
                start.wait()
                return storage.put_bytes(key, f"racer {number}".encode(), if_absent=True)

            with ThreadPoolExecutor(racers) as pool:
                won = list(pool.map(race, range(racers)))
            assert won.count(True) == 1
            assert storage.get_bytes(f"race/{lap}") == f"racer {won.index(True)}".encode()

    def test_of_racing_processes_one_wins(self, storage: Storage) -> None:
        keys = [f"race/{i}" for i in range(20)]
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
            racers = [[pool.submit(claim, storage.uri, key, f"racer {number}") for key in keys] for number in range(2)]
            won = [[future.result() for future in futures] for futures in racers]
        for key, first, second in zip(keys, *won, strict=True):
            assert first != second
            assert storage.get_bytes(key) == f"racer {int(second)}".encode()

    def test_readers_never_see_half_a_value(self, storage: Storage) -> None:
        values = [bytes([i]) * 200_000 for i in range(4)]
        storage.put_bytes("a/k", values[0])
        with ThreadPoolExecutor(2) as pool:
            writer = pool.submit(lambda: [storage.put_bytes("a/k", v) for _ in range(10) for v in values])
            while not writer.done():
                assert storage.get_bytes("a/k") in values
            writer.result()
        assert storage.list("a") == ["a/k"]
