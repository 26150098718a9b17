"""The process runner against commands that behave, misbehave and refuse to die."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowSkipException

from nvr_airflow.process import ProcessStageOperator

Script = Callable[[str], str]
RESULT = {"stage": "download", "outputs": {"dataset": ["d"]}, "figures": {"documents": 3}, "skipped": None}
PRINT_RESULT = f"print('NVR_RESULT ' + {json.dumps(json.dumps(RESULT))})"


class Task:
    """Stands in for Airflow's task instance."""

    def __init__(self) -> None:
        self.pushed: dict[str, Any] = {}

    def xcom_push(self, key: str, value: Any) -> None:
        self.pushed[key] = value


def operator(nvr_bin: str, tmp_path: Path, command: str = "download", **kwargs: Any) -> ProcessStageOperator:
    return ProcessStageOperator(
        task_id=command, command=command, root=str(tmp_path), nvr_bin=nvr_bin, workdir=str(tmp_path), **kwargs
    )


def execute(task: ProcessStageOperator) -> tuple[Any, Task]:
    ti = Task()
    context = {"run_id": "manual__1", "params": {}, "ti": ti, "outlet_events": {}}
    # Airflow's guard against calling execute() by hand is for DAG authors, not for this test.
    return type(task).execute.__wrapped__(task, context), ti  # type: ignore[attr-defined]


def test_the_result_is_found_among_noise(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    class Log:
        def info(self, message: str, *args: object) -> None:
            told.append(message % args)

    monkeypatch.setattr(ProcessStageOperator, "log", Log())
    noise = "print('noise'); print('[download] half', file=sys.stderr); sys.stderr.write('10%\\r20%\\rend'); print('NVR_RES')"
    result, _ = execute(operator(script(f"{noise}\n{PRINT_RESULT}\nprint('more')"), tmp_path))
    assert result == RESULT
    assert set(told[1:]) == {"noise", "[download] half", "10%", "20%", "end", "NVR_RES", "more"}
    assert told[0].startswith("$ ")


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        (
            "print('nvr: unknown key', file=sys.stderr); sys.exit(2)",
            AirflowFailException,
            "refused .*: nvr: unknown key",
        ),
        (
            "print('x\\nnvr: disk full', file=sys.stderr); sys.exit(1)",
            AirflowException,
            "exit status 1: nvr: disk full",
        ),
        ("sys.exit(3)", AirflowException, "exit status 3: it said nothing on stderr"),
        ("os.kill(os.getpid(), signal.SIGKILL)", AirflowException, r"ended by SIGKILL \(out of memory\?\)"),
        ("print('fine')", AirflowException, "printed no line starting with 'NVR_RESULT '"),
        ("print('NVR_RESULT {')", AirflowException, "the result line is not JSON"),
        ("sys.stdout.buffer.write(bytes(range(256)) * 9)", AirflowException, "printed no line"),
        ("sys.stdout.write('x' * 5_000_000)", AirflowException, "printed no line"),
    ],
)
def test_a_failure_says_what_happened(script: Script, tmp_path: Path, body: str, error: type, message: str) -> None:
    with pytest.raises(error, match=f"(?s){message}") as caught:
        execute(operator(script(body), tmp_path))
    # Only a refused recipe is hopeless; everything else is worth a retry.
    assert isinstance(caught.value, AirflowFailException) == (error is AirflowFailException)


def test_a_held_promotion_is_a_skip_and_its_result_is_kept(script: Script, tmp_path: Path) -> None:
    held = json.dumps({**RESULT, "skipped": "verdict: hold"})
    ti = Task()
    task = operator(script(f"print('NVR_RESULT ' + {held!r}); sys.exit(99)"), tmp_path)
    with pytest.raises(AirflowSkipException, match="verdict: hold"):
        type(task).execute.__wrapped__(  # type: ignore[attr-defined]
            task, {"run_id": "1", "params": {}, "ti": ti, "outlet_events": {}}
        )
    assert ti.pushed["return_value"]["skipped"] == "verdict: hold"


@pytest.mark.parametrize("nvr_bin", ["/absent/nvr", "/etc/passwd"])
def test_a_missing_command_says_how_to_get_it(tmp_path: Path, nvr_bin: str) -> None:
    with pytest.raises(AirflowFailException, match=f"cannot start {nvr_bin} .*`make setup`"):
        execute(operator(nvr_bin, tmp_path))


