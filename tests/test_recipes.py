"""Every shipped recipe: valid as it is and in miniature; and, in `make test-recipes`, run from download to gate."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nvr_tasks.config import Recipe
from nvr_tasks.errors import NvrError, RecipeError
from nvr_tasks.models import pick_device
from nvr_tasks.recipe_files import load_recipe, parse_recipe, shipped_recipes
from nvr_tasks.settings import HubModel
from nvr_tasks.stages import STAGES
from nvr_tasks.tiny import tiny
from nvr_tasks.tiny_models import WIDTH

SYSTEMS = sorted(set(shipped_recipes()) - {"demo", "beir-small", "beir-small-ablation"})
IN_EVERY_TEST_RUN = {"nv-embed-v2"}  # the richest: two stages, labels, latent attention, adapters, prompt masking
BILLIONS = {"nv-retriever-v1", "nv-embed-v2", "llama-nemotron-embed-1b-v2", "omni-embed-nemotron-3b"}  # of parameters
SECONDS = 120

# What the systems of the paper's followers are made of, as they publish it.
PUBLISHED: dict[str, dict[str, Any]] = {
    "nv-retriever-v1": {"bidirectional": True, "pool_prompt": False, "max_tokens": 512, "max_query_tokens": 192},
    "nv-embed-v2": {"bidirectional": True, "pool_prompt": False},
    "llama-nemotron-embed-1b-v2": {"bidirectional": True, "max_tokens": 8192},
    "omni-embed-nemotron-3b": {"bidirectional": True},
    "late-on-code": {"max_tokens": 2048, "max_query_tokens": 256},
    "late-on-code-edge": {"max_tokens": 2048, "max_query_tokens": 256},
    "multilingual-e5-small-ko": {"max_tokens": 512},
    "multilingual-e5-small-ko-v2": {"max_tokens": 512},
    "koen-e5-tiny": {"max_tokens": 512},
}


def test_there_is_a_recipe_per_system() -> None:
    assert sorted(PUBLISHED) == SYSTEMS


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_recipe_says_what_the_system_publishes(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == recipe.register_.model_name == name
    student = recipe.train.student
    assert {key: getattr(student, key) for key in PUBLISHED[name]} == PUBLISHED[name]
    models = [student.model, *(t.model for t in recipe.embed.teachers)]
    assert all(isinstance(m, HubModel) and m.architecture for m in models)
    assert recipe.mine.method == "perc_pos"
    assert recipe.mine.resolved_threshold == (0.99 if name.startswith("late-on") else 0.95)
    assert parse_recipe(json.dumps(recipe.dump()), "dumped") == recipe
    stages = recipe.train.schedule
    if name == "nv-retriever-v1":
        assert student.lora is not None
        assert (student.lora.rank, student.lora.alpha) == (16, 32)
        assert [(s.hard_negatives, s.in_batch_negatives, s.steps, s.learning_rate, s.warmup_steps) for s in stages] == [
            (1, True, 12 * 2844, 1e-5, 100),
            (5, False, 12 * 829, 1e-5, 100),
        ]
    if name.startswith("late-on"):
        assert (recipe.mine.num_negatives, stages[0].hard_negatives, stages[0].choice) == (50, 15, "drawn")
        assert stages[0].temperature == 0.07
    if "ko" in name.split("-") or name.startswith("koen"):
        assert all(
            s.false_negatives and (s.false_negatives.margin, s.false_negatives.value) == ("relative", 0.05)
            for s in stages
        )


@pytest.mark.parametrize(("name", "passes"), [("nv-retriever-v1", 12), ("nv-embed-v2", 12.6)])
def test_a_second_stage_draws_each_query_of_classes_so_often(name: str, passes: float) -> None:
    """By size they would drown in retrieval."""
    recipe = load_recipe(name)
    first, second = recipe.train.schedule
    assert second.steps is not None
    assert set(second.sources) == {s.name for s in recipe.data.sources} > set(first.sources)
    examples = second.steps * second.batch_size / sum(second.sources.values())
    classes = [s for s in recipe.data.sources if s.origin.type == "hf" and s.origin.layout == "labels"]
    assert len(classes) == 8
    for source in classes:
        assert source.max_queries is not None
        assert second.sources[source.name] * examples / source.max_queries == pytest.approx(passes, rel=0.02)


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_recipe_for_gpus_is_refused_without_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(name)
    for_gpus = recipe.runtime.processes > 1 or any(s.dtype != "float32" for s in recipe.train.schedule)
    assert recipe.runtime.device == ("cuda" if for_gpus else "auto")
    assert recipe.evaluate.dtype == ("bfloat16" if name in BILLIONS else "float32")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    if for_gpus:
        with pytest.raises(NvrError, match=r"runtime\.device is cuda, but torch sees no CUDA device"):
            pick_device(recipe.runtime)


@pytest.mark.parametrize("name", shipped_recipes())
def test_the_miniature_keeps_what_makes_the_recipe(name: str) -> None:
    recipe = load_recipe(name)
    small = tiny(recipe)
    assert small.mine.model_dump(exclude={"depth"}) == recipe.mine.model_dump(exclude={"depth"})
    assert small.train.student.prompts == recipe.train.student.prompts
    kept = ("bidirectional", "pooling", "pool_prompt", "weights_dtype")
    assert [getattr(small.train.student, k) for k in kept] == [getattr(recipe.train.student, k) for k in kept]
    for field in ("lora", "latent_attention", "late_interaction"):
        assert (getattr(small.train.student, field) is None) == (getattr(recipe.train.student, field) is None)
    losses = (
        "hard_negatives",
        "choice",
        "in_batch_negatives",
        "false_negatives",
        "sources",
        "batches",
        "temperature",
        "dtype",
        "min_positive_score",
    )
    for one, other in zip(small.train.schedule, recipe.train.schedule, strict=True):
        assert [getattr(one, k) for k in losses] == [getattr(other, k) for k in losses]
        assert [d * max(other.matryoshka_dims) for d in one.matryoshka_dims] == [
            d * WIDTH for d in other.matryoshka_dims
        ]
        assert (one.cached_batch is None) == (other.cached_batch is None)
        assert one.cached_batch is None or one.cached_batch < one.batch_size, "a batch is still several parts"
    assert small.evaluate.dtype == recipe.evaluate.dtype
    assert small.register_.model_name.endswith("-tiny"), "it must never touch the real model's registry entry"
    origins = [s.origin for s in (*small.data.sources, *small.data.benchmark)]
    assert {o.type for o in origins} == {"package_docs"}
    assert len({o.part for o in origins}) == len(origins), "no text is in two of them"


def test_a_miniature_runs_on_any_machine() -> None:
    recipe = load_recipe("nv-embed-v2", ["runtime.device=cuda", "runtime.attention=flash_attention_2"])
    small = tiny(recipe).runtime
    assert (small.device, small.attention, small.processes) == ("cpu", "auto", 1)


def test_a_source_of_images_is_one_in_miniature() -> None:
    recipe = load_recipe("omni-embed-nemotron-3b")
    small = tiny(recipe)
    drawn = [source.name for source in small.data.sources if source.origin.pages]
    assert drawn == ["vdr"] == [source.name for source in recipe.data.sources if source.origin.media_columns]
    images = [small.train.student.image_pixels, *(t.image_pixels for t in small.embed.teachers)]
    assert all(pixels is not None and pixels < 10_000 for pixels in images)


def test_a_model_of_unknown_architecture_has_no_miniature() -> None:
    tree = load_recipe("nv-retriever-v1").dump()
    tree["train"]["student"]["model"]["architecture"] = None
    with pytest.raises(
        RecipeError, match=r"no architecture is given for mistralai/Mistral-7B-v0\.1.*add `architecture:`"
    ):
        tiny(Recipe.model_validate(tree))


RELOAD = """
import json, sys
from pathlib import Path
from nvr_tasks.models import load_folder
model = load_folder(Path(sys.argv[1]), "cpu")
print(json.dumps([v.tolist() for v in model.encode_query(["what is a graph?", "shortest paths"])]))
"""


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_miniature_runs_from_download_to_gate(name: str, tmp_path: Path, nvr: Callable, python: Callable) -> None:
    if name not in IN_EVERY_TEST_RUN and not os.environ.get("NVR_TEST_RECIPES"):
        pytest.skip("all recipes: make test-recipes")
    settings = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    started = time.monotonic()
    result = nvr("run", "--recipe", name, "--tiny", "--root", "store", **settings)
    seconds = time.monotonic() - started
    assert result.returncode == 0, result.stderr[-4000:]
    for stage in STAGES[:-1]:
        assert stage.name in result.stdout
    if os.environ.get("NVR_TEST_RECIPES") == "timed":
        assert seconds < SECONDS
    [folder] = (tmp_path / "store" / "model").iterdir()
    from nvr_tasks.models import load_folder

    here = [v.tolist() for v in load_folder(folder, "cpu").encode_query(["what is a graph?", "shortest paths"])]
    fresh = python("-c", RELOAD, str(folder))
    assert fresh.returncode == 0, fresh.stderr[-2000:]
    for one, other in zip(here, json.loads(fresh.stdout.splitlines()[-1]), strict=True):
        np.testing.assert_array_equal(np.array(one), np.array(other))
    names = [p.name for p in folder.rglob("*") if p.is_file()]
    assert not [n for n in names if n.endswith((".bin", ".py", ".pt")) or "adapter" in n]
