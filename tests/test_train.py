"""What names a model: old recipes keep their models, and every setting that can change one does."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from nvr_tasks import train
from nvr_tasks.artifacts import Store
from nvr_tasks.config import Recipe
from nvr_tasks.errors import RecipeError
from nvr_tasks.pipeline import Context
from nvr_tasks.recipe_files import load_recipe, parse_recipe

Make = Callable[..., Recipe]
INPUTS = {
    "dataset": ["file:///r/dataset/d"],
    "negatives": ["file:///r/negatives/n"],
    "embeddings": ["file:///r/embeddings/e"],
}
STAGED = (
    "train.stages=[{name: one, steps: 5}, {name: two, epochs: 1, hard_negatives: 2, in_batch_negatives: false}]",
    "train.learning_rate=1e-3",
)


def identity(store: Store, recipe: Recipe) -> Any:
    [found] = train.plan(Context(recipe, store), INPUTS)["model"]
    return found


def test_a_flat_recipe_is_named_as_it_was_before_there_were_stages(store: Store) -> None:
    """Else every new setting would have every model trained again."""
    config = identity(store, load_recipe("demo", ["train.dropout=null"])).config
    student = config.pop("student")
    assert config == {
        "steps": 80, "batch_size": 32, "max_tokens": 80, "hard_negatives": 1, "learning_rate": 1e-4, "warmup_steps": 8,
        "weight_decay": 0.01, "max_grad_norm": 1.0, "temperature": 0.05, "dtype": "float32", "eval_every_steps": 40,
        "seed": 17,
    }  # fmt: skip
    assert set(student) == {"model", "layers", "prompts", "max_tokens"}


@pytest.mark.parametrize(
    "override",
    [
        "train.epochs=2", "train.max_query_tokens=16", "train.choice=drawn", "train.in_batch_negatives=false",
        "train.false_negatives={margin: absolute, value: 0.1}", "train.sources={docs: 2}", "train.batches=homogeneous",
        "train.matryoshka_dims=[384, 64]", "train.cached_batch=8", "train.student.bidirectional=true",
        "train.student.pooling=cls", "train.student.pool_prompt=false", "train.student.latent_attention={latents: 8}",
        "train.student.late_interaction={dim: 16}", "train.student.lora={rank: 4}", "train.student.weights_dtype=bfloat16",
        "train.student.max_query_tokens=16", "train.dropout=0.2", "train.min_positive_score=0.3", *STAGED[:1],
    ],
)  # fmt: skip
def test_every_new_setting_makes_another_model(store: Store, tiny_recipe: Make, override: str) -> None:
    changed = tiny_recipe(override)
    assert identity(store, changed).fingerprint != identity(store, tiny_recipe()).fingerprint


def test_a_setting_written_out_at_its_default_changes_nothing(store: Store, tiny_recipe: Make) -> None:
    plain = ("train.choice=best", "train.stages=[]", "train.student.lora=null", "train.sources={}")
    assert identity(store, tiny_recipe(*plain)).fingerprint == identity(store, tiny_recipe()).fingerprint


def test_what_stands_beside_stages_goes_into_those_that_say_nothing_else(store: Store, tiny_recipe: Make) -> None:
    recipe = tiny_recipe(*STAGED)
    assert [(s.steps, s.epochs, s.learning_rate) for s in recipe.train.schedule] == [(5, None, 1e-3), (None, 1, 1e-3)]
    assert "learning_rate" not in recipe.dump()["train"]
    again = parse_recipe(json.dumps(recipe.dump()), "dumped")
    assert (again.train, again.dump()) == (recipe.train, recipe.dump())
    renamed = tiny_recipe(STAGED[0].replace("one", "first"), STAGED[1])
    assert identity(store, renamed).fingerprint == identity(store, recipe).fingerprint, "a name changes no model"


def test_the_teacher_s_vectors_are_read_only_where_its_scores_mask(store: Store, tiny_recipe: Make) -> None:
    masked = tiny_recipe("train.false_negatives={value: 0.1}")
    assert "embeddings" not in train.needs(Context(tiny_recipe(), store))
    assert "embeddings" in train.needs(Context(masked, store))
    other = tiny_recipe("train.false_negatives={value: 0.1}", "embed.teachers.0.max_tokens.query=24")
    assert identity(store, other).fingerprint != identity(store, masked).fingerprint


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.steps=5", "train.epochs=2"], "steps is 5 and epochs 2: give one of them"),
        (["train.hard_negatives=0", "train.in_batch_negatives=false"], "no negatives at all"),
        (
            ["train.hard_negatives=9"],
            r"train\.hard_negatives is 9 but mine\.num_negatives is only 4: mine at least as many as are trained on",
        ),
        (
            [STAGED[0].replace("hard_negatives: 2", "hard_negatives: 9")],
            r"train\.stages\.1\.hard_negatives is 9 but mine\.num_negatives is only 4",
        ),
        (["train.sources={dox: 1}"], r"train\.sources names dox, which data\.sources lacks; it has: docs"),
        (["train.sources={docs: 0}"], r"train\.sources\.docs: 0 is not allowed"),
        (["train.false_negatives={marge: 1}"], r"unknown key .* Did you mean margin\? Allowed here: margin, value"),
        (
            ["train.stages=[{name: a, steps: 1}]", "train.steps=5"],
            r"steps is given for all stages, but every stage has its own: change train\.stages\.0\.steps",
        ),
        (["train.stages=[{name: a}, {name: a}]"], r"train\.stages\.name must be unique; a appears twice"),
        (
            ["train.student.late_interaction={dim: 8}", "train.in_batch_negatives=false"],
            r"stage train: in_batch_negatives: false cannot be combined with student\.late_interaction yet",
        ),
        (
            ["train.student.late_interaction={dim: 8}", "train.student.pooling=mean"],
            "late_interaction keeps every token vector, so pooling has no meaning",
        ),
        (["train.matryoshka_dims=[64, 64]"], "matryoshka_dims must be unique; 64 appears twice"),
    ],
)
def test_what_makes_no_sense_is_refused(tiny_recipe: Make, overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        tiny_recipe(*overrides)
