"""What was mined, for people: distributions, removals, threshold curves and examples, as one HTML page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from nvr_tasks.html import lines, page, table

if TYPE_CHECKING:
    from nvr_tasks.mining import Candidates, EnsembleResult, MiningResult
    from nvr_tasks.mining.advisor import Curve
    from nvr_tasks.mining.arrays import Floats

TITLE = "Mined hard negatives"
EXAMPLES = 8
LONGEST_TEXT = 280
BINS = 60

Text = Callable[[int], str]


def mining_report(
    result: MiningResult,
    candidates: Candidates,
    curves: Sequence[Curve],
    reasons: dict[str, str],
    query_text: Text,
    passage_text: Text,
) -> str:
    """The page.

    Args:
        result, candidates: the selection, and what it was selected from.
        curves: of `advisor.curves`.
        reasons: what each reason to leave a passage out means.
        query_text, passage_text: text of a row of the queries, of the corpus.
    """
    short = len(result.short_rows)
    body = [
        f"<h1>{TITLE}</h1>",
        f"<p>{escape(_setting(result))}: {len(result.kept_per_row):,} rows, {result.kept:,} negatives, {short:,} rows with "
        "fewer than asked for.</p>",
        *_sections(result, candidates, curves, reasons, query_text, passage_text),
    ]
    return page(TITLE, "".join(body))


@dataclass(frozen=True)
class OfTeacher:
    """What one of several teachers gave, and what it was selected from."""

    name: str
    result: MiningResult
    candidates: Candidates
    curves: Sequence[Curve]


def ensemble_report(
    together: EnsembleResult,
    teachers: Sequence[OfTeacher],
    reasons: dict[str, str],
    query_text: Text,
    passage_text: Text,
) -> str:
    """The page for several teachers: who gave what, then the sections of each."""
    kept = together.kept_per_row
    wanted = together.negative_ids.shape[1]
    rows = [
        [
            escape(t.name),
            escape(_setting(t.result)),
            f"{len(t.result.kept_per_row):,}",
            f"{t.result.kept:,}",
            f"{t.result.kept / max(1, int(kept.sum())):.1%}",
        ]
        for t in teachers
    ]
    body = [
        f"<h1>{TITLE}</h1>",
        f"<p>{len(teachers)} teachers, {escape(together.how)}: {len(kept):,} rows, {int(kept.sum()):,} negatives, "
        f"{int((kept < wanted).sum()):,} rows with fewer than {wanted}. Scores of different teachers are not compared: each "
        "negative lies below the ceiling that its own teacher's score of the positive sets.</p>",
        "<h2>Which teacher gave what</h2>",
        table(["teacher", "setting", "rows", "negatives", "share"], rows, numbers=(2, 3, 4)),
    ]
    for t in teachers:
        body.append(f"<h1>Teacher {escape(t.name)}</h1>")
        body += _sections(t.result, t.candidates, t.curves, reasons, query_text, passage_text)
    return page(TITLE, "".join(body))


def _setting(result: MiningResult) -> str:
    spec = result.spec
    threshold = f" {spec.resolved_threshold:g}" if np.isfinite(spec.resolved_threshold) else ""
    row = "(query, positive)" if spec.positive_policy == "each" else "query"
    return f"{spec.method}{threshold}, {spec.num_negatives} negatives by sampling “{spec.sampling}”, one row per {row}"


def _sections(
    result: MiningResult,
    candidates: Candidates,
    curves: Sequence[Curve],
    reasons: dict[str, str],
    query_text: Text,
    passage_text: Text,
) -> list[str]:
    spec = result.spec
    return [
        "<h2>Scores</h2>",
        lines(_distributions(result), "teacher score", "share of rows"),
        "<h2>Why passages are not negatives</h2>",
        table(
            ["reason", "passages", "meaning"],
            [[name, f"{count:,}", reasons[name]] for name, count in result.skipped.items()],
            numbers=(1,),
        ),
        "<h2>What another threshold would do</h2>",
        "<p>Hidden positives: what share of the hardest negatives would be positives, if of every query with several all "
        "but one were not known. Mining never takes a known one; this is what a threshold lets through where positives are "
        "missing.</p>",
        *(_curve(curve, spec.resolved_threshold if curve.method == spec.method else None) for curve in curves),
        "<h2>Closest calls</h2>",
        "<p>Left: the hardest negatives kept, nearest below their ceiling. Right: of the same queries, the nearest passage "
        "that the ceiling removed. Negatives that answer the query mean a ceiling too high; removed passages that do not "
        "mean one too low.</p>",
        _examples(result, candidates, query_text, passage_text),
    ]


def _distributions(result: MiningResult) -> dict[str, list[tuple[float, float]]]:
    found = {
        "positives": result.positive_scores,
        "ceilings": result.ceilings[np.isfinite(result.ceilings)],
        "hardest negative": result.negative_scores[:, 0],
        "all negatives": result.negative_scores.ravel(),
    }
    found = {name: values[np.isfinite(values)] for name, values in found.items()}
    every = np.concatenate(list(found.values()))
    if not len(every):
        return {}
    edges = np.linspace(every.min(), every.max() + 1e-9, BINS + 1)
    middles = (edges[1:] + edges[:-1]) / 2
    return {name: _histogram(values, edges, middles) for name, values in found.items() if len(values)}


def _histogram(values: Floats, edges: Floats, middles: Floats) -> list[tuple[float, float]]:
    counts, _ = np.histogram(values, edges)
    return list(zip(middles.tolist(), (counts / len(values)).tolist(), strict=True))


def _curve(curve: Curve, chosen: float | None) -> str:
    x = curve.thresholds.tolist()
    series = {
        "stored candidates kept": list(zip(x, curve.kept.tolist(), strict=True)),
        "rows that need more than is stored": list(zip(x, curve.short.tolist(), strict=True)),
    }
    told = curve.mined > 0
    if told.any():
        share = curve.false[told] / curve.mined[told]
        series["hidden positives among negatives"] = list(
            zip(curve.thresholds[told].tolist(), share.tolist(), strict=True)
        )
    return f"<h3>{escape(curve.method)}</h3>{lines(series, 'threshold', 'share', chosen)}"


def _examples(result: MiningResult, candidates: Candidates, query_text: Text, passage_text: Text) -> str:
    there = np.flatnonzero((result.negative_ids[:, 0] >= 0) & np.isfinite(result.ceilings))
    if not len(there):
        return "<p>No row has both a ceiling and a negative.</p>"
    near = there[np.argsort(result.ceilings[there] - result.negative_scores[there, 0], kind="stable")]
    _, first = np.unique(result.query_rows[near], return_index=True)  # one row per query
    rows = []
    for row in near[np.sort(first)][:EXAMPLES].tolist():
        query = int(result.query_rows[row])
        ids, scores = candidates.ids[query], candidates.scores[query]
        removed = np.flatnonzero((ids >= 0) & (scores >= result.ceilings[row]))
        kept = _cell(passage_text(int(result.negative_ids[row, 0])), float(result.negative_scores[row, 0]))
        gone = _cell(passage_text(int(ids[removed[-1]])), float(scores[removed[-1]])) if len(removed) else "<td>–</td>"
        positive = _cell(passage_text(int(result.positive_ids[row])), float(result.positive_scores[row]))
        rows.append(f'<tr><td class="text">{escape(_cut(query_text(query)))}</td>{positive}{kept}{gone}</tr>')
    head = "<tr><th>query</th><th>positive</th><th>hardest kept</th><th>closest removed</th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def _cell(text: str, score: float) -> str:
    return f'<td class="text"><b>{score:.4f}</b> {escape(_cut(text))}</td>'


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…"
