"""The quick tier of a benchmark: what it says of a challenger, and which tasks are scored after it.

screening/<fp>/screening.json holds a `Screening`. It is named by the policy of the tier and by the scores that it looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nvr_tasks.artifacts import Artifact, Store
from nvr_tasks.evaluation.comparison import PerQuery, fall_short, task_weights
from nvr_tasks.evaluation.scores import tasks_of
from nvr_tasks.pipeline import Context, Inputs
from nvr_tasks.policy import Gate, Quick

KIND, RECORD = "screening", "screening.json"


@dataclass(frozen=True)
class Screening:
    """What the quick tier found; scores are nDCG@10, from 0 to 1.

    Attributes:
        stopped: the challenger falls short, so that nothing else is scored.
        queries: per task of the tier.
        challenger, champion: scores per task; no champion if there is none, or the challenger is it.
        mean: the challenger's, over the tier.
        min_mean: floor of it, if the policy has one.
        gain: in the mean over the champion.
        high: upper end of its interval, that is the one-sided bound at 1 − alpha.
        p: one-sided, of "the gain is at least `limit`".
        limit: gain that the challenger must not be shown to miss; None if the policy does not look at the champion.
    """

    stopped: bool
    queries: dict[str, int]
    challenger: dict[str, float]
    champion: dict[str, float] | None
    mean: float
    min_mean: float | None
    gain: float | None = None
    high: float | None = None
    p: float | None = None
    limit: float | None = None


def screen(
    policy: Gate, challenger: PerQuery, champion: PerQuery | None, parts: Mapping[str, Sequence[str]]
) -> Screening:
    """Judge a challenger by the tasks of the quick tier alone.

    Args:
        challenger: task → query id → nDCG@10.
        champion: the same of the champion, if there is another than the challenger.
        parts: tasks that count as one in the mean, by the name of the whole.

    Raises:
        NvrError: the two were scored on different queries, or a score is not finite.
    """
    quick = _quick(policy)
    ours, weights = _means(challenger), task_weights(challenger, parts)
    mean = sum(weights[task] * value for task, value in ours.items())
    low = quick.min_mean is not None and mean < quick.min_mean
    facts: dict[str, Any] = {
        "queries": {task: len(values) for task, values in challenger.items()},
        "challenger": ours,
        "champion": None if champion is None else _means(champion),
        "mean": mean,
        "min_mean": quick.min_mean,
    }
    if champion is None or quick.max_shortfall is None:
        return Screening(stopped=low, **facts)
    found = fall_short(policy, policy.margin - quick.max_shortfall, challenger, champion, parts)
    return Screening(
        stopped=low or found.shown, gain=found.gain, high=found.high, p=found.p, limit=found.limit, **facts
    )


def narrowed(ctx: Context, inputs: Inputs, benchmark: Artifact) -> list[str] | None:
    """The tasks that are scored after the quick tier; None: all of the benchmark.

    Those of the tier if it stopped the challenger, else those that the full verdict is about.
    """
    quick = ctx.recipe.gate.quick
    if quick is None or ctx.options.get("model") is not None:  # a single model is scored on all
        return None
    every = list(tasks_of(benchmark))
    if any(stopped(ctx.store.open(uri)) for uri in inputs.get(KIND, [])):
        return [task for task in every if task in quick.tasks]
    judged = ctx.recipe.gate.judged(every)
    return None if judged == every else judged


def stopped(screening: Artifact) -> bool:
    """Whether it says that nothing else is to be scored."""
    return bool(screening.manifest.stats["stopped"])


def read_screening(store: Store, screening: Artifact) -> Screening:
    """What a `screening` artefact holds."""
    return Screening(**store.read_json(screening, RECORD))


def tier_identity(policy: Gate) -> dict[str, Any]:
    """What of a policy decides the outcome of its quick tier."""
    quick = _quick(policy)
    return {
        **quick.model_dump(mode="json", exclude={"counts"}),
        "margin": policy.margin,
        "alpha": policy.alpha,
        "resamples": policy.resamples,
        "seed": policy.resample_seed,
    }


def _quick(policy: Gate) -> Quick:
    assert policy.quick is not None  # noqa: S101  callers looked
    return policy.quick


def _means(scores: PerQuery) -> dict[str, float]:
    return {task: float(np.mean(list(values.values()))) for task, values in scores.items()}
