"""Mine positive-aware hard negatives for every training query, exactly, and keep the scored candidates.

Reads   dataset/<fp> · embeddings/<fp> (every shard of the teacher; only when there is something to search)
Writes  candidates/<fp>  candidates.parquet, one row per training query: query_id · positive_ids · positive_scores ·
                         candidate_ids · candidate_scores (the best `mine.depth` without a ceiling, by falling score) ·
                         near_duplicate_ids · excluded_ids (never mined for this query, and why)
        negatives/<fp>   negatives.parquet, one row per (query, positive): query_id · positive_id · positive_score ·
                         ceiling · negative_ids · negative_scores (by falling score; fewer than asked where no more are eligible)
                         report.html: scores, removals, threshold curves, closest calls

Candidates do not depend on method, threshold or number of negatives: another setting selects from them, and only
queries that the stored depth cannot serve are searched again. Whatever is judged relevant to a query, or to one that is
nearly the same, in any split, and its duplicates and near-duplicates, is never mined.

Example  nvr mine --recipe beir-small --set mine.method=margin_pos
         nvr mine --recipe beir-small --suggest      (what each threshold would do, and which one to take)
"""

from __future__ import annotations

import hashlib
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from nvr_tasks.artifacts import Artifact, Identity, reading
from nvr_tasks.errors import NvrError
from nvr_tasks.models import pick_device, teacher_identity
from nvr_tasks.pipeline import Context, Inputs, Plan, StageResult, one

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa
    from tqdm import tqdm

    from nvr_tasks.config import Mine
    from nvr_tasks.dataset import RetrievalData
    from nvr_tasks.mining import Candidates, MiningResult, MiningSpec
    from nvr_tasks.mining.arrays import Ints, Ragged
    from nvr_tasks.vectors import Vectors

VERSION = 2
CANDIDATES_FILE = "candidates.parquet"
NEGATIVES_FILE = "negatives.parquet"
REPORT_FILE = "report.html"
SECONDS_PER_LINE = 15.0  # of progress in a log

log = logging.getLogger(__name__)


def plan(ctx: Context, inputs: Inputs) -> Plan:
    """One `candidates` and one `negatives` artefact."""
    dataset = one(inputs, "dataset")
    # The teacher, not its shards: vectors are the same however the texts were divided.
    mine = ctx.recipe.mine
    searched = {
        "teacher": teacher_identity(ctx.recipe.teacher),
        "depth": mine.depth,
        "duplicate_similarity": mine.duplicate_similarity,
        "query_similarity": mine.query_similarity,
    }
    candidates = Identity("candidates", VERSION, searched, {"dataset": dataset})
    selected = {"dataset": dataset, "candidates": ctx.store.uri(candidates.kind, candidates.fingerprint)}
    negatives = Identity("negatives", VERSION, _selection(mine, ctx.recipe.seed), selected)
    return {"candidates": [candidates], "negatives": [negatives]}


def _selection(mine: Mine, seed: int) -> dict[str, Any]:
    """The settings that can change which negatives are selected; what a method does not look at is left out."""
    draws = mine.sampling != "top"
    return {
        "method": mine.method,
        "threshold": mine.resolved_threshold,
        "shift": mine.shift if mine.method == "shifted" else None,
        "num_negatives": mine.num_negatives,
        "sampling": mine.sampling,
        "sample_from": mine.sample_from if draws else None,
        "temperature": mine.temperature if draws else None,
        "positive_policy": mine.positive_policy,
        "seed": seed if draws else None,
    }


def build(ctx: Context, inputs: Inputs, plan: Plan) -> StageResult:
    """Search candidates unless they are there, then select."""
    (to_search,), (to_select,) = plan["candidates"], plan["negatives"]
    with _searched(ctx, inputs, to_search) as (stored, candidates, task, vectors):
        selected = ctx.store.publish(to_select, lambda folder: _write_negatives(ctx, task, candidates, vectors, folder))
    figures = selected.manifest.stats["figures"]
    return StageResult("mine", {"candidates": [stored.uri], "negatives": [selected.uri]}, figures)


def tell(ctx: Context, run: str, outputs: Inputs) -> None:
    """Put the report beside the other records of a pipeline run in MLflow, whether it was made now or before."""
    from nvr_tasks.tracking import Tracking

    report = ctx.store.fetch(ctx.store.open(one(outputs, "negatives")), only=(REPORT_FILE,)) / REPORT_FILE
    tracking = Tracking(ctx.recipe.register_.experiment)
    with tracking.explained():
        tracking.client.log_artifact(tracking.run(run).info.run_id, str(report), "mining")


