"""Rate of training against what a user of sentence-transformers would write, on one machine: part of `make bench`.

The same student (first three layers of all-MiniLM-L6-v2), pairs, steps, batch, lengths, loss (InfoNCE over in-batch and one
mined negative) and precision. The peer is peer.py; ours are the stages of the recipe, with the dropout of the model's config,
which is the peer's, and without, as our recipes. Rates are of optimizer steps alone (median from the begin of one to its
end), in turns.

Pairs are SciFact's and FeedbackQA's below NVR_DATA, or, without it, documentation that installed packages ship.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import peer
from prepared import inputs_of

from nvr_tasks.artifacts import Store
from nvr_tasks.config import Recipe
from nvr_tasks.dataset import read_dataset
from nvr_tasks.pipeline import Context, execute
from nvr_tasks.recipe_files import load_recipe
from nvr_tasks.stages import stage

SOURCES = ("scifact", "feedbackqa")
DTYPES = ("float32", "bfloat16")
PEER = "sentence-transformers"
OURS: dict[str, dict[str, Any]] = {
    "nvr, no dropout": {"train.dropout": 0.0},
    "nvr, the model's own dropout": {"train.dropout": None},
    "nvr, no dropout, 2 processes": {"train.dropout": 0.0, "runtime.processes": 2},
}


def recipe_of(args: argparse.Namespace) -> Recipe:
    """beir-small with two of its sources, or demo; one stage of training without dev set."""
    steps = [f"train.steps={args.steps}", f"train.batch_size={args.batch}", f"train.max_tokens={args.tokens}"]
    steps += ["train.hard_negatives=1", "data.dev_queries=0", "runtime.device=cpu"]
    steps += ["train.sources={}", "train.min_positive_score=null", "train.false_negatives=null"]
    if not os.environ.get("NVR_DATA"):
        return load_recipe("demo", [*steps, "data.sources.0.max_queries=2000"])
    recipe = load_recipe("beir-small", steps)
    kept = tuple(s for s in recipe.data.sources if s.name in SOURCES)
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"sources": kept})})


def our_seconds(recipe: Recipe, ctx: Context, seed: int) -> float:
    """Seconds per step of stage `train`; another seed is another model, so nothing is reused."""
    trained = execute(stage("train"), replace(ctx, recipe=recipe.varied({}, seed)), inputs_of(ctx))
    pace: float = ctx.store.open(trained.outputs["model"][0]).manifest.stats["seconds_per_step"]
    return pace


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
                found.setdefault((dtype, label), []).append(our_seconds(own, replace(ctx, recipe=own), seed))
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


if __name__ == "__main__":
    main()
