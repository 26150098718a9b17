"""Challenger against champion, query by query: the evidence that a decision rests on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nvr_tasks.artifacts import reading
from nvr_tasks.errors import NvrError
from nvr_tasks.evaluation import statistics
from nvr_tasks.evaluation.statistics import Floats
from nvr_tasks.policy import Gate

PRIMARY, RECALL = "ndcg_at_10", "recall_at_100"

PerQuery = Mapping[str, Mapping[str, float]]  # task → query id → value of one metric


@dataclass(frozen=True)
class TaskComparison:
    """One task: means of both (0 to 1), their difference with its interval, and tests that know of the other tasks."""

    task: str
    queries: int
    challenger: float
    champion: float
    difference: float
    low: float
    high: float
    p_difference: float  # two-sided, of "no difference"; Holm over tasks
    p_loss: float  # one-sided, of "the loss is within max_loss_per_task"; Holm over tasks
    wins: int
    losses: int


@dataclass(frozen=True)
class Comparison:
    """All tasks: the gain in the macro mean, its interval and test, and what could have been seen."""

    gain: float
    low: float
    high: float
    level: float  # of the interval, two-sided
    p: float  # one-sided, of "the gain is at most the margin"
    p_superior: float  # one-sided, of "there is no gain"
    margin: float
    detectable: float  # true difference beyond the margin that is found with probability `power`
    queries: int
    tasks: tuple[TaskComparison, ...]

    @property
    def passed(self) -> bool:
        """Test and interval agree that the gain exceeds the margin: the one assumes symmetry, the other many queries."""
        return self.p <= (1 - self.level) / 2 + 1e-12 and self.low > self.margin

    @property
    def superior(self) -> bool:
        """The challenger is shown to be better than the champion, whatever the margin."""
        return self.p_superior <= (1 - self.level) / 2 + 1e-12 and self.low > 0


@dataclass(frozen=True)
class Shortfall:
    """Whether a challenger is shown to gain less on the champion than `limit`, by the same two witnesses as a gain."""

    gain: float
    high: float  # upper end of the interval of the gain: its one-sided bound
    p: float  # one-sided, of "the gain is at least the limit"
    limit: float
    alpha: float

    @property
    def shown(self) -> bool:
        """Test and interval agree."""
        return self.p <= self.alpha + 1e-12 and self.high < self.limit


def task_weights(tasks: Iterable[str], parts: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Weight of each task in the mean: equal, but the parts of an aggregate (CQADupstack's forums) count as one task."""
    whole = {part: name for name, members in parts.items() for part in members}
    names = list(tasks)
    groups = Counter(whole.get(task, task) for task in names)
    return {task: 1 / len(groups) / groups[whole.get(task, task)] for task in names}


def compare(
    policy: Gate, challenger: PerQuery, champion: PerQuery, parts: Mapping[str, Sequence[str]] | None = None
) -> Comparison:
    """Paired comparison on the primary metric, with the policy's margins, level and resampling.

    Args:
        parts: tasks that count as one in the mean, by the name of the whole.

    Raises:
        NvrError: the two were not scored on the same tasks and queries, or a score is not finite.
    """
    names, ours, theirs, weights = _paired(challenger, champion, parts)
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    level = 1 - 2 * policy.alpha
    draws, seed = policy.resamples, policy.resample_seed
    low, high = statistics.bootstrap_interval(differences, level, draws, seed, weights)
    p_difference = statistics.holm([statistics.difference_p(d, draws, seed) for d in differences])
    p_loss = statistics.holm(
        [float(statistics.superiority_p([-d], policy.max_loss_per_task, draws, seed)) for d in differences]
    )
    tasks = []
    for number, (task, a, b, d) in enumerate(zip(names, ours, theirs, differences, strict=True)):
        task_low, task_high = statistics.bootstrap_interval([d], level, draws, seed)
        tasks.append(
            TaskComparison(
                task=task,
                queries=len(d),
                challenger=float(a.mean()),
                champion=float(b.mean()),
                difference=float(d.mean()),
                low=float(task_low),
                high=float(task_high),
                p_difference=p_difference[number],
                p_loss=p_loss[number],
                wins=int((d > 0).sum()),
                losses=int((d < 0).sum()),
            )
        )
    p = float(statistics.superiority_p(differences, policy.margin, draws, seed, weights))
    return Comparison(
        gain=float(statistics.macro_mean(differences, weights)),
        low=float(low),
        high=float(high),
        level=level,
        p=p,
        p_superior=p if policy.margin == 0 else float(statistics.superiority_p(differences, 0.0, draws, seed, weights)),
        margin=policy.margin,
        detectable=float(statistics.detectable_difference(differences, policy.alpha, policy.power, weights)),
        queries=sum(len(d) for d in differences),
        tasks=tuple(tasks),
    )


