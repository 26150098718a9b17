"""The champion of a registered model, moved one step at a time, with a journal that outlives crashes.

MLflow has neither transactions nor compare-and-set on aliases, so the order of moves is kept beside it: a journal of
numbered entries in the artefact store, each written with a conditional put. Whoever gets number n+1 may move the
champion from what entry n left; everybody else has lost and looks again. An entry is an intent: it is written first,
the aliases follow (`champion` last), and `<n>.done.json` closes it. A process that finds an open entry finishes it,
after waiting for its owner unless that is known to be dead. The journal's state is the truth, the alias its image.

Keys: registry/<model>/<creation time of the registered model>/000001.json, 000001.done.json, … The creation time tells
registries apart that were used with one store, whatever address they had.
"""

from __future__ import annotations

import datetime
import getpass
import json
import logging
import os
import socket
import time
import uuid
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from nvr_tasks.artifacts import Store
from nvr_tasks.errors import NvrError
from nvr_tasks.tracking import CHALLENGER, CHAMPION, PASSED_TAG, PREVIOUS, Tracking

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

LEASE_S = 120.0  # how long an open entry's owner is waited for; longer than MLflow's client retries
POLL_S = 0.2
DONE = ".done.json"
ROLLBACK = "rollback"
FOUND = "found"  # an entry that records what others did

log = logging.getLogger(__name__)


class ChampionChangedError(NvrError):
    """The champion is not the version that a move was to start from."""

    def __init__(self, name: str, expected: str | None, now: str | None) -> None:
        found = "gone" if now is None else f"version {now}"
        wanted = f"version {expected}" if expected else "none"
        changed = f"is {found} now, not {wanted}" if now != expected else f"is {found} again, but has moved meanwhile"
        super().__init__(f"{name}@champion {changed}: look at `nvr history`, then decide again")


@dataclass(frozen=True)
class Standing:
    """Who is champion, and after how many moves: what a decision rests on. The same champion may have come back."""

    champion: ModelVersion | None
    moves: int


@dataclass(frozen=True)
class Entry:
    """One move of the champion: who, when, from, to, why, the decision behind it, and the run that asked for it."""

    number: int
    action: str  # promote, rollback, or found: a champion that the journal did not know of
    source: str | None  # version that was champion
    target: str | None  # version that becomes it
    who: str
    when: str
    why: str
    decision: str | None
    owner: str  # host:pid:token of the process that wrote it
    run: str | None = None  # pipeline run that asked for it; its other tries know it by that
    champion: str | None = None  # what became of it, once closed
    closed_at: str | None = None
    note: str = ""

    @property
    def closed(self) -> bool:
        """Whether the aliases followed."""
        return self.closed_at is not None

    @property
    def happened(self) -> bool:
        """Whether it was carried out, and not given up."""
        return self.closed and self.champion == self.target


