"""Training checkpoints in the artefact store: `checkpoints/<model fingerprint>/<step>/`, with `done.json` last.

A checkpoint without its `done.json` does not exist, so a run killed while saving resumes from the one before.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

from nvr_tasks.artifacts import sha256_file
from nvr_tasks.storage import Storage

log = logging.getLogger(__name__)

DONE = "done.json"


class Checkpoints:
    """The checkpoints of one model in the making."""

    def __init__(self, storage: Storage, fingerprint: str) -> None:
        self.storage = storage
        self.prefix = f"checkpoints/{fingerprint}"

    def save(self, folder: Path, step: int) -> None:
        """Upload a trainer's checkpoint folder and drop the older ones."""
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        key = f"{self.prefix}/{step:08d}"
        for path in files:
            self.storage.put_file(path, f"{key}/{path.relative_to(folder).as_posix()}")
        digests = {p.relative_to(folder).as_posix(): sha256_file(p) for p in files}
        self.storage.put_bytes(f"{key}/{DONE}", json.dumps({"step": step, "files": digests}).encode())
        for other in self._steps():
            if other < step:
                self.storage.delete(f"{self.prefix}/{other:08d}")

    def restore(self, target: Path) -> Path | None:
        """Fetch the newest whole checkpoint into `target`; None when there is none. Damaged ones are passed over.

        Raises:
            OSError: it could not be written here, or not be read: that says nothing of the checkpoint.
        """
        for step in sorted(self._steps(), reverse=True):
            key = f"{self.prefix}/{step:08d}"
            done = self.storage.get_bytes(f"{key}/{DONE}")
            if done is None:
                continue
            folder = target / f"checkpoint-{step}"
            try:
                for name, digest in json.loads(done)["files"].items():
                    path = folder / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    self.storage.get_file(f"{key}/{name}", path)
                    if sha256_file(path) != digest:
                        raise ValueError(f"{name} has other bytes than were saved")
            except (FileNotFoundError, ValueError, KeyError) as error:
                log.warning("checkpoint of step %d is damaged (%s); looking for an earlier one", step, error)
                shutil.rmtree(folder, ignore_errors=True)
                continue
            return folder
        return None

    def clear(self) -> None:
        """Remove them all: the model is published."""
        self.storage.delete(self.prefix)

    def _steps(self) -> list[int]:
        names = {key.removeprefix(f"{self.prefix}/").split("/")[0] for key in self.storage.list(self.prefix)}
        return sorted(int(name) for name in names if name.isdigit())
