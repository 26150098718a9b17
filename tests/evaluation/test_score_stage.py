"""Scores per model and task: sharded, resumed and reused they are those of one undisturbed run."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from nvr_tasks.artifacts import Store
from nvr_tasks.errors import NvrError, RecipeError
from nvr_tasks.evaluation import run
from nvr_tasks.pipeline import Context, StageResult, execute
from nvr_tasks.stages import stage

WORDS = [
    "volcano",
    "piano",
    "bicycle",
    "bread",
    "glacier",
    "chess",
    "violin",
    "desert",
    "harbour",
    "orchid",
    "eagle",
    "tea",
]


def write_task(folder: Path, words: list[str]) -> None:
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    passages = [
        {"_id": f"d{i}", "title": "", "text": f"An entry about the {w} and its history."} for i, w in enumerate(words)
    ]
    queries = [{"_id": f"q{i}", "text": f"what is a {w}?"} for i, w in enumerate(words)]
    for name, rows in (("corpus", passages), ("queries", queries)):
        with gzip.open(folder / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    lines = ["query-id\tcorpus-id\tscore", *(f"q{i}\td{(i + i % 2) % len(words)}\t1" for i in range(len(words)))]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")


@pytest.fixture
def context(tiny_recipe: Callable[..., Any], tmp_path: Path) -> Callable[..., Context]:
    """Makes a context whose benchmark has the tasks SciFact and Mine, in a store of a given name."""
    for name, words in (("one", WORDS[:6]), ("two", WORDS[4:])):
        write_task(tmp_path / name, words)
    tasks = [
        {"task": "SciFact", "origin": {"type": "beir", "uri": str(tmp_path / "one")}},
        {"task": "Mine", "official": False, "origin": {"type": "beir", "uri": str(tmp_path / "two")}},
    ]

    def make(name: str = "artifacts", *overrides: str, **options: str) -> Context:
        recipe = tiny_recipe(f"data.benchmark={json.dumps(tasks)}", *overrides)
        return Context(recipe, Store(str(tmp_path / name)), options={"model": "base", **options})

    return make


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tasks that were really scored, in order."""
    names: list[str] = []
    original = run.score_task

    def counted(model: Any, name: str, revision: str, task: str, *rest: Any, **more: Any) -> Any:
        names.append(task)
        return original(model, name, revision, task, *rest, **more)

    monkeypatch.setattr(run, "score_task", counted)
    return names


def go(name: str, ctx: Context, **options: str) -> StageResult:
    ctx = replace(ctx, options={**ctx.options, **options})
    benchmark = execute(stage("mirror"), ctx).outputs["benchmark"]
    return execute(stage(name), ctx, {"benchmark": benchmark})


def content(ctx: Context, result: StageResult) -> tuple[Any, pd.DataFrame]:
    artifact = ctx.store.open(result.outputs["evaluation_base"][0])
    return artifact.manifest.stats, pd.read_parquet(ctx.store.fetch(artifact) / "per_query.parquet")


