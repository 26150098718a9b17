"""Rate of training against what a user of sentence-transformers would write, on one machine: part of `make bench`.

The same student (first three layers of all-MiniLM-L6-v2), pairs, steps, batch, lengths, loss (InfoNCE over in-batch and one
mined negative) and precision. The peer is peer.py; ours are the stages of the recipe, with the dropout of the model's config,
which is the peer's, and without, as our recipes. Rates are of optimizer steps alone (median from the begin of one to its
end), in turns. A profile of a few steps of each side tells what the seconds go to.

Pairs are SciFact's and FeedbackQA's below NVR_DATA, or, without it, documentation that installed packages ship.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import peer
from prepared import inputs_of, trained
from torch.profiler import ProfilerActivity, profile, schedule  # noqa: TID253
from transformers import Trainer  # noqa: TID253

from nvr_tasks.artifacts import Store
from nvr_tasks.config import Recipe
from nvr_tasks.dataset import read_dataset
from nvr_tasks.pipeline import Context
from nvr_tasks.recipe_files import load_recipe

SOURCES = ("scifact", "feedbackqa")
DTYPES = ("float32", "bfloat16")
PEER = "sentence-transformers"
OURS: dict[str, dict[str, Any]] = {
    "nvr, no dropout": {"train.dropout": 0.0},
    "nvr, the model's own dropout": {"train.dropout": None},
    "nvr, no dropout, 2 processes": {"train.dropout": 0.0, "runtime.processes": 2},
}

WARM, PROFILED = 4, 8  # steps
PARTS = {  # of a step, by how the names of torch's operators begin; the rest is the last part
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "linear"),
    "softmax, fused attention": ("scaled_dot_product", "flash", "softmax", "safe_softmax"),
    "drawing dropout": ("bernoulli", "native_dropout"),
    "activations, norms": ("gelu", "native_layer_norm", "layer_norm", "tanh"),
    "optimizer, clipping": ("fused_adamw", "linalg_vector_norm", "foreach"),
}
REST = "the rest (copies, products with masks, sums, embeddings)"


def recipe_of(args: argparse.Namespace) -> Recipe:
    """beir-small with two of its sources, or demo; one stage of training without dev set."""
    steps = [f"train.steps={args.steps}", f"train.batch_size={args.batch}", f"train.max_tokens={args.tokens}"]
    steps += ["train.hard_negatives=1", "data.dev_queries=0", "runtime.device=cpu", "mine.threshold=0.95"]
    steps += ["train.sources={}", "train.min_positive_score=null", "train.false_negatives=null"]
    if not os.environ.get("NVR_DATA"):
        return load_recipe("demo", [*steps, "data.sources.0.max_queries=2000"])
    recipe = load_recipe("beir-small", steps)
    kept = tuple(s for s in recipe.data.sources if s.name in SOURCES)
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"sources": kept})})


def our_seconds(recipe: Recipe, ctx: Context, inputs: dict[str, list[str]], seed: int) -> float:
    """Seconds per step of stage `train`; another seed is another model, so nothing is reused."""
    model = trained(replace(ctx, recipe=recipe.varied({}, seed)), inputs)
    pace: float = model.manifest.stats["seconds_per_step"]
    return pace


def profiled(train: Callable[[], object]) -> dict[str, float]:
    """Milliseconds per step and part of it, on the thread that computes, of the steps after the first `WARM` ones."""
    told = dict.fromkeys((*PARTS, REST), 0.0)

    def read(found: profile) -> None:
        for event in found.key_averages():
            name = event.key.removeprefix("aten::").lstrip("_")
            if event.key.startswith("aten::"):
                part = next((p for p, starts in PARTS.items() if name.startswith(starts)), REST)
                told[part] += event.self_cpu_time_total / 1000 / PROFILED

    steps = schedule(wait=WARM - 1, warmup=1, active=PROFILED, repeat=1)
    with profile(activities=[ProfilerActivity.CPU], schedule=steps, on_trace_ready=read) as found:
        step = Trainer.training_step

        def counted(self: Trainer, *args: Any, **kwargs: Any) -> Any:
            loss = step(self, *args, **kwargs)
            found.step()
            return loss

        with patch.object(Trainer, "training_step", counted):
            train()
    return told


def main() -> None:
    """Measure, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    recipe = recipe_of(args)
    with tempfile.TemporaryDirectory(prefix="nvr-bench-") as name:
        folder = Path(name)
        ctx = Context(recipe, Store(str(folder / "artifacts")))
        clock = time.perf_counter()
        inputs = inputs_of(ctx)
        our_mining = time.perf_counter() - clock
        dataset = ctx.store.fetch(ctx.store.open(inputs["dataset"][0]))
        mined = peer.mined(recipe, read_dataset(dataset), folder / "embeddings")
        found: dict[tuple[str, str], list[float]] = {}
        for turn, dtype in itertools.product(range(args.rounds), DTYPES):
            there = recipe.varied({"train.dtype": dtype}, recipe.seed)
            found.setdefault((dtype, PEER), []).append(peer.trained(there, mined.rows, folder / "peer")[1].median)
            for number, (label, changes) in enumerate(OURS.items()):
                own, seed = there.varied(changes, recipe.seed), 100 + 10 * turn + number
                found.setdefault((dtype, label), []).append(our_seconds(own, ctx, inputs, seed))
        parts: dict[str, dict[str, float]] = {}
        for dtype in DTYPES:
            few = recipe.varied({"train.dtype": dtype, "train.steps": WARM + PROFILED + 1}, recipe.seed)
            parts[f"{PEER}, {dtype}"] = profiled(partial(peer.trained, few, mined.rows, folder / "peer"))
            for label, changes in OURS.items():
                if "runtime.processes" not in changes:  # the profiler sees this process alone
                    own = few.varied(changes, recipe.seed)
                    parts[f"{label}, {dtype}"] = profiled(partial(our_seconds, own, ctx, inputs, 1))
    print(
        f"{len(mined.rows):,} triplets of the peer; {args.steps} steps × {args.batch} pairs with one mined negative, at most "
        f"{args.tokens} tokens; best of {args.rounds} rounds. Mining, teacher's forward passes included: "
        f"{mined.seconds:.0f} s by the peer, {our_mining:.0f} s by the stages (download included).\n"
    )
    print("| | seconds per step | samples/s | times the peer at this precision |")
    print("|---|---|---|---|")
    for (dtype, label), seconds in found.items():
        best, theirs = min(seconds), min(found[dtype, PEER])
        print(f"| {label}, {dtype} | {best:.3f} | {args.batch / best:.1f} | {theirs / best:.2f} |")
    print("\nWhere a step goes, milliseconds by torch's profiler (which slows all of them):\n")
    print(f"| | {' | '.join((*PARTS, REST))} |\n|---|{'---|' * (len(PARTS) + 1)}")
    for label, told in parts.items():
        print(f"| {label} | {' | '.join(f'{told[part]:,.0f}' for part in (*PARTS, REST))} |")


if __name__ == "__main__":
    main()
