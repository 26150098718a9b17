"""From candidates to the `negatives` artefact: select for one teacher or several, check, write the table and the page."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nvr_tasks.errors import NvrError
from nvr_tasks.media import shown
from nvr_tasks.mine_settings import Mine
from nvr_tasks.mined.tables import NEGATIVES_FILE, write_ensemble, write_negatives
from nvr_tasks.mined.task import MiningTask
from nvr_tasks.mined.vectors import TeacherVectors, tiles
from nvr_tasks.mining import Candidates, EnsembleResult, MiningResult, MiningSpec
from nvr_tasks.mining.advisor import curves
from nvr_tasks.mining.arrays import Ints, Ragged
from nvr_tasks.mining.verify import verify
from nvr_tasks.mining_report import OfTeacher, ensemble_report, mining_report
from nvr_tasks.pipeline import Context

REPORT_FILE = "report.html"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """What one teacher brings to a selection.

    Attributes:
        name: of the teacher.
        candidates: on the scale that its threshold refers to.
        spec: what is mined with its scores.
        vectors: the vectors that were searched; None: of a reranker, which has none.
    """

    name: str
    candidates: Candidates
    spec: MiningSpec
    vectors: TeacherVectors | None

    @property
    def both(self) -> Callable[[], tuple[Any, Any]] | None:
        """Gives query and passage vectors, if there are any."""
        vectors = self.vectors
        return None if vectors is None else lambda: vectors.both


def spec_of(mine: Mine, teacher: str) -> MiningSpec:
    """The recipe's settings for a teacher."""
    return MiningSpec(
        method=mine.method,
        threshold=mine.thresholds.get(teacher, mine.threshold),
        shift=mine.shift,
        num_negatives=mine.num_negatives,
        sampling=mine.sampling,
        sample_from=mine.sample_from,
        temperature=mine.temperature,
        min_score=mine.min_score,
        positive_policy=mine.positive_policy,
    )


def write_selection(ctx: Context, task: MiningTask, sources: Sequence[Source], folder: Path) -> dict[str, Any]:
    """Fill the folder of a `negatives` artefact; returns its stats."""
    if len(sources) == 1:
        return _write_one(ctx, task, sources[0], folder)
    return _write_several(ctx, task, sources, folder)


# ── one teacher ──────────────────────────────────────────────────────────────────────────────────────────────────


def _write_one(ctx: Context, task: MiningTask, source: Source, folder: Path) -> dict[str, Any]:
    from nvr_tasks.mining import reselect

    def select() -> Any:
        return reselect(
            source.candidates,
            source.spec,
            source.both,
            seed=ctx.recipe.seed,
            query_keys=task.query_keys,
            **tiles(ctx, "search again"),
        )

    if source.vectors is None:
        mined = select()
    else:
        with source.vectors.named():
            mined = select()
    result = mined.result
    _verify(task, [source], [result])
    pairs = write_negatives(task, source.candidates.positive_scores, result, folder / NEGATIVES_FILE)
    _tell([source], len(mined.searched_again), result.kept_per_row, result.spec.num_negatives)
    (folder / REPORT_FILE).write_text(_page(task, [source], [result]), encoding="utf-8")
    margins = (result.positive_scores - result.negative_scores[:, 0])[result.kept_per_row > 0]
    return {
        "figures": {
            "queries": len(task.query_ids),
            "pairs": pairs,
            "negatives": result.kept,
            "short_queries": len(np.unique(result.query_rows[result.short_rows])),
            "mean_margin": _mean(margins),
        },
        **_counts(result),
        "rows_by_negatives": _by_count(result.kept_per_row, result.spec.num_negatives),
        "searched_again": len(mined.searched_again),
    }


# ── several teachers ─────────────────────────────────────────────────────────────────────────────────────────────