def test_sharded_resumed_and_whole_are_the_same(
    context: Any, scored: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = context("whole")
    expected, table = content(whole, go("evaluate", whole))
    assert scored == ["SciFact", "Mine"]

    sharded = context("sharded")
    scored.clear()
    for task in ("Mine", "SciFact"):
        go("score", sharded, task=task)
    found, rows = content(sharded, go("evaluate", sharded))
    assert scored == ["Mine", "SciFact"]
    assert found == expected
    pd.testing.assert_frame_equal(rows, table)

    killed = context("killed")
    scored.clear()
    original = run._save

    def interrupted(*arguments: Any) -> None:
        if scored == ["SciFact", "Mine"]:
            raise KeyboardInterrupt
        original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(run, "_save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            go("evaluate", killed)
    scored.clear()
    found, rows = content(killed, go("evaluate", killed))
    assert scored == ["Mine"], "the finished task was scored again"
    assert found == expected
    pd.testing.assert_frame_equal(rows, table)


def test_a_changed_task_is_scored_again_and_no_other(context: Any, scored: list[str], tmp_path: Path) -> None:
    ctx = context()
    before = go("evaluate", ctx)
    scored.clear()
    assert go("evaluate", ctx).reused
    write_task(tmp_path / "one", WORDS[:7])
    after = go("evaluate", ctx)
    assert scored == ["SciFact"]
    assert after.outputs != before.outputs
    scored.clear()
    go("evaluate", context("artifacts", "evaluate.prompts={Mine: {query: 'find: '}}"))
    assert scored == ["Mine"]
    scored.clear()
    go("evaluate", context("artifacts", "train.student.max_tokens=16"))
    assert scored == ["SciFact", "Mine"], "another model got the scores of the first"


def test_results_lie_as_mteb_lays_them_out(context: Any) -> None:
    ctx = context()
    folder = ctx.store.fetch(ctx.store.open(go("evaluate", ctx).outputs["evaluation_base"][0]))
    found = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    place = "results/nvr__untrained-base/untrained"
    names = ("Mine.json", "SciFact.json", "model_meta.json", "run_settings.jsonl")
    assert found == ["manifest.json", "per_query.parquet", *(f"{place}/{name}" for name in names)]
    assert len((folder / place / "run_settings.jsonl").read_text().splitlines()) == 2


def test_a_wrong_task_or_model_is_refused_before_anything_is_loaded(context: Any, scored: list[str]) -> None:
    with pytest.raises(RecipeError, match="--task 'SciFakt' is not in the benchmark; its tasks: SciFact, Mine"):
        go("score", context(), task="SciFakt")
    with pytest.raises(RecipeError, match="--model 'intfloat/e5@main' is not allowed: one of challenger, base"):
        go("score", context(), model="intfloat/e5@main")
    assert scored == []


def test_an_unknown_task_name_is_told_before_any_download(
    tiny_recipe: Any, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("something was read")

    monkeypatch.setattr("nvr_tasks.data.sources.read", never)
    for name in ("mirror", "download"):
        with pytest.raises(NvrError, match=r"mteb has no task 'scifacts'; nearest: SciFact"):
            execute(stage(name), Context(tiny_recipe("data.benchmark=[{task: scifacts}]"), store))


def test_a_task_by_name_alone_is_read_by_mteb_s_own_loader(
    tiny_recipe: Any, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import Dataset
    from mteb.abstasks.retrieval import RetrievalDatasetLoader

    asked: list[tuple[str, str, str]] = []

    def load(self: Any, **_: Any) -> Any:
        asked.append((self.hf_repo, self.revision, self.split))
        return {
            "corpus": Dataset.from_list(
                [{"id": "a", "title": "", "text": "x"}, {"id": "b", "title": "t", "text": "y"}]
            ),
            "queries": Dataset.from_list([{"id": "q", "text": "z"}]),
            "relevant_docs": {"q": {"a": 1}},
            "top_ranked": None,
        }

    monkeypatch.setattr(RetrievalDatasetLoader, "load", load)
    monkeypatch.setattr("mteb.abstasks.retrieval_dataset_loaders.get_dataset_config_names", lambda *_: [])  # the hub
    result = execute(stage("mirror"), Context(tiny_recipe("data.benchmark=[{task: AILACasedocs}]"), store))
    import mteb

    pinned = mteb.get_task("AILACasedocs").metadata.dataset
    assert asked == [(pinned["path"], pinned["revision"], "test")]
    stats = store.open(result.outputs["benchmark"][0]).manifest.stats
    assert stats["revisions"] == {"AILACasedocs": pinned["revision"]}
    assert stats["tasks"]["AILACasedocs"]["counts"] == {"documents": 2, "queries": 1, "judgements": 1}


def test_a_tiny_teacher_has_a_revision_too(tiny_recipe: Callable[..., Any], store: Store) -> None:
    """As of `nvr evaluate --model teacher --tiny`."""
    from nvr_tasks.evaluation.subjects import subjects

    recipe = tiny_recipe("embed.teachers.0.model={type: tiny, architecture: bert}")
    [teacher] = subjects(Context(recipe, store, options={"model": "teacher"}), {})
    assert teacher.revision == "tiny-1"
    assert teacher.load(Path("unused")).encode(["a"]).shape == (1, 32)


def test_the_base_is_computed_as_a_saved_model_is(
    tiny_recipe: Callable[..., Any], store: Store, tmp_path: Path
) -> None:
    """With weights in bfloat16, too: the challenger's gain would else be one of precision."""
    from nvr_tasks.evaluation.subjects import subjects
    from nvr_tasks.models import build_student, load_folder, student_identity

    def base_of(dtype: str) -> Any:
        student = {"model": {"type": "tiny", "architecture": "mistral"}, "weights_dtype": dtype}
        recipe = tiny_recipe(f"train.student={json.dumps(student)}")
        [base] = subjects(Context(recipe, store, options={"model": "base"}), {})
        return recipe, base

    recipe, base = base_of("bfloat16")
    untrained = build_student(recipe.student, recipe.runtime)
    texts = ["what is a graph?", "shortest paths"]
    rounded = untrained.encode(texts, convert_to_tensor=True).float().numpy()
    untrained.save_pretrained(str(tmp_path / "saved"))
    expected = load_folder(tmp_path / "saved", "cpu").encode(texts)
    np.testing.assert_array_equal(base.load(tmp_path).encode(texts), expected)
    assert np.abs(rounded - expected).max() > 1e-4, "in bfloat16 the vectors are others, so the test would see it"
    assert base.identity != {"student": student_identity(recipe.student)}, "scores of older versions would be reused"
    recipe, base = base_of("float32")
    assert base.identity == {"student": student_identity(recipe.student)}
