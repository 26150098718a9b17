"""Artefacts: there whole or not at all, found again, and never believed when their bytes are not the manifest's."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvr_tasks.artifacts import MANIFEST, Artifact, Identity, Store, fingerprint, fingerprint_of, reading
from nvr_tasks.errors import NvrError, explain_os_error

WORDS = Identity("words", 1, {"n": 2})


def write_words(folder: Path) -> dict[str, Any]:
    (folder / "sub").mkdir()
    (folder / "a.txt").write_text("alpha")
    (folder / "sub" / "b.txt").write_text("beta")
    return {"words": 2}


def files_below(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


@pytest.fixture(params=["file", "s3"])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "file":
        return Store(str(tmp_path / "artifacts"))
    return Store(f"s3://{request.getfixturevalue('bucket')}/root", scratch=str(tmp_path / "scratch"))


# ── fingerprints ─────────────────────────────────────────────────────────────────────────────────────────────────

trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=8,
)


def reordered(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {k: reordered(v) for k, v in reversed(tree.items())}
    return [reordered(v) for v in tree] if isinstance(tree, list) else tree


@given(trees)
def test_the_order_of_keys_is_no_part_of_an_identity(config: Any) -> None:
    assert fingerprint("k", 1, config, {}) == fingerprint("k", 1, reordered(config), {})


@given(trees, trees)
def test_another_config_is_another_identity(one: Any, other: Any) -> None:
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (fingerprint("k", 1, one, {}) == fingerprint("k", 1, other, {})) == same


def test_kind_version_and_inputs_are_part_of_an_identity() -> None:
    made = {
        Identity("k", 1, {}).fingerprint,
        Identity("l", 1, {}).fingerprint,
        Identity("k", 2, {}).fingerprint,
        Identity("k", 1, {}, {"a": "file:///r/x/1"}).fingerprint,
        Identity("k", 1, {}, {"b": "file:///r/x/1"}).fingerprint,
        Identity("k", 1, {}, {"a": "file:///r/x/2"}).fingerprint,
    }
    assert len(made) == 6


def test_the_root_of_an_input_is_no_part_of_an_identity() -> None:
    roots = ("file:///one/x/1f", "s3://bucket/two/x/1f", "s3://bucket/two/x/1f/")
    assert len({Identity("k", 1, {}, {"a": uri}).fingerprint for uri in roots}) == 1


def test_a_fingerprint_stays_what_it_was() -> None:
    """Golden: a change here orphans every artefact that users have."""
    assert fingerprint("k", 1, {"b": [1, 0.5, None], "a": "ö"}, {"in": "00"}) == GOLDEN


GOLDEN = "9aa04e989a5eb1bd51634b0192ac7449"


# ── published or not ─────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_published_is_found_whole(any_store: Store) -> None:
    assert any_store.find(WORDS) is None
    made = any_store.publish(WORDS, write_words)
    assert made.uri == f"{any_store.root}/words/{WORDS.fingerprint}"
    assert fingerprint_of(made.uri) == WORDS.fingerprint
    assert any_store.find(WORDS) == any_store.open(made.uri) == any_store.open(made.uri + "/") == made
    folder = any_store.fetch(made)
    assert (folder / "a.txt").read_text() == "alpha"
    assert (folder / "sub" / "b.txt").read_text() == "beta"
    assert made.manifest.stats == {"words": 2}
    assert [(f.path, f.size) for f in made.manifest.files] == [("a.txt", 5), ("sub/b.txt", 4)]
    assert list(any_store.scratch.glob("work-*")) == []


def test_the_same_artefact_in_two_roots_is_the_same(any_store: Store, tmp_path: Path) -> None:
    here = any_store.publish(WORDS, write_words).manifest
    there = Store(str(tmp_path / "elsewhere")).publish(WORDS, write_words).manifest
    assert (here.fingerprint, here.content_digest) == (there.fingerprint, there.content_digest)


def test_publishing_again_keeps_the_first(any_store: Store) -> None:
    first = any_store.publish(WORDS, write_words)

    def write_other(folder: Path) -> dict[str, Any]:
        (folder / "a.txt").write_text("other")
        return {}

    assert any_store.publish(WORDS, write_other) == first
    assert (any_store.fetch(first) / "a.txt").read_text() == "alpha"


def test_some_files_only(any_store: Store) -> None:
    made = any_store.publish(WORDS, write_words)
    assert (any_store.fetch(made, only=("sub/b.txt",)) / "sub" / "b.txt").read_text() == "beta"


def test_a_deleted_artefact_is_gone_and_can_be_made_again(any_store: Store) -> None:
    made = any_store.publish(WORDS, write_words)
    any_store.delete(made)
    assert any_store.find(WORDS) is None
    assert any_store.storage.list("words") == []
    with pytest.raises(NvrError, match=r"no artefact at .*: it was never finished or has been deleted"):
        any_store.open(made.uri)
    again = any_store.publish(WORDS, write_words)
    assert again.manifest.content_digest == made.manifest.content_digest


def test_a_failing_writer_leaves_nothing(any_store: Store) -> None:
    def fail(folder: Path) -> dict[str, Any]:
        (folder / "a.txt").write_text("half")
        raise NvrError("no")

    with pytest.raises(NvrError, match=r"^no$"):
        any_store.publish(WORDS, fail)
    assert any_store.find(WORDS) is None
    assert any_store.storage.list("words") == []
    assert files_below(any_store.scratch) == []


def test_the_manifest_goes_up_last(any_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, seen = any_store.storage, []
    if storage.local_path("x") is not None:
        pytest.skip("a folder appears by one rename, manifest included")
    put_file, put_bytes = storage.put_file, storage.put_bytes
    monkeypatch.setattr(storage, "put_file", lambda local, key: (seen.append(key), put_file(local, key)))
    monkeypatch.setattr(
        storage, "put_bytes", lambda key, data, **how: (seen.append((key, how)), put_bytes(key, data, **how))[1]
    )
    any_store.publish(WORDS, write_words)
    assert len(seen) == 3
    assert seen[-1] == (f"words/{WORDS.fingerprint}/{MANIFEST}", {"if_absent": True})


@pytest.mark.parametrize(
    "uri", ["file:///elsewhere/words/1f", "{root}", "{root}/words", "{root}/words/1f/a.txt", "words"]
)
def test_what_is_no_artefact_uri(store: Store, uri: str) -> None:
    with pytest.raises(NvrError, match="is not an artefact below"):
        store.open(uri.format(root=store.root))


def test_a_root_that_only_begins_alike_is_another(store: Store) -> None:
    neighbour = Store(store.root + "-2")
    made = neighbour.publish(WORDS, write_words)
    with pytest.raises(NvrError, match="is not an artefact below"):
        store.open(made.uri)


# ── killed, racing ───────────────────────────────────────────────────────────────────────────────────────────────

WRITER = """
import sys, time
from pathlib import Path
from nvr_tasks.artifacts import Identity, Store