def suggestion(ctx: Context, inputs: Inputs) -> str:
    """What each threshold of each method would do, as a table, and which one to take; searches candidates if need be."""
    from nvr_tasks.mining.advisor import curves, suggest

    [to_search] = plan(ctx, inputs)["candidates"]
    with _searched(ctx, inputs, to_search) as (_, candidates, _, _):
        found = curves(candidates, _spec(ctx.recipe.mine))
    lines = [
        f"{'method':12}{'threshold':>10}{'kept':>9}{'short rows':>12}{'median margin':>15}{'hidden positives':>18}"
    ]
    for curve in found:
        for i, threshold in enumerate(curve.thresholds):
            leak = f"{curve.false[i] / curve.mined[i]:.2%}" if curve.mined[i] else "–"
            lines.append(
                f"{curve.method:12}{threshold:>10.2f}{curve.kept[i]:>9.1%}{curve.short[i]:>12.2%}{curve.margin[i, 1]:>15.4f}{leak:>18}"
            )
    for curve in found:
        best = suggest(found, curve.method)
        lines += ["", f"mine.method={best.method} mine.threshold={best.threshold:g}", *(f"  {r}" for r in best.reasons)]
    return "\n".join(lines)


@contextmanager
def _searched(
    ctx: Context, inputs: Inputs, wanted: Identity
) -> Iterator[tuple[Artifact, Candidates, _Task, _TeacherVectors]]:
    """The candidates, searched unless they are there."""
    from nvr_tasks.dataset import read_dataset

    data = read_dataset(ctx.store.fetch(ctx.store.open(one(inputs, "dataset"))))
    task = _Task.of(data)
    with ctx.store.workdir("mine") as scratch:
        vectors = _TeacherVectors(ctx, list(inputs.get("embeddings", [])), data, task, scratch)
        stored = ctx.store.find(wanted)
        if stored is None:
            stored = ctx.store.publish(wanted, lambda folder: _write_candidates(ctx, task, vectors, folder))
        else:
            log.info("candidates are there: no full search")
        yield stored, _read_candidates(ctx, stored, task), task, vectors


# ── what is to be mined ──────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Task:
    """The training queries (sorted by id) and what is known to be relevant to them, as rows of the corpus.

    Attributes:
        query_ids, query_texts: of split `train`.
        doc_ids, passages: of the corpus, sorted, so that "lowest row" is "lowest id"; what a model sees of each.
        groups: group of each passage, [N].
        positives: judged relevant for training, per query.
        exclude: judged relevant in any other split, per query.
        judged_texts, judged_positives: every query of any split, and what is relevant to it.
        query_keys: digest of each query id: a draw hangs on it, not on which other queries there are, [Q].
    """

    query_ids: list[str]
    query_texts: list[str]
    doc_ids: npt.NDArray[np.object_]
    passages: list[str]
    groups: Ints
    positives: Ragged
    exclude: Ragged
    judged_texts: list[str]
    judged_positives: Ragged
    query_keys: npt.NDArray[np.uint64]

    @staticmethod
    def of(data: RetrievalData) -> _Task:
        import numpy as np
        import pandas as pd

        from nvr_tasks.mining.arrays import Ragged

        queries = data.queries[data.queries["split"] == "train"].sort_values("query_id")
        if queries.empty:
            raise NvrError("the data set has no query in split train: there is nothing to mine; check data.sources")
        corpus = data.corpus.sort_values("doc_id")
        if not data.corpus["doc_id"].is_monotonic_increasing:
            raise NvrError("the data set's corpus is not sorted by doc_id: run `nvr download` again")
        relevant = data.qrels[data.qrels["relevance"] >= 1]
        of_training = relevant["query_id"].isin(queries["query_id"])
        trained = relevant["split"] == "train"

        def lists(judged: pd.DataFrame, queries: pd.DataFrame = queries) -> Ragged:
            query = pd.Index(queries["query_id"]).get_indexer(pd.Index(judged["query_id"]))
            row = pd.Index(corpus["doc_id"]).get_indexer(pd.Index(judged["doc_id"]))
            if (row < 0).any():
                raise NvrError(
                    f"a judgement names document {judged['doc_id'].iloc[int(np.flatnonzero(row < 0)[0])]}, which is not in the corpus"
                )
            pairs = np.unique(np.stack([query, row], axis=1).astype(np.int64), axis=0)
            sizes = np.bincount(pairs[:, 0], minlength=len(queries))
            return Ragged(pairs[:, 1].copy(), np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)]))

        ids = queries["query_id"].tolist()
        digests = b"".join(hashlib.blake2b(i.encode(), digest_size=8).digest() for i in ids)
        return _Task(
            query_ids=ids,
            query_texts=queries["text"].tolist(),
            doc_ids=corpus["doc_id"].to_numpy(dtype=object),
            passages=data.passages(),
            groups=corpus["group"].to_numpy(dtype=np.int64),
            positives=lists(relevant[of_training & trained]),
            exclude=lists(relevant[of_training & ~trained]),
            judged_texts=data.queries["text"].tolist(),
            judged_positives=lists(relevant[relevant["query_id"].isin(data.queries["query_id"])], data.queries),
            query_keys=np.frombuffer(digests, dtype="<u8").astype(np.uint64),
        )


