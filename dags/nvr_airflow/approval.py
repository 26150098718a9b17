"""A person's word on a decision that needs it: Airflow's human in the loop, the report at hand, a deadline, default no."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from airflow.providers.standard.operators.hitl import HITLOperator
from airflow.sdk import Param
from airflow.sdk.exceptions import AirflowFailException

APPROVE, REJECT = "Approve", "Reject"
NEEDS_APPROVAL = "needs-approval"


def answer_form() -> dict[str, Param]:
    """What a person may add to the answer. To be given as `params`, which Airflow merges with those of the DAG."""
    return {"reason": Param("", type="string", maxLength=2000, title="Reason", description="For the record.")}


class ApproveOperator(HITLOperator):
    """Asks only when the gate's verdict is `needs-approval`; else it passes at once.

    Args:
        result: the gate's result (templated: give `gate.output`).

    A person approves what is shown, so a question whose text is not of this decision is not asked: the task fails.

    The XCom `return_value` is what `nvr promote` is told (its options): nothing when nobody was asked, else what was
    said, by whom and why. A deadline that passes is a rejection by nobody.
    """

    template_fields: Sequence[str] = ("subject", "body", "result")

    def __init__(self, *, result: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(
            subject="Promote this model?",
            options=[APPROVE, REJECT],
            defaults=REJECT,
            **kwargs,
        )
        self.result = result

    def execute(self, context: Any) -> Any:
        """Ask, if there is something to ask."""
        figures = (self.result or {}).get("figures", {})
        if figures.get("verdict") != NEEDS_APPROVAL:
            self.log.info("the verdict is %s: nobody has to be asked", figures.get("verdict"))
            return {}
        self.subject = f"Promote {figures['model']} version {figures['version']}?"
        self.body = question(figures)
        if self._shown(context) != (self.subject, self.body):
            raise AirflowFailException(
                "Airflow keeps the text of the first question that this task asked in this run, and the decision is another one "
                "since: nobody can be asked about it here. Start a new run (what is there is reused), or decide by hand: "
                "nvr promote --input decision=… --approved-by NAME --reason WHY"
            )
        return super().execute(context)

    def _shown(self, context: Any) -> tuple[str, str | None]:
        """Put the question to Airflow; what people will see of it, which is an older one if the task was cleared."""
        from airflow.sdk.execution_time.comms import CreateHITLDetailPayload
        from airflow.sdk.execution_time.task_runner import SUPERVISOR_COMMS

        asked = CreateHITLDetailPayload(
            ti_id=context["task_instance"].id,
            options=self.options,
            subject=self.subject,
            body=self.body,
            defaults=self.defaults,
            multiple=self.multiple,
            params=self.serialized_params,
            assigned_users=[],
        )
        kept: Any = SUPERVISOR_COMMS.send(msg=asked)
        return kept.subject, kept.body

    def execute_complete(self, context: Any, event: dict[str, Any]) -> Any:
        """The answer, or the deadline's, as the options of `nvr promote`."""
        return answer(super().execute_complete(context, event))


def question(figures: Mapping[str, Any]) -> str:
    """What a person reads before deciding: the criteria with their numbers, and where the report is."""
    champion = figures.get("champion")
    against = f"Champion: version {champion}." if champion else "There is no champion yet."
    lines = [f"- {'✓' if c['passed'] else '✗'} **{c['name']}**: {c['reason']}" for c in figures["criteria"]]
    url = str(figures.get("report_url") or "")
    report = (
        f"[The whole report]({url})" if url.startswith(("http://", "https://")) else "`nvr show` prints the decision."
    )
    return "\n".join([f"{report} {against}", "", *lines, "", "No answer before the deadline counts as *Reject*."])


def answer(payload: Mapping[str, Any]) -> dict[str, str]:
    """An answer of Airflow's as options of `nvr promote`."""
    approved = payload["chosen_options"] == [APPROVE]
    user = payload.get("responded_by_user") or {}
    name = str(user.get("name") or user.get("id") or "")
    reason = str((payload.get("params_input") or {}).get("reason") or "")
    if not name:
        return {"rejected-by": "nobody", "reason": "no answer before the deadline"}
    return {"approved-by" if approved else "rejected-by": name, "reason": reason}
