"""What benchmarks of training start from: the stages before it, made or found."""

from __future__ import annotations

from nvr_tasks.pipeline import Context, execute
from nvr_tasks.stages import stage


def inputs_of(ctx: Context) -> dict[str, list[str]]:
    """Data set, benchmark and negatives of the recipe."""
    data = execute(stage("download"), ctx).outputs
    dataset = {"dataset": data["dataset"]}
    execute(stage("embed"), ctx, dataset)
    return {**data, "negatives": execute(stage("mine"), ctx, dataset).outputs["negatives"]}