class _TeacherVectors:
    """The teacher's vectors, gathered on first use: a selection that the candidates can serve needs none."""

    def __init__(self, ctx: Context, uris: list[str], data: RetrievalData, task: _Task, scratch: Path) -> None:
        self.ctx, self.uris, self.data, self.task, self.scratch = ctx, uris, data, task, scratch

    @cached_property
    def folders(self) -> list[Path]:
        """Local folders of the shards. Raises NvrError if one is another teacher's."""
        teacher = self.ctx.recipe.teacher
        wanted = teacher_identity(teacher)
        folders = []
        for uri in self.uris:
            shard = self.ctx.store.open(uri)
            made_by = shard.manifest.config.get("teacher", wanted)
            if made_by != wanted:
                raise NvrError(
                    f"{uri} holds vectors of another teacher than {teacher.name} (or of another version of it): run `nvr embed` with this recipe"
                )
            folders.append(self.ctx.store.fetch(shard))
        return folders

    @cached_property
    def both(self) -> tuple[Vectors, Vectors]:
        """Queries [Q, D] in memory, passages [N, D] memory-mapped; not yet checked for NaN."""
        from nvr_tasks.vectors import gather, text_keys

        teacher = self.ctx.recipe.teacher
        keys = text_keys(self.task.passages, teacher.prompts.passage, teacher.max_tokens.passage)
        return self.of_queries(self.task.query_texts), gather(self.folders, keys, out=self.scratch / "passages.npy")

    def of_queries(self, texts: list[str]) -> Vectors:
        """Vectors of queries, [n, D], in memory."""
        from nvr_tasks.vectors import gather, text_keys

        teacher = self.ctx.recipe.teacher
        return gather(self.folders, text_keys(texts, teacher.prompts.query, teacher.max_tokens.query))

    @contextmanager
    def named(self) -> Iterator[None]:
        """Turn a row number in an error into the id that people know."""
        from nvr_tasks.mining.corpus import NotFiniteError

        try:
            yield
        except NotFiniteError as error:
            what, ids = {
                "query_vectors": ("query", self.task.query_ids),
                "other_vectors": ("query", self.data.queries["query_id"].tolist()),
            }.get(error.name, ("passage", self.task.doc_ids))
            raise NvrError(
                f"the teacher's vector of {what} {ids[error.row]} has NaN or infinite numbers: delete the embeddings "
                f"({', '.join(self.uris)}) and run `nvr embed` again, with teacher dtype float32 if it was another"
            ) from None


def _tiles(ctx: Context, label: str) -> dict[str, Any]:
    """Arguments of a search that never change its result."""
    runtime = ctx.recipe.runtime
    return {
        "device": pick_device(runtime),
        "block_rows": runtime.search_block_rows,
        "block_queries": runtime.search_block_queries,
        "progress": _Progress(label),
    }


