"""The cache rule, and how a stage finds its inputs or says who makes them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from nvr_tasks import embed
from nvr_tasks.artifacts import Artifact, Store
from nvr_tasks.config import Recipe, Runtime
from nvr_tasks.errors import NvrError
from nvr_tasks.pipeline import Context, StageResult, execute, module_of, one, run_key, stage_results
from nvr_tasks.stages import OPTIONAL_ROLES, STAGES, Stage, maker, stage

Make = Callable[..., Recipe]
Publish = Callable[..., Artifact]


# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("row", STAGES, ids=lambda row: row.name)
def test_every_stage_keeps_the_contract(row: Stage) -> None:
    module = module_of(row)
    assert callable(module.plan)
    assert callable(module.build)
    document = module.__doc__ or ""
    assert document.splitlines()[0].endswith(".")
    for part in ("Reads", "Writes", "Example"):
        assert part in document, f"the docstring of {row.name} has no {part}"
    assert f"nvr {row.name}" in document


def test_every_role_is_made_before_it_is_needed() -> None:
    made: set[str] = set()
    for row in STAGES:
        assert set(row.needs) <= made, f"{row.name} needs what no earlier stage makes"
        made |= set(row.makes)
        assert all(maker(role) is row for role in row.makes)
    assert made >= OPTIONAL_ROLES
    with pytest.raises(KeyError):
        maker("nothing")


# ── identity ─────────────────────────────────────────────────────────────────────────────────────────────────────

OTHER_RUNTIME = {
    "device": "cuda",
    "threads": 3,
    "embed_batch_tokens": 999,
    "embed_part_texts": 7,
    "mine_shards": 3,
    "checkpoint_every_steps": 3,
    "eval_batch_size": 3,
    "search_block_rows": 99,
    "search_block_queries": 9,
    "judge_requests": 3,
    "gradient_checkpointing": "true",
    "attention": "eager",
    "nodes": 2,
    "shard_weights": "true",
}
URIS = {role: [f"file:///root/{role}/{i:032x}"] for i, role in enumerate(r for row in STAGES for r in row.makes)}


def identities(row: Stage, store: Store, recipe: Recipe) -> list[tuple[str, str]]:
    plan = module_of(row).plan(Context(recipe, store), {role: URIS[role] for role in row.needs})
    return [(role, identity.fingerprint) for role, made in plan.items() for identity in made]


PLANNED = [stage(name) for name in ("embed", "mine", "train")]


@pytest.mark.parametrize("row", PLANNED, ids=lambda row: row.name)
def test_runtime_settings_change_no_identity(row: Stage, store: Store, tiny_recipe: Make) -> None:
    plain = identities(row, store, tiny_recipe())
    assert plain
    other = tiny_recipe(*(f"runtime.{name}={value}" for name, value in OTHER_RUNTIME.items()))
    assert identities(row, store, other) == plain


def test_every_runtime_setting_is_in_the_test_above() -> None:
    # How many shards there are says which artefacts hold the vectors, not what is mined or trained from them; the number of
    # training processes is in the identity of students with dropout alone (tests/training/test_processes.py).
    assert set(Runtime.model_fields) - {"embed_shards", "processes"} == set(OTHER_RUNTIME)


@pytest.mark.parametrize("row", [stage("mine"), stage("train")], ids=lambda row: row.name)
def test_how_texts_were_divided_over_shards_changes_nothing_later(row: Stage, store: Store, tiny_recipe: Make) -> None:
    assert identities(row, store, tiny_recipe("runtime.embed_shards=7")) == identities(row, store, tiny_recipe())


@pytest.mark.parametrize(
    ("name", "override"),
    [
        ("embed", "embed.teachers.0.dtype=float16"),
        ("mine", "mine.threshold=0.9"),
        ("mine", "embed.teachers.0.max_tokens.query=20"),
        ("train", "train.learning_rate=1e-3"),
        ("train", "seed=3"),
    ],
)
def test_other_settings_do(name: str, override: str, store: Store, tiny_recipe: Make) -> None:
    assert identities(stage(name), store, tiny_recipe(override)) != identities(stage(name), store, tiny_recipe())


@pytest.mark.parametrize("override", ["gate.promote=false", "register.model_name=other", "description=other", "name=x"])
@pytest.mark.parametrize("row", PLANNED, ids=lambda row: row.name)
def test_what_later_stages_do_changes_no_earlier_identity(
    row: Stage, override: str, store: Store, tiny_recipe: Make
) -> None:
    assert identities(row, store, tiny_recipe(override)) == identities(row, store, tiny_recipe())


# ── inputs ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "role", "run"),
    [
        ("embed", "dataset", "download"),
        ("mine", "dataset", "download"),
        ("train", "dataset", "download"),
        ("register", "dataset", "download"),
        ("evaluate", "benchmark", "download"),
    ],
)
def test_a_missing_input_says_which_stage_to_run(
    name: str, role: str, run: str, store: Store, tiny_recipe: Make
) -> None:
    with pytest.raises(
        NvrError, match=rf"no {role} for recipe tiny at file://.*: run `nvr {run}` with the same recipe"
    ):
        execute(stage(name), Context(tiny_recipe(), store))


def test_other_inputs_are_located_from_those_given(store: Store, tiny_recipe: Make, publish_dataset: Publish) -> None:
    dataset = publish_dataset(store, ["a passage"], ["a query"])
    with pytest.raises(NvrError, match=r"no embeddings for recipe tiny at .*/embeddings/[0-9a-f]{32}: run `nvr embed`"):
        execute(stage("mine"), Context(tiny_recipe(), store), {"dataset": [dataset.uri]})


def test_an_unknown_role(store: Store, tiny_recipe: Make) -> None:
    with pytest.raises(NvrError, match="stage embed has no input modle; it reads: dataset"):
        execute(stage("embed"), Context(tiny_recipe(), store), {"modle": ["x"]})
    with pytest.raises(NvrError, match="stage download has no input dataset; it reads: nothing"):
        execute(stage("download"), Context(tiny_recipe(), store), {"dataset": ["x"]})


@pytest.mark.parametrize("uris", [[], ["a", "b"]])
def test_one_input_is_one(uris: list[str]) -> None:
    with pytest.raises(
        NvrError, match=rf"expected one input 'dataset', got {len(uris)}: pass it as --input dataset=URI"
    ):
        one({"dataset": uris}, "dataset")


def test_an_input_that_does_not_exist_is_found_before_any_work(
    store: Store, tiny_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embed, "plan", lambda *_: pytest.fail("too late"))
    with pytest.raises(NvrError, match=r"no artefact at .*: it was never finished or has been deleted"):
        execute(stage("embed"), Context(tiny_recipe(), store), {"dataset": [f"{store.root}/dataset/{'0' * 32}"]})


def test_an_input_of_another_kind(store: Store, tiny_recipe: Make, publish_dataset: Publish) -> None:
    dataset = publish_dataset(store, ["a passage"], ["a query"])
    with pytest.raises(NvrError, match=r"--input model=.* is of kind dataset, expected model"):
        execute(stage("register"), Context(tiny_recipe(), store), {"model": [dataset.uri]})


def test_a_truncated_input_is_found_before_any_work(
    store: Store, tiny_recipe: Make, publish_dataset: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = publish_dataset(store, ["a passage"], ["a query"])
    file = max(Path(dataset.uri.removeprefix("file://")).rglob("*.parquet"))
    os.truncate(file, 10)
    monkeypatch.setattr(embed, "plan", lambda *_: pytest.fail("too late"))
    with pytest.raises(NvrError, match=r"has 10 bytes, the manifest says"):
        execute(stage("embed"), Context(tiny_recipe(), store), {"dataset": [dataset.uri]})


# ── the cache rule ───────────────────────────────────────────────────────────────────────────────────────────────

HIT = """
import sys
from nvr_tasks.cli import main
status = main(sys.argv[1:])
heavy = {"torch", "transformers", "sentence_transformers", "mlflow", "pandas", "datasets", "mteb"} & set(sys.modules)
print("HEAVY", sorted(heavy))
sys.exit(status)
"""


def test_a_cache_hit_imports_nothing_heavy(
    store: Store,
    tiny_recipe: Make,
    tiny_file: Path,
    publish_dataset: Publish,
    python: Callable[..., subprocess.CompletedProcess],
) -> None:
    dataset = publish_dataset(store, ["a passage"], ["a query"])
    made = execute(stage("embed"), Context(tiny_recipe(), store), {"dataset": [dataset.uri]})
    again = python(
        "-c", HIT, "embed", f"--recipe={tiny_file}", f"--root={store.root}", f"--input=dataset={dataset.uri}"
    )
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith("embed: reused in ")
    assert all(uri in again.stdout for uri in made.outputs["embeddings"])
    assert again.stdout.splitlines()[-1] == "HEAVY []"
    assert [line.split("] ", 1)[1].split(" in ")[0] for line in again.stderr.splitlines()] == [
        "embed: start",
        "embed: reused",
    ]


def test_one_missing_output_of_several_is_made(store: Store, tiny_recipe: Make, publish_dataset: Publish) -> None:
    ctx = Context(tiny_recipe(), store)
    given = {"dataset": [publish_dataset(store, ["a passage", "another"], ["a query"]).uri]}
    first = execute(stage("embed"), ctx, given)
    kept, gone = (store.open(uri) for uri in first.outputs["embeddings"])
    store.delete(gone)
    second = execute(stage("embed"), ctx, given)
    assert not second.reused
    assert second.outputs == first.outputs
    assert store.open(kept.uri) == kept


# ── records ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_results_of_a_run_are_recorded_in_the_order_of_the_workflow(
    store: Store, tiny_recipe: Make, publish_dataset: Publish
) -> None:
    run = run_key("manual__2026-01-02T03:04:05+00:00")
    given = {"dataset": [publish_dataset(store, ["a passage"], ["a query"]).uri]}
    for shard in ("1/2", "0/2"):
        execute(stage("embed"), Context(tiny_recipe(), store, run, {"shard": shard}), given)
    store.write_record(f"runs/{run}/download.json", json.loads(StageResult("download", {}).to_json()))
    store.write_record(f"runs/{run}/begin.json", {"stage": "begin"})
    assert [(r.stage, r.part) for r in stage_results(store, run)] == [
        ("download", ""),
        ("embed", "0of2"),
        ("embed", "1of2"),
    ]
    assert stage_results(store, "other") == []


def test_a_run_id_is_one_segment_of_a_key() -> None:
    assert run_key("scheduled__2026-01-02T03:04:05+00:00") == "scheduled__2026-01-02T03:04:05+00:00"
    assert run_key("a/b c\\d") == "a-b-c-d"
    assert run_key("../x") != "../x"
    assert run_key("..") not in ("..", ".")
