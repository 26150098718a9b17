"""The cells of an ablation: one recipe per variant and seed, and what they share. Light: no torch, no pandas."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

from nvr_tasks.ablation_settings import Ablation
from nvr_tasks.config import Recipe
from nvr_tasks.errors import RecipeError
from nvr_tasks.pipeline import Context, Plan, module_of
from nvr_tasks.settings import Reranker, Teacher
from nvr_tasks.stages import stage


@dataclass(frozen=True)
class Cell:
    """A variant with a seed."""

    variant: str
    seed: int
    recipe: Recipe

    @property
    def name(self) -> str:
        """What --cell takes."""
        return f"{self.variant}:{self.seed}"


def ablation_of(recipe: Recipe) -> Ablation:
    """The recipe's ablation. Raises RecipeError if it has none."""
    if recipe.ablation is None:
        raise RecipeError(
            f"recipe {recipe.name} has no ablation: add a section `ablation` with variants, or give a grid, e.g. "
            '--set "ablation.grid={methods: [naive, perc_pos]}"'
        )
    return recipe.ablation


def cells_of(recipe: Recipe) -> list[Cell]:
    """All cells, seed by seed, so that what else a machine does meanwhile slows no variant alone.

    Raises:
        RecipeError: the recipe has no ablation.
    """
    ablation = ablation_of(recipe)
    return [Cell(v.name, s, recipe.varied(v.changes, s)) for s in ablation.seeds for v in ablation.rows]


def distinct(cells: list[Cell]) -> list[str]:
    """Names of the cells that differ in their settings: two tasks must not train one model at a time."""
    first: dict[str, str] = {}
    for cell in cells:
        first.setdefault(json.dumps(cell.recipe.dump()), cell.name)  # with the threshold in force, given or not
    return list(first.values())


def chosen(ctx: Context) -> list[Cell]:
    """The cell that the option `cell` names, all without it. Raises RecipeError if there is none of that name."""
    cells, name = cells_of(ctx.recipe), ctx.options.get("cell")
    found = [c for c in cells if name in (None, c.name)]
    if not found:
        raise RecipeError(f"--cell {name!r} is not in the ablation; its cells: {', '.join(c.name for c in cells)}")
    return found


def teachers_of(recipe: Recipe) -> list[Teacher | Reranker]:
    """Whose scores any variant looks at. Raises RecipeError if the recipe has no ablation."""
    ablation = ablation_of(recipe)
    used = {t.name: t for v in ablation.rows for t in recipe.varied(v.changes, recipe.seed).mining_teachers}
    return list(used.values())


def shared(recipe: Recipe) -> Recipe:
    """A recipe by which everything is embedded and searched that any variant selects from.

    Raises:
        RecipeError: the recipe has no ablation.
    """
    names = [t.name for t in teachers_of(recipe)]
    changes = {
        "mine.method": "perc_pos",
        "mine.sampling": "top",
        "mine.min_score": None,
        "mine.teacher": None,
        "mine.teachers": names,
        "mine.ensemble": "cross_sample",
        **{
            f"{where}.min_positive_score": None for where in _stages(recipe)
        },  # of a single teacher's scale, but nothing is trained
    }
    return recipe.varied(changes, recipe.seed)


def _stages(recipe: Recipe) -> list[str]:
    return [f"train.stages.{i}" for i in range(len(recipe.train.stages))] or ["train"]


def shards_of(recipe: Recipe) -> list[str]:
    """Parts of embedding (`TEACHER:I/N`) that the variants need together."""
    names, total = [t.name for t in shared(recipe).teachers], recipe.runtime.embed_shards
    return [f"{name}:{i}/{total}" for name in names for i in range(total)]


def inside(ctx: Context, recipe: Recipe) -> Context:
    """The context of a stage that works for an ablation: its records and metrics are not the pipeline run's."""
    return replace(ctx, recipe=recipe, pipeline_run=None, options={})


def candidates_plan(ctx: Context, recipe: Recipe, dataset: str) -> Plan:
    """The candidates that a recipe selects from."""
    searching = replace(inside(ctx, recipe), options={"search_only": "1"})
    return module_of(stage("mine")).plan(searching, {"dataset": [dataset]})