class _Progress:
    """A bar on a terminal, a line with rate and time left every few seconds in a log."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.bar: tqdm[NoReturn] | None = None
        self.begun = self.told = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if sys.stderr.isatty():
            from tqdm import tqdm

            if self.bar is None:
                self.bar = tqdm(total=total, desc=self.label, unit="score", unit_scale=True)
            self.bar.update(done - self.bar.n)
            if done == total:
                self.bar.close()
            return
        now = time.monotonic()
        if now - self.told >= SECONDS_PER_LINE or done == total:
            self.told = now
            rate = done / max(now - self.begun, 1e-9)
            log.info(
                "%s: %.0f %% · %.3g scores/s · %.0f s left", self.label, 100 * done / total, rate, (total - done) / rate
            )


# ── candidates ───────────────────────────────────────────────────────────────────────────────────────────────────


def _write_candidates(ctx: Context, task: _Task, vectors: _TeacherVectors, folder: Path) -> dict[str, Any]:
    import numpy as np
    import pyarrow as pa

    from nvr_tasks.mining import search_candidates
    from nvr_tasks.mining.arrays import BLOCKED_REASONS, EXCLUDED, NEAR_DUPLICATE, Ragged
    from nvr_tasks.mining.guards import positives_of_similar_queries
    from nvr_tasks.mining.search import Tiles

    clock = time.perf_counter()
    mine = ctx.recipe.mine
    with vectors.named():
        queries, passages = vectors.both
        exclude = task.exclude
        if mine.query_similarity is not None:
            others = vectors.of_queries(task.judged_texts)
            related = positives_of_similar_queries(
                queries, others, task.judged_positives, mine.query_similarity, Tiles(pick_device(ctx.recipe.runtime))
            )
            exclude = Ragged.joined(exclude, related)
        found = search_candidates(
            queries,
            passages,
            task.positives,
            mine.depth,
            groups=task.groups,
            exclude=exclude,
            duplicate_similarity=mine.duplicate_similarity,
            **_tiles(ctx, "search"),
        )
    there = found.ids >= 0
    sizes = np.count_nonzero(there, axis=1)
    blocked = found.judged.blocked
    near, excluded = blocked.barred(NEAR_DUPLICATE), blocked.barred(EXCLUDED)
    _write_parquet(
        folder / CANDIDATES_FILE,
        {
            "query_id": pa.array(task.query_ids, pa.string()),
            "positive_ids": _lists(np.diff(task.positives.offsets), _strings(task.doc_ids, task.positives.values)),
            "positive_scores": _lists(np.diff(task.positives.offsets), pa.array(found.positive_scores, pa.float64())),
            "candidate_ids": _lists(sizes, _strings(task.doc_ids, found.ids[there])),
            # float64, as decided: a float32 score could land on the other side of a ceiling.
            "candidate_scores": _lists(sizes, pa.array(found.scores[there], pa.float64())),
            "near_duplicate_ids": _lists(np.diff(near.offsets), _strings(task.doc_ids, near.values)),
            "excluded_ids": _lists(np.diff(excluded.offsets), _strings(task.doc_ids, excluded.values)),
        },
    )
    log.info(
        "searched %s × %s scores in %.1f s", f"{len(queries):,}", f"{len(passages):,}", time.perf_counter() - clock
    )
    figures = {"queries": len(queries), "passages": len(passages)}
    return {
        "figures": figures,
        "positives": len(task.positives.values),
        "candidates": int(sizes.sum()),
        "depth": ctx.recipe.mine.depth,
        "left_out": dict(zip(BLOCKED_REASONS, blocked.counts.sum(axis=0).tolist(), strict=True)),
    }


def _read_candidates(ctx: Context, artifact: Artifact, task: _Task) -> Candidates:
    import numpy as np
    import pandas as pd
    import pyarrow.parquet as pq

    from nvr_tasks.mining import Candidates
    from nvr_tasks.mining.arrays import Ragged
    from nvr_tasks.mining.prepare import Judged

    path = ctx.store.fetch(artifact) / CANDIDATES_FILE
    with reading(path):
        table = pq.read_table(path)
    column = {name: table[name].combine_chunks() for name in table.column_names}
    rows = pd.Index(task.doc_ids)

    def lists(name: str) -> Ragged:
        values = rows.get_indexer(pd.Index(column[name].flatten().to_pandas()))
        return Ragged(values.astype(np.int64), column[name].offsets.to_numpy().astype(np.int64))

    near, excluded = lists("near_duplicate_ids"), lists("excluded_ids")
    positives = rows.get_indexer(pd.Index(column["positive_ids"].flatten().to_pandas()))
    ids = rows.get_indexer(pd.Index(column["candidate_ids"].flatten().to_pandas()))
    same_queries = column["query_id"].to_pylist() == task.query_ids
    if (
        not same_queries
        or not np.array_equal(positives, task.positives.values)
        or any((i < 0).any() for i in (ids, near.values, excluded.values))
    ):
        raise NvrError(f"{artifact.uri} was not made from this data set: delete it and run `nvr mine` again")
    sizes = np.diff(column["candidate_ids"].offsets.to_numpy())
    shape = (len(sizes), max(1, int(sizes.max(initial=0))))
    place = np.arange(shape[1])[None, :] < sizes[:, None]
    ids_QK, scores_QK = np.full(shape, -1, np.int64), np.full(shape, -np.inf)
    ids_QK[place] = ids
    scores_QK[place] = column["candidate_scores"].flatten().to_numpy()
    judged = Judged.of(len(task.query_ids), len(task.doc_ids), task.positives, task.groups, excluded, near)
    return Candidates(judged, column["positive_scores"].flatten().to_numpy(), ids_QK, scores_QK)


# ── negatives ────────────────────────────────────────────────────────────────────────────────────────────────────


def _write_negatives(
    ctx: Context, task: _Task, candidates: Candidates, vectors: _TeacherVectors, folder: Path
) -> dict[str, Any]:
    import numpy as np

    from nvr_tasks.mining import reselect
    from nvr_tasks.mining.arrays import Ragged
    from nvr_tasks.mining.verify import verify

    with vectors.named():
        mined = reselect(
            candidates,
            _spec(ctx.recipe.mine),
            lambda: vectors.both,
            seed=ctx.recipe.seed,
            query_keys=task.query_keys,
            **_tiles(ctx, "search again"),
        )
    result = mined.result
    # What the data set forbids is taken from the data set, not from what the search made of it.
    barred = Ragged.joined(task.exclude, candidates.judged.barred)
    verify(result, task.positives, barred, task.groups, len(task.doc_ids))
    pairs = _write_pairs(task, candidates, result, folder / NEGATIVES_FILE)
    if len(mined.searched_again):
        log.info(
            "%s rows needed more than the stored candidates and were searched again", f"{len(mined.searched_again):,}"
        )
    short = result.short_rows
    if len(short):
        log.warning(
            "%s of %s rows have fewer than %d negatives: no further passage is eligible",
            f"{len(short):,}",
            f"{len(result.kept_per_row):,}",
            result.spec.num_negatives,
        )
    (folder / REPORT_FILE).write_text(_report(task, candidates, result), encoding="utf-8")
    margins = (result.positive_scores - result.negative_scores[:, 0])[result.kept_per_row > 0]
    by_count = np.bincount(result.kept_per_row, minlength=result.spec.num_negatives + 1)
    return {
        "figures": {
            "queries": len(task.query_ids),
            "pairs": pairs,
            "negatives": result.kept,
            "short_queries": len(np.unique(result.query_rows[short])),
            "mean_margin": round(float(margins.mean()), 4) if len(margins) else None,
        },
        "rows": len(result.kept_per_row),
        "candidates": result.candidates,
        "kept": result.kept,
        "skipped": result.skipped,
        "rows_by_negatives": {str(n): int(count) for n, count in enumerate(by_count)},
        "searched_again": len(mined.searched_again),
    }


def _report(task: _Task, candidates: Candidates, result: MiningResult) -> str:
    from nvr_tasks.mining import REASONS
    from nvr_tasks.mining.advisor import curves
    from nvr_tasks.mining_report import mining_report

    return mining_report(
        result,
        candidates,
        curves(candidates, result.spec),
        dict(REASONS),
        task.query_texts.__getitem__,
        task.passages.__getitem__,
    )


def _spec(mine: Mine) -> MiningSpec:
    from nvr_tasks.mining import MiningSpec

    return MiningSpec(
        method=mine.method,
        threshold=mine.threshold,
        shift=mine.shift,
        num_negatives=mine.num_negatives,
        sampling=mine.sampling,
        sample_from=mine.sample_from,
        temperature=mine.temperature,
        positive_policy=mine.positive_policy,
    )


def _write_pairs(task: _Task, candidates: Candidates, result: MiningResult, path: Path) -> int:
    """One row per (query, positive), sorted; under policies min and max the positives of a query share its negatives."""
    import numpy as np
    import pyarrow as pa

    owners, positives = task.positives.owners, task.positives.values
    row = np.arange(len(owners)) if result.spec.positive_policy == "each" else owners
    ids, scores = result.negative_ids[row], result.negative_scores[row]
    there = ids >= 0
    sizes = np.count_nonzero(there, axis=1)
    _write_parquet(
        path,
        {
            "query_id": pa.array(task.query_ids, pa.string()).take(pa.array(owners)),
            "positive_id": _strings(task.doc_ids, positives),
            "positive_score": pa.array(candidates.positive_scores, pa.float64()),
            "ceiling": pa.array(result.ceilings[row], pa.float64()),
            "negative_ids": _lists(sizes, _strings(task.doc_ids, ids[there])),
            "negative_scores": _lists(sizes, pa.array(scores[there], pa.float64())),
        },
    )
    return len(owners)


# ── parquet ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _strings(doc_ids: npt.NDArray[np.object_], rows: Ints) -> pa.Array:
    import pyarrow as pa

    return pa.array(doc_ids, pa.string()).take(pa.array(rows))


def _lists(sizes: Ints, values: pa.Array) -> pa.Array:
    """Lists of the given sizes, end to end in `values`."""
    import numpy as np
    import pyarrow as pa

    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)


def _write_parquet(path: Path, columns: dict[str, pa.Array]) -> None:
    """One file, the same bytes for the same rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path, compression="zstd")