def _write_several(ctx: Context, task: MiningTask, sources: Sequence[Source], folder: Path) -> dict[str, Any]:
    from contextlib import ExitStack

    from nvr_tasks.mining import select_together

    mine = ctx.recipe.mine
    with ExitStack() as stack:
        for source in sources:
            if source.vectors is not None:
                stack.enter_context(source.vectors.named())
        result = select_together(
            [s.candidates for s in sources],
            [s.spec for s in sources],
            mine.ensemble,
            [s.both for s in sources],
            seed=ctx.recipe.seed,
            query_keys=task.query_keys,
            **tiles(ctx, "search again"),
        )
    _verify(task, sources, result.parts)
    if result.how == "intra_sample_dedup":
        _verify_distinct(result, task.groups)
    scores = [s.candidates.positive_scores for s in sources]
    pairs = write_ensemble(task, scores, [s.name for s in sources], result, folder / NEGATIVES_FILE)
    kept = result.kept_per_row
    _tell(sources, result.searched_again, kept, mine.num_negatives)
    (folder / REPORT_FILE).write_text(_page(task, sources, result.parts, result), encoding="utf-8")
    by_teacher = {}
    for source, part in zip(sources, result.parts, strict=True):
        margins = (part.positive_scores - part.negative_scores[:, 0])[part.kept_per_row > 0]
        by_teacher[source.name] = {"negatives": part.kept, "mean_margin": _mean(margins), **_counts(part)}
    return {
        "figures": {
            "queries": len(task.query_ids),
            "pairs": pairs,
            "negatives": int(kept.sum()),
            "short_queries": len(np.unique(result.query_rows[kept < mine.num_negatives])),
            **{f"from_{name}": told["negatives"] for name, told in by_teacher.items()},
        },
        "ensemble": result.how,
        "teachers": by_teacher,
        "repeated": _repeated(result.negative_ids),
        "rows": len(kept),
        "rows_by_negatives": _by_count(kept, mine.num_negatives),
        "searched_again": result.searched_again,
    }


def _verify_distinct(result: EnsembleResult, groups: Ints) -> None:
    """Raise NvrError if a row has two passages of one group."""
    real = result.negative_ids >= 0
    labels = np.where(real, groups[np.maximum(result.negative_ids, 0)], -1 - np.arange(real.shape[1]))
    ordered = np.sort(labels, axis=1)
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        raise NvrError("the ensemble gave two negatives of one group; nothing was written; report this as a bug")


def _repeated(ids_RK: Ints) -> int:
    """Negatives that another teacher gave to the same row, too."""
    ordered = np.sort(ids_RK, axis=1)
    return int(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).sum())


# ── both ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _verify(task: MiningTask, sources: Sequence[Source], results: Sequence[MiningResult]) -> None:
    # What the data set forbids is taken from the data set, not from what the search made of it. What one teacher's guards
    # found, no teacher gives.
    barred = task.exclude
    for source in sources:
        barred = Ragged.joined(barred, source.candidates.judged.barred)
    for result in results:
        verify(result, task.positives, barred, task.groups, len(task.doc_ids))


def _tell(sources: Sequence[Source], again: int, kept_per_row: Ints, wanted: int) -> None:
    if again:
        log.info("%s rows needed more than the stored candidates and were searched again", f"{again:,}")
    short = int((kept_per_row < wanted).sum())
    if short:
        rescored = all(s.candidates.rescored for s in sources)
        log.warning(
            "%s of %s rows have fewer than %d negatives: no further passage is eligible%s",
            f"{short:,}",
            f"{len(kept_per_row):,}",
            wanted,
            " among those rescored (depth of the reranker)" if rescored else "",
        )


def _page(
    task: MiningTask, sources: Sequence[Source], results: Sequence[MiningResult], together: EnsembleResult | None = None
) -> str:
    from nvr_tasks.mining import REASONS

    texts = dict(REASONS), lambda row: shown(task.query_texts[row]), lambda row: shown(task.passages[row])
    found = [
        OfTeacher(source.name, result, source.candidates, curves(source.candidates, result.spec))
        for source, result in zip(sources, results, strict=True)
    ]
    if together is not None:
        return ensemble_report(together, found, *texts)
    [only] = found
    return mining_report(only.result, only.candidates, only.curves, *texts)


def _counts(result: MiningResult) -> dict[str, Any]:
    return {
        "rows": len(result.kept_per_row),
        "candidates": result.candidates,
        "kept": result.kept,
        "skipped": result.skipped,
    }


def _by_count(kept_per_row: Ints, most: int) -> dict[str, int]:
    return {str(n): int(count) for n, count in enumerate(np.bincount(kept_per_row, minlength=most + 1))}


def _mean(margins: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> float | None:
    return round(float(margins.mean()), 4) if len(margins) else None
