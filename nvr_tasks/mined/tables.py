"""The tables of the `candidates` and `negatives` artefacts: layout, writing, reading. The same rows are the same bytes.

candidates.parquet  query_id · positive_ids · positive_scores · candidate_ids · candidate_scores · near_duplicate_ids ·
                    excluded_ids, one row per training query, sorted by id
negatives.parquet   query_id · positive_id · positive_score · ceiling · negative_ids · negative_scores, one row per (query,
                    positive); with several teachers also, for each negative, negative_teachers · negative_ceilings ·
                    negative_positive_scores (the same teacher's score of the positive that set the ceiling)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from nvr_tasks.artifacts import reading
from nvr_tasks.errors import NvrError
from nvr_tasks.mining import Candidates, EnsembleResult, MiningResult
from nvr_tasks.mining.arrays import EXCLUDED, NEAR_DUPLICATE, Floats, Ints, Ragged
from nvr_tasks.mining.prepare import Judged

if TYPE_CHECKING:
    import numpy.typing as npt

    from nvr_tasks.mined.task import MiningTask

CANDIDATES_FILE = "candidates.parquet"
NEGATIVES_FILE = "negatives.parquet"
# Only where an index proposed the candidates: of queries that were also searched exactly, candidates found and there were.
RECALL_COLUMNS = ("recall_hits", "recall_trials")


def candidates_table(task: MiningTask, start: int, found: Candidates) -> pa.Table:
    """The candidates of the training queries from `start` on."""
    there = found.ids >= 0
    sizes = np.count_nonzero(there, axis=1)
    positives, blocked = found.judged.positives, found.judged.blocked
    near, excluded = blocked.barred(NEAR_DUPLICATE), blocked.barred(EXCLUDED)
    sampled = found.sampled
    measured = {} if sampled is None else dict(zip(RECALL_COLUMNS, (sampled.hits, sampled.trials), strict=True))
    return pa.table(
        {
            "query_id": pa.array(task.query_ids[start : start + len(sizes)], pa.string()),
            "positive_ids": _lists(np.diff(positives.offsets), _strings(task.doc_ids, positives.values)),
            "positive_scores": _lists(np.diff(positives.offsets), pa.array(found.positive_scores, pa.float64())),
            "candidate_ids": _lists(sizes, _strings(task.doc_ids, found.ids[there])),
            # float64, as decided: a float32 score could land on the other side of a ceiling.
            "candidate_scores": _lists(sizes, pa.array(found.scores[there], pa.float64())),
            "near_duplicate_ids": _lists(np.diff(near.offsets), _strings(task.doc_ids, near.values)),
            "excluded_ids": _lists(np.diff(excluded.offsets), _strings(task.doc_ids, excluded.values)),
            **{name: pa.array(counts) for name, counts in measured.items()},
        }
    )


def read_candidates(table: pa.Table, task: MiningTask, where: str) -> Candidates:
    """The table of all training queries as arrays. Raises NvrError unless it was made from this data set."""
    column = {name: table[name].combine_chunks() for name in table.column_names}
    rows = pd.Index(task.doc_ids)

    def lists(name: str) -> Ragged:
        values = rows.get_indexer(pd.Index(column[name].flatten().to_pandas()))
        offsets = np.concatenate([[0], np.cumsum(column[name].value_lengths().to_numpy(zero_copy_only=False))])
        return Ragged(values.astype(np.int64), offsets.astype(np.int64))

    near, excluded = lists("near_duplicate_ids"), lists("excluded_ids")
    positives, candidates = lists("positive_ids"), lists("candidate_ids")
    if (
        column["query_id"].to_pylist() != task.query_ids
        or not np.array_equal(positives.values, task.positives.values)
        or any((found.values < 0).any() for found in (candidates, near, excluded))
    ):
        raise NvrError(f"{where} was not made from this data set: delete it and run `nvr mine` again")
    sizes = np.diff(candidates.offsets)
    shape = (len(sizes), max(1, int(sizes.max(initial=0))))
    place = np.arange(shape[1])[None, :] < sizes[:, None]
    ids_QK, scores_QK = np.full(shape, -1, np.int64), np.full(shape, -np.inf)
    ids_QK[place] = candidates.values
    scores_QK[place] = column["candidate_scores"].flatten().to_numpy()
    judged = Judged.of(len(task.query_ids), len(task.doc_ids), task.positives, task.groups, excluded, near)
    return Candidates(judged, column["positive_scores"].flatten().to_numpy(), ids_QK, scores_QK)


def write_negatives(task: MiningTask, positive_scores: Floats, result: MiningResult, path: Path) -> int:
    """Negatives of one teacher. Under policies min and max the positives of a query share its negatives.

    Returns the number of rows.
    """
    owners = task.positives.owners
    row = _row_of_pair(task, result.spec.positive_policy)
    ids, scores = result.negative_ids[row], result.negative_scores[row]
    there = ids >= 0
    write_table(
        path,
        pa.table(
            {
                **_pairs(task),
                "positive_score": pa.array(positive_scores, pa.float64()),
                "ceiling": pa.array(result.ceilings[row], pa.float64()),
                "negative_ids": _lists(np.count_nonzero(there, axis=1), _strings(task.doc_ids, ids[there])),
                "negative_scores": _lists(np.count_nonzero(there, axis=1), pa.array(scores[there], pa.float64())),
            }
        ),
    )
    return len(owners)


def write_ensemble(
    task: MiningTask, positive_scores: Sequence[Floats], names: Sequence[str], result: EnsembleResult, path: Path
) -> int:
    """Negatives of several teachers, whose names and scores of the positives are given in the order of the result's parts.

    `positive_score` and `ceiling` are those of the one teacher that a row fell to (cross_sample), and null where several
    share a row. Returns the number of rows.
    """
    row = _row_of_pair(task, result.parts[0].spec.positive_policy)
    ids = result.negative_ids[row]
    there = ids >= 0
    sizes = np.count_nonzero(there, axis=1)
    score, ceiling = np.full(len(row), np.nan), np.full(len(row), np.nan)
    if result.how == "cross_sample":
        giver = np.empty(len(result.query_rows), np.int64)
        ceilings = np.empty(len(giver))
        for t, part in enumerate(result.parts):
            giver[result.drawn == t], ceilings[result.drawn == t] = t, part.ceilings
        score = np.stack(positive_scores)[giver[row], np.arange(len(row))]
        ceiling = ceilings[row]

    def of_negatives(values: Floats) -> pa.Array:
        return _lists(sizes, pa.array(values[row][there], pa.float64()))

    write_table(
        path,
        pa.table(
            {
                **_pairs(task),
                "positive_score": pa.array(score, pa.float64(), from_pandas=True),
                "ceiling": pa.array(ceiling, pa.float64(), from_pandas=True),
                "negative_ids": _lists(sizes, _strings(task.doc_ids, ids[there])),
                "negative_scores": of_negatives(result.negative_scores),
                "negative_teachers": _lists(
                    sizes, pa.array(list(names), pa.string()).take(pa.array(result.teachers[row][there]))
                ),
                "negative_ceilings": of_negatives(result.ceilings),
                "negative_positive_scores": of_negatives(result.positive_scores),
            }
        ),
    )
    return len(row)


def _pairs(task: MiningTask) -> dict[str, pa.Array]:
    owners = task.positives.owners
    return {
        "query_id": pa.array(task.query_ids, pa.string()).take(pa.array(owners)),
        "positive_id": _strings(task.doc_ids, task.positives.values),
    }


def _row_of_pair(task: MiningTask, policy: str) -> Ints:
    """Row of a result for each (query, positive)."""
    owners = task.positives.owners
    return np.arange(len(owners), dtype=np.int64) if policy == "each" else owners


def read_table(path: Path) -> pa.Table:
    """A parquet file. Raises NvrError if it is damaged."""
    with reading(path):
        return pq.read_table(path, page_checksum_verification=True)


def write_table(path: Path | BinaryIO, table: pa.Table) -> None:
    """One file; how the table was put together, and from what, does not show."""
    # A table that was read has other names for the items of its lists than one that was made, and they are written, too.
    plain = [
        pa.field(f.name, pa.list_(f.type.value_type) if pa.types.is_list(f.type) else f.type) for f in table.schema
    ]
    pq.write_table(table.cast(pa.schema(plain)).combine_chunks(), path, compression="zstd", write_page_checksum=True)


def _strings(doc_ids: npt.NDArray[np.object_], rows: Ints) -> pa.Array:
    return pa.array(doc_ids, pa.string()).take(pa.array(rows))


def _lists(sizes: Ints, values: pa.Array) -> pa.Array:
    """Lists of the given sizes, end to end in `values`."""
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)
