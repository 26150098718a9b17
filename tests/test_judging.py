"""The gate's criteria, one by one: each can hold a challenger, and says why with numbers. Chosen scores."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from nvr_tasks.errors import NvrError
from nvr_tasks.evaluation.comparison import Comparison, compare
from nvr_tasks.evaluation.footprint import Footprint
from nvr_tasks.evaluation.tiers import Screening
from nvr_tasks.judging import Evidence, judge, not_looked_at, quick_tier, verdict
from nvr_tasks.policy import Gate

BASE = {"A": 0.10, "B": 0.10}
POLICY = Gate(min_mean=0.3, min_per_task={"B": 0.2}, min_gain_over_base=0.1, max_loss_per_task=0.02, resamples=999)
QUERIES = 200


def per_query(means: Mapping[str, float], seed: int, spread: float = 0.1) -> dict[str, dict[str, float]]:
    """Scores of a model: its mean, and a spread around it that is the same query by query for equal seeds."""
    random = np.random.default_rng(seed)
    found = {}
    for task, mean in means.items():
        values = random.normal(0, spread, QUERIES)
        found[task] = {f"q{i:03}": float(mean + v) for i, v in enumerate(values - values.mean())}
    return found


OLD = {"A": 0.50, "B": 0.42}
BETTER = {"A": 0.56, "B": 0.43}


def evidence(
    challenger: Mapping[str, float], champion: Mapping[str, float] | None, policy: Gate = POLICY, **more
) -> Evidence:
    found: Comparison | None = None
    if champion is not None:
        found = compare(policy, per_query(challenger, 1), per_query(champion, 2))
    queries = dict.fromkeys(challenger, QUERIES)
    return Evidence(challenger, BASE, more.pop("queries", queries), found, **more)


def failed(policy: Gate, given: Evidence) -> list[str]:
    return [c.name for c in judge(policy, given) if not c.passed]


def test_a_better_challenger_meets_every_criterion() -> None:
    given = evidence(BETTER, OLD)
    assert failed(POLICY, given) == []
    assert verdict(POLICY, judge(POLICY, given), given.comparison) == "promote"


def test_the_first_model_needs_no_champion() -> None:
    assert failed(POLICY, evidence(BETTER, None)) == []


@pytest.mark.parametrize(
    ("changes", "challenger", "champion", "held_by"),
    [
        ({"min_mean": 0.51}, BETTER, OLD, "mean nDCG@10"),
        ({"min_per_task": {"B": 0.45}}, BETTER, OLD, "B nDCG@10"),
        ({"min_gain_over_base": 0.41}, BETTER, OLD, "gain over the untrained base"),
        ({"min_gain_over_champion": 0.03}, BETTER, OLD, "gain over the champion"),  # +0.035 ± 0.01 does not show it
        ({}, {"A": 0.80, "B": 0.38}, OLD, "loss on B"),  # wins on average, loses one task
        ({"task_loss": "significant"}, {"A": 0.80, "B": 0.37}, OLD, "loss on B"),
    ],
)
def test_each_criterion_holds_alone(changes: dict, challenger: dict, champion: dict, held_by: str) -> None:
    policy = POLICY.model_copy(update=changes)
    given = evidence(challenger, champion, policy)
    [criterion] = [c for c in judge(policy, given) if not c.passed]
    assert criterion.name == held_by
    assert criterion.to_pass
    assert verdict(policy, judge(policy, given), given.comparison) == "hold"


def test_a_loss_beyond_the_limit_that_may_be_chance_holds_only_when_measured() -> None:
    slightly = {"A": 0.80, "B": 0.42 - 0.022}
    assert failed(POLICY, evidence(slightly, OLD)) == ["loss on B"]
    policy = POLICY.model_copy(update={"task_loss": "significant"})
    assert failed(policy, evidence(slightly, OLD, policy)) == []


def test_an_equal_challenger_is_held_or_not_inferior_as_the_policy_says() -> None:
    same = Evidence(OLD, BASE, dict.fromkeys(OLD, QUERIES), compare(POLICY, per_query(OLD, 1), per_query(OLD, 1)))
    assert failed(POLICY, same) == ["gain over the champion"]
    policy = POLICY.model_copy(update={"comparison": "non_inferiority", "non_inferiority_margin": 0.02})
    given = evidence(OLD, OLD, policy)
    assert failed(policy, given) == []
    assert verdict(policy, judge(policy, given), given.comparison) == "promote"
    careful = policy.model_copy(update={"approval": "unless_superior"})
    assert verdict(careful, judge(careful, given), given.comparison) == "needs-approval"
    tight = policy.model_copy(update={"non_inferiority_margin": 0.001})
    assert failed(tight, evidence(OLD, OLD, tight)) == ["not inferior to the champion"]


def test_approval_is_asked_only_for_what_would_pass() -> None:
    for approval, better, worse in (("always", "needs-approval", "hold"), ("unless_superior", "promote", "hold")):
        policy = POLICY.model_copy(update={"approval": approval})
        for challenger, expected in ((BETTER, better), ({"A": 0.4, "B": 0.4}, worse)):
            given = evidence(challenger, OLD, policy)
            assert verdict(policy, judge(policy, given), given.comparison) == expected


def test_a_bound_that_is_met_exactly_is_met() -> None:
    policy = POLICY.model_copy(update={"min_gain_over_champion": -1.0, "min_gain_over_base": 0.46, "min_mean": 0.56})
    constant = {task: dict.fromkeys(map(str, range(QUERIES)), value) for task, value in OLD.items()}
    ours, theirs = {**OLD, "A": 0.70}, {**OLD, "A": 0.72}
    both = ({**constant, "A": dict.fromkeys(constant["A"], m["A"])} for m in (ours, theirs))
    given = Evidence(ours, BASE, dict.fromkeys(OLD, QUERIES), compare(policy, *both))
    assert failed(policy, given) == []


def test_a_task_of_one_query_holds_and_does_not_break() -> None:
    one = {**per_query(BETTER, 1), "B": {"q": 0.4}}, {**per_query(OLD, 2), "B": {"q": 0.4}}
    given = Evidence(BETTER, BASE, {"A": QUERIES, "B": 1}, compare(POLICY, *one))
    assert "queries" in failed(POLICY, given)
    assert given.comparison is not None
    assert 0 < given.comparison.detectable < 10


def test_the_champion_itself_is_held_and_says_so() -> None:
    criteria = judge(POLICY, evidence(BETTER, None, is_champion=True))
    assert [c.reason for c in criteria if not c.passed] == [
        "this version is the champion already; there is nothing to promote"
    ]


def test_too_few_queries_hold_and_name_the_task() -> None:
    [criterion] = [c for c in judge(POLICY, evidence(BETTER, OLD, queries={"A": 200, "B": 19})) if not c.passed]
    assert criterion.name == "queries"
    assert "B has 19" in criterion.reason
    assert "at least 20" in criterion.reason


def test_reasons_carry_the_numbers_and_the_power() -> None:
    [reason] = [c.reason for c in judge(POLICY, evidence(BETTER, OLD)) if c.name == "gain over the champion"]
    for part in ("+0.0350", "90% interval", "p = ", "α = 0.05", "400 queries", "80%"):
        assert part in reason


@pytest.mark.parametrize("changes", [{}, {"comparison": "non_inferiority", "non_inferiority_margin": 0.001}])
@pytest.mark.parametrize(("shift", "more"), [(0.005, True), (-0.03, False)])
def test_more_queries_are_offered_only_to_a_challenger_that_is_ahead(changes: dict, shift: float, more: bool) -> None:
    policy = POLICY.model_copy(update={**changes, "max_loss_per_task": 1.0})
    given = evidence({task: value + shift for task, value in OLD.items()}, OLD, policy)
    [criterion] = [c for c in judge(policy, given) if not c.passed]
    assert ("more queries than 400" in criterion.to_pass) is more
    found = given.comparison
    assert found is not None
    visible = f"{policy.margin + found.detectable:+.4f}"
    assert f"about {visible}" in criterion.to_pass
    assert (
        f"with 400 queries, a true difference of {visible} or more meets this with a chance of 80%" in criterion.reason
    )
    assert ("gate.non_inferiority_margin" in criterion.to_pass) == bool(changes)


def test_what_the_quick_tier_says_is_a_test_and_one_task_is_one() -> None:
    found = Screening(True, {"A": 80}, {"A": 0.4}, {"A": 0.42}, 0.4, None, gain=-0.02, high=0.01, p=0.1197, limit=0.0)
    assert "one-sided bound +0.0100, p = 0.1197 for a gain below +0.0000;" in quick_tier(found, moved=False).reason
    [queries] = [c for c in judge(POLICY, Evidence({"B": 0.5}, {"B": 0.1}, {"B": 40})) if c.name == "queries"]
    assert queries.reason == "40 in 1 task, which has at least 20"


CHEAP, DEAR = Footprint(60, 384, 12.5, 5.0), Footprint(130, 768, 25, 11.0)


@pytest.mark.parametrize(
    ("changes", "held_by", "told"),
    [
        ({"same_dimension": True}, "same dimension", "768 numbers per vector, the champion has 384"),
        ({"max_dimension": 512}, "dimension", "768 numbers per vector, at most 512 allowed"),
        ({"max_model_mb": 100}, "model size", "130 MB"),
        ({"max_index_mb": 20}, "index size", "25 MB"),
        ({"max_latency_ratio": 2}, "query latency", "2.20 times"),
        ({"max_recall_loss": 0.01}, "Recall@100", "0.9000 → 0.8800"),
    ],
)
def test_guards_hold_alone(changes: dict, held_by: str, told: str) -> None:
    policy = POLICY.model_copy(update=changes)
    given = evidence(BETTER, OLD, policy, footprint=DEAR, champion_footprint=CHEAP, recall=(0.88, 0.90))
    [criterion] = [c for c in judge(policy, given) if not c.passed]
    assert criterion.name == held_by
    assert told in criterion.reason
    given = evidence(BETTER, OLD, policy, footprint=CHEAP, champion_footprint=CHEAP, recall=(0.90, 0.90))
    assert failed(policy, given) == []


def test_scores_on_other_tasks_or_queries_are_refused() -> None:
    with pytest.raises(NvrError, match="different tasks"):
        judge(POLICY, Evidence({"A": 0.1}, BASE, {"A": 30}))
    ours, theirs = per_query(OLD, 1), per_query(OLD, 2)
    del theirs["B"]["q000"]
    with pytest.raises(NvrError, match=r"different queries of B \(200 and 199, 199 in common\)"):
        compare(POLICY, ours, theirs)
    theirs["B"]["q000"] = float("nan")
    with pytest.raises(NvrError, match="not finite"):
        compare(POLICY, ours, theirs)


@pytest.mark.parametrize("comparison", ["superiority", "non_inferiority"])
@pytest.mark.parametrize("champion", [OLD, None])
def test_what_a_stopped_challenger_is_not_judged_by_is_what_others_are(comparison: str, champion: dict | None) -> None:
    guards = {"max_recall_loss": 0.1, "same_dimension": True, "max_dimension": 9, "max_model_mb": 9.0}
    more = {"max_index_mb": 9.0, "max_latency_ratio": 2.0, "comparison": comparison}
    cost = Footprint(1.0, 8, 1.0, 1.0)
    for changes in ({"comparison": comparison}, {**guards, **more}):
        policy = POLICY.model_copy(update=changes)
        rest = (
            {"footprint": cost, "champion_footprint": cost, "recall": (0.5, 0.5)} if champion else {"footprint": cost}
        )
        judged = judge(policy, evidence(BETTER, champion, policy, **(rest if len(changes) > 1 else {})))
        left = not_looked_at(policy, ["B", "A"], champion is not None)
        assert [c.name for c in left] == [c.name for c in judged]
        assert not any(c.passed or c.looked_at for c in left)
        assert verdict(policy, left, None) == "hold"
