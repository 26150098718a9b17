"""Embed the serving corpus with the champion into a faiss index, and check its recall against exact search.

Reads   the champion's version in the MLflow registry · dataset/<fp>, or the source `index.corpus`
Writes  index/<fp>: index.faiss (inner product over unit vectors) · ids.parquet (row → doc_id)

The manifest names the weights whose vectors the index holds. An index that finds too few of the true neighbours is not
published. A killed run goes on with the parts of the corpus it has embedded. `nvr swap` puts it into service.

Example  nvr index --recipe demo
"""

from __future__ import annotations

import hashlib
import io
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvr_tasks.artifacts import Identity
from nvr_tasks.data_settings import PassageSource
from nvr_tasks.errors import NvrError
from nvr_tasks.media import refuse_unread
from nvr_tasks.models import load_folder, pick_device
from nvr_tasks.pipeline import Context, Inputs, Plan, StageResult, one
from nvr_tasks.registry import Registry
from nvr_tasks.tracking import DIGEST_TAG, Tracking

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

    from nvr_tasks.encoding import Encoder
    from nvr_tasks.vectors import Vectors

VERSION = 1
PART = 4096  # passages per resumable part

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Texts:
    """What is indexed, and queries to try it with; `files`: folder of what they refer to (`nvr_tasks.media`)."""

    ids: list[str]
    passages: list[str]
    queries: list[str]
    files: Path | None = None


def needs(ctx: Context) -> tuple[str, ...]:
    """The data set, unless the recipe names a corpus of its own."""
    return ("dataset",) if ctx.recipe.index.corpus is None else ()


def plan(ctx: Context, inputs: Inputs) -> Plan:
    """One `index` artefact, named by the champion's weights, the corpus and the settings of the index."""
    settings = ctx.recipe.index
    corpus: Any = None
    if settings.corpus is not None:
        corpus = _probe(settings.corpus)
    config = {
        "model": {"digest": _champion(ctx).tags[DIGEST_TAG]},
        "corpus": corpus,
        **settings.model_dump(mode="json", exclude={"corpus"}),
    }
    given = {"dataset": one(inputs, "dataset")} if settings.corpus is None else {}
    return {"index": [Identity("index", VERSION, config, given)]}


def _champion(ctx: Context) -> ModelVersion:
    name = ctx.recipe.register_.model_name
    version = Registry(ctx.store, Tracking(ctx.recipe.register_.experiment), name).champion()
    if version is None:
        raise NvrError(f"model {name} has no champion: there is nothing to index with; promote a version first")
    if DIGEST_TAG not in version.tags:
        raise NvrError(
            f"version {version.version} of {name}, the champion, has no tag {DIGEST_TAG}: it was not registered by NVR; "
            "register it with `nvr register`, or move the alias"
        )
    return version


def _probe(entry: PassageSource) -> Any:
    from nvr_tasks.data.reading import probe

    return probe([("corpus", entry)])


def build(ctx: Context, inputs: Inputs, plan: Plan) -> StageResult:
    """Embed, index, check, publish."""
    [identity] = plan["index"]
    champion = _champion(ctx)
    if champion.tags[DIGEST_TAG] != identity.config["model"]["digest"]:
        raise NvrError(f"the champion of {champion.name} has just changed: run `nvr index` again")
    ctx.store.discard_finished("parts", "index")
    texts = _texts(ctx, inputs)

    def write(folder: Path) -> dict[str, Any]:
        with ctx.store.workdir("index") as scratch:
            tracking = Tracking(ctx.recipe.register_.experiment)
            model = load_folder(tracking.download(champion, scratch), pick_device(ctx.recipe.runtime))
            return _write(ctx, identity, model, texts, scratch, folder)

    artifact = ctx.store.publish(identity, write)
    ctx.store.storage.delete(f"parts/{identity.fingerprint}")
    return StageResult("index", {"index": [artifact.uri]}, dict(artifact.manifest.stats["figures"]))


def _texts(ctx: Context, inputs: Inputs) -> Texts:
    from nvr_tasks.dataset import passage_text, read_dataset

    entry = ctx.recipe.index.corpus
    if entry is None:
        data = read_dataset(ctx.store.fetch(ctx.store.open(one(inputs, "dataset"))))
        return Texts(list(data.corpus["doc_id"]), data.passages(), list(data.queries["text"]), data.files)
    from nvr_tasks.data.reading import Reader

    raw = Reader(ctx, "index").load(entry)
    passages = [passage_text(title, text) for title, text in raw.documents.values()]
    return Texts(list(raw.documents), passages, list(raw.queries.values()))


