"""Command lines, inputs and results: pure functions."""

from __future__ import annotations

import pytest

from nvr_airflow import calls
from nvr_airflow.environment import task_environment
from nvr_airflow.params import AS_IN_RECIPE, FORMS, METHODS, evaluation_overrides, form, overrides
from nvr_tasks.stages import stage

ANSWERS = {
    "recipe": "demo",
    "teacher": None,
    "mining_method": AS_IN_RECIPE,
    "mining_threshold": None,
    "overrides": [],
    "promote": True,
}


def test_arguments_of_a_stage() -> None:
    argv = calls.arguments(
        "evaluate", root="/r", run_id="manual__1+00:00", recipe="/r/x.yaml", inputs={"model": ["a"], "registration": []}
    )
    assert argv == [
        "evaluate",
        "--root=/r",
        "--pipeline-run=manual__1+00:00",
        "--result-line",
        "--recipe=/r/x.yaml",
        "--input=model=a",
        "--input=registration=",
    ]


def test_the_gate_only_decides_and_finish_has_no_result() -> None:
    assert "--decide-only" in calls.arguments("gate", root="/r", run_id="1")
    assert calls.arguments("finish", root="/r", run_id="1") == ["finish", "--root=/r", "--pipeline-run=1"]


def test_options_without_a_value_are_left_out() -> None:
    argv = calls.arguments("score", root="/r", run_id="1", options={"task": "SciFact", "model": ""})
    assert argv == ["score", "--root=/r", "--pipeline-run=1", "--result-line", "--task=SciFact"]


def test_roles_that_no_upstream_task_makes_are_left_to_the_recipe() -> None:
    results = {"mirror": {"outputs": {"benchmark": ["b"]}}}
    assert calls.inputs_of(stage("score"), results) == {"benchmark": ["b"]}
    assert calls.inputs_of(stage("index"), {}) == {}


def test_inputs_gather_all_parts_of_a_mapped_stage() -> None:
    results = {
        "download": {"outputs": {"dataset": ["d"], "benchmark": ["b"]}},
        "embed": [{"outputs": {"embeddings": ["e0"]}}, {"outputs": {"embeddings": ["e1", "e2"]}}],
    }
    assert calls.inputs_of(stage("mine"), results) == {"dataset": ["d"], "embeddings": ["e0", "e1", "e2"]}


def test_a_missing_champion_is_an_empty_input_and_a_missing_model_an_error() -> None:
    results = {
        "register": {"outputs": {"registration": ["r"]}},
        "evaluate": {"outputs": {"evaluation": ["e"], "evaluation_base": ["b"]}},
    }
    assert calls.inputs_of(stage("gate"), results)["evaluation_champion"] == []
    with pytest.raises(calls.ResultError, match="register needs model, but the result of train names only: log"):
        calls.inputs_of(stage("register"), {"train": {"outputs": {"log": ["x"]}}})


@pytest.mark.parametrize("line", ["NVR_RESULT {", "NVR_RESULT []", "NVR_RESULT {}", 'NVR_RESULT {"outputs": 3}'])
def test_an_unusable_result_is_refused(line: str) -> None:
    with pytest.raises(calls.ResultError, match="result line"):
        calls.parse_result(line)


# ── the form ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_untouched_answers_change_nothing() -> None:
    assert overrides(ANSWERS) == []
    assert {name: param.resolve() for name, param in form("demo").items()} == ANSWERS


def test_promote_says_that_it_cannot_override_a_recipe_that_forbids() -> None:
    assert "`gate.promote: false`" in (form("demo")["promote"].description or "")


