"""Whether a training can be divided over its processes at all: asked when it begins, and before the work that leads to it."""

from __future__ import annotations

from nvr_tasks.config import Recipe
from nvr_tasks.errors import NvrError


def refuse_impossible(recipe: Recipe, given: int | None = None) -> None:
    """Raise NvrError when the machine, or a batch, cannot be divided over the processes that are asked for.

    Args:
        given: GPUs that the stage will be given, where it is another machine that trains; None: those that torch sees here.
    """
    runtime, count = recipe.runtime, recipe.runtime.processes
    if runtime.shard_weights and count == 1:
        raise NvrError(
            "runtime.shard_weights divides a student over processes, but runtime.processes is 1: raise it, or leave out shard_weights"
        )
    if count % runtime.nodes:
        raise NvrError(
            f"runtime.processes is {count}, which {runtime.nodes} machines (runtime.nodes) cannot divide evenly: change one of them"
        )
    for stage in recipe.train.schedule:
        if stage.batch_size % count:
            raise NvrError(
                f"batch_size of stage {stage.name} is {stage.batch_size}, which {count} processes (runtime.processes) cannot "
                "divide evenly: change one of them"
            )
    here = count // runtime.nodes
    if runtime.device == "cpu" or (runtime.device == "auto" and here == 1):
        return  # torch need not be asked
    gpus = _seen() if given is None else given
    if here > gpus and (runtime.device == "cuda" or gpus):
        of = f", {here} on each of {runtime.nodes} machines" if runtime.nodes > 1 else ""
        has, more = "torch sees", "run on a node with more GPUs"
        if given is not None:
            has, more = "its task is given", "give it more (NVR_RESOURCES; without NVR_GPU_IMAGE it is given none)"
        fewer = f"set runtime.processes={gpus * runtime.nodes}" if gpus else "set runtime.device=cpu"
        raise NvrError(f"runtime.processes is {count}, one GPU each{of}, but {has} {gpus}: {fewer}, or {more}")


def _seen() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
