"""What a model costs to serve: dimension, weights, index, latency of one query. Both models in one process, in turns."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nvr_tasks.artifacts import reading
from nvr_tasks.policy import Gate

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

WARM_UP, MEASURED = 20, 200  # queries
SAMPLED = 16  # passages of each task
MB = 1e6


@dataclass(frozen=True)
class Footprint:
    """Costs of serving a model.

    Attributes:
        model_mb: weights, in MB.
        dimension: numbers per vector.
        index_mb: float32 vectors of the benchmark's corpora, in MB; a late-interaction model has one per token.
        p95_ms: 95th percentile of encoding one query, in milliseconds.
    """

    model_mb: float
    dimension: int
    index_mb: float
    p95_ms: float


def wanted(policy: Gate) -> bool:
    """Whether a policy looks at footprints at all: measuring them means to load the models."""
    limits = (policy.max_dimension, policy.max_model_mb, policy.max_index_mb, policy.max_latency_ratio)
    return policy.same_dimension or any(limit is not None for limit in limits)


def measure(folders: Sequence[Path], models: Sequence[SentenceTransformer], benchmark: Path) -> list[Footprint]:
    """Footprints of one or more models; latencies are taken in turns, query by query, so that load hits all alike."""
    documents, queries, some = 0, [], []
    for task in sorted(p for p in benchmark.iterdir() if p.is_dir()):
        with reading(task):
            with gzip.open(task / "corpus.jsonl.gz", "rt", encoding="utf-8") as file:
                for number, line in enumerate(file):
                    if number < SAMPLED:
                        some.append(json.loads(line)["text"])
                    documents += 1
            with gzip.open(task / "queries.jsonl.gz", "rt", encoding="utf-8") as file:
                queries += [json.loads(line)["text"] for line in islice(file, MEASURED)]
    p95 = _latencies(models, queries[:: max(1, len(queries) // MEASURED)][:MEASURED])
    found = []
    for folder, model, latency in zip(folders, models, p95, strict=True):
        vectors, dimension = _vectors_per_passage(model, some)
        weights = sum(p.stat().st_size for p in folder.rglob("*.safetensors"))
        found.append(Footprint(weights / MB, dimension, documents * vectors * dimension * 4 / MB, latency))
    return found


def _vectors_per_passage(model: SentenceTransformer, passages: Sequence[str]) -> tuple[float, int]:
    """Mean number of vectors of a passage, and their dimension: 1, but with late interaction one vector per token."""
    encoded = [np.atleast_2d(v) for v in model.encode_document(list(passages), convert_to_numpy=True)]
    return float(np.mean([len(v) for v in encoded])), encoded[0].shape[1]


def _latencies(models: Sequence[SentenceTransformer], queries: Sequence[str]) -> list[float]:
    """p95 per model, in milliseconds."""
    for query in queries[:WARM_UP]:
        for model in models:
            model.encode_query(query)
    times_MQ = np.zeros((len(models), len(queries)))
    for column, query in enumerate(queries):
        order = range(len(models)) if column % 2 == 0 else reversed(range(len(models)))
        for row in order:
            clock = time.perf_counter()
            models[row].encode_query(query)
            times_MQ[row, column] = 1000 * (time.perf_counter() - clock)
    return [float(x) for x in np.percentile(times_MQ, 95, axis=1)]
