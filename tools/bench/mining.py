"""Time and memory of mining against its peers, all in one run on one machine: `make bench`.

Every contender runs in a process of its own, in turn, several rounds; the best round counts. Vectors are made up (a
seeded hierarchy of topics, so that some passages lie above the ceiling of a query as in real corpora) and loaded
before the clock starts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

DIM = 384
THRESHOLD = 0.95
NEGATIVES = 4
SIX_SPECS = (
    ("perc_pos", 0.95),
    ("perc_pos", 0.9),
    ("margin_pos", 0.05),
    ("abs", 0.7),
    ("naive", None),
    ("shifted", None),
)


# ── data ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1."""
    found: np.ndarray = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return found


def make(folder: Path, rows: int, queries: int, dtype: str) -> None:
    """corpus.npy [rows, DIM], queries.npy [queries, DIM] float32, positives.npy [queries], unless they are there."""
    if (folder / "positives.npy").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(11)
    noise = np.float32(np.sqrt(1 / DIM))
    topics = unit(rng.standard_normal((2000, DIM), dtype=np.float32))
    narrow = unit(0.6 * topics[rng.integers(0, 2000, 20_000)] + 0.8 * noise * normal(rng, 20_000))
    positives = np.sort(rng.choice(rows, queries, replace=False))
    corpus = np.lib.format.open_memmap(folder / "corpus.npy", "w+", dtype, (rows, DIM))
    vectors = np.empty((queries, DIM), np.float32)
    for start in range(0, rows, 100_000):
        end = min(start + 100_000, rows)
        near = rng.uniform(0.6, 0.99, (end - start, 1)).astype(np.float32)  # to the centre of its topic
        block = unit(
            near * narrow[rng.integers(0, 20_000, end - start)]
            + np.sqrt(1 - near**2) * noise * normal(rng, end - start)
        )
        corpus[start:end] = block
        low, high = np.searchsorted(positives, [start, end])
        strength = rng.uniform(0.55, 0.9, (high - low, 1)).astype(np.float32)
        vectors[low:high] = unit(
            strength * block[positives[low:high] - start] + np.sqrt(1 - strength**2) * noise * normal(rng, high - low)
        )
    corpus.flush()
    np.save(folder / "queries.npy", vectors)
    np.save(folder / "positives.npy", positives)


def normal(rng: np.random.Generator, rows: int) -> np.ndarray:
    """Standard normal numbers, float32 [rows, DIM]."""
    return rng.standard_normal((rows, DIM), dtype=np.float32)


# ── contenders: load, then give what is to be timed ──────────────────────────────────────────────────────────────


def nvr(folder: Path, specs: tuple[Any, ...] = SIX_SPECS[:1], mmap: Literal["r"] | None = None) -> Callable[[], Any]:
    """`nvr_tasks.mining.mine` and, for one spec, the triplets to train on."""
    import datasets  # noqa: F401  # the peer has imported it before the clock starts, too

    from nvr_tasks.mining import MiningSpec, mine

    x, y = np.load(folder / "queries.npy"), np.load(folder / "corpus.npy", mmap_mode=mmap)
    positives = np.load(folder / "positives.npy")[:, None]
    wanted = [MiningSpec(method, threshold, num_negatives=NEGATIVES) for method, threshold in specs]
    mine(x[:64], y[:512], positives[:64] % 512, wanted)  # compiled loops are loaded, the type of product is chosen

    def run() -> Any:
        results = mine(x, y, positives, wanted)
        if len(specs) > 1 or mmap:
            return [int(r.kept) for r in results]
        queries, corpus = texts("q", len(x)), texts("p", len(y))
        data = results[0].to_dataset(queries, corpus, "triplet")
        return triplets(data["anchor"], data["negative"])

    return run


def texts(letter: str, count: int) -> list[str]:
    """Short texts, all different."""
    return [f"{letter}{i}" for i in range(count)]