def write(folder):
    (folder / "a.txt").write_text("x" * 1000)
    print("half", flush=True)
    sys.stdin.readline()
    (folder / "b.txt").write_text("y")
    return {}

store = Store(sys.argv[1], scratch=sys.argv[2] or None)
print(store.publish(Identity("words", 1, {"n": 3}), write).uri, flush=True)
"""
KILLED = Identity("words", 1, {"n": 3})


@pytest.fixture
def writer(any_store: Store, tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts a process that has written half of an artefact and waits for a line on its stdin."""
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, any_store.root, str(any_store.scratch)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_killed_writer_leaves_nothing_visible_and_the_retry_sweeps(any_store: Store, writer: Any) -> None:
    process = writer()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(list(any_store.scratch.glob("work-*"))) == 1  # its half
    assert any_store.find(KILLED) is None
    assert any_store.storage.list("words") == []

    retry = writer()
    assert len(list(any_store.scratch.glob("work-*"))) == 1  # its own: the dead one's is swept
    out, _ = retry.communicate("go on\n")
    assert out.strip() == any_store.uri("words", KILLED.fingerprint)
    assert {f.path: f.size for f in any_store.open(out.strip()).manifest.files} == {"a.txt": 1000, "b.txt": 1}
    assert list(any_store.scratch.glob("work-*")) == []


def test_two_racing_writers_end_with_one_artefact(any_store: Store, writer: Any) -> None:
    first, second = writer(), writer()
    for process in (first, second):
        process.stdin.write("go on\n")
        process.stdin.flush()
    uris = {process.communicate()[0].strip() for process in (first, second)}
    assert uris == {any_store.uri("words", KILLED.fingerprint)}
    assert (first.returncode, second.returncode) == (0, 0)
    assert any_store.storage.list("words").count(f"words/{KILLED.fingerprint}/{MANIFEST}") == 1
    any_store.fetch(any_store.open(uris.pop()))