def fall_short(
    policy: Gate,
    limit: float,
    challenger: PerQuery,
    champion: PerQuery,
    parts: Mapping[str, Sequence[str]] | None = None,
) -> Shortfall:
    """Test whether the gain over the champion lies below `limit`, at the policy's level and with its resampling.

    Raises:
        NvrError: as `compare`.
    """
    _, ours, theirs, weights = _paired(challenger, champion, parts)
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    draws, seed = policy.resamples, policy.resample_seed
    _, high = statistics.bootstrap_interval(differences, 1 - 2 * policy.alpha, draws, seed, weights)
    return Shortfall(
        gain=float(statistics.macro_mean(differences, weights)),
        high=float(high),
        p=float(statistics.superiority_p([-d for d in differences], -limit, draws, seed, weights)),
        limit=limit,
        alpha=policy.alpha,
    )


def interval_of_mean(policy: Gate, values: Mapping[str, float]) -> tuple[float, float]:
    """Bootstrap interval of one model's mean on one task."""
    ordered = np.array([values[query] for query in sorted(values)])
    low, high = statistics.bootstrap_interval([ordered], 1 - 2 * policy.alpha, policy.resamples, policy.resample_seed)
    return float(low), float(high)


def read_per_query(folder: Path, metric: str) -> dict[str, dict[str, float]]:
    """One metric of an `evaluation` artefact's per_query.parquet."""
    import pyarrow.parquet as pq

    path = folder / "per_query.parquet"
    with reading(path):
        table = pq.read_table(path, filters=[("metric", "==", metric)])
        columns = [table[name].to_pylist() for name in ("task", "query_id", "value")]
    found: dict[str, dict[str, float]] = {}
    for task, query, value in zip(*columns, strict=True):
        found.setdefault(task, {})[query] = value
    return found


def _paired(
    challenger: PerQuery, champion: PerQuery, parts: Mapping[str, Sequence[str]] | None
) -> tuple[list[str], list[Floats], list[Floats], list[float]]:
    """Tasks, both models' values of each in one order of queries, and the tasks' weights."""
    names = sorted(challenger)
    if set(names) != set(champion):
        raise NvrError(
            f"challenger and champion were scored on different tasks ({names} and {sorted(champion)}): run `nvr evaluate` again"
        )
    pairs = [_aligned(task, challenger[task], champion[task]) for task in names]
    weights = task_weights(names, parts or {})
    return names, [ours for ours, _ in pairs], [theirs for _, theirs in pairs], [weights[task] for task in names]


def _aligned(task: str, challenger: Mapping[str, float], champion: Mapping[str, float]) -> tuple[Floats, Floats]:
    """Both models' values in one order of queries."""
    if challenger.keys() != champion.keys():
        raise NvrError(
            f"challenger and champion were scored on different queries of {task} ({len(challenger)} and {len(champion)}, "
            f"{len(challenger.keys() & champion.keys())} in common): run `nvr evaluate` again"
        )
    order = sorted(challenger)
    ours, theirs = (np.array([values[query] for query in order], np.float64) for values in (challenger, champion))
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        raise NvrError(f"a score on {task} is not finite: the model's vectors are broken; run `nvr evaluate` again")
    return ours, theirs
