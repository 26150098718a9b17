"""The gate's criteria: scores, comparison and footprint held against the policy. No I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nvr_tasks.errors import NvrError
from nvr_tasks.evaluation.comparison import Comparison, TaskComparison
from nvr_tasks.evaluation.footprint import Footprint
from nvr_tasks.evaluation.tiers import Screening
from nvr_tasks.policy import Gate

PROMOTE, HOLD, NEEDS_APPROVAL = "promote", "hold", "needs-approval"
OVER_BASE, OVER_CHAMPION = "gain over the untrained base", "gain over the champion"
ROUNDING = 1e-9  # what a bound may be missed by: 0.52 − 0.50 is more than 0.02 in floating point

Scores = Mapping[str, float]  # task → nDCG@10


@dataclass(frozen=True)
class Criterion:
    """One condition of the gate, met or not, with the numbers that say why and what would meet it."""

    name: str
    passed: bool
    reason: str
    to_pass: str = ""  # of a condition that is not met
    looked_at: bool = True  # False: the quick tier had stopped the challenger before, so nobody knows


@dataclass(frozen=True)
class Evidence:
    """All that a verdict rests on.

    Attributes:
        challenger: nDCG@10 per task, from 0 to 1.
        base: of the untrained student.
        queries: number of queries per task.
        weights: of the tasks in the mean; equal if unset.
        comparison: with the champion; None when there is none, or the challenger is it.
        is_champion: the challenger is the champion already.
        recall: mean Recall@100 of challenger and champion, for `max_recall_loss`.
        footprint: what the challenger costs to serve, where the policy asks.
        champion_footprint: the champion's.
    """

    challenger: Scores
    base: Scores
    queries: Mapping[str, int]
    comparison: Comparison | None = None
    is_champion: bool = False
    recall: tuple[float, float] | None = None
    footprint: Footprint | None = None
    weights: Mapping[str, float] | None = None
    champion_footprint: Footprint | None = None


def judge(policy: Gate, evidence: Evidence) -> list[Criterion]:
    """One criterion per condition of the policy.

    Raises:
        NvrError: challenger and base were scored on different tasks.
    """
    challenger, base = evidence.challenger, evidence.base
    if set(base) != set(challenger):
        raise NvrError(
            f"challenger and base were scored on different tasks ({sorted(challenger)} and {sorted(base)}): run `nvr evaluate` again"
        )
    mean, base_mean = _mean(challenger, evidence.weights), _mean(base, evidence.weights)
    criteria = [_enough_queries(policy, evidence.queries), _floor("mean nDCG@10", mean, policy.min_mean)]
    criteria += [
        _floor(f"{task} nDCG@10", challenger[task], floor) for task, floor in sorted(policy.min_per_task.items())
    ]
    gain = mean - base_mean
    criteria.append(
        _criterion(
            OVER_BASE,
            gain >= policy.min_gain_over_base - ROUNDING,
            f"{mean:.4f} − {base_mean:.4f} = {gain:+.4f}, at least {policy.min_gain_over_base:+.4f} wanted",
            f"a mean of {base_mean + policy.min_gain_over_base:.4f}, {policy.min_gain_over_base - gain:.4f} more",
        )
    )
    if evidence.is_champion:
        criteria.append(
            Criterion("new model", False, "this version is the champion already; there is nothing to promote")
        )
    elif evidence.comparison is None:
        criteria.append(Criterion(OVER_CHAMPION, True, "there is no champion yet"))
    else:
        criteria.append(_against_champion(policy, evidence.comparison))
        criteria += [_task_loss(policy, task) for task in evidence.comparison.tasks]
    return [*criteria, *_guards(policy, evidence)]


def quick_tier(found: Screening, moved: bool) -> Criterion:
    """What the quick tier said, as a criterion.

    Args:
        moved: the champion is another one than the tier compared with.
    """
    tasks = ", ".join(f"{task} {score:.4f}" for task, score in found.challenger.items())
    told = [f"mean nDCG@10 {found.mean:.4f} over {sum(found.queries.values()):,} queries of the quick tier ({tasks})"]
    wanted = []
    if found.min_mean is not None:
        told.append(f"at least {found.min_mean:.4f} wanted")
        wanted.append(f"a mean of {found.min_mean:.4f} there")
    if found.gain is not None and found.high is not None and found.p is not None and found.limit is not None:
        told.append(
            f"{found.gain:+.4f} against the champion{' of then, which has moved since' if moved else ''}, one-sided bound "
            f"{found.high:+.4f}, p = {_p(found.p)} for a gain below {found.limit:+.4f}"
        )
        wanted.append(f"a gain there that is not shown to be below {found.limit:+.4f}")
    told.append("the challenger falls short, nothing else was scored" if found.stopped else "worth scoring on the rest")
    return _criterion("quick tier", not found.stopped, "; ".join(told), " and ".join(wanted))


def not_looked_at(policy: Gate, tasks: Sequence[str], against_champion: bool) -> list[Criterion]:
    """The other criteria of a challenger that the quick tier has stopped, by the names that `judge` gives them.

    Args:
        tasks: that the full verdict would be about.
        against_champion: there is a champion to compare with.
    """
    names = ["queries", "mean nDCG@10", *(f"{task} nDCG@10" for task in sorted(policy.min_per_task)), OVER_BASE]
    names.append(_over_champion(policy) if against_champion else OVER_CHAMPION)
    if against_champion:
        names += [f"loss on {task}" for task in sorted(tasks)]
    guards = (
        ("Recall@100", against_champion and policy.max_recall_loss is not None),
        ("same dimension", against_champion and policy.same_dimension),
        ("dimension", policy.max_dimension is not None),
        ("model size", policy.max_model_mb is not None),
        ("index size", policy.max_index_mb is not None),
        ("query latency", against_champion and policy.max_latency_ratio is not None),
    )
    names += [name for name, wanted in guards if wanted]
    return [Criterion(name, False, "not looked at: the quick tier stopped", looked_at=False) for name in names]


def verdict(policy: Gate, criteria: list[Criterion], comparison: Comparison | None) -> str:
    """promote, hold or needs-approval."""
    if not all(c.passed for c in criteria):
        return HOLD
    unproven = comparison is not None and not comparison.superior
    if policy.approval == "always" or (policy.approval == "unless_superior" and unproven):
        return NEEDS_APPROVAL
    return PROMOTE


def _against_champion(policy: Gate, found: Comparison) -> Criterion:
    numbers = f"{found.gain:+.4f} in the mean, {found.level:.0%} interval {found.low:+.4f} to {found.high:+.4f}, p = {_p(found.p)}"
    visible = f"{found.margin + found.detectable:+.4f}"  # a true difference that this benchmark would show
    could_see = f"with {found.queries:,} queries, a true difference of {visible} or more meets this with a chance of {policy.power:.0%}"
    # More queries narrow the interval around the measured gain: of use only to a gain on the right side of the margin.
    more = f"more queries than {found.queries:,}" if found.gain > found.margin else ""
    if policy.comparison == "superiority":
        wanted = f"a gain of more than {found.margin:+.4f} has to be shown at α = {policy.alpha:g}"
        ways = [f"a gain of about {visible} with this benchmark", more]
    else:
        wanted = f"a loss of {-found.margin:.4f} or more has to be ruled out at α = {policy.alpha:g}"
        ways = [
            f"a true difference of about {visible} or more with this benchmark",
            more,
            f"a wider gate.non_inferiority_margin than {-found.margin:.4f}",
        ]
    to_pass = ", or ".join(way for way in ways if way)
    return _criterion(_over_champion(policy), found.passed, f"{numbers}; {wanted}; {could_see}", to_pass)


def _over_champion(policy: Gate) -> str:
    return OVER_CHAMPION if policy.comparison == "superiority" else "not inferior to the champion"


def _task_loss(policy: Gate, task: TaskComparison) -> Criterion:
    allowed = policy.max_loss_per_task
    loss = -task.difference
    numbers = f"{task.champion:.4f} → {task.challenger:.4f} ({task.difference:+.4f}, interval {task.low:+.4f} to {task.high:+.4f})"
    to_pass = (
        f"{task.task} at {task.champion - allowed:.4f} or more, {max(0.0, loss - allowed):.4f} above what was measured"
    )
    if policy.task_loss == "measured":
        return _criterion(
            f"loss on {task.task}",
            loss <= allowed + ROUNDING,
            f"{numbers}, a loss of at most {allowed:.4f} allowed",
            to_pass,
        )
    return _criterion(
        f"loss on {task.task}",
        not task.p_loss <= policy.alpha,
        f"{numbers}; p = {_p(task.p_loss)} (Holm) for a loss beyond {allowed:.4f}, which must not be shown at α = {policy.alpha:g}",
        to_pass,
    )


def _enough_queries(policy: Gate, queries: Mapping[str, int]) -> Criterion:
    short = {task: n for task, n in sorted(queries.items()) if n < policy.min_queries}
    if not short:
        tasks = "1 task, which has" if len(queries) == 1 else f"{len(queries)} tasks, each with"
        reason = f"{sum(queries.values()):,} in {tasks} at least {policy.min_queries}"
        return Criterion("queries", True, reason)
    named = ", ".join(f"{task} has {n}" for task, n in short.items())
    return Criterion(
        "queries",
        False,
        f"{named}; a verdict needs at least {policy.min_queries} queries of each task",
        "a benchmark with more queries, data.benchmark without these tasks, or a lower gate.min_queries",
    )


def _guards(policy: Gate, evidence: Evidence) -> list[Criterion]:
    """Conditions beside quality; those that compare need a champion."""
    criteria = []
    if policy.max_recall_loss is not None and evidence.recall is not None:
        ours, theirs = evidence.recall
        criteria.append(
            _criterion(
                "Recall@100",
                theirs - ours <= policy.max_recall_loss + ROUNDING,
                f"{theirs:.4f} → {ours:.4f} in the mean, a loss of at most {policy.max_recall_loss:.4f} allowed",
                f"a mean Recall@100 of {theirs - policy.max_recall_loss:.4f}",
            )
        )
    ours_, theirs_ = evidence.footprint, evidence.champion_footprint
    if ours_ is None:
        return criteria
    if policy.same_dimension and theirs_ is not None:
        criteria.append(
            _criterion(
                "same dimension",
                ours_.dimension == theirs_.dimension,
                f"{ours_.dimension} numbers per vector, the champion has {theirs_.dimension}",
                f"vectors of {theirs_.dimension} numbers, or gate.same_dimension=false and new indexes everywhere",
            )
        )
    limits: tuple[tuple[str, float | None, float | None, str], ...] = (
        ("dimension", policy.max_dimension, ours_.dimension, "numbers per vector"),
        ("model size", policy.max_model_mb, ours_.model_mb, "MB of weights"),
        ("index size", policy.max_index_mb, ours_.index_mb, "MB as float32 over the benchmark's corpora"),
    )
    for name, limit, value, unit in limits:
        if limit is not None and value is not None:
            reason = f"{value:,.6g} {unit}, at most {limit:,.6g} allowed"
            criteria.append(_criterion(name, value <= limit, reason, f"at most {limit:,.6g} {unit}"))
    if policy.max_latency_ratio is not None and theirs_ is not None:
        ratio = ours_.p95_ms / theirs_.p95_ms
        criteria.append(
            _criterion(
                "query latency",
                ratio <= policy.max_latency_ratio,
                f"p95 {ours_.p95_ms:.2f} ms, the champion's {theirs_.p95_ms:.2f} ms in the same process: {ratio:.2f} times, "
                f"at most {policy.max_latency_ratio:g} times allowed",
                f"a p95 of {policy.max_latency_ratio * theirs_.p95_ms:.2f} ms on this machine",
            )
        )
    return criteria


def _floor(name: str, value: float, floor: float) -> Criterion:
    return _criterion(
        name,
        value >= floor - ROUNDING,
        f"{value:.4f}, at least {floor:.4f} wanted",
        f"{floor:.4f}, {floor - value:.4f} more",
    )


def _criterion(name: str, passed: bool, reason: str, to_pass: str) -> Criterion:
    return Criterion(name, bool(passed), reason, "" if passed else to_pass)


def _mean(scores: Scores, weights: Mapping[str, float] | None) -> float:
    return sum(scores.values()) / len(scores) if weights is None else sum(weights[t] * s for t, s in scores.items())


def _p(p: float) -> str:
    return f"{p:.4f}" if p >= 0.001 else f"{p:.1g}"
