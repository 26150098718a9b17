"""What benchmarks of training work with: the stages up to it, made or found."""

from __future__ import annotations

from nvr_tasks.artifacts import Artifact
from nvr_tasks.pipeline import Context, execute
from nvr_tasks.stages import stage


def inputs_of(ctx: Context) -> dict[str, list[str]]:
    """Data set, benchmark and negatives of the recipe."""
    data = execute(stage("download"), ctx).outputs
    dataset = {"dataset": data["dataset"]}
    execute(stage("embed"), ctx, dataset)
    return {**data, "negatives": execute(stage("mine"), ctx, dataset).outputs["negatives"]}


def trained(ctx: Context, inputs: dict[str, list[str]]) -> Artifact:
    """The model that the recipe trains on these inputs, made or found.

    They are given, since the seed of a recipe draws its dev queries, too: other seeds are to have the same data.
    """
    train = stage("train")
    [model] = execute(train, ctx, {role: inputs[role] for role in train.needs if role in inputs}).outputs["model"]
    return ctx.store.open(model)
