"""The gate's criteria, one by one: each can hold a challenger, and says why with numbers."""

import pytest

from nvr_tasks.config import Gate
from nvr_tasks.errors import NvrError
from nvr_tasks.gate import judge
from nvr_tasks.report import decision_report

GOOD, BASE, OLD = {"A": 0.60, "B": 0.40}, {"A": 0.10, "B": 0.10}, {"A": 0.55, "B": 0.41}
POLICY = Gate(
    min_mean=0.3, min_per_task={"B": 0.2}, min_gain_over_base=0.1, min_gain_over_champion=0.01, max_loss_per_task=0.02
)


def failed(*args, **kwargs) -> list[str]:
    return [c.name for c in judge(*args, **kwargs) if not c.passed]


def test_a_better_challenger_meets_every_criterion() -> None:
    assert failed(POLICY, GOOD, BASE, OLD) == []


def test_the_first_model_needs_no_champion() -> None:
    assert failed(POLICY, GOOD, BASE, None) == []


@pytest.mark.parametrize(
    ("policy", "challenger", "champion", "held_by"),
    [
        (POLICY.model_copy(update={"min_mean": 0.51}), GOOD, OLD, "mean nDCG@10"),
        (POLICY.model_copy(update={"min_per_task": {"B": 0.41}}), GOOD, OLD, "B nDCG@10"),
        (POLICY.model_copy(update={"min_gain_over_base": 0.41}), GOOD, OLD, "gain over the untrained base"),
        (POLICY, GOOD, {"A": 0.59, "B": 0.40}, "gain over the champion"),  # +0.005 is not more than 0.01
        (POLICY, {"A": 0.70, "B": 0.37}, OLD, "loss on B"),  # wins on average, loses one task
    ],
)
def test_each_criterion_holds_alone(policy: Gate, challenger, champion, held_by: str) -> None:
    assert failed(policy, challenger, BASE, champion) == [held_by]


def test_an_equal_challenger_is_held() -> None:
    policy = Gate()
    assert failed(policy, GOOD, BASE, GOOD) == ["gain over the champion"]


def test_the_champion_itself_is_held_and_says_so() -> None:
    criteria = judge(POLICY, GOOD, BASE, None, is_champion=True)
    assert [c.reason for c in criteria if not c.passed] == [
        "this version is the champion already; there is nothing to promote"
    ]


def test_reasons_carry_the_numbers() -> None:
    [reason] = [c.reason for c in judge(POLICY, GOOD, BASE, OLD) if c.name == "gain over the champion"]
    assert "0.5000" in reason
    assert "0.4800" in reason
    assert "+0.0200" in reason
    assert "+0.0100" in reason


def test_scores_on_different_tasks_are_refused() -> None:
    with pytest.raises(NvrError, match="different tasks"):
        judge(POLICY, GOOD, {"A": 0.1}, None)


def test_nan_never_promotes() -> None:
    nan = float("nan")
    assert set(failed(POLICY, {"A": nan, "B": 0.4}, BASE, OLD)) >= {
        "mean nDCG@10",
        "gain over the champion",
        "loss on A",
    }


def test_the_report_escapes_and_needs_no_network() -> None:
    decision = {
        "verdict": "hold",
        "criteria": [{"name": "<b>x</b>", "passed": False, "reason": "a < b"}],
        "model": "m<script>",
        "challenger": "2",
        "champion": "1",
        "dry_run": True,
        "scores": {"challenger": {"A": 0.5}, "base": {"A": 0.1}},
        "evaluations": {"evaluation": "ff"},
        "model_artifact": "aa",
        "recipe": "r",
        "pipeline_run": None,
    }
    html = decision_report(decision)
    assert "<script" not in html
    assert "&lt;b&gt;x&lt;/b&gt;" in html
    assert "http" not in html
