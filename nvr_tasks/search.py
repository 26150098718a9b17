"""Search the candidates that all cells of an ablation select from, once, by every teacher that a variant names.

Reads   dataset/<fp> · embeddings/<fp> (every shard of those teachers)
Writes  candidates/<fp> per teacher, as `nvr mine` writes them

Method, threshold, sampling and number of negatives change no candidates, so cells only select.

Example  nvr search --recipe beir-small-ablation
"""

from __future__ import annotations

from dataclasses import replace

from nvr_tasks.cells import candidates_plan, inside, shared
from nvr_tasks.pipeline import Context, Inputs, Plan, StageResult, execute, one
from nvr_tasks.stages import stage


def needs(ctx: Context) -> tuple[str, ...]:  # noqa: ARG001
    """Embeddings are found by teacher: the recipe's own may not be among those of the variants."""
    return ("dataset",)


def plan(ctx: Context, inputs: Inputs) -> Plan:
    """One `candidates` artefact per teacher."""
    return candidates_plan(ctx, shared(ctx.recipe), one(inputs, "dataset"))


def build(ctx: Context, inputs: Inputs, plan: Plan) -> StageResult:  # noqa: ARG001
    """Let `mine` search and select nothing."""
    searching = replace(inside(ctx, shared(ctx.recipe)), options={"search_only": "1"})
    found = execute(stage("mine"), searching, {"dataset": [one(inputs, "dataset")]})
    return StageResult("search", found.outputs, found.figures)
