"""nDCG@10 after training, against what a user of sentence-transformers would write (peer.py), over several seeds.

The same teacher, student, data and steps; each side mines and trains with its own tools, and mteb scores both. The peer is
given all pairs, as its documentation does; or one positive per query, drawn by the seed, and no dropout, as our recipe: of
a query with many positives the library takes the lowest for its ceiling, and most such queries come back without a row.
Needs NVR_DATA; takes about a quarter of an hour per seed on two cores, and half an hour for the embeddings of both sides.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import peer
from prepared import inputs_of, trained
from sentence_transformers import SentenceTransformer  # noqa: TID253

from nvr_tasks.artifacts import Artifact, Identity, Store
from nvr_tasks.dataset import read_dataset
from nvr_tasks.evaluation.run import score_task
from nvr_tasks.models import teacher_identity
from nvr_tasks.pipeline import Context
from nvr_tasks.recipe_files import load_recipe

OURS = "nvr"
PEERS: dict[str, tuple[bool, float | None]] = {  # one positive per query, dropout
    "sentence-transformers": (False, None),
    "sentence-transformers, one positive per query, no dropout": (True, 0.0),
}


def scores(ctx: Context, model: SentenceTransformer, benchmark: Artifact) -> dict[str, float]:
    """nDCG@10 by task."""
    folder = ctx.store.fetch(benchmark)
    found = {}
    for task, facts in json.loads((folder / "tasks.json").read_text(encoding="utf-8")).items():
        with tempfile.TemporaryDirectory(prefix="nvr-bench-") as scratch:
            of_task = score_task(
                model, "bench/student", "0", task, facts, folder / task, Path(scratch), dtype="float32"
            )
        found[task] = of_task["ndcg_at_10"]
    return found


def ours(ctx: Context, inputs: dict[str, list[str]]) -> SentenceTransformer:
    """The model of stage `train`."""
    return SentenceTransformer(str(ctx.store.fetch(trained(ctx, inputs))), device="cpu")


def main() -> None:
    """Measure, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="beir-small")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[17, 18, 19])
    parser.add_argument("--root", default=".nvr/artifacts")
    args = parser.parse_args()
    if not os.environ.get("NVR_DATA"):
        sys.exit("NVR_DATA is not set: this compares on real data sets; see the README for what it has to hold")
    recipe = load_recipe(args.recipe, ["runtime.device=cpu", *args.set])
    ctx = Context(recipe, Store(args.root))
    inputs = inputs_of(ctx)
    benchmark = ctx.store.open(inputs["benchmark"][0])
    data = read_dataset(ctx.store.fetch(ctx.store.open(inputs["dataset"][0])))
    # The library's own key of cached embeddings knows neither weights nor lengths.
    key = Identity("peer", 1, teacher_identity(recipe.teacher)).fingerprint[:16]
    cache = Path(".nvr", "peer", key).resolve()
    every = peer.mined(recipe, data, cache)
    counts = {"all pairs": every.counts}
    found: dict[str, list[dict[str, float]]] = {side: [] for side in (OURS, *PEERS)}
    for seed in args.seeds:
        there = replace(ctx, recipe=recipe.varied({}, seed))
        models = {OURS: ours(there, inputs)}
        single = peer.mined(recipe, data, cache, seed)
        counts[f"one positive per query, seed {seed}"] = single.counts
        for side, (one, dropout) in PEERS.items():
            given = single.rows if one else every.rows
            with tempfile.TemporaryDirectory(prefix="nvr-bench-") as scratch:
                models[side], _ = peer.trained(there.recipe, given, Path(scratch), dropout)
        for side, model in models.items():
            found[side].append(scores(ctx, model, benchmark))
            print(f"seed {seed}, {side}: {found[side][-1]}", file=sys.stderr)
    tasks = list(found[OURS][0])
    print(f"nDCG@10, mean (least–most) of {len(args.seeds)} seeds.\n")
    print(f"| | {' | '.join(tasks)} | mean |\n|---|{'---|' * (len(tasks) + 1)}")
    for side, runs in found.items():
        columns = [[run[task] for run in runs] for task in tasks] + [[statistics.mean(run.values()) for run in runs]]
        cells = [f"{statistics.mean(c):.4f} ({min(c):.4f}–{max(c):.4f})" for c in columns]
        print(f"| {side} | {' | '.join(cells)} |")

    print("\n(query, positive) pairs that the peer was given, and rows that came back with enough negatives:\n")
    sources = sorted({source for of in counts.values() for source in of})
    print(f"| | {' | '.join(sources)} |\n|---|{'---|' * len(sources)}")
    for label, of in counts.items():
        print(f"| {label} | {' | '.join('{:,} → {:,}'.format(*of.get(s, (0, 0))) for s in sources)} |")


if __name__ == "__main__":
    main()
