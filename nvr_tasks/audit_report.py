"""What an audit found, for people: one chapter per experiment, as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from nvr_tasks.html import intervals, page, table

if TYPE_CHECKING:
    from nvr_tasks.mine_settings import Audit
    from nvr_tasks.mining.audit import Estimate

TITLE = "What share of mined negatives is relevant"
CHAPTERS = {
    "held out": (
        "Judgements that were hidden",
        "{hidden:.0%} of the judged passages of each query with several were hidden, negatives were mined, and what came back was "
        "counted. This is what mining lets through where judgements are missing; where they are nearly complete, the training "
        "data have fewer. All methods had the same hidden passages.",
    ),
    "planted": (
        "Copies that were planted",
        "Copies of positives in other words were embedded by the teacher and put into the corpus, at most one per query chosen for "
        "it. They are as relevant as their originals, and nobody had judged them. How many came back compares guards, not methods: "
        "where each positive makes a row, methods whose ceiling moves with it look at more of the ranking.",
    ),
    "judged": (
        "What a language model says",
        "A model graded a sample of the pairs that each method mines from all judgements with all guards. Its grade of known "
        "positives says how far to trust it: what it misses there, it misses among negatives.",
    ),
}
MAIN = "negatives"  # what stands for an experiment
MEASURES = {
    "negatives": "negatives that are relevant",
    "rows": "rows with at least one such",
    "found": "hidden or planted passages that came back",
}


def audit_report(found: Sequence[Estimate], settings: Audit, teacher: str, judge: dict[str, Any] | None) -> str:
    """The page."""
    body = [
        f"<h1>{TITLE}</h1>",
        f"<p>Teacher {escape(teacher)}. Shares with 95 % intervals (Wilson's, over clusters: the negatives of one query are not "
        "independent). Guards add up: a positive's own id; passages of the same or nearly the same text; passages and queries "
        "whose vectors are as similar as near-duplicates are.</p>",
        audit_chapters(found, settings.hidden_share, judge),
    ]
    return page(TITLE, "".join(body))


def audit_chapters(found: Sequence[Estimate], hidden_share: float, judge: dict[str, Any] | None, level: int = 2) -> str:
    """The chapters alone, for a page that tells more; headings from `level` on."""
    parts = []
    for experiment, (title, told) in CHAPTERS.items():
        some = [e for e in found if e.experiment == experiment and e.share.trials]
        if not some:
            continue
        parts.append(f"<h{level}>{title}</h{level}><p>{told.format(hidden=hidden_share)}</p>")
        if experiment == "judged" and judge is not None:
            parts.append(
                f"<p>Model {escape(str(judge['model']))}: {judge['cached']:,} grades were there, {judge['calls']:,} requests, "
                f"{judge['tokens']:,} tokens; no grade for {judge['unreadable'] + judge['failed']:,} pairs, "
                f"{judge['unasked']:,} left out by the budget.</p>"
            )
        every = [e for e in some if e.part == "all" and e.measure == MAIN]
        methods = list(dict.fromkeys(e.method for e in every))
        bars = [
            (m, [(e.guards, e.share.low, e.share.value, e.share.high) for e in every if e.method == m]) for m in methods
        ]
        parts.append(intervals(bars, MEASURES[MAIN]))
        for measure, meaning in MEASURES.items():
            for part in dict.fromkeys(e.part for e in some if e.measure == measure):
                chosen = [e for e in some if e.measure == measure and e.part == part]
                name = meaning if part == "all" else f"{meaning}: {part}"
                parts.append(f"<details{' open' if (measure, part) == (MAIN, 'all') else ''}>")
                parts.append(f"<summary>{escape(name)}</summary>{_table(chosen)}</details>")
    return "".join(parts)


def _table(chosen: Sequence[Estimate]) -> str:
    guards = list(dict.fromkeys(e.guards for e in chosen))
    methods = list(dict.fromkeys(e.method for e in chosen))
    cell = {(e.method, e.guards): e.share for e in chosen}
    rows = []
    for method in methods:
        shares = [cell.get((method, g)) for g in guards]
        counted = max((s.trials for s in shares if s is not None), default=0)
        rows.append([method, *(str(s) if s is not None else "–" for s in shares), f"{counted:,}"])
    return table(["method", *guards, "of"], rows, numbers=range(1, len(guards) + 2))


def lines_of(found: Sequence[Estimate]) -> list[str]:
    """The shares under all guards as lines of text, for a terminal."""
    from nvr_tasks.mining.audit import ALL, ARMS

    lines = []
    for experiment in CHAPTERS:
        chosen = [
            e
            for e in found
            if (e.experiment, e.part, e.measure) == (experiment, ALL, MAIN) and e.guards == ARMS[-1].name
        ]
        lines += [f"{experiment}: {MEASURES[MAIN]}"] if chosen else []
        lines += [f"  {e.method:34}{e.share!s:>34}" for e in chosen if e.share.trials]
    return lines