def test_answers_become_overrides_and_free_ones_win() -> None:
    told = overrides(
        ANSWERS
        | {
            "teacher": "e5",
            "mining_method": "margin_pos",
            "mining_threshold": 0.1,
            "promote": False,
            "overrides": ["a.b=1"],
        }
    )
    assert told == [
        "mine.teacher=e5",
        "mine.method=margin_pos",
        "mine.threshold=null",
        "mine.threshold=0.1",
        "gate.promote=false",
        "a.b=1",
    ]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("recipe", ""),
        ("recipe", 3),
        ("teacher", "../x"),
        ("mining_method", "best"),
        ("mining_threshold", 1.5),
        ("mining_threshold", "0.9"),
        ("overrides", ["no equals sign"]),
        ("overrides", ["--root=/"]),
        ("overrides", "train.steps=1"),
        ("promote", "yes"),
    ],
)
def test_the_form_refuses(field: str, value: object) -> None:
    from airflow.sdk.exceptions import ParamValidationError

    with pytest.raises(ParamValidationError):
        form("demo")[field].resolve(value)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_the_form_fits_every_shipped_recipe(method: str) -> None:
    from nvr_tasks.recipe_files import load_recipe, shipped_recipes

    for recipe in shipped_recipes():
        assert load_recipe(recipe, overrides(ANSWERS | {"mining_method": method})).mine.method == method


# ── what a stage inherits ────────────────────────────────────────────────────────────────────────────────────────


def test_no_secret_of_airflow_reaches_a_stage() -> None:
    environ = {
        "AIRFLOW__CORE__FERNET_KEY": "x",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": "x",
        "AIRFLOW_CONN_DB": "x",
        "AIRFLOW_HOME": "x",
        "PYTHONPATH": "x",
        "PYTHONHOME": "x",
        "VIRTUAL_ENV": "x",
        "DATABASE_URL": "x",
        "KUBECONFIG": "x",
        "MY_TOKEN": "passed by name",
        "PATH": "/bin",
        "AWS_SECRET_ACCESS_KEY": "s3",
        "MLFLOW_TRACKING_URI": "http://m",
        "NVR_DATA": "/d",
        "LC_ALL": "C.UTF-8",
        "https_proxy": "http://p",
    }
    env = task_environment(environ, ["MY_TOKEN", "AIRFLOW__CORE__FERNET_KEY", "ABSENT"])
    kept = {"MY_TOKEN", "PATH", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_URI", "NVR_DATA", "LC_ALL", "https_proxy"}
    assert set(env) == kept | {"PYTHONUNBUFFERED"}


def test_an_answer_to_no_question_of_the_form_is_noticed() -> None:
    asked = dict.fromkeys(form("demo"))
    assert FORMS["retrain"].unknown(asked) == []
    assert FORMS["retrain"].unknown({**asked, "minning_method": "abs", "nosuch": 1}) == ["minning_method", "nosuch"]
    assert FORMS["recipe"].unknown(asked) == ["mining_method", "mining_threshold", "promote", "teacher"]


def test_suite_and_tasks_take_the_place_of_the_recipe_s_benchmark() -> None:
    from nvr_tasks.recipe_files import load_recipe, shipped_recipes

    untouched = {"recipe": "demo", "overrides": ["seed=3"], "model": "champion", "suite": None, "tasks": []}
    assert evaluation_overrides(untouched) == ["seed=3"]
    told = evaluation_overrides(untouched | {"suite": "nano-beir", "tasks": ["SciFact"]})
    assert told == ["data.benchmark=[{suite: nano-beir}, {task: SciFact}]", "gate={}", "seed=3"]
    for recipe in shipped_recipes():
        assert len(load_recipe(recipe, told).data.benchmark) == 14


@pytest.mark.parametrize(
    ("field", "value", "fine"),
    [
        ("model", "champion", True),
        ("model", "models:/a@challenger", True),
        ("model", "models:/a/3", True),
        ("model", "intfloat/e5-small@" + "a" * 40, True),
        ("model", "intfloat/e5-small@main", False),
        ("model", "models:/a", False),
        ("model", "", False),
        ("suite", "nano-beir", True),
        ("suite", "beir", False),
        ("tasks", ["SciFact"], True),
        ("tasks", ["a b"], False),
    ],
)
def test_the_evaluation_form(field: str, value: object, fine: bool) -> None:
    from airflow.sdk.exceptions import ParamValidationError

    param = FORMS["evaluate"].fields("demo")[field]
    if fine:
        assert param.resolve(value) == value
    else:
        with pytest.raises(ParamValidationError):
            param.resolve(value)
