"""Keys of texts and looking vectors up by them, against plain dictionaries."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nvr_tasks.errors import NvrError
from nvr_tasks.vectors import KEY_BYTES, Keys, _occupy, allocate, find_rows, gather, sort_order, text_keys

# Few different bytes, zero among them: collisions, shared beginnings and trailing zeros are common.
key_arrays = arrays(
    np.uint8, st.tuples(st.integers(0, 12), st.just(KEY_BYTES)), elements=st.sampled_from([0, 1, 127, 255])
)


def shard(folder: Path, keys: Keys, vectors: np.ndarray) -> Path:
    folder.mkdir()
    order = sort_order(keys)
    np.save(folder / "keys.npy", keys[order])
    np.save(folder / "vectors.npy", vectors[order])
    return folder


@given(key_arrays)
def test_keys_sort_by_their_bytes(keys: Keys) -> None:
    assert [k.tobytes() for k in keys[sort_order(keys)]] == sorted(k.tobytes() for k in keys)


@settings(deadline=None)
@given(key_arrays, key_arrays)
def test_rows_are_found_as_a_dictionary_finds_them(have: Keys, want: Keys) -> None:
    have = np.unique(have, axis=0)
    place = {k.tobytes(): i for i, k in enumerate(have)}
    assert find_rows(have, want).tolist() == [place.get(k.tobytes(), -1) for k in want]


def test_a_key_says_text_prompt_and_length() -> None:
    keys = [text_keys([t], p, n)[0].tobytes() for t in ("a", "b") for p in ("", "q: ") for n in (16, 32)]
    assert len(set(keys)) == 8
    assert text_keys(["x"], "", 16)[0].tobytes() != text_keys([""], "x", 16)[0].tobytes()
    assert text_keys([], "", 16).shape == (0, KEY_BYTES)


def test_vectors_come_in_the_order_of_the_keys_from_any_shard(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(50)]
    keys, vectors = text_keys(texts, "", 16), np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    folders = [shard(tmp_path / str(s), keys[s::3], vectors[s::3]) for s in range(3)]
    wanted = np.random.default_rng(1).permutation(50)[:30]
    np.testing.assert_array_equal(gather(folders, keys[wanted]), vectors[wanted])
    mapped = gather(folders, keys[wanted], out=tmp_path / "out.npy")
    np.testing.assert_array_equal(mapped, vectors[wanted])
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), vectors[wanted])


def test_a_text_without_a_vector_is_an_error(tmp_path: Path) -> None:
    keys = text_keys(["a", "b", "c"], "", 16)
    folder = shard(tmp_path / "0", keys[:1], np.eye(1, 2, dtype=np.float32))
    with pytest.raises(NvrError, match=r"2 of 3 texts have no vector in 1 embedding shards: run `nvr embed`"):
        gather([folder], keys)


@pytest.mark.parametrize("length", [0.0, 0.99, 4.5e21])
def test_damaged_vectors_are_told_by_their_length(tmp_path: Path, length: float) -> None:
    keys, vectors = text_keys(["a", "b"], "", 16), np.eye(2, dtype=np.float32)
    vectors[1] *= length
    folder = shard(tmp_path / "0", keys, vectors)
    with pytest.raises(NvrError, match=r"damaged \(1 vectors are no unit vectors.*run `nvr embed` again"):
        gather([folder], keys)


def test_shards_of_two_teachers_are_refused(tmp_path: Path) -> None:
    keys = text_keys(["a", "b"], "", 16)
    folders = [shard(tmp_path / str(d), keys[d - 2 : d - 1], np.ones((1, d), np.float32)) for d in (2, 3)]
    with pytest.raises(NvrError, match=r"different dimensions \[2, 3\]"):
        gather(folders, keys)


def test_an_empty_shard_does_not_disturb(tmp_path: Path) -> None:
    keys = text_keys(["a"], "", 16)
    folders = [
        shard(tmp_path / "0", keys[:0], np.zeros((0, 0), np.float32)),
        shard(tmp_path / "1", keys, np.eye(1, 2, dtype=np.float32)),
    ]
    assert gather(folders, keys).tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("system", ["Linux", "macOS"])
def test_an_array_on_disk_has_its_space_from_the_start(
    system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mapped file with holes would end a process with SIGBUS on a full disk, long after it was made."""
    if system == "macOS":
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    array = allocate(tmp_path / "a.npy", (30_000, 16))
    status = (tmp_path / "a.npy").stat()
    assert status.st_blocks * 512 >= status.st_size >= array.nbytes
    assert np.load(tmp_path / "a.npy").shape == array.shape
    array[:] = 7
    array.flush()
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), np.full((30_000, 16), 7, np.float32))
    assert allocate(tmp_path / "empty.npy", (0, 0)).shape == (0, 0)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_met_where_space_cannot_be_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    with Path("/dev/full").open("r+b", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        _occupy(file, 128, 1 << 21)