class Registry:
    """Moves and history of one registered model's champion."""

    _working: ClassVar[set[str]] = set()  # owners of entries that this process is carrying out now

    def __init__(self, store: Store, tracking: Tracking, name: str) -> None:
        self.store = store
        self.tracking = tracking
        self.name = name
        self.lease_s = float(os.environ.get("NVR_PROMOTION_LEASE_S") or LEASE_S)

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────────

    def champion(self) -> ModelVersion | None:
        """The champion, after finishing what a killed process left half-done."""
        return self.standing().champion

    def standing(self) -> Standing:
        """The champion and the number of moves so far, which belong together."""
        while True:
            head = self.settle()
            champion = self.tracking.alias(self.name, CHAMPION)
            if _version(champion) == (head.champion if head else None):
                return Standing(champion, head.number if head else 0)

    def unfinished(self) -> int | None:
        """Number of a move that was begun and not finished, if there is one: `settle` will finish it."""
        folder = self._folder()
        head = None if folder is None else self._head(folder)
        return None if head is None or head.closed else head.number

    def withdrawn(self, version: str) -> Entry | None:
        """The rollback that took the champion from a version, if that is the last that happened to the version."""
        for entry in reversed(self.history()):
            if entry.champion == version:
                return None
            if entry.happened and entry.source == version:
                return entry if entry.action == ROLLBACK else None
        return None

    def arrival(self, version: str) -> Entry | None:
        """The last move that made a version champion."""
        return next((e for e in reversed(self.history()) if e.happened and e.target == version), None)

    def history(self) -> list[Entry]:
        """All moves, oldest first."""
        folder = self._folder()
        if folder is None:
            return []
        return [self._read(folder, key) for key in self._keys(folder)]

    def settle(self) -> Entry | None:
        """Finish an open entry and take note of a champion that was set by other means; the last entry, if any.

        Raises:
            NvrError: MLflow or the store cannot be reached; nothing is lost, the next call goes on.
        """
        waited_for: tuple[int, float] | None = None
        while True:
            folder = self._folder()
            if folder is None:
                return None
            head = self._head(folder)
            if head is not None and not head.closed:
                if waited_for is None or waited_for[0] != head.number:
                    waited_for = (head.number, time.monotonic())
                if not self._abandoned(head) and time.monotonic() - waited_for[1] < self.lease_s:
                    time.sleep(POLL_S)
                    continue
                log.info("finishing move %d of %s, which another process left open", head.number, self.name)
                self._carry_out(folder, head)
                continue
            now = self._alias()
            if now == (head.champion if head else None):
                return head
            # By hand, by another tool, or before there was a journal. If it is a move in progress, its number is taken.
            why = "the alias was moved by other means" if head else "champion before there was a journal"
            found = self._entry(head, FOUND, now, "unknown", why, None)
            if self._append(folder, found):
                self._close(folder, found, now)

    # ── moving ───────────────────────────────────────────────────────────────────────────────────────────────

    def move(
        self,
        action: str,
        target: str,
        expected: str | None,
        *,
        who: str,
        why: str,
        decision: str | None = None,
        after: int | None = None,
        run: str | None = None,
    ) -> Entry:
        """Make `target` the champion if `expected` still is; old champion under `previous`, alias `champion` last.

        Repeating it is harmless: when the target is champion already, the last entry is returned.

        Args:
            action: promote or rollback.
            target: version that becomes champion.
            expected: version that is champion, as the caller saw it.
            who: acts, for the record.
            why: for the record.
            decision: URI of the decision behind it.
            after: number of moves when the caller looked (`Standing.moves`). A champion that went and came back since
                is another one: why it went may be a reason against this move. Not looked at if unset.
            run: pipeline run that asks for it.

        Raises:
            ChampionChangedError: somebody else's move came first.
            NvrError: MLflow or the store cannot be reached. An intent that was written is carried out by the next call.
        """
        while True:
            head = self.settle()
            folder = self._folder()
            if folder is None:
                raise NvrError(f"no registered model {self.name} in MLflow: run `nvr register` first")
            now = head.champion if head else None
            if head is not None and now == target:
                return head
            if now != expected or (after is not None and after != (head.number if head else 0)):
                raise ChampionChangedError(self.name, expected, now)
            entry = self._entry(head, action, target, who, why, decision, run)
            self._working.add(entry.owner)
            try:
                if self._append(folder, entry):
                    self._carry_out(folder, entry)
                    done = self._read(folder, self._key(folder, entry.number))
                    if done.champion == target:
                        return done
            finally:
                self._working.discard(entry.owner)

    def _carry_out(self, folder: str, entry: Entry) -> None:
        """Let the aliases follow an entry and close it. Safe to repeat, and to do twice at once."""
        now = self._alias()
        if entry.action == FOUND:
            self._close(folder, entry, now)
            return
        if now not in (entry.source, entry.target):
            self._close(folder, entry, now, f"given up: the alias was set to {now or 'nothing'} by other means")
            return
        target = str(entry.target)
        if not self.tracking.exists(self.name, target):
            self._close(folder, entry, now, f"given up: version {target} was deleted")
            return
        tags = {"nvr.promoted_at": entry.when, "nvr.promoted_by": entry.who}
        if entry.decision is not None:
            tags |= {"nvr.decision": entry.decision, PASSED_TAG: entry.decision}
        self.tracking.tag(self.name, target, tags)
        if entry.source is not None and self.tracking.exists(self.name, entry.source):
            self.tracking.point(self.name, PREVIOUS, entry.source)
        waiting = self.tracking.alias(self.name, CHALLENGER)
        if waiting is not None and str(waiting.version) == target:  # another run's challenger stays one
            self.tracking.unpoint(self.name, CHALLENGER)
        head = self._head(folder)
        if head is None or head.number != entry.number or head.closed:  # finished by another while this process slept
            return
        self.tracking.point(self.name, CHAMPION, target)
        log.info("champion of %s: version %s → version %s", self.name, entry.source or "none", target)
        self._close(folder, entry, target)
        head = self._head(folder)
        if head is not None and head.number > entry.number and head.closed and head.champion is not None:
            # This process slept through its lease before the move: what it just wrote is old news.
            self.tracking.point(self.name, CHAMPION, head.champion)

    # ── the journal ──────────────────────────────────────────────────────────────────────────────────────────

    def _folder(self) -> str | None:
        created = self.tracking.created(self.name)
        return None if created is None else f"registry/{self.name}/{created}"

    def _key(self, folder: str, number: int) -> str:
        return f"{folder}/{number:06d}.json"

    def _keys(self, folder: str) -> list[str]:
        return [key for key in self.store.storage.list(folder) if not key.endswith(DONE)]

    def _head(self, folder: str) -> Entry | None:
        keys = self._keys(folder)
        return self._read(folder, keys[-1]) if keys else None

    def _read(self, folder: str, key: str) -> Entry:
        facts = self.store.read_record(key)
        if not isinstance(facts, dict):
            raise NvrError(
                f"{self.store.root}/{key} is gone: restore {folder} from a backup, the journal must be whole"
            )
        return Entry(**facts, **(self.store.read_record(key.removesuffix(".json") + DONE) or {}))

    def _entry(
        self,
        head: Entry | None,
        action: str,
        target: str | None,
        who: str,
        why: str,
        decision: str | None,
        run: str | None = None,
    ) -> Entry:
        number, source = (1, None) if head is None else (head.number + 1, head.champion)
        owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex}"
        return Entry(number, action, source, target, who, timestamp(), why, decision, owner, run)

    def _append(self, folder: str, entry: Entry) -> bool:
        """Write an entry under its number; False when that is taken."""
        facts = {k: v for k, v in asdict(entry).items() if k not in ("champion", "closed_at", "note")}
        return self._put(self._key(folder, entry.number), facts)

    def _close(self, folder: str, entry: Entry, champion: str | None, note: str = "") -> None:
        """Say what became of an entry; of two who finish it, the first one does."""
        if note:
            log.warning("move %d of %s: %s", entry.number, self.name, note)
        facts = {"champion": champion, "closed_at": timestamp(), "note": note}
        self._put(self._key(folder, entry.number).removesuffix(".json") + DONE, facts)

    def _put(self, key: str, facts: dict[str, Any]) -> bool:
        data = json.dumps(facts, indent=2, ensure_ascii=False).encode()
        return self.store.storage.put_bytes(key, data, if_absent=True)

    def _alias(self) -> str | None:
        return _version(self.tracking.alias(self.name, CHAMPION))

    def _abandoned(self, entry: Entry) -> bool:
        """Whether an entry's owner is known to work on it no more: a dead process of this machine, or this one."""
        host, pid, _ = entry.owner.rsplit(":", 2)
        if host != socket.gethostname():
            return False
        if int(pid) == os.getpid():
            return entry.owner not in self._working
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # another user's, alive
            return False
        return False


def actor(pipeline_run: str | None) -> str:
    """Who acts, for the record: a pipeline run, else the user at the keyboard."""
    if pipeline_run is not None:
        return f"pipeline run {pipeline_run}"
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def timestamp() -> str:
    """Now, in UTC, as records have it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def _version(found: ModelVersion | None) -> str | None:
    return None if found is None else str(found.version)
