"""A checkpoint exists when it is whole, and only then."""

import errno
from pathlib import Path

import pytest

from nvr_tasks.storage import open_storage
from nvr_tasks.training.checkpoints import Checkpoints


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(open_storage(str(tmp_path / "store")), "abc")


def make(folder: Path, text: str) -> Path:
    (folder / "sub").mkdir(parents=True)
    (folder / "weights").write_text(text)
    (folder / "sub" / "state").write_text(text)
    return folder


def test_the_newest_is_restored_and_older_ones_are_dropped(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoints.save(make(tmp_path / "a", "first"), 5)
    checkpoints.save(make(tmp_path / "b", "second"), 10)
    restored = checkpoints.restore(tmp_path / "out")
    assert restored is not None
    assert restored.name == "checkpoint-10"
    assert (restored / "sub" / "state").read_text() == "second"
    assert not [k for k in checkpoints.storage.list("checkpoints/abc") if "/00000005/" in k]


def test_one_that_was_not_finished_is_invisible(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoints.save(make(tmp_path / "a", "first"), 5)
    checkpoints.storage.put_bytes("checkpoints/abc/00000010/weights", b"half")
    restored = checkpoints.restore(tmp_path / "out")
    assert restored is not None
    assert restored.name == "checkpoint-5"


def test_a_damaged_one_is_passed_over(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoints.save(make(tmp_path / "a", "first"), 5)
    checkpoints.storage.put_bytes("checkpoints/abc/00000005/weights", b"other")
    assert checkpoints.restore(tmp_path / "out") is None


def test_a_full_disk_is_no_damage(checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passed over, it would send the training back to its beginning."""
    checkpoints.save(make(tmp_path / "a", "first"), 5)

    def full(key: str, path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(checkpoints.storage, "get_file", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.restore(tmp_path / "out")


def test_clear(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoints.save(make(tmp_path / "a", "first"), 5)
    checkpoints.clear()
    assert checkpoints.restore(tmp_path / "out") is None
    assert checkpoints.storage.list("checkpoints") == []
