"""Which index serves, and which model version its vectors are of: one record names both, so they never disagree.

    refs/index/<registered model>/<number>.json     the highest number is in force

A record is written once and never changed: the next number is taken with a conditional put, so of two that swap at the
same time one loses, looks again, and finds out whether it is still meant.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from nvr_tasks.artifacts import Store
from nvr_tasks.errors import NvrError


@dataclass(frozen=True)
class Pointer:
    """What serves.

    Attributes:
        model: registered model name.
        version: the version whose vectors the index holds; queries must be embedded with models:/<model>/<version>.
        digest: of that version's weights.
        index: URI of the `index` artefact.
        since: when it came into force.
        number: counts swaps, from 1.
    """

    model: str
    version: str
    digest: str
    index: str
    since: str = ""
    number: int = 0


def current(store: Store, model: str) -> Pointer | None:
    """The pointer in force, or None. Raises NvrError on a damaged record."""
    keys = [k for k in store.storage.list(_folder(model)) if k.endswith(".json")]
    if not keys:
        return None
    record: Any = store.read_record(max(keys))
    try:
        return Pointer(**record)
    except TypeError as error:
        raise NvrError(f"{store.root}/{max(keys)} is damaged ({error}): delete it and run `nvr swap` again") from None


def advance(store: Store, wanted: Pointer, still_meant: Callable[[], bool]) -> Pointer | None:
    """Bring a pointer into force unless it no longer is to be.

    Args:
        still_meant: asked again before every try, after the pointer in force was read. When it says no after another
            swap came first, nothing is written.

    Returns:
        The pointer in force if it is the wanted one, else None.
    """
    while True:
        now = current(store, wanted.model)
        if not still_meant():
            return None
        if now is not None and (now.version, now.digest, now.index) == (wanted.version, wanted.digest, wanted.index):
            return now
        since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        number = 1 if now is None else now.number + 1
        record = asdict(wanted) | {"since": since, "number": number}
        if store.storage.put_bytes(key(wanted.model, number), json.dumps(record, indent=2).encode(), if_absent=True):
            return Pointer(**record)


def key(model: str, number: int) -> str:
    """Where a pointer's record is."""
    return f"{_folder(model)}/{number:08}.json"


def _folder(model: str) -> str:
    return f"refs/index/{model}"