def _write(ctx: Context, identity: Identity, model: Any, texts: Texts, scratch: Path, folder: Path) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    from nvr_tasks.encoding import Encoder
    from nvr_tasks.vectors import allocate

    similarity = str(model.similarity_fn_name or "cosine")
    if similarity != "cosine":
        raise NvrError(f"the champion compares by {similarity}, but an index is built over unit vectors (cosine) only")
    prompts = {kind: (model.prompts or {}).get(kind) or "" for kind in ("query", "document")}
    limit = int(model.max_seq_length or 512)
    if texts.files is not None:
        refuse_unread("the champion", model, (("the dataset", text) for text in (*texts.passages, *texts.queries)))
    tokens = ctx.recipe.runtime.embed_batch_tokens or None
    encoder = Encoder(model, getattr(torch, ctx.recipe.evaluate.dtype), tokens, files=texts.files)
    dim = int(model.get_embedding_dimension() or 0)
    vectors = allocate(scratch / "vectors.npy", (len(texts.passages), dim))
    for start in range(0, len(texts.passages), PART):
        part = texts.passages[start : start + PART]
        vectors[start : start + PART] = _part(ctx, identity, encoder, part, prompts["document"], limit)
        log.info("embedded %s of %s passages", f"{start + len(part):,}", f"{len(texts.passages):,}")
    sample = _sample(texts.queries or texts.passages, ctx.recipe.index.recall_queries)
    queries = encoder.encode(sample, prompts["query"], limit)
    recall = _index(ctx, vectors, queries, folder / "index.faiss")
    pq.write_table(pa.table({"doc_id": texts.ids}), folder / "ids.parquet")
    at = ctx.recipe.index.recall_at
    return {
        "dim": dim,
        "prompts": prompts,
        "max_tokens": limit,
        "figures": {"passages": len(texts.ids), f"recall_at_{at}": round(recall, 4), "recall_queries": len(sample)},
    }


def _part(ctx: Context, identity: Identity, encoder: Encoder, texts: list[str], prompt: str, limit: int) -> Vectors:
    """Vectors of some passages, from storage when an earlier, killed run left them there."""
    import numpy as np

    digest = hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()[:32]
    key = f"parts/{identity.fingerprint}/{digest}.npy"
    kept = ctx.store.storage.get_bytes(key)
    if kept is not None:
        try:
            found: Vectors = np.load(io.BytesIO(kept), allow_pickle=False)
            if len(found) == len(texts):
                return found
        except (ValueError, EOFError):
            log.warning("%s is damaged; embedding its texts again", key)
    vectors = encoder.encode(texts, prompt, limit)
    if not np.isfinite(vectors).all():
        raise NvrError("the champion gives vectors with NaN or infinite numbers: its weights are damaged; roll it back")
    buffer = io.BytesIO()
    np.save(buffer, vectors)
    ctx.store.storage.put_bytes(key, buffer.getvalue())
    return vectors


def _sample(texts: list[str], count: int) -> list[str]:
    """Texts chosen by hash: the same ones whenever the same are asked for."""
    distinct = list(dict.fromkeys(texts))
    return sorted(distinct, key=lambda t: hashlib.sha256(t.encode("utf-8", "surrogatepass")).digest())[:count]


def _index(ctx: Context, vectors: Vectors, queries: Vectors, path: Path) -> float:
    """Build and write the index; returns its recall. Raises NvrError if that is too low."""
    from nvr_tasks.serving import ann

    settings = ctx.recipe.index
    index = ann.build(
        vectors, settings.kind, settings.hnsw_links, settings.hnsw_ef_construction, settings.hnsw_ef_search
    )
    k = min(settings.recall_at, len(vectors))
    recall = ann.recall(index, vectors, queries, k)
    if recall < settings.min_recall:
        raise NvrError(
            f"the index finds only {recall:.4f} of the true {k} nearest passages of {len(queries)} queries, index.min_recall is "
            f"{settings.min_recall}: raise index.hnsw_ef_search (now {settings.hnsw_ef_search}), or set index.kind=flat"
        )
    ann.write(index, path)
    return recall