def test_the_stage_sees_no_airflow(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW__CORE__FERNET_KEY", "secret")
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    monkeypatch.setenv("NVR_DATA", "/data")
    monkeypatch.setenv("PRIVATE_INDEX", "x")
    body = "r = {'outputs': {}, 'env': dict(os.environ), 'cwd': os.getcwd(), 'group': os.getpgid(0) == os.getpid()}\n"
    result, _ = execute(
        operator(script(f"{body}print('NVR_RESULT ' + json.dumps(r))"), tmp_path, pass_env=["PRIVATE_INDEX"])
    )
    assert not [name for name in result["env"] if name.startswith(("AIRFLOW", "PYTHONPATH"))]
    assert result["env"]["NVR_DATA"] == "/data"
    assert result["env"]["PRIVATE_INDEX"] == "x"
    assert result["cwd"] == str(tmp_path)
    assert result["group"]


def test_begin_shares_recipe_link_and_shards(script: Script, tmp_path: Path) -> None:
    result = {
        "outputs": {"recipe": ["/r/recipe.yaml"]},
        "figures": {"shards": ["0/2", "1/2"], "mlflow_run_url": "http://m/#/runs/1"},
    }
    task = operator(script(f"print('NVR_RESULT ' + {json.dumps(result)!r})"), tmp_path, command="begin")
    ti = Task()
    params = {
        "teacher": None,
        "mining_method": "as in the recipe",
        "mining_threshold": None,
        "promote": True,
        "overrides": [],
    }
    shards = type(task).execute.__wrapped__(  # type: ignore[attr-defined]
        task, {"run_id": "1", "params": params, "ti": ti, "outlet_events": {}}
    )
    assert shards == ["0/2", "1/2"]
    assert ti.pushed == {"recipe": "/r/recipe.yaml", "mlflow_run_url": "http://m/#/runs/1", "result": result}
    link = next(link for link in task.operator_extra_links if link.name == "MLflow run")
    assert link.get_link(task, ti_key=None) == "http://m/#/runs/1"  # type: ignore[arg-type]


@dataclass
class Event:
    """Of an asset, as Airflow hands it to the run that it triggered."""

    timestamp: int
    extra: dict[str, Any]


def test_a_triggered_run_works_on_the_recipe_behind_the_newest_event(tmp_path: Path) -> None:
    """By the clock or by hand: on that of the form."""
    task = operator("/bin/true", tmp_path, command="begin", recipe="demo", form="recipe")
    context = {"run_id": "1", "params": {"recipe": "demo", "overrides": []}}
    assert "--recipe=demo" in task.command_line(context)
    assert "--recipe=demo" in task.command_line(context | {"triggering_asset_events": {}})
    events = {"a": [Event(1, {"recipe": "old"}), Event(3, {"recipe": "file:///r/new.yaml"})], "b": [Event(2, {})]}
    assert "--recipe=file:///r/new.yaml" in task.command_line(context | {"triggering_asset_events": events})
    assert "--recipe=demo" in task.command_line(context | {"triggering_asset_events": {"b": [Event(2, {})]}})


def test_events_say_which_recipe_is_behind_them(script: Script, tmp_path: Path) -> None:
    from types import SimpleNamespace

    from airflow.sdk import Asset

    asset = Asset("news")
    task = operator(script(PRINT_RESULT), tmp_path, recipe="file:///r/kept.yaml", outlets=[asset])
    told = SimpleNamespace(extra={})
    context = {"run_id": "1", "params": {}, "ti": Task(), "outlet_events": {asset: told}}
    type(task).execute.__wrapped__(task, context)  # type: ignore[attr-defined]
    assert told.extra["recipe"] == "file:///r/kept.yaml"


def test_a_failed_begin_result_is_refused(script: Script, tmp_path: Path) -> None:
    task = operator(script(PRINT_RESULT), tmp_path, command="finish")
    assert execute(task)[0] is None  # finish has no result, whatever it prints


# ── ending ───────────────────────────────────────────────────────────────────────────────────────────────────────

FAMILY = """
child = subprocess.Popen([sys.executable, "-c", "import time; print('child', flush=True); time.sleep(600)"])
with open("pids.json", "w") as f: json.dump([os.getpid(), child.pid], f)
"""
STUBBORN = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"


def pids(tmp_path: Path) -> list[int]:
    file = tmp_path / "pids.json"
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError):
            return list(json.loads(file.read_text()))
        time.sleep(0.02)
    raise AssertionError("the stage did not start")


def gone(numbers: list[int], within_s: float = 5) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        alive = [n for n in numbers if psutil.pid_exists(n) and psutil.Process(n).status() != psutil.STATUS_ZOMBIE]
        if not alive:
            return True
        time.sleep(0.05)
    return False


def test_workers_that_outlive_a_stage_do_not_hang_the_task(script: Script, tmp_path: Path) -> None:
    start = time.monotonic()
    result, _ = execute(operator(script(FAMILY + PRINT_RESULT), tmp_path))
    assert result == RESULT
    assert time.monotonic() - start < 10
    assert gone(pids(tmp_path))


@pytest.mark.parametrize("stubborn", [False, True])
def test_on_kill_ends_the_whole_family(script: Script, tmp_path: Path, stubborn: bool) -> None:
    body = (STUBBORN if stubborn else "") + FAMILY + "time.sleep(600)"
    task = operator(script(body), tmp_path)
    caught: list[BaseException] = []

    def run() -> None:
        try:
            execute(task)
        except AirflowException as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    family = pids(tmp_path)
    start = time.monotonic()
    task.on_kill()
    assert time.monotonic() - start < 5, "Airflow kills the task then, and nobody would be left to end the family"
    thread.join(10)
    assert not thread.is_alive()
    assert gone(family)
    assert ("SIGKILL" if stubborn else "SIGTERM") in str(caught[0])


def test_a_timeout_leaves_nobody_behind(script: Script, tmp_path: Path) -> None:
    from airflow.sdk.exceptions import AirflowTaskTimeout
    from airflow.sdk.execution_time.timeout import timeout

    task = operator(script(FAMILY + "time.sleep(600)"), tmp_path)
    with pytest.raises(AirflowTaskTimeout), timeout(2):
        execute(task)
    assert gone(pids(tmp_path))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PR_SET_PDEATHSIG is Linux's")
def test_a_stage_does_not_outlive_a_killed_worker(script: Script, tmp_path: Path) -> None:
    nvr = script("with open('pids.json', 'w') as f: json.dump([os.getpid()], f)\ntime.sleep(600)")
    code = (
        "from nvr_airflow.process import ProcessStageOperator as P\n"
        f"p = P(task_id='x', command='download', root='/r', nvr_bin={nvr!r}, workdir={str(tmp_path)!r})\n"
        "P.execute.__wrapped__(p, {'run_id': '1', 'params': {}})"
    )
    dags = Path(__file__).resolve().parents[2] / "dags"
    worker = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(dags)})
    family = pids(tmp_path)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    assert gone(family)
