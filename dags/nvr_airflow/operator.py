"""What every runner's task shares: its arguments, what becomes of its result, and the link to MLflow.

A runner is a subclass that starts `nvr` with `self.command_line(context)` somewhere, finds the marked line in its stdout
and hands exit status and line to `self.conclude`. It may inherit from a provider's operator as well
(`class X(StageOperator, DockerOperator)`): constructor arguments are passed on.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperator, BaseOperatorLink
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowSkipException

from nvr_airflow import calls
from nvr_airflow.params import FORMS
from nvr_tasks.errors import EXIT_SKIPPED, EXIT_USAGE
from nvr_tasks.stages import ON_DEMAND, RESULT_MARK, STAGES, stage

if TYPE_CHECKING:
    from airflow.sdk.types import TaskInstanceKey

BEGIN, FINISH = "begin", "finish"  # the two commands that open and close a run
WITHIN_AIRFLOWS_S = 3.0  # Airflow kills a task 5 s after asking it to stop; clearing up takes the rest
STAGE_NAMES = frozenset(row.name for row in (*STAGES, *ON_DEMAND))
RECIPE_KEY, RUN_URL_KEY, RESULT_KEY = "recipe", "mlflow_run_url", "result"  # XComs of `begin`; the first also of events


class MLflowRunLink(BaseOperatorLink):
    """Button in the UI: this workflow run in MLflow. Airflow keeps the address as an XCom of the task."""

    name = "MLflow run"

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:  # noqa: ARG002
        """The address, or nothing where MLflow is a file without a web page."""
        url = str(getattr(operator, "mlflow_run_url", None) or "")
        return url if url.startswith(("http://", "https://")) else ""


class ReportLink(BaseOperatorLink):
    """Button in the UI: the report of mining, of the gate or of an ablation, as MLflow shows it."""

    name = "Report"

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:  # noqa: ARG002
        """The address, or nothing for a stage without a report or without an MLflow server."""
        url = str(getattr(operator, "report_url", None) or "")
        return url if url.startswith(("http://", "https://")) else ""


class StageOperator(BaseOperator):
    """A task that runs one `nvr` command.

    Args:
        command: `begin`, a stage, `finish`, or another command that reports like a stage.
        root: where artefacts live.
        recipe: what is passed as --recipe (templated).
        results: upstream results by stage name (templated: give `task.output`).
        part: which part of a mapped stage this is (templated), passed as the option `part_option`.
        options: further options of the command (values templated); those without a value are left out.
        answer: more of them, from a person's word on the decision (templated: give `approve.output`).
        form: which form (of `params.FORMS`) the DAG shows, for the task that reads its answers: other Params than its own
            are refused. What they mean to the recipe goes to `begin`.
        mlflow_run_url: what the link points to (templated).
    """

    template_fields: Sequence[str] = ("recipe", "results", "part", "options", "answer", "mlflow_run_url")
    operator_extra_links = (MLflowRunLink(), ReportLink())
    ui_color = "#e8f4d9"
    where_nvr_is_from = "the nvr command"  # the setting of a runner to look at when the command is not ours
    result_on_stdout = True  # else the runner gets it another way

    def __init__(
        self,
        *,
        command: str,
        root: str,
        recipe: str | None = None,
        results: Mapping[str, Any] | None = None,
        part: str | None = None,
        part_option: str = "shard",
        options: Mapping[str, str] | None = None,
        answer: Mapping[str, str] | None = None,
        form: str | None = None,
        mlflow_run_url: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.command = command
        self.root = root
        self.recipe = recipe
        self.results = results
        self.part = part
        self.part_option = part_option
        self.options = options
        self.answer = answer
        self.form = form
        self.report_url = ""
        self.mlflow_run_url = mlflow_run_url

    def command_line(self, context: Mapping[str, Any]) -> list[str]:
        """The arguments of `nvr`; call it once the templates are rendered."""
        asked = FORMS[self.form] if self.form is not None else None
        if asked is not None and (strange := asked.unknown(context["params"])):
            raise AirflowFailException(
                f"the run was given {', '.join(strange)}, which this DAG does not know; its Params: {', '.join(asked.names)}"
            )
        is_stage = self.command in STAGE_NAMES
        try:
            inputs = calls.inputs_of(stage(self.command), self.results or {}) if is_stage else {}
        except calls.ResultError as error:
            raise AirflowFailException(str(error)) from None
        options = (
            dict(self.options or {})
            | dict(self.answer or {})
            | ({self.part_option: self.part} if self.part is not None else {})
        )
        return calls.arguments(
            self.command,
            root=self.root,
            run_id=context["run_id"],
            recipe=(_recipe_of_event(context) if self.command == BEGIN else None) or self.recipe,
            overrides=asked.overrides(context["params"]) if asked is not None else (),
            inputs=inputs,
            options=options,
            result_line=self.result_on_stdout,
        )

    def conclude(self, status: int, line: str | None, last_words: str, context: Mapping[str, Any]) -> Any:
        """Turn the end of the command into the end of the task.

        Args:
            status: exit status; negative: the signal that ended it.
            line: the marked line of stdout, if there was one.
            last_words: end of stderr, for the message.
            context: of the task.

        Returns:
            What goes into the XCom `return_value`: the result, and for `begin` the list of shards, since Airflow maps
            over nothing else.
        """
        if status == EXIT_USAGE:
            # The same arguments would be refused again: no retry.
            raise AirflowFailException(f"nvr {self.command} refused its arguments or recipe: {last_words}")
        if status not in (0, EXIT_SKIPPED):
            raise AirflowException(f"nvr {self.command} {_ended(status)}: {last_words}")
        if self.command == FINISH:
            return None
        if line is None:
            raise AirflowException(
                f"nvr {self.command} ended with status {status} but printed no line starting with "
                f"{RESULT_MARK!r}: is {self.where_nvr_is_from} of this repository's version?"
            )
        try:
            result = calls.parse_result(line)
        except calls.ResultError as error:
            raise AirflowException(f"nvr {self.command}: {error}") from None
        if status == EXIT_SKIPPED:
            reason = str(result.get("skipped") or "nothing to do")
            context["ti"].xcom_push(key="return_value", value=result)
            raise AirflowSkipException(f"nvr {self.command} did nothing, rightly: {reason}")
        self.report_url = str(result.get("figures", {}).get("report_url") or "")
        self._announce(result, context)
        return self._share(result, context) if self.command == BEGIN else result

    def _announce(self, result: calls.Result, context: Mapping[str, Any]) -> None:
        """Give asset events the facts that consumers want."""
        for asset in self.outlets:
            context["outlet_events"][asset].extra.update(
                {
                    "outputs": result["outputs"],
                    "figures": result.get("figures", {}),
                    "reused": result.get("reused", False),
                    RECIPE_KEY: self.recipe,
                }
            )

    def _share(self, result: calls.Result, context: Mapping[str, Any]) -> list[str]:
        """Publish what all later tasks read from `begin`."""
        figures = result.get("figures", {})
        recipes, shards = result["outputs"].get(RECIPE_KEY, []), figures.get("shards", [])
        if len(recipes) != 1 or not shards:
            raise AirflowException(
                f"nvr begin gave {len(recipes)} recipes and {len(shards)} shards; expected 1 and at least 1"
            )
        self.mlflow_run_url = str(figures.get(RUN_URL_KEY) or "")
        for key, value in {RECIPE_KEY: recipes[0], RUN_URL_KEY: self.mlflow_run_url, RESULT_KEY: result}.items():
            context["ti"].xcom_push(key=key, value=value)
        return [str(shard) for shard in shards]


class PartsOperator(BaseOperator):
    """A list that `begin` counted (its figure `figure`), as a task of its own: Airflow maps over return values only."""

    ui_color = StageOperator.ui_color

    def __init__(self, *, figure: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.figure = figure

    def execute(self, context: Any) -> list[str]:
        """The parts; none when the work is not divided."""
        result = context["ti"].xcom_pull(task_ids=BEGIN, key=RESULT_KEY)
        return [str(part) for part in result["figures"].get(self.figure, [])]


def _recipe_of_event(context: Mapping[str, Any]) -> str | None:
    """The recipe behind the newest asset event that triggered the run; none when a person or the clock did."""
    events = [e for of_asset in (context.get("triggering_asset_events") or {}).values() for e in of_asset]
    newest = max(events, key=lambda event: event.timestamp, default=None)
    found = (newest.extra or {}).get(RECIPE_KEY) if newest is not None else None
    return str(found) if found else None


def _ended(status: int) -> str:
    if status >= 0:
        return f"failed with exit status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:  # e.g. 255, which is told of a container that was lost with its node
        return f"failed with exit status {128 - status}"
    hint = " (out of memory?)" if name == "SIGKILL" else ""
    return f"was ended by {name}{hint}"
