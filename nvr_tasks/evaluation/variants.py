"""From the scores and dev curves of an ablation's cells to its table: who is better, by how much, and who is faster."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nvr_tasks.evaluation import crossed
from nvr_tasks.evaluation.statistics import holm

Floats = npt.NDArray[np.float64]
Curve = Sequence[tuple[int, float]]  # (step, dev nDCG@10), by step


@dataclass(frozen=True)
class Row:
    """A variant as it was measured.

    Attributes:
        name: of the variant.
        values: task → score per seed and query, [S, n]; seeds and queries in the same order for all variants.
        curves: dev curve of each seed.
        seconds_per_step: of each seed's training; 0 where it was not measured.
        work: what a step computes; variants of equal work have one pace, since they differ only in which texts they read.
        machines: what trained each seed's model, as far as it is known.
    """

    name: str
    values: Mapping[str, Floats]
    curves: Sequence[Curve]
    seconds_per_step: Sequence[float]
    work: Hashable = None
    machines: Sequence[str] = ()


def compared(
    rows: Sequence[Row], baseline: str, weights: Mapping[str, float], *, alpha: float, draws: int, seed: int
) -> list[dict[str, Any]]:
    """The table, a dict per variant in the order given.

    {"name", "tasks": {task: {"mean", "low", "high", "by_seed"}}, "mean": {"mean", "low", "high", "by_seed"},
     "difference": None for the baseline, else {"mean", "low", "high", "p", "p_holm", "seeds_to_queries",
     "tasks": {task: {"mean", "low", "high"}}}}; `seeds_to_queries` as in `crossed`.

    Args:
        weights: of each task in the mean; they add up to 1.
        alpha: intervals cover 1 − alpha.
    """
    names = [r.name for r in rows]
    base = names.index(baseline)
    tasks = list(weights)
    strata = {t: np.stack([np.asarray(r.values[t], np.float64) for r in rows], axis=2) for t in tasks}
    differences = {t: strata[t] - strata[t][:, :, [base]] for t in tasks}
    every = list(weights.values())

    def told(of: Mapping[str, Floats]) -> tuple[dict[str, dict[str, Floats]], dict[str, Floats], Floats]:
        by_task = {}
        for task in tasks:
            low, high = crossed.interval(crossed.resampled([of[task]], [1.0], draws, seed), alpha)
            by_task[task] = {"mean": of[task].mean(axis=(0, 1)), "low": low, "high": high}
        means = crossed.resampled([of[t] for t in tasks], every, draws, seed)
        low, high = crossed.interval(means, alpha)
        return by_task, {"mean": crossed.macro_mean([of[t] for t in tasks], every), "low": low, "high": high}, means

    scores, score, _ = told(strata)
    gains, gain, resampled = told(differences)
    p = crossed.two_sided_p(resampled)
    others = [i for i in range(len(rows)) if i != base]
    adjusted = dict(zip(others, holm([float(p[i]) for i in others]), strict=True))
    found = []
    for i, row in enumerate(rows):
        by_seed = {t: strata[t][:, :, i].mean(axis=1) for t in tasks}
        overall = sum(w * by_seed[t] for t, w in weights.items())
        difference = None
        if i != base:
            difference = {
                **_at(gain, i),
                "p": float(p[i]),
                "p_holm": adjusted[i],
                "seeds_to_queries": crossed.seeds_to_queries(
                    [gains_of[:, :, i] for gains_of in differences.values()], every
                ),
                "tasks": {t: _at(gains[t], i) for t in tasks},
            }
        found.append(
            {
                "name": row.name,
                "tasks": {t: {**_at(scores[t], i), "by_seed": by_seed[t].tolist()} for t in tasks},
                "mean": {**_at(score, i), "by_seed": np.asarray(overall).tolist()},
                "difference": difference,
            }
        )
    return found


def _at(columns: Mapping[str, Floats], i: int) -> dict[str, float]:
    return {name: float(values[i]) for name, values in columns.items()}


def speed(rows: Sequence[Row], reach: float) -> dict[str, Any]:
    """How fast each variant learns, by its dev curve.

    {"best_final", "best", "target", "machines", "variants": {name: {"steps", "seconds", "by_seed", "final", "curve"}}}: `steps`
    until the mean curve over seeds is at least `target` = reach · best final score and stays there, None if it does not end
    there; `seconds` at the median pace of all cells of equal work, since cells may have run beside others, None where several
    machines trained; `curve` is [(step, mean, min, max)] over seeds. Between two evaluations a curve is a line.
    """
    curves = {r.name: mean_curve(r.curves) for r in rows}
    finals = {name: curve[-1][1] for name, curve in curves.items() if curve}
    if not finals:
        return {"best_final": None, "best": None, "target": None, "machines": [], "variants": {}}
    best = max(finals, key=lambda name: finals[name])
    target = reach * finals[best]
    machines = sorted({m for row in rows for m in row.machines})
    paces: dict[Hashable, list[float]] = {row.work: [] for row in rows}
    for row in rows if len(machines) < 2 else ():
        paces[row.work].extend(s for s in row.seconds_per_step if s > 0)
    variants = {}
    for row in rows:
        curve = curves[row.name]
        if not curve:
            continue
        steps = steps_to([(step, mean) for step, mean, _, _ in curve], target)
        pace = float(np.median(paces[row.work])) if paces[row.work] else None
        variants[row.name] = {
            "steps": steps,
            "seconds": None if steps is None or pace is None else steps * pace,
            "seconds_per_step": pace,
            "by_seed": [steps_to(c, target) for c in row.curves],
            "final": finals[row.name],
            "curve": [list(point) for point in curve],
        }
    return {"best_final": finals[best], "best": best, "target": target, "machines": machines, "variants": variants}


def mean_curve(curves: Sequence[Curve]) -> list[tuple[int, float, float, float]]:
    """(step, mean, min, max) over seeds, at the steps that all of them have."""
    if not curves or not all(curves):
        return []
    by_step = [dict(c) for c in curves]
    common = sorted(set.intersection(*(set(c) for c in by_step)))
    found = []
    for step in common:
        values = [c[step] for c in by_step]
        found.append((step, float(np.mean(values)), min(values), max(values)))
    return found


def steps_to(curve: Curve, target: float) -> float | None:
    """Step from which a curve stays at `target` or above; its first step if it always is, None if it ends below.

    Not the step at which it first touches it: early in training curves rise and fall again.
    """
    reached: float | None = None
    before: tuple[int, float] | None = None
    for step, value in curve:
        if value < target:
            reached = None
        elif reached is None and before is None:
            reached = float(step)
        elif reached is None and before is not None:
            reached = before[0] + (target - before[1]) / (value - before[1]) * (step - before[0])
        before = (step, value)
    return reached
