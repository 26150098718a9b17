"""Changes of sources are told once per change, and again to the run that asks again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nvr_tasks.artifacts import Store
from nvr_tasks.pipeline import Context, StageResult, execute
from nvr_tasks.stages import stage


@pytest.fixture
def ask(tiny_recipe: Callable[..., Any], store: Store, tmp_path: Path) -> Callable[..., StageResult]:
    for name in ("training", "benchmark"):
        (tmp_path / name / "qrels").mkdir(parents=True)
        for file in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"):
            (tmp_path / name / file).write_text("{}\n")
    recipe = tiny_recipe(
        f"data.sources.0.origin.uri={tmp_path / 'training'}", f"data.benchmark.0.origin.uri={tmp_path / 'benchmark'}"
    )
    ctx = Context(recipe, store)
    return lambda of, run=None: execute(stage("sources"), replace(ctx, options={"of": of}, pipeline_run=run))


def test_only_a_change_is_told(ask: Callable[..., StageResult], tmp_path: Path) -> None:
    assert ask("training").figures["changed"] == ["source docs"]  # never asked before
    assert ask("training").skipped == "no source of the training data changed"
    assert ask("benchmark").figures["changed"] == ["task Docs"]
    (tmp_path / "benchmark" / "corpus.jsonl").write_text('{"_id": "1"}\n')
    assert ask("training").skipped
    assert ask("benchmark").figures["changed"] == ["task Docs"]
    assert ask("benchmark").skipped


def test_a_run_that_is_tried_again_tells_again(ask: Callable[..., StageResult], store: Store, tmp_path: Path) -> None:
    """Killed after the record was written, before Airflow heard of it."""
    ask("training", "r1")
    assert ask("training", "r1").figures["changed"] == ["source docs"]
    assert ask("training", "r2").skipped
    (tmp_path / "training" / "corpus.jsonl").write_text('{"_id": "2"}\n')
    assert not ask("training", "r3").skipped
    assert not ask("training", "r3").skipped
    assert ask("training", "r4").skipped
    assert json.loads((Path(store.scratch.parent) / "runs" / "r4" / "sources-training.json").read_text())["skipped"]
