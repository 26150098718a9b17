"""Whole runs of the DAG with a stand-in for `nvr`: states, order, what is passed on, what a failure leaves."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from nvr_tasks.stages import STAGES

pytestmark = pytest.mark.usefixtures("database")
Calls = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def run(
    dags: Callable[..., Any], calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[str, dict[str, str]]]:
    """Run the DAG: returns its state and the state of each task (`embed[0]` for mapped ones)."""

    def go(
        plan: dict[str, Any] | None = None,
        conf: dict[str, Any] | None = None,
        dag: str = "nv_retriever_retrain",
        **environ: str,
    ) -> tuple[str, dict[str, str]]:
        monkeypatch.setenv("NVR_FAKE_PLAN", json.dumps(plan or {}))
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        done = dags().dags[dag].test(run_conf=conf or {})
        states = {}
        for ti in done.get_task_instances():
            states[ti.task_id + (f"[{ti.map_index}]" if ti.map_index >= 0 else "")] = str(ti.state)
        return str(done.state), states

    return go


def options(call: dict[str, Any], name: str) -> list[str]:
    return [value for key, value in call["options"] if key == name]


def test_all_stages_run_in_order_and_pass_on_what_they_made(run: Any, calls: Calls) -> None:
    state, states = run(
        conf={"recipe": "beir-small", "mining_method": "abs", "promote": False, "overrides": ["train.steps=3"]}
    )
    assert state == "success"
    assert {name for name, s in states.items() if s != "success"} == {"mine_block"}
    assert states["mine_block"] == "skipped"  # mining is not divided
    made = calls()
    by_name = {call["command"]: call for call in made}
    order = [call["command"] for call in made]
    names = [s.name for s in STAGES for _ in range(2 if s.name in ("embed", "score") else 1)]
    assert order == ["begin", *names, "finish"]
    assert options(by_name["begin"], "recipe") == ["beir-small"]
    assert options(by_name["begin"], "set") == [
        "mine.method=abs",
        "mine.threshold=null",
        "gate.promote=false",
        "train.steps=3",
    ]
    assert sorted(options(c, "shard") for c in made if c["command"] == "embed") == [["0/2"], ["1/2"]]
    assert [v.rpartition("/")[2] for v in options(by_name["mine"], "input")] == ["fake", "fake-0of2", "fake-1of2"]
    assert sorted(options(c, "task") for c in made if c["command"] == "score") == [["NFCorpus"], ["SciFact"]]
    assert "scores=" + options(by_name["begin"], "root")[0] + "/scores/fake-SciFact" in options(
        by_name["evaluate"], "input"
    )
    assert "evaluation_champion=" in options(by_name["gate"], "input")
    assert ["decide-only", ""] in by_name["gate"]["options"]
    [root] = options(by_name["begin"], "root")
    assert {tuple(options(c, "recipe")) for c in made[1:-1]} == {(f"{root}/recipe/fake",)}
    assert len({tuple(options(c, "pipeline-run")) for c in made}) == 1
    assert not [name for call in made for name in call["env"] if name.startswith("AIRFLOW")]


def test_a_hold_is_a_skipped_promotion_in_a_successful_run(run: Any, calls: Calls) -> None:
    state, states = run({"promote": {"exit": 99}})
    assert state == "success"
    assert {name for name, s in states.items() if s != "success"} == {"mine_block", "promote"}
    assert states["promote"] == "skipped"
    assert calls()[-1]["command"] == "finish"


def test_a_task_that_the_quick_tier_leaves_out_keeps_nothing_from_following(run: Any, calls: Calls) -> None:
    state, states = run({"score NFCorpus": {"outputs": {"scores": []}}})
    assert state == "success"
    assert {name for name, s in states.items() if s != "success"} == {"mine_block"}
    by_name = {call["command"]: call for call in calls()}
    given = [value for value in options(by_name["evaluate"], "input") if value.startswith("scores=")]
    assert [value.rpartition("/")[2] for value in given] == ["fake-SciFact"]
    for command in ("score", "evaluate", "gate"):
        assert [v.rpartition("/")[2] for v in options(by_name[command], "input") if v.startswith("screening=")] == [
            "fake"
        ]


def test_without_a_quick_tier_its_task_passes_at_once(run: Any, calls: Calls) -> None:
    state, states = run({"screen": {"outputs": {"screening": []}}})
    assert (state, states["screen"]) == ("success", "success")
    assert "screening=" in options(next(c for c in calls() if c["command"] == "gate"), "input")


def test_mining_is_divided_over_blocks_and_embedding_over_teachers(run: Any, calls: Calls) -> None:
    state, states = run({"begin": {"shards": ["a:0/1", "b:0/1"], "blocks": ["0/3", "1/3", "2/3"]}})
    assert state == "success"
    assert set(states.values()) == {"success"}
    assert {name for name in states if name.startswith("mine_block[")} == {f"mine_block[{i}]" for i in range(3)}
    made = calls()
    assert sorted(options(c, "shard") for c in made if c["command"] == "embed") == [["a:0/1"], ["b:0/1"]]
    mined = [c for c in made if c["command"] == "mine"]
    assert sorted(options(c, "shard") for c in mined[:3]) == [["0/3"], ["1/3"], ["2/3"]]  # in any order
    assert options(mined[3], "shard") == []
    given = [[v.rpartition("/")[2] for v in options(c, "input")] for c in mined]
    assert given == [["fake", "fake-a-0of1", "fake-b-0of1"]] * 4
    train = next(c for c in made if c["command"] == "train")
    assert [v.rpartition("/")[2] for v in options(train, "input")] == ["fake", "fake"]


def test_a_failed_block_keeps_what_follows_from_running(run: Any, calls: Calls) -> None:
    state, states = run({"begin": {"blocks": ["0/2", "1/2"]}, "mine": {"exit": 1, "times": 1}})
    assert state == "failed"
    assert sorted(states[f"mine_block[{i}]"] for i in range(2)) == ["failed", "success"]
    assert states["mine"] == states["train"] == "upstream_failed"
    assert states["finish"] == "success"


def test_a_failure_fails_the_run_and_finish_still_runs(run: Any, calls: Calls) -> None:
    state, states = run({"train": {"exit": 1}})
    assert state == "failed"
    assert states["train"] == "failed"
    assert states["promote"] == "upstream_failed"
    assert states["finish"] == "success"
    assert [c["command"] for c in calls()][-2:] == ["train", "finish"]


def test_a_failing_finish_does_not_hide_a_success(run: Any) -> None:
    state, states = run({"finish": {"exit": 1}})
    assert (state, states["finish"]) == ("success", "failed")


def test_a_failed_stage_is_tried_again(run: Any, calls: Calls) -> None:
    state, _ = run({"mine": {"exit": 1, "times": 1}}, NVR_RETRIES="1", NVR_RETRY_DELAY_S="0")
    assert state == "success"
    assert [c["command"] for c in calls()].count("mine") == 2


def test_an_unknown_param_fails_before_anything_starts(run: Any, calls: Calls) -> None:
    state, states = run(conf={"minning_method": "abs"}, NVR_RETRIES="3", NVR_RETRY_DELAY_S="0")
    assert (state, states["begin"]) == ("failed", "failed")
    assert calls() == []


def test_a_refused_recipe_is_not_tried_again_and_starts_nothing(run: Any, calls: Calls) -> None:
    state, states = run({"begin": {"exit": 2}}, NVR_RETRIES="3", NVR_RETRY_DELAY_S="0")
    assert state == "failed"
    assert states["begin"] == "failed"
    assert [c["command"] for c in calls()] == ["begin"]


def test_a_model_is_scored_on_a_suite_without_training(run: Any, calls: Calls) -> None:
    conf = {"model": "models:/m@challenger", "suite": "nano-beir"}
    state, states = run(conf=conf, dag="nv_retriever_evaluate")
    assert (state, set(states.values())) == ("success", {"success"})
    made = calls()
    assert [c["command"] for c in made] == ["begin", "mirror", "score", "score", "evaluate", "finish"]
    assert options(made[0], "set") == ["data.benchmark=[{suite: nano-beir}]", "gate={}"]
    assert [options(c, "model") for c in made[2:5]] == [["models:/m@challenger"]] * 3
    assert [v.partition("=")[0] for v in options(made[2], "input")] == ["benchmark"]
    assert options(made[-1], "expect") == ["mirror,score,evaluate"]


def test_no_champion_to_score_is_no_failure(run: Any) -> None:
    state, states = run({"score": {"exit": 99}}, dag="nv_retriever_evaluate")
    assert state == "success"
    assert {name.partition("[")[0] for name, s in states.items() if s == "skipped"} == {"score", "evaluate"}


def test_the_cells_of_an_ablation_are_mapped_and_compared(run: Any, calls: Calls) -> None:
    grid = {"methods": ["naive", "perc_pos"], "thresholds": ["perc_pos=0.9", "perc_pos = 0.95"], "samplings": ["top"]}
    state, states = run(conf={**grid, "seeds": [1, 2], "baseline": "naive"}, dag="nv_retriever_ablation")
    assert (state, set(states.values())) == ("success", {"success"})
    made = calls()
    by_name = {call["command"]: call for call in made}
    assert [c["command"] for c in made] == [
        "begin",
        "download",
        "embed",
        "embed",
        "search",
        *["cell"] * 4,
        "ablation",
        "finish",
    ]
    assert ["ablation", ""] in by_name["begin"]["options"]
    assert options(by_name["begin"], "set") == [
        "ablation.variants=[]",
        "ablation.baseline=null",
        'ablation.grid={"methods": ["naive", "perc_pos"], "thresholds": {"perc_pos": [0.9, 0.95]}, "samplings": ["top"], '
        '"teachers": []}',
        "ablation.seeds=[1, 2]",
        "ablation.baseline=naive",
    ]
    assert sorted(options(c, "cell")[0] for c in made if c["command"] == "cell") == [
        "naive:1", "naive:2", "perc_pos:1", "perc_pos:2",
    ]  # fmt: skip
    roles = {v.partition("=")[0] for v in options(by_name["cell"], "input")}
    assert roles == {"dataset", "benchmark", "candidates"}
    assert [v.rpartition("/")[2] for v in options(by_name["ablation"], "input")] == [
        "fake-naive-1", "fake-naive-2", "fake-perc_pos-1", "fake-perc_pos-2",
    ]  # fmt: skip
    assert options(made[-1], "expect") == ["download,embed,search,cell,ablation"]


def test_a_failed_cell_leaves_the_others_alone(run: Any, calls: Calls) -> None:
    state, states = run({"cell naive:2": {"exit": 1}}, dag="nv_retriever_ablation")
    assert state == "failed"
    assert sorted(states[f"cell[{i}]"] for i in range(4)) == ["failed", "success", "success", "success"]
    assert (states["ablation"], states["finish"]) == ("upstream_failed", "success")
    assert options(next(c for c in calls() if c["command"] == "begin"), "set") == []  # the variants of the recipe


def test_a_threshold_of_no_method_is_refused_by_the_form(run: Any, calls: Calls) -> None:
    with pytest.raises(Exception, match="thresholds"):
        run(conf={"methods": ["naive"], "thresholds": ["naive=0.9"]}, dag="nv_retriever_ablation")
    assert calls() == []


def test_an_index_is_built_and_swapped(run: Any, calls: Calls) -> None:
    state, states = run(dag="nv_retriever_reindex")
    assert (state, set(states.values())) == ("success", {"success"})
    assert [c["command"] for c in calls()] == ["begin", "index", "swap", "finish"]
    assert [v.partition("=")[0] for v in options(calls()[2], "input")] == ["index"]


def test_only_what_changed_is_announced(run: Any, calls: Calls) -> None:
    state, states = run({"sources training": {"exit": 99}}, dag="nv_retriever_sources")
    assert (state, states) == ("success", {"training": "skipped", "benchmark": "success"})
    assert sorted(options(c, "of")[0] for c in calls()) == ["benchmark", "training"]
    assert {tuple(options(c, "recipe")) for c in calls()} == {("demo",)}


def test_nobody_is_asked_when_no_approval_is_needed(run: Any, calls: Calls) -> None:
    state, states = run({"gate": {"figures": {"verdict": "promote"}}})
    assert (state, states["approve"], states["promote"]) == ("success", "success", "success")
    [promote] = [c for c in calls() if c["command"] == "promote"]
    assert not [name for name, _ in promote["options"] if name in ("approved-by", "rejected-by")]


def test_a_rollback_passes_on_what_the_form_says(run: Any, calls: Calls) -> None:
    form = {"recipe": "beir-small", "to": "3", "reason": "--worse {{ on }} Mondays", "force": True}
    state, _ = run(conf=form, dag="nv_retriever_rollback")
    assert state == "success"
    [call] = calls()
    assert call["command"] == "rollback"
    assert options(call, "recipe") == ["beir-small"]
    assert options(call, "to") == ["3"]
    assert options(call, "reason") == ["--worse {{ on }} Mondays"]
    assert ["force", ""] in call["options"]
    assert ["result-line", ""] in call["options"]


@pytest.mark.parametrize(
    ("dag", "conf"),
    [
        ("nv_retriever_rollback", {"version": "3", "reason": "worse"}),
        ("nv_retriever_sources", {"recipee": "beir-small"}),
    ],
)
def test_a_mistyped_param_is_refused_by_every_dag(run: Any, calls: Calls, dag: str, conf: dict[str, str]) -> None:
    state, states = run(conf=conf, dag=dag, NVR_RETRIES="3", NVR_RETRY_DELAY_S="0")
    assert (state, set(states.values())) == ("failed", {"failed"})
    assert calls() == []


def test_a_rollback_without_a_reason_is_refused(run: Any, calls: Calls) -> None:
    with pytest.raises(Exception, match="reason"):
        run(conf={"to": "previous"}, dag="nv_retriever_rollback")
    assert calls() == []
