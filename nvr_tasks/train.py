"""Fine-tune the student with InfoNCE over in-batch and mined hard negatives.

Reads   dataset/<fp> · negatives/<fp>
Writes  model/<fp>: a sentence-transformers folder (safetensors), README.md (model card), log.jsonl (loss, learning
        rate, dev nDCG@10 per step)

Every query comes once per pass; no batch holds a passage that is relevant to another of its queries. Checkpoints go
to the artefact store, so a killed run resumes where its last checkpoint was.

Example  nvr train --recipe beir-small --set train.steps=100
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from typing import TYPE_CHECKING, Any

from nvr_tasks.artifacts import Identity, reading
from nvr_tasks.errors import NvrError
from nvr_tasks.models import build_student, digest_of_folder, student_identity
from nvr_tasks.pipeline import Context, Inputs, Plan, StageResult, one

if TYPE_CHECKING:
    import pandas as pd
    from sentence_transformers import SentenceTransformer

    from nvr_tasks.dataset import RetrievalData
    from nvr_tasks.training.loop import DevSet, Examples

VERSION = 1
DEV_DISTRACTORS = 2000

log = logging.getLogger(__name__)


def plan(ctx: Context, inputs: Inputs) -> Plan:
    """One `model` artefact."""
    config = {
        **ctx.recipe.train.model_dump(mode="json", exclude={"student"}),
        "student": student_identity(ctx.recipe.train.student),
        "seed": ctx.recipe.seed,
    }
    roles = {"dataset": one(inputs, "dataset"), "negatives": one(inputs, "negatives")}
    return {"model": [Identity("model", VERSION, config, roles)]}


def build(ctx: Context, inputs: Inputs, plan: Plan) -> StageResult:
    """Train and publish."""
    from nvr_tasks.dataset import read_dataset
    from nvr_tasks.model_card import model_card
    from nvr_tasks.tracking import Tracking
    from nvr_tasks.training.checkpoints import Checkpoints
    from nvr_tasks.training.loop import train_model, write_log

    [identity] = plan["model"]
    config, store = ctx.recipe.train, ctx.store
    store.discard_finished("checkpoints", "model")
    data = read_dataset(store.fetch(store.open(one(inputs, "dataset"))))
    negatives = _read_negatives(ctx, one(inputs, "negatives"))
    examples, drawn = _examples(ctx, data, negatives)
    dev = _dev_set(data)
    tracking = Tracking(ctx.recipe.register_.experiment)
    run = tracking.run(ctx.pipeline_run) if ctx.pipeline_run else None

    def report(step: int, values: Any) -> None:
        if run is not None:
            tracking.log(run, metrics={f"train/{k}": v for k, v in values.items()}, step=step)

    _seed(ctx.recipe.seed)
    model = build_student(config.student, ctx.recipe.runtime)
    model.max_seq_length = config.max_tokens or config.student.max_tokens
    checkpoints = Checkpoints(store.storage, identity.fingerprint)
    with store.workdir(f"train-{identity.fingerprint[:8]}") as scratch:
        outcome = train_model(
            model,
            examples,
            dev,
            config,
            seed=ctx.recipe.seed,
            checkpoint_every=ctx.recipe.runtime.checkpoint_every_steps,
            checkpoints=checkpoints,
            folder=scratch / "trainer",
            on_log=report,
        )
        refuse_broken_weights(model)
        folder = scratch / "model"
        model.max_seq_length = config.student.max_tokens
        model.save_pretrained(str(folder), create_model_card=False, safe_serialization=True)
        losses = [e["loss"] for e in outcome.log if "loss" in e]
        scores = [e["dev_ndcg_at_10"] for e in outcome.log if "dev_ndcg_at_10" in e]
        figures = {
            "steps": config.steps,
            "loss": round(losses[-1], 4) if losses else None,
            "examples_per_s": round(outcome.examples_per_s, 1),
        }
        if scores:
            figures["dev_ndcg_at_10"] = round(scores[-1], 4)
        write_log(outcome.log, folder / "log.jsonl")
        (folder / "README.md").write_text(model_card(ctx.recipe, identity, figures), encoding="utf-8")
        stats = {
            "figures": figures,
            "digest": digest_of_folder(folder),
            "random_negatives": drawn,
            "resumed_from": outcome.resumed_from,
        }
        artifact = store.publish_folder(identity, folder, stats)
    checkpoints.clear()
    return StageResult("train", {"model": [artifact.uri]}, figures)


def refuse_broken_weights(model: SentenceTransformer) -> None:
    """Raise NvrError when a weight is NaN or infinite; the last update is not covered by the watch on the loss."""
    for name, weight in model.named_parameters():
        if not bool(weight.isfinite().all()):
            raise NvrError(
                f"training left {name} with NaN or infinite weights: lower train.learning_rate, or use dtype float32"
            )


def _seed(seed: int) -> None:
    from transformers import set_seed

    set_seed(seed)


def _read_negatives(ctx: Context, uri: str) -> pd.DataFrame:
    import pandas as pd

    path = ctx.store.fetch(ctx.store.open(uri)) / "negatives.parquet"
    with reading(path):
        columns = ["query_id", "positive_id", "negative_ids"]
        return pd.read_parquet(path, columns=columns, page_checksum_verification=True)


def _examples(ctx: Context, data: RetrievalData, negatives: pd.DataFrame) -> tuple[Examples, int]:
    """Training examples in training order, and how many negatives had to be drawn at random."""
    import pandas as pd

    from nvr_tasks.training.batches import compose, fill_short, passes
    from nvr_tasks.training.loop import Examples

    config, seed = ctx.recipe.train, ctx.recipe.seed
    row_of = {doc: row for row, doc in enumerate(data.corpus["doc_id"])}
    queries = {query: index for index, query in enumerate(data.queries["query_id"])}
    groups = data.corpus["group"].to_numpy()
    relevant: list[set[int]] = [set() for _ in queries]
    judged = data.qrels[data.qrels["relevance"] >= 1]
    for query, doc in zip(judged["query_id"], judged["doc_id"], strict=True):
        if query in queries:
            relevant[queries[query]].add(int(groups[row_of[doc]]))
    frozen = [frozenset(r) for r in relevant]
    mined = [
        (queries[q], row_of[p], [row_of[n] for n in ids])
        for q, p, ids in zip(negatives["query_id"], negatives["positive_id"], negatives["negative_ids"], strict=True)
    ]
    try:
        rows, drawn = fill_short(mined, frozen, groups, config.hard_negatives, seed)
        query_groups, _ = pd.factorize(data.queries["text"])
        batches, lost = compose(passes(rows, seed), frozen, groups, query_groups, config.batch_size, config.steps)
    except ValueError as error:
        raise NvrError(
            f"cannot compose training batches: {error}; use more training data, a smaller train.batch_size or fewer hard negatives"
        ) from None
    short = sum(len(b) < config.batch_size for b in batches)
    if short:
        log.warning(
            "%d of %d batches are smaller than %d: too few unrelated queries", short, len(batches), config.batch_size
        )
    if lost:
        log.warning("%s rows lost their turn: too many queries share a positive to come once per pass", f"{lost:,}")
    passages, texts = data.passages(), list(data.queries["text"])
    flat = list(itertools.chain.from_iterable(batches))
    columns = {"anchor": [texts[r.query] for r in flat], "positive": [passages[r.positive] for r in flat]}
    for i in range(config.hard_negatives):
        columns[f"negative_{i + 1}"] = [passages[r.negatives[i]] for r in flat]
    ends = list(itertools.accumulate(len(b) for b in batches))
    indices = [list(range(end - len(b), end)) for b, end in zip(batches, ends, strict=True)]
    log.info(
        "%s examples of %s queries in %d batches; %s negatives drawn at random",
        f"{len(flat):,}",
        f"{len({r.query for r in flat}):,}",
        len(batches),
        f"{drawn:,}",
    )
    return Examples(columns, indices), drawn


def _dev_set(data: RetrievalData) -> DevSet | None:
    """Held-out queries, their relevant passages and a fixed sample of others to search among."""
    from nvr_tasks.training.loop import DevSet

    dev = data.queries[data.queries["split"] == "dev"]
    if dev.empty:
        return None
    judged = data.qrels[(data.qrels["relevance"] >= 1) & data.qrels["query_id"].isin(set(dev["query_id"]))]
    relevant = {str(query): set(map(str, docs)) for query, docs in judged.groupby("query_id")["doc_id"]}
    needed = set(judged["doc_id"])
    others = sorted(
        (d for d in data.corpus["doc_id"] if d not in needed), key=lambda d: hashlib.sha256(d.encode()).digest()
    )
    kept = needed | set(others[:DEV_DISTRACTORS])
    corpus = {doc: text for doc, text in zip(data.corpus["doc_id"], data.passages(), strict=True) if doc in kept}
    return DevSet(dict(zip(dev["query_id"], dev["text"], strict=True)), corpus, relevant)
