"""Where a model and its scores come from, down to the digests of the data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from nvr_tasks.artifacts import Artifact, Store, fingerprint_of
from nvr_tasks.errors import NvrError

ORDER = ("dataset", "benchmark", "embeddings", "candidates", "negatives", "model", "screening", "evaluation")


def lineage(store: Store, artifacts: Iterable[Artifact]) -> list[dict[str, Any]]:
    """The artefacts and all they were made from, data first: kind, identity, digest of the content, key figures.

    What has been deleted meanwhile is named without digest and figures: the record stays whole.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    waiting = list(artifacts)
    while waiting:
        artifact = waiting.pop()
        manifest = artifact.manifest
        key = (manifest.kind, manifest.fingerprint)
        if key in found:
            continue
        found[key] = {
            "kind": manifest.kind,
            "fingerprint": manifest.fingerprint,
            "content": manifest.content_digest,
            "figures": manifest.stats.get("figures", {}),
            "code": manifest.code_version,
            "made": manifest.created_at,
        }
        for uri in manifest.inputs.values():
            kind = uri.rstrip("/").rsplit("/", 2)[-2]
            try:
                waiting.append(store.open(store.uri(kind, fingerprint_of(uri))))
            except NvrError:
                found.setdefault((kind, fingerprint_of(uri)), {"kind": kind, "fingerprint": fingerprint_of(uri)})
    return sorted(found.values(), key=lambda e: (_rank(e["kind"]), e["fingerprint"]))


def _rank(kind: str) -> int:
    return ORDER.index(kind) if kind in ORDER else len(ORDER)
