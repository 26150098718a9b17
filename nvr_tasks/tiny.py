"""A recipe in miniature, for `nvr run --tiny`: the same stages, settings and code paths, in a minute on a CPU.

Models become tiny ones with random weights of the same architecture, data a handful of real texts (documentation that
installed packages ship; drawn as pages, where the recipe's source has images), lengths and steps small. What makes a recipe
what it is stays: mining method and threshold, negatives per query, stages and their losses, prompts, surgery, adapters. The
scores mean nothing.
"""

from __future__ import annotations

from typing import Any

from nvr_tasks.config import Recipe
from nvr_tasks.errors import RecipeError
from nvr_tasks.settings import HubModel, ModelRef, TinyModel
from nvr_tasks.tiny_models import WIDTH

PACKAGES = ("networkx",)
PARTS = 40  # of the documentation; one is some twenty passages
STEPS = 3
TOKENS = 48
PIXELS = 8 * 28 * 28  # of an image: eight tokens
TASK = "PackageDocs"


def tiny(recipe: Recipe) -> Recipe:
    """The recipe in miniature. Raises RecipeError when the architecture of a model is not known."""
    if recipe.mine.rerankers:
        raise RecipeError(
            "--tiny has no stand-in for rerankers yet: leave mine.cross_encoders and mine.late_interaction out"
        )
    tree = recipe.dump()
    tree["name"] = f"{recipe.name}-tiny"
    tree["register"] = {k: f"{v}-tiny" for k, v in tree["register"].items()}
    sources = tree["data"]["sources"]
    for number, source in enumerate(sources):
        pages = bool(source["origin"].get("image_column") or source["origin"].get("pages"))
        source |= {"origin": _documentation(number, pages), "mirror": None, "split": "train"}
        source |= {"max_queries": None, "max_passages": None}
        source["instruction"] = source["instruction"] and f"set {number}"  # a whole one would fill so short a text
    tree["data"]["instruction"] = tree["data"]["instruction"] and "any set"
    tree["data"] |= {
        "benchmark": [{"task": TASK, "origin": _documentation(len(sources)), "official": False}],
        "dev_queries": 4,
    }
    for teacher, settings in zip(tree["embed"]["teachers"], recipe.embed.teachers, strict=True):
        teacher |= {"model": _stand_in(settings.model), "max_tokens": {"query": TOKENS, "passage": TOKENS}}
        teacher["image_pixels"] = PIXELS if settings.image_pixels else None
    tree["train"]["student"] = _student(tree["train"]["student"], recipe.train.student.model)
    for stage in tree["train"]["stages"] or [tree["train"]]:
        _shorten(stage)
    tree["mine"]["depth"] = min(tree["mine"]["depth"], 100)
    tree["gate"] = {"promote": recipe.gate.promote, "min_queries": 2}  # a handful of queries are enough to see it work
    tree["runtime"] |= {
        "device": "cpu",
        "attention": "auto",  # flash_attention_2 runs on GPUs alone
        "embed_shards": 1,
        "mine_shards": 1,
        "processes": 1,
        "nodes": 1,
        "shard_weights": False,
    }
    return Recipe.model_validate(tree)


def _documentation(part: int, pages: bool = False) -> dict[str, Any]:
    return {
        "pages": pages,
        "type": "package_docs",
        "packages": list(PACKAGES),
        "min_words": 20,
        "max_words": 60,
        "test_percent": 30,
        "part": f"{part}/{PARTS}",
    }


def _stand_in(model: ModelRef) -> dict[str, Any]:
    if isinstance(model, TinyModel):
        return model.model_dump()
    architecture = model.architecture if isinstance(model, HubModel) else "bert"  # what packages ship are BERTs
    if architecture is None:
        raise RecipeError(
            f"no architecture is given for {model.repo if isinstance(model, HubModel) else model}, so --tiny does not know "
            "which tiny model stands in for it: add `architecture:` beside its revision"
        )
    return {"type": "tiny", "architecture": architecture}


def _student(settings: dict[str, Any], model: ModelRef) -> dict[str, Any]:
    small = {**settings, "model": _stand_in(model), "max_tokens": TOKENS}
    small["image_pixels"] = PIXELS if settings["image_pixels"] else None
    small["layers"] = 1 if settings["layers"] else None
    if settings["max_query_tokens"]:
        small["max_query_tokens"] = TOKENS // 2
    if settings["latent_attention"]:
        small["latent_attention"] = {"latents": 8, "heads": 4}
    if settings["late_interaction"]:
        small["late_interaction"] = {"dim": WIDTH // 2}
    if settings["lora"]:
        small["lora"] = {**settings["lora"], "rank": 4}
    return small


def _shorten(stage: dict[str, Any]) -> None:
    stage |= {"steps": STEPS, "epochs": None, "batch_size": 4, "warmup_steps": 1, "eval_every_steps": STEPS}
    stage["max_tokens"] = TOKENS
    if stage["max_query_tokens"]:
        stage["max_query_tokens"] = TOKENS // 2
    if stage["cached_batch"]:
        stage["cached_batch"] = 2
    if stage["matryoshka_dims"]:
        largest = max(stage["matryoshka_dims"])
        stage["matryoshka_dims"] = sorted(
            {max(1, d * WIDTH // largest) for d in stage["matryoshka_dims"]}, reverse=True
        )
