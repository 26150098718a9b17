"""Two processes over gloo are one process with the whole batch; and what cannot be divided is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_students as tiny
import torch  # noqa: TID253

from nvr_tasks.artifacts import Identity, Store
from nvr_tasks.config import Recipe
from nvr_tasks.errors import NvrError
from nvr_tasks.recipe_files import parse_recipe
from nvr_tasks.training.fit import Job, fit, student_of
from nvr_tasks.training.processes import fit_in_processes, refuse_impossible
from nvr_tasks.training.weights import trained

RECIPE = """
name: pair
data:
  sources: [{name: docs, origin: {type: beir, uri: docs}}]
  benchmark: [{task: Docs, origin: {type: beir, uri: docs}}]
embed:
  teachers: [{name: t, model: {type: tiny, architecture: modernbert}}]
mine: {num_negatives: 2}
train:
  student: {model: {type: tiny, architecture: modernbert}, max_tokens: 32}   # it has no dropout
  batch_size: 8
  learning_rate: 1.0e-2
  warmup_steps: 1
  stages:
    - {name: one, steps: 4, hard_negatives: 1}
    - {name: two, steps: 3, hard_negatives: 2, cached_batch: 2}
runtime: {device: cpu, threads: 1, checkpoint_every_steps: 2}
"""
TOLERANCE = 1e-4  # sums in another order, over seven steps of a large learning rate


def recipe(*overrides: str) -> Recipe:
    return parse_recipe(RECIPE, "pair", overrides)


@pytest.fixture
def inputs(store: Store, publish_dataset: Callable) -> dict[str, list[str]]:
    """A data set of 32 queries, and two mined negatives for each."""
    generator = np.random.default_rng(1)
    texts = [" ".join(generator.choice(tiny.WORDS, 6)) for _ in range(128)]
    dataset = publish_dataset(store, texts[:96], texts[96:])
    rows = {
        "query_id": [f"q{i:04}" for i in range(32)],
        "positive_id": [f"d{i:04}" for i in range(32)],
        "negative_ids": [[f"d{(i + 32) % 96:04}", f"d{(i + 64) % 96:04}"] for i in range(32)],
    }

    def write(folder: Path) -> dict[str, Any]:
        pq.write_table(pa.table(rows), folder / "negatives.parquet")
        return {}

    negatives = store.publish(Identity("negatives", 1, {"num_negatives": 2}, {"dataset": dataset.uri}), write)
    return {"dataset": [dataset.uri], "negatives": [negatives.uri]}


def test_two_processes_are_one_with_the_whole_batch(store: Store, inputs: dict[str, list[str]], tmp_path: Path) -> None:
    alone = recipe()
    student = student_of(alone)
    expected = fit(Job(alone, store, inputs, "one", tmp_path / "one"), student, lambda *_: None)
    logged: list[int] = []
    both, outcome = fit_in_processes(
        Job(recipe("runtime.processes=2"), store, inputs, "two", tmp_path / "two"), lambda step, _: logged.append(step)
    )
    losses = [[e["loss"] for e in log if "loss" in e] for log in (expected.log, outcome.log)]
    assert len(losses[0]) == 7
    np.testing.assert_allclose(losses[1], losses[0], atol=TOLERANCE)
    assert losses[0][0] > losses[0][-1] + 0.01, "it must learn something"
    wanted = trained(student.model)
    for name, tensor in trained(both.model).items():
        assert torch.allclose(tensor, wanted[name], atol=20 * TOLERANCE), name
    assert logged == [7], "progress comes from the first process"


def test_an_error_of_a_process_is_the_error_of_the_stage(
    store: Store, inputs: dict[str, list[str]], tmp_path: Path
) -> None:
    greedy = recipe("runtime.processes=2", "mine.num_negatives=4", "train.stages.1.hard_negatives=4")
    with pytest.raises(NvrError, match=r"stage two trains on 4 hard negatives per query, but .* holds 2: mine with"):
        fit_in_processes(Job(greedy, store, inputs, "two", tmp_path / "two"), lambda *_: None)


def test_what_cannot_be_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        NvrError, match=r"batch_size of stage one is 8, which 3 processes \(runtime\.processes\) cannot"
    ):
        refuse_impossible(recipe("runtime.processes=3"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(
        NvrError, match=r"runtime\.processes is 4, one GPU each, but torch sees 2: set runtime\.processes=2"
    ):
        refuse_impossible(recipe("runtime.processes=4", "runtime.device=cuda"))
