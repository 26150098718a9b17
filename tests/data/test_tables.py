"""Labelled and scored texts become queries with the right positives; real texts, read from files."""

from __future__ import annotations

import csv
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import recipe

from nvr_tasks.data import sources
from nvr_tasks.data.package_docs import read_package_docs
from nvr_tasks.data.raw import RawData
from nvr_tasks.data.tables import RELATED
from nvr_tasks.data.training_set import assemble
from nvr_tasks.data_settings import PackageDocsSource, TableSource
from nvr_tasks.errors import NvrError


@pytest.fixture(scope="module")
def documented() -> list[dict[str, str]]:
    """Real texts with real labels: what networkx documents, labelled by the part of it that they come from."""
    data = read_package_docs(PackageDocsSource(type="package_docs", packages=["networkx"], test_percent=0))
    rows = [{"text": text, "label": ".".join(doc_id.split(".")[1:3])} for doc_id, (_, text) in data.documents.items()]
    counts = {label: sum(r["label"] == label for r in rows) for label in {r["label"] for r in rows}}
    return [r for r in rows if counts[r["label"]] >= 5]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(files: dict[str, str], **columns: Any) -> RawData:
    source = TableSource.model_validate({"type": "table", "files": files, **columns})
    return sources.read(source, Path("unused"), Path("unused"))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_labelled_text_is_answered_by_every_passage_of_its_label_and_no_other(
    documented: list[dict[str, str]], tmp_path: Path, suffix: str
) -> None:
    label_of = {row["text"]: row["label"] for row in documented}
    file = write(tmp_path / f"train{suffix}", documented)
    data = read({"train": file}, layout="labels", label_column="label", passages_per_label=4)
    assert len(set(label_of.values())) >= 8, "too few labels to show anything"
    judged: dict[str, set[str]] = {}
    for query, doc in data.qrels["train"]:
        judged.setdefault(query, set()).add(doc)
    passages = {doc: label_of[text] for doc, (_, text) in data.documents.items()}
    assert set(data.queries) == set(judged)
    for query, docs in judged.items():
        own = label_of[data.queries[query]]
        assert docs == {doc for doc, label in passages.items() if label == own}, "right positives, all of them"
        assert data.queries[query] not in {data.documents[d][1] for d in docs}
    per_label = {label: list(passages.values()).count(label) for label in passages.values()}
    assert max(per_label.values()) == 4
    assert len(data.queries) + len(data.documents) == len(label_of), "each text is a query or a passage"


def test_lists_of_texts_as_clustering_sets_have_them(documented: list[dict[str, str]], tmp_path: Path) -> None:
    flat = read(
        {"train": write(tmp_path / "flat.jsonl", documented)},
        layout="labels",
        label_column="label",
        passages_per_label=4,
    )
    half = len(documented) // 2
    rows = [
        {"sentences": [r["text"] for r in part], "labels": [r["label"] for r in part]}
        for part in (documented[:half], documented[half:])
    ]
    file = write(tmp_path / "lists.parquet", rows)
    listed = read(
        {"train": file}, layout="labels", text_column="sentences", label_column="labels", passages_per_label=4
    )
    assert listed.documents == flat.documents
    assert listed.queries == flat.queries
    assert listed.qrels == flat.qrels


def test_passages_of_the_same_label_in_another_split_are_no_negatives(tmp_path: Path) -> None:
    def rows(name: str) -> list[dict[str, str]]:
        return [{"text": f"{name} {label} {i}", "label": label} for label in ("joy", "fear") for i in range(4)]

    files = {split: write(tmp_path / f"{split}.jsonl", rows(split)) for split in ("train", "test")}
    data = read(files, layout="labels", label_column="label", passages_per_label=2)
    for query, text in data.queries.items():
        split, label, _ = text.split()
        other = "test" if split == "train" else "train"
        docs = {kind: {data.documents[d][1] for q, d in data.qrels[kind] if q == query} for kind in (split, RELATED)}
        assert len(docs[split]) == 2
        assert all(d.startswith(f"{split} {label}") for d in docs[split])
        assert len(docs[RELATED]) == 2
        assert all(d.startswith(f"{other} {label}") for d in docs[RELATED])


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    rows = [
        {"text": t, "label": k}
        for t, k in [("a b", "x"), ("c d", "x"), ("A, b!", "y"), ("e", "z"), ("", "x"), ("f", "x")]
    ]
    data = read({"train": write(tmp_path / "t.jsonl", rows)}, layout="labels", label_column="label")
    assert data.merged == {"text_with_several_labels": 2, "label_with_one_text": 1, "row_without_text": 1}
    assert sorted([*data.queries.values(), *(t for _, t in data.documents.values())]) == ["c d", "f"]