HOLDER = """
import os, sys
from nvr_tasks.artifacts import Store
os.getpid = lambda: 2 ** 22 + 1  # in another container of the same name: a pid that nobody has here
with Store(sys.argv[1]).workdir("living") as folder:
    print(folder, flush=True)
    sys.stdin.readline()
"""


def test_the_scratch_of_the_living_stays_whatever_their_pid(store: Store) -> None:
    """Two containers can have one host name, one store and pids of their own."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, store.root], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        living = Path(process.stdout.readline().strip())
        leftover = living.with_name(f"{living.name}-leftover")
        leftover.mkdir()
        with store.workdir("next"):
            assert living.is_dir()
        process.kill()
        process.wait()
        with store.workdir("next") as own:
            assert own.is_dir()
            assert not living.exists()
            assert not leftover.exists()
    assert list(store.scratch.iterdir()) == []


def test_a_lock_file_is_no_part_of_an_artefact(store: Store) -> None:
    made = store.publish(WORDS, write_words)
    assert files_below(store.fetch(made)) == ["a.txt", MANIFEST, "sub/b.txt"]
    assert list(store.scratch.iterdir()) == []


def test_a_deletion_that_was_killed_half_way_does_not_block(store: Store) -> None:
    made = store.publish(WORDS, write_words)
    folder = store.fetch(made)
    (folder / MANIFEST).unlink()  # what is left is not an artefact
    assert store.find(WORDS) is None
    assert store.publish(WORDS, write_words).manifest.files == made.manifest.files
    assert files_below(store.scratch) == []


def other_disk(tmp_path: Path) -> Path | None:
    for candidate in ("/dev/shm", tempfile_dir()):  # noqa: S108
        path = Path(candidate)
        if path.is_dir() and os.access(path, os.W_OK) and path.stat().st_dev != tmp_path.stat().st_dev:
            return path
    return None


def tempfile_dir() -> str:
    import tempfile

    return tempfile.gettempdir()


def test_scratch_on_another_disk(tmp_path: Path) -> None:
    disk = other_disk(tmp_path)
    if disk is None:
        pytest.skip("this machine has one disk")
    scratch = disk / f"nvr-test-{os.getpid()}"
    try:
        store = Store(str(tmp_path / "artifacts"), scratch=str(scratch))
        made = store.publish(WORDS, write_words)
        assert (store.fetch(made) / "sub" / "b.txt").read_text() == "beta"
        assert store.publish(WORDS, write_words) == made
        assert files_below(scratch) == []
        assert len(files_below(tmp_path / "artifacts")) == 3
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


# ── damage ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def published(store: Store) -> Artifact:
    return store.publish(WORDS, write_words)


def test_a_truncated_file_is_always_found(store: Store, published: Artifact) -> None:
    (store.fetch(published) / "a.txt").write_text("alph")
    with pytest.raises(
        NvrError, match=r"a\.txt has 4 bytes, the manifest says 5; delete that folder and run the stage"
    ):
        store.fetch(published)
    store.fetch(published, only=("sub/b.txt",))  # what is not damaged can be read


def test_changed_bytes_are_found_by_verify(store: Store, published: Artifact) -> None:
    (store.fetch(published) / "a.txt").write_text("alphA")
    store.fetch(published)
    verifying = Store(store.root, verify=True)
    with pytest.raises(NvrError, match=r"a\.txt has other bytes than the manifest's sha256"):
        verifying.fetch(published)


def test_a_missing_file(store: Store, published: Artifact) -> None:
    (store.fetch(published) / "sub" / "b.txt").unlink()
    with pytest.raises(NvrError, match=r"sub/b\.txt is missing"):
        store.fetch(published)


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"kind": "words"}', b"\xff\xfe"])
def test_a_damaged_manifest(store: Store, published: Artifact, damage: bytes) -> None:
    (store.fetch(published) / MANIFEST).write_bytes(damage)
    with pytest.raises(NvrError, match=r"manifest\.json is damaged \(.*\): delete the folder and run the stage again"):
        store.find(WORDS)


def test_a_manifest_of_another_artefact(store: Store, published: Artifact) -> None:
    other = store.publish(Identity("words", 1, {"n": 9}), write_words)
    shutil.copy(store.fetch(other) / MANIFEST, store.fetch(published) / MANIFEST)
    with pytest.raises(NvrError, match=r"manifest\.json is damaged"):
        store.find(WORDS)


def test_damage_on_s3_is_always_found(bucket: str, tmp_path: Path) -> None:
    root = f"s3://{bucket}/root"
    made = Store(root, scratch=str(tmp_path / "a")).publish(WORDS, write_words)
    reader = Store(root, scratch=str(tmp_path / "b"))
    [key] = [k for k in reader.storage.list("words") if k.endswith("a.txt")]
    for data, said in ((b"alphA", "has other bytes"), (b"alph", "has 4 bytes, the manifest says 5")):
        reader.storage.put_bytes(key, data)
        with pytest.raises(NvrError, match=said):
            reader.fetch(made)
    reader.storage.delete(key)
    with pytest.raises(NvrError, match=r"a\.txt is missing"):
        reader.fetch(made)
    assert not [f for f in files_below(tmp_path / "b") if "a.txt" in f]


def test_a_local_copy_of_s3_that_was_damaged_is_fetched_again(bucket: str, tmp_path: Path) -> None:
    store = Store(f"s3://{bucket}/root", scratch=str(tmp_path), verify=True)
    made = store.publish(WORDS, write_words)
    (store.fetch(made) / "a.txt").write_text("alphA")
    assert (store.fetch(made) / "a.txt").read_text() == "alpha"


def test_a_local_copy_of_s3_is_checked_once_per_process(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(f"s3://{bucket}/root", scratch=str(tmp_path))
    made = store.publish(WORDS, write_words)
    (store.fetch(made) / "a.txt").write_text("alphA")
    reader = Store(f"s3://{bucket}/root", scratch=str(tmp_path))
    assert (reader.fetch(made) / "a.txt").read_text() == "alpha"
    reader.fetch(made)
    monkeypatch.setattr("nvr_tasks.artifacts.sha256_file", lambda path: pytest.fail(f"read {path} again"))
    reader.fetch(made)


@pytest.fixture
def shared_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for /tmp; gives the name of the scratch folder that a store on S3 has there."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path / f"nvr-{os.getuid()}"


def test_scratch_in_tmp_is_private(bucket: str, shared_tmp: Path) -> None:
    for _ in range(2):
        store = Store(f"s3://{bucket}/root")
        store.fetch(store.publish(WORDS, write_words))
        assert shared_tmp.stat().st_mode & 0o777 == 0o700
        shared_tmp.chmod(0o777)


@pytest.mark.parametrize("kind", ["link", "file", "of another user"])
def test_scratch_in_tmp_that_somebody_else_prepared_is_refused(
    bucket: str, shared_tmp: Path, tmp_path: Path, kind: str
) -> None:
    if kind == "link":
        (tmp_path / "elsewhere").mkdir()
        shared_tmp.symlink_to(tmp_path / "elsewhere")
    elif kind == "file":
        shared_tmp.write_text("")
    else:
        if os.getuid():
            pytest.skip("giving a folder away needs root")
        shared_tmp.mkdir()
        os.chown(shared_tmp, 12345, 12345)
    with pytest.raises(NvrError, match=r"nvr-\d+ is not a folder of this user: set NVR_SCRATCH"):
        Store(f"s3://{bucket}/root").publish(WORDS, write_words)


def test_what_a_killed_process_did_not_tidy_up_is_discarded(any_store: Store) -> None:
    made = any_store.publish(WORDS, write_words).manifest.fingerprint
    any_store.storage.put_bytes(f"parts/{made}/1/x", b"")
    any_store.storage.put_bytes("parts/unfinished/x", b"")
    any_store.discard_finished("parts", "words")
    assert any_store.storage.list("parts") == ["parts/unfinished/x"]


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────


def read_table(path: Path) -> None:
    import pandas as pd

    pd.read_parquet(path)


def read_array(path: Path) -> None:
    import numpy as np

    np.load(path)


@pytest.mark.parametrize("read", [read_table, read_array, lambda path: json.loads(path.read_text())])
@pytest.mark.parametrize("data", [b"", b"junk" * 9, b"PAR1" + b"\xff" * 40 + b"\x20\0\0\0PAR1", b"\x93NUMPY\1\0junk"])
def test_damaged_bytes_name_the_file_and_the_remedy(tmp_path: Path, read: Callable[[Path], None], data: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    with (
        pytest.raises(NvrError, match=r"cannot read .*/file: .*--verify .*delete the artefact's folder"),
        reading(path),
    ):
        read(path)


def test_damage_that_keeps_the_size_is_named_by_the_readers(store: Store, publish_dataset: Callable) -> None:
    from nvr_tasks.dataset import read_dataset
    from nvr_tasks.vectors import gather, text_keys

    folder = store.fetch(publish_dataset(store, ["a passage"], ["a query"]))
    for name in ("qrels.parquet", "corpus/part-00000.parquet"):
        path = folder / name
        path.write_bytes(path.read_bytes()[:-60] + bytes(60))
        with pytest.raises(NvrError, match=rf"cannot read .*/{name.split('/')[0]}: .*--verify"):
            read_dataset(folder)
    (folder / "keys.npy").write_bytes(bytes(200))
    with pytest.raises(NvrError, match=r"cannot read .*/keys\.npy: .*--verify"):
        gather([folder], text_keys(["a"], "", 8))


def test_what_is_no_damage_is_not_called_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), reading(tmp_path / "absent"):
        read_array(tmp_path / "absent")
    with pytest.raises(NvrError, match=r"^mine$"), reading(tmp_path):
        raise NvrError("mine")


# ── a full disk ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def full_disk(small_disk: Callable[[str], Path]) -> Path:
    return small_disk("256k")


def write_a_lot(folder: Path) -> dict[str, Any]:
    (folder / "a.txt").write_bytes(bytes(200_000))
    (folder / "b.txt").write_bytes(bytes(200_000))
    return {}


def test_no_space_while_writing(full_disk: Path) -> None:
    store = Store(str(full_disk / "artifacts"))
    with pytest.raises(OSError, match="No space left") as caught:
        store.publish(WORDS, write_a_lot)
    assert "no disk space left" in str(explain_os_error(caught.value))
    assert "NVR_SCRATCH" in str(explain_os_error(caught.value))
    assert store.find(WORDS) is None
    assert files_below(full_disk) == []
    store.publish(WORDS, write_words)  # what fits, fits


def test_no_space_while_moving_from_another_disk(full_disk: Path, tmp_path: Path) -> None:
    store = Store(str(full_disk / "artifacts"), scratch=str(tmp_path / "scratch"))
    with pytest.raises(OSError, match="No space left"):
        store.publish(WORDS, write_a_lot)
    assert store.find(WORDS) is None
    assert files_below(full_disk) == []
    assert files_below(tmp_path / "scratch") == []


def test_no_space_without_a_mount(store: Store) -> None:
    def write(folder: Path) -> dict[str, Any]:
        (folder / "a.txt").write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "a.txt"))

    with pytest.raises(OSError, match="No space left") as caught:
        store.publish(WORDS, write)
    assert "a.txt" in str(explain_os_error(caught.value))
    assert store.find(WORDS) is None
    assert files_below(store.scratch) == []


# ── records ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_records_are_replaced_and_read_back(any_store: Store) -> None:
    assert any_store.read_record("refs/x.json") is None
    for value in ({"a": ["ö", 1.5, None]}, {"b": 1}):
        any_store.write_record("refs/x.json", value)
        assert any_store.read_record("refs/x.json") == value


def test_a_damaged_record_says_which(any_store: Store) -> None:
    any_store.storage.put_bytes("refs/x.json", b'{"a": ')
    with pytest.raises(NvrError, match=r"refs/x\.json is damaged .*: delete it"):
        any_store.read_record("refs/x.json")


def test_inputs_are_found_in_a_copy_of_the_root(tmp_path: Path) -> None:
    first = Store(str(tmp_path / "first"))
    source = first.publish(Identity("words", 1, {}), lambda folder: (folder / "a.txt").write_text("x") and {})
    first.publish(
        Identity("made", 1, {}, {"words": source.uri}), lambda folder: (folder / "b.txt").write_text("y") and {}
    )
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    shutil.rmtree(tmp_path / "first")
    second = Store(str(tmp_path / "second"))
    [fingerprint] = [p.name for p in (tmp_path / "second" / "made").iterdir()]
    made = second.get("made", fingerprint)
    assert made is not None
    assert second.input_of(made, "words").uri == f"{second.root}/words/{source.manifest.fingerprint}"
