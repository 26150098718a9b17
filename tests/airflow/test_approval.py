"""What a person is asked, and what an answer, a refusal and a silence become."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowFailException, TaskAwaitingInput

from nvr_airflow import approval

FIGURES = {
    "verdict": "needs-approval",
    "model": "m",
    "version": "7",
    "report_url": "http://127.0.0.1:5000/#/report",
    "criteria": [{"name": "queries", "passed": True, "reason": "623 in 2 tasks"}],
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What reaches Airflow's database."""
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "airflow.providers.standard.operators.hitl.upsert_hitl_detail", lambda **detail: seen.append(detail)
    )
    monkeypatch.setattr(approval.ApproveOperator, "_shown", lambda self, _: (self.subject, self.body))
    return seen


def operator(figures: dict[str, Any]) -> approval.ApproveOperator:
    task = approval.ApproveOperator(
        task_id="approve", params=approval.answer_form(), response_timeout=timedelta(hours=1)
    )
    task.result = {"figures": figures}
    return task


@pytest.mark.parametrize("verdict", ["promote", "hold"])
def test_only_what_needs_approval_is_asked(verdict: str, asked: list[Any]) -> None:
    assert operator({**FIGURES, "verdict": verdict}).execute({}) == {}
    assert asked == []


def test_the_question_has_the_numbers_the_report_and_no_as_its_default(asked: list[dict[str, Any]]) -> None:
    class Instance:
        id = "1"

    with pytest.raises(TaskAwaitingInput) as waiting:
        operator(FIGURES).execute({"task_instance": Instance(), "ti": Instance()})
    [detail] = asked
    assert detail["subject"] == "Promote m version 7?"
    assert detail["defaults"] == ["Reject"]
    assert "623 in 2 tasks" in detail["body"]
    assert "http://127.0.0.1:5000/#/report" in detail["body"]
    assert waiting.value.timeout == timedelta(hours=1)


def test_an_older_question_is_not_asked_again_about_another_decision(
    asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Airflow keeps the first text of a task that is cleared: a person would approve what is not shown."""
    monkeypatch.setattr(approval.ApproveOperator, "_shown", lambda self, _: (self.subject, "an older text"))
    with pytest.raises(AirflowFailException, match=r"the decision is another one since.*Start a new run"):
        operator(FIGURES).execute({})
    monkeypatch.setattr(approval.ApproveOperator, "_shown", lambda self, _: ("Promote m version 6?", self.body))
    with pytest.raises(AirflowFailException, match="the decision is another one since"):
        operator(FIGURES).execute({})
    assert asked == []


ANN = {"id": "1", "name": "ann"}


@pytest.mark.parametrize(
    ("chosen", "user", "reason", "options"),
    [
        ("Approve", ANN, "fine", {"approved-by": "ann", "reason": "fine"}),
        ("Reject", ANN, "", {"rejected-by": "ann", "reason": ""}),
        ("Reject", None, "", {"rejected-by": "nobody", "reason": "no answer before the deadline"}),
        ("Approve", None, "", {"rejected-by": "nobody", "reason": "no answer before the deadline"}),
    ],
)
def test_answers(chosen: str, user: dict[str, str] | None, reason: str, options: dict[str, str]) -> None:
    event = {
        "chosen_options": [chosen],
        "params_input": {"reason": reason},
        "responded_at": datetime.now(UTC),
        "responded_by_user": user,
    }
    assert operator(FIGURES).execute_complete({}, event) == options