def test_scored_pairs(documented: list[dict[str, str]], tmp_path: Path) -> None:
    """Alike: positives of each other; half alike: not to be mined; unlike: may be mined."""
    texts = [row["text"] for row in documented[:9]]
    scores = [5.0, 4.0, 3.9, 2.5, 2.4, 0.0, 4.5, 1.0]
    rows = [{"a": one, "b": two, "s": s} for (one, two), s in zip(pairwise(texts), scores, strict=True)]
    rows.append({"a": texts[0], "b": texts[0], "s": 5.0})
    data = read(
        {"train": write(tmp_path / "sts.csv", rows)},
        layout="scored_pairs",
        query_column="a",
        passage_column="b",
        score_column="s",
        positive_score=4,
        related_score=2.5,
    )

    def pairs(split: str) -> set[frozenset[str]]:
        found = {(data.queries[q], data.documents[d][1]) for q, d in data.qrels[split]}
        assert {(b, a) for a, b in found} == found, "both directions"
        return {frozenset(pair) for pair in found}

    def expected(low: float, high: float) -> set[frozenset[str]]:
        return {frozenset(p) for p, s in zip(pairwise(texts), scores, strict=True) if low <= s < high}

    assert pairs("train") == expected(4, 9)
    assert pairs(RELATED) == expected(2.5, 4)
    assert {t for _, t in data.documents.values()} == set(texts), "unlike ones are there to be mined"
    assert data.merged["pair_of_equal_texts"] == 2


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_only_line_feeds_end_a_line(tmp_path: Path, suffix: str) -> None:
    query, passage = "what is a\x85b\u2028c", "a\x0cb\nc\r\nd"
    rows = [{"query": query, "passage": passage}]
    if suffix == ".jsonl":
        (tmp_path / "t.jsonl").write_text(json.dumps(rows[0], ensure_ascii=False) + "\n", encoding="utf-8")
        file = str(tmp_path / "t.jsonl")
    else:
        file = write(tmp_path / "t.csv", rows)
    data = read({"train": file}, layout="pairs")
    assert list(data.queries.values()) == [query]
    assert list(data.documents.values()) == [("", passage)]


def test_a_labelled_set_becomes_a_training_set(documented: list[dict[str, str]], tmp_path: Path) -> None:
    file = write(tmp_path / "train.jsonl", documented)
    origin = {"type": "table", "layout": "labels", "files": {"train": file}, "label_column": "label"}
    made = recipe(
        [{"name": "topics", "origin": origin}], [{"task": "B", "origin": origin, "official": False}], dev_queries=0
    )
    [source] = made.data.sources
    raw = sources.read(sources.resolve(source), tmp_path, tmp_path)
    training = assemble([(source, raw)], [], made.data, 1)
    assert len(training.queries) == len(raw.queries)
    assert {split for *_, split in training.qrels} == {"train"}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"layout": "labels"}, "layout labels needs label_column"),
        ({"layout": "scored_pairs", "score_column": "s"}, "layout scored_pairs needs positive_score, related_score"),
        (
            {"layout": "scored_pairs", "score_column": "s", "positive_score": 1, "related_score": 2},
            "related_score 2 is above positive_score 1",
        ),
    ],
)
def test_incomplete_settings(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TableSource.model_validate({"type": "table", "files": {"train": "x.csv"}, **columns})


def test_bad_tables(tmp_path: Path) -> None:
    with pytest.raises(NvrError, match=r"no table at .*missing\.csv: there is no such file"):
        read({"train": str(tmp_path / "missing.csv")}, layout="labels", label_column="label")
    file = write(tmp_path / "t.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}])
    with pytest.raises(NvrError, match=r"has no label with two texts: check text_column \(text\) and label_column"):
        read({"train": file}, layout="labels", label_column="label")
    with pytest.raises(NvrError, match=r"train row 0: no column 'topic'; columns: text, label"):
        read({"train": file}, layout="labels", label_column="topic")
    rows = [{"query": "a", "passage": "b", "score": "high"}]
    with pytest.raises(NvrError, match=r"train row 0: column score has 'high', expected a number"):
        read(
            {"train": write(tmp_path / "s.jsonl", rows)},
            layout="scored_pairs",
            score_column="score",
            positive_score=4,
            related_score=2,
        )