def triplets(anchors: Any, negatives: Any) -> list[tuple[str, str]]:
    """(query, negative) pairs, for a comparison."""
    return sorted(zip(anchors, negatives, strict=True))


def sentence_transformers(folder: Path) -> Callable[[], Any]:
    """`mine_hard_negatives(use_faiss=True)`, given vectors that are made already."""
    import torch
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import mine_hard_negatives

    x, y = np.load(folder / "queries.npy"), np.load(folder / "corpus.npy")
    queries, corpus = texts("q", len(x)), texts("p", len(y))
    pairs = Dataset.from_dict(
        {"anchor": queries, "positive": [corpus[i] for i in np.load(folder / "positives.npy").tolist()]}
    )

    class Ready:
        """A model whose texts are embedded already."""

        device = torch.device("cpu")

        def get_embedding_dimension(self) -> int:
            return DIM

        def encode_query(self, *_: Any, **__: Any) -> Any:
            return x

        def encode_document(self, *_: Any, **__: Any) -> Any:
            return y

        def similarity_pairwise(self, a: np.ndarray, b: np.ndarray) -> torch.Tensor:
            return (torch.from_numpy(a) * torch.from_numpy(b)).sum(dim=1)

    def run() -> Any:
        data = mine_hard_negatives(
            pairs,
            cast(SentenceTransformer, Ready()),
            corpus=corpus,
            relative_margin=1 - THRESHOLD,
            num_negatives=NEGATIVES,
            use_faiss=True,
            output_format="triplet",
            verbose=False,
        )
        return triplets(data["anchor"], data["negative"])

    return run


def faiss(folder: Path) -> Callable[[], Any]:
    """The search alone, at the depth that sentence-transformers asks for: 10 · negatives + 2."""
    import faiss as library

    x, y = np.load(folder / "queries.npy"), np.load(folder / "corpus.npy")
    index = library.IndexFlatIP(DIM)
    index.add(y)
    return lambda: index.search(x, 10 * NEGATIVES + 2)[1].shape


def gemm(folder: Path, dtype: str) -> Callable[[], Any]:
    """All products and nothing else, in the better of two tile sizes."""
    import torch

    type_ = getattr(torch, dtype)
    x = torch.from_numpy(np.load(folder / "queries.npy")).to(type_)
    y = torch.from_numpy(np.load(folder / "corpus.npy")).to(type_)

    def run() -> Any:
        best = float("inf")
        for tile_rows, tile_columns in ((1024, 8192), (2048, 2048)):
            tile = torch.empty(tile_rows * tile_columns, dtype=type_)
            clock = time.perf_counter()
            for c in range(0, len(y), tile_columns):
                block = y[c : c + tile_columns].T
                for r in range(0, len(x), tile_rows):
                    rows = x[r : r + tile_rows]
                    torch.mm(rows, block, out=tile[: len(rows) * block.shape[1]].view(len(rows), -1))
            best = min(best, time.perf_counter() - clock)
        return {"seconds": best}

    return run


CONTENDERS: dict[str, Callable[[Path], Callable[[], Any]]] = {
    "nvr": nvr,
    "nvr, six specs": lambda folder: nvr(folder, SIX_SPECS),
    "nvr, from disk": lambda folder: nvr(folder, mmap="r"),
    "sentence-transformers": sentence_transformers,
    "faiss IndexFlatIP, k = 42": faiss,
    "GEMM float32": lambda folder: gemm(folder, "float32"),
    "GEMM bfloat16": lambda folder: gemm(folder, "bfloat16"),
}


# ── measuring ────────────────────────────────────────────────────────────────────────────────────────────────────


