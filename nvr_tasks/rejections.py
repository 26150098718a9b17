"""What persons turned down: kept beside the journal of moves, which it leaves alone, and as tags of the version.

A rejection moves nothing, so it takes no number of the journal. From then on, and until it was champion, the version is promoted
by a person's word only, whatever a decision says: one that was made before or after.

Keys: rejections/<model>/<creation time of the registered model>/<digest of decision, who, why and run>.json. Saying it
twice, or a task's next try, makes no second record.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from nvr_tasks.errors import NvrError
from nvr_tasks.registry import Registry, timestamp

ACTION = "reject"
LONGEST_TAG = 1000  # characters of a reason; the record has it all


@dataclass(frozen=True)
class Rejection:
    """A decision that a person rejected; the fields are named like those of a move (`registry.Entry`)."""

    source: str | None  # version that was champion, and stayed
    target: str  # version that did not become it
    who: str
    why: str  # may be empty
    decision: str
    run: str | None = None  # pipeline run that asked
    when: str = ""
    action: str = ACTION

    @property
    def told(self) -> str:
        """In words."""
        return f"{self.who} rejected this version before ({self.when}){': ' if self.why else ''}{self.why}"


def reject(registry: Registry, rejection: Rejection) -> Rejection:
    """Record a rejection, then tag the version. Safe to repeat; the first record of the same words stays.

    Raises:
        NvrError: MLflow or the store cannot be reached: say it again.
    """
    said = json.dumps([rejection.decision, rejection.who, rejection.why, rejection.run], ensure_ascii=False)
    key = f"{_folder(registry)}/{hashlib.sha256(said.encode()).hexdigest()[:32]}.json"
    made = replace(rejection, when=timestamp())
    data = json.dumps(asdict(made), indent=2, ensure_ascii=False).encode()
    if not registry.store.storage.put_bytes(key, data, if_absent=True):
        made = Rejection(**_read(registry, key))
    if registry.tracking.exists(registry.name, made.target):
        tags = {"by": made.who, "at": made.when, "reason": made.why[:LONGEST_TAG], "decision": made.decision}
        registry.tracking.tag(registry.name, made.target, {f"nvr.rejected_{k}": v for k, v in tags.items()})
    return made


def turned_down(registry: Registry, version: str) -> Rejection | None:
    """The last rejection of a version, unless it was champion since."""
    found = [r for r in rejections(registry) if r.target == version]
    arrival = registry.arrival(version) if found else None
    return found[-1] if found and (arrival is None or found[-1].when > arrival.when) else None


def rejections(registry: Registry) -> list[Rejection]:
    """All rejections, oldest first."""
    if registry.tracking.created(registry.name) is None:
        return []
    found = [Rejection(**_read(registry, key)) for key in registry.store.storage.list(_folder(registry))]
    return sorted(found, key=lambda r: r.when)


def _folder(registry: Registry) -> str:
    created = registry.tracking.created(registry.name)
    if created is None:
        raise NvrError(f"no registered model {registry.name} in MLflow: run `nvr register` first")
    return f"rejections/{registry.name}/{created}"


def _read(registry: Registry, key: str) -> Mapping[str, str]:
    facts = registry.store.read_record(key)
    if not isinstance(facts, dict):
        raise NvrError(f"{registry.store.root}/{key} is gone: restore it from a backup")
    return facts
