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


def hub(repo: str) -> dict[str, Any]:
    return {"type": "hub", "repo": repo}


E5_MISTRAL = {"model": hub("intfloat/e5-mistral-7b-instruct")}
MISTRAL = {"model": hub("mistralai/Mistral-7B-v0.1"), "bidirectional": True, "pooling": "mean", "pool_prompt": False}
E5_PROMPTS = {"query": "query: ", "passage": "passage: "}
GIST = {"margin": "relative", "value": 0.05}
KOREAN = {
    "mine": {"method": "perc_pos", "threshold": 0.95},
    "student": {"pooling": "mean", "prompts": E5_PROMPTS, "max_tokens": 512},
}
LATE_ON = {
    "teachers": [{"model": hub("Alibaba-NLP/gte-modernbert-base")}],
    "mine": {"method": "perc_pos", "threshold": 0.99, "num_negatives": 50},
    "student": {"max_tokens": 2048, "max_query_tokens": 256},
    "stages": [
        {
            "epochs": 1,
            "batch_size": 128,
            "hard_negatives": 15,
            "choice": "drawn",
            "batches": "homogeneous",
            "in_batch_negatives": True,
            "learning_rate": 8e-6,
            "warmup_steps": 0,
            "weight_decay": 0,
            "max_grad_norm": 1,
            "temperature": 0.07,
            "dtype": "bfloat16",
        }
    ],
}

# All that papers, cards and training scripts publish of the systems and that their recipes state.
PUBLISHED: dict[str, dict[str, Any]] = {
    "nv-retriever-v1": {
        "instruction": "Given a web search query, retrieve relevant passages that answer the query",
        "teachers": [{**E5_MISTRAL, "max_tokens": {"passage": 4096}}],
        "mine": {"method": "perc_pos", "threshold": 0.95, "num_negatives": 5},
        "student": {
            **MISTRAL,
            "prompts": {"query": "{instruction}: ", "passage": ""},
            "max_tokens": 512,
            "max_query_tokens": 192,
            "lora": {"rank": 16, "alpha": 32},
        },
        "stages": [
            {
                "steps": 12 * 2844,
                "batch_size": 8 * 32,
                "hard_negatives": 1,
                "in_batch_negatives": True,
                "learning_rate": 1e-5,
                "warmup_steps": 100,
            },
            {
                "steps": 12 * 829,
                "batch_size": 8 * 8,
                "hard_negatives": 5,
                "in_batch_negatives": False,  # as the recipe reads the paper
                "learning_rate": 1e-5,
                "warmup_steps": 100,
            },
        ],
        "runtime": {"processes": 8},
    },
    "nv-embed-v2": {
        "instruction": "Given a question, retrieve passages that answer the question",
        "teachers": [E5_MISTRAL],
        "mine": {"method": "perc_pos", "threshold": 0.95, "num_negatives": 7},
        "student": {
            **MISTRAL,
            "prompts": {"query": "Instruct: {instruction}\nQuery: ", "passage": ""},
            "max_tokens": 512,
            "latent_attention": {"latents": 512, "heads": 8},
            "lora": {"rank": 16, "alpha": 32, "dropout": 0.1},
        },
        "stages": [
            {
                "steps": steps,
                "batch_size": 128,
                "hard_negatives": 7,
                "in_batch_negatives": in_batch,
                "learning_rate": rate,
                "warmup_steps": 500,
                "weight_decay": 0.03,
            }
            for steps, rate, in_batch in ((20000, 2e-5, True), (18000, 1.5e-5, False))
        ],
    },
    "llama-nemotron-embed-1b-v2": {
        "mine": {"method": "perc_pos"},
        "student": {
            "model": hub("meta-llama/Llama-3.2-1B"),
            "bidirectional": True,
            "pooling": "mean",
            "prompts": E5_PROMPTS,
            "max_tokens": 8192,
        },
        "stages": [{"matryoshka_dims": [2048, 1024, 768, 512, 384]}],
    },
    "omni-embed-nemotron-3b": {
        "mine": {"method": "perc_pos"},
        "student": {
            "model": hub("Qwen/Qwen2.5-Omni-3B"),
            "bidirectional": True,
            "pooling": "mean",
            "prompts": E5_PROMPTS,
        },
    },
    "late-on-code": {
        **LATE_ON,
        "student": {
            **LATE_ON["student"],
            "model": hub("lightonai/LateOn-Code-pretrain"),
            "late_interaction": {"dim": 128},
        },
    },
    "late-on-code-edge": {
        **LATE_ON,
        "student": {
            **LATE_ON["student"],
            "model": hub("lightonai/LateOn-Code-edge-pretrain"),
            "late_interaction": {"dim": 48},
        },
    },
    "multilingual-e5-small-ko": {
        **KOREAN,
        "student": {**KOREAN["student"], "model": hub("intfloat/multilingual-e5-small")},
        "stages": [{"false_negatives": GIST}],
    },
    "multilingual-e5-small-ko-v2": {
        **KOREAN,
        "student": {**KOREAN["student"], "model": hub("intfloat/multilingual-e5-small")},
        "stages": [{"false_negatives": GIST}, {"false_negatives": GIST}],
    },
    "koen-e5-tiny": {**KOREAN, "stages": [{"false_negatives": GIST}]},
}


def departures(found: Any, published: Any, where: str = "") -> list[str]:
    """Where a recipe says something else than what is published, which may be a part of it."""
    if isinstance(published, dict):
        return [d for key, value in published.items() for d in departures(found[key], value, f"{where}.{key}")]
    if isinstance(published, list) and isinstance(published[0], dict) and len(found) == len(published):
        pairs = enumerate(zip(found, published, strict=True))
        return [d for number, (one, other) in pairs for d in departures(one, other, f"{where}.{number}")]
    return [] if found == published else [f"{where} is {found!r}, and {published!r} is published"]


def test_there_is_a_recipe_per_system() -> None:
    assert sorted(PUBLISHED) == SYSTEMS


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_recipe_says_what_the_system_publishes(name: str) -> None:
    recipe = load_recipe(name)
    tree = recipe.dump()
    said = {
        "instruction": tree["data"]["instruction"],
        "teachers": tree["embed"]["teachers"],
        "mine": tree["mine"],
        "student": tree["train"]["student"],
        "stages": [stage.model_dump(mode="json") for stage in recipe.train.schedule],
        "runtime": tree["runtime"],
    }
    assert departures(said, PUBLISHED[name]) == []


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_recipe_is_whole(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == recipe.register_.model_name == name
    models = [recipe.train.student.model, *(t.model for t in recipe.embed.teachers)]
    assert all(isinstance(m, HubModel) and m.architecture for m in models)
    assert parse_recipe(json.dumps(recipe.dump()), "dumped") == recipe


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