def memory_mb(key: str) -> float:
    """A figure of /proc/self/status (VmRSS, VmHWM, RssAnon) in MB."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    return float("nan")


class Watch(threading.Thread):
    """Peak of memory that is the process's own and not the page cache's."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.stop = 0.0, threading.Event()

    def run(self) -> None:
        while not self.stop.wait(0.02):
            self.peak = max(self.peak, memory_mb("RssAnon"))


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Run one contender in this process."""
    run = CONTENDERS[name](folder)
    before, watch = memory_mb("RssAnon"), Watch()
    watch.start()
    clock = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - clock
    watch.stop.set()
    if isinstance(result, dict):
        seconds = result["seconds"]
    digest = None
    if isinstance(result, list) and result and isinstance(result[0], tuple):
        out = folder / f"{name}.json"
        out.write_text(json.dumps(result))
        digest = str(out)
    return {"seconds": seconds, "above_mb": watch.peak - before, "anonymous_mb": watch.peak, "pairs": digest}


def contend(name: str, folder: Path) -> dict[str, Any]:
    """Run one contender in a fresh process."""
    command = [sys.executable, __file__, "--contender", name, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"  {name}: {found['seconds']:.2f} s, {found['above_mb']:.0f} MB above", file=sys.stderr)
    return found


def best_of(names: list[str], folder: Path, rounds: int) -> dict[str, dict[str, Any]]:
    """The fastest round of each contender; they take turns, so that a slow minute hits all."""
    found: dict[str, dict[str, Any]] = {}
    for _ in range(rounds):
        for name in names:
            one = contend(name, folder)
            if name not in found or one["seconds"] < found[name]["seconds"]:
                found[name] = one
    return found


# ── reports ──────────────────────────────────────────────────────────────────────────────────────────────────────


def against_peers(folder: Path, rounds: int, rows: int, queries: int) -> list[str]:
    """Speed and memory against the peers, and whether the negatives are the same."""
    place = folder / f"{rows}x{queries}"
    make(place, rows, queries, "float32")
    names = [n for n in CONTENDERS if n != "nvr, from disk"]
    found = best_of(names, place, rounds)
    ours = found["nvr"]["seconds"]
    work = 2.0 * rows * queries * DIM
    lines = [
        f"{queries:,} queries × {rows:,} passages × {DIM}, PercPos 95 %, {NEGATIVES} negatives; best of {rounds}; "
        "near-duplicate guards off, which no peer has.",
        "",
        "| | seconds | times nvr | GFLOP/s | MB above the vectors |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {v['seconds']:.2f} | {v['seconds'] / ours:.2f} | {work / v['seconds'] / 1e9:,.0f} | {v['above_mb']:,.0f} |"
        for name, v in found.items()
    ]
    mine_, theirs = (
        set(map(tuple, json.loads(Path(found[n]["pairs"]).read_text()))) for n in ("nvr", "sentence-transformers")
    )
    lines += [
        "",
        f"Of {len(mine_):,} negatives {len(mine_ & theirs):,} are sentence-transformers', which has {len(theirs):,}.",
    ]
    return lines


def from_disk(folder: Path, sizes: list[int], queries: int) -> list[str]:
    """Memory and time over corpora that are not in memory."""
    lines = [
        f"{queries:,} queries × N passages × {DIM}, float16 on disk, memory-mapped.",
        "",
        "| N | seconds | ns per score | resident, page cache aside (MB) |",
        "|---|---|---|---|",
    ]
    for rows in sizes:
        place = folder / f"disk-{rows}x{queries}"
        make(place, rows, queries, "float16")
        found = contend("nvr, from disk", place)
        lines.append(
            f"| {rows:,} | {found['seconds']:.1f} | {found['seconds'] / rows / queries * 1e9:.3f} | {found['anonymous_mb']:,.0f} |"
        )
        for file in place.iterdir():
            file.unlink()
    return lines


def main() -> None:
    """Measure, and print the tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".nvr/bench"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--queries", type=int, default=20_000)
    parser.add_argument("--sizes", type=int, nargs="*", default=[1_000_000, 2_000_000, 4_000_000])
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        print(json.dumps(measure(args.contender, args.folder)))
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    print("\n".join(against_peers(args.folder, args.rounds, args.rows, args.queries)))
    if args.sizes:
        print()
        print("\n".join(from_disk(args.folder, args.sizes, 10_000)))


if __name__ == "__main__":
    main()
