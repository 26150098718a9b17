"""BEIR folders: every line is checked, text passes unchanged."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from data_helpers import write_beir
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nvr_tasks.data.beir import digest_rows, read_beir
from nvr_tasks.data.beir import write_beir as write_artifact
from nvr_tasks.errors import NvrError

TEXT = st.text(st.characters(exclude_categories=()), max_size=20)
ID = st.text(
    st.characters(min_codepoint=33, max_codepoint=0x2FFF, exclude_categories=("Cs", "Cc", "Zl", "Zp", "Zs")),
    min_size=1,
    max_size=6,
)


def append(name: str, line: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        with (folder / name).open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    return change


def replace(name: str, content: str | bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


HEADER = "query-id\tcorpus-id\tscore\n"
BROKEN = {
    "malformed line": (append("corpus.jsonl", '{"_id": "x", "text": "cut'), "corpus.jsonl, line 13: malformed JSON"),
    "not an object": (append("queries.jsonl", "[1, 2]"), "queries.jsonl, line 13: expected a JSON object, correct this line: [1, 2]"),
    "no id": (append("corpus.jsonl", '{"text": "a"}'), 'corpus.jsonl, line 13: "_id" is missing'),
    "empty id": (append("corpus.jsonl", '{"_id": "", "text": "a"}'), 'corpus.jsonl, line 13: "_id" is \'\''),
    "half a surrogate pair": (append("corpus.jsonl", r'{"_id": "\ud800", "text": "a"}'), "'\\ud800' is not valid Unicode"),
    "text is null": (append("corpus.jsonl", '{"_id": "x", "text": null}'), 'line 13: "text" is None, expected a text'),
    "no text": (append("corpus.jsonl", '{"_id": "x"}'), 'corpus.jsonl, line 13: "text" is missing'),
    "text is a number": (append("corpus.jsonl", '{"_id": "x", "text": 3}'), 'line 13: "text" is 3, expected a text'),
    "title is a list": (append("corpus.jsonl", '{"_id": "x", "text": "", "title": []}'), 'line 13: "title" is []'),
    "query without text": (append("queries.jsonl", '{"_id": "x"}'), 'queries.jsonl, line 13: "text" is missing'),
    "not UTF-8": (replace("corpus.jsonl", b'{"_id": "x", "text": "\xff"}\n'), "corpus.jsonl, line 1: not UTF-8"),
    "id twice": (append("corpus.jsonl", '{"_id": "d3", "text": "other"}'), "line 13: document id 'd3' was used before with a different text"),
    "query id twice": (append("queries.jsonl", '{"_id": "q3", "text": "other"}'), "line 13: query id 'q3' was used before"),
    "empty corpus": (replace("corpus.jsonl", ""), "the corpus of the set is empty"),
    "document missing": (append("qrels/train.tsv", "q1\tnone\t1"), "train.tsv, line 10: document 'none' (judged for query 'q1') is not among the 12"),
    "query missing": (append("qrels/train.tsv", "none\td1\t1"), "train.tsv, line 10: query 'none' (judged with document 'd1') is not among the 12"),
    "score is a word": (append("qrels/test.tsv", "q1\td1\tyes"), "qrels/test.tsv, line 6: score 'yes' is not a whole number"),
    "score is a fraction": (append("qrels/test.tsv", "q1\td1\t0.5"), "score '0.5' is not a whole number"),
    "too few columns": (append("qrels/test.tsv", "q1\td1"), "qrels/test.tsv, line 6: 2 columns, the header has 3"),
    "no header": (replace("qrels/test.tsv", "q1\td1\t1\n"), "qrels/test.tsv, line 1: no column query-id, corpus-id, score"),
    "spaces for tabs": (replace("qrels/test.tsv", "query-id corpus-id score\n"), "qrels/test.tsv, line 1: no column"),
    "no corpus": (remove("corpus.jsonl"), "has no corpus.jsonl or corpus.jsonl.gz"),
    "no queries": (remove("queries.jsonl"), "has no queries.jsonl"),
    "both": (replace("corpus.jsonl.gz", gzip.compress(b"")), "has both corpus.jsonl and corpus.jsonl.gz"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_errors_name_file_line_and_fact(case: str, tmp_path: Path) -> None:
    change, words = BROKEN[case]
    change(write_beir(tmp_path))
    with pytest.raises(NvrError) as caught:
        read_beir(tmp_path, "the set")
    assert words in str(caught.value)
    assert "the set" in str(caught.value)


def test_empty_in_every_way(tmp_path: Path) -> None:
    with pytest.raises(NvrError, match="the corpus of s is empty"):
        read_beir(write_beir(tmp_path / "a", corpus={}, qrels={"train": []}), "s")
    with pytest.raises(NvrError, match="s has no queries"):
        read_beir(write_beir(tmp_path / "b", queries={}, qrels={"train": []}), "s")
    with pytest.raises(NvrError, match="s has no judgements"):
        read_beir(write_beir(tmp_path / "c", qrels={"train": []}), "s")
    with pytest.raises(NvrError, match="there is no such folder"):
        read_beir(tmp_path / "none", "s")


@pytest.mark.parametrize("keep", [0.2, 0.7, 0.99])
def test_a_cut_off_gzip(tmp_path: Path, keep: float) -> None:
    path = write_beir(tmp_path, zipped=True) / "corpus.jsonl.gz"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(NvrError, match=r"corpus.jsonl.gz is damaged or cut off after line \d+"):
        read_beir(tmp_path, "s")


def test_zipped_and_plain_are_the_same(tmp_path: Path) -> None:
    plain, zipped = read_beir(write_beir(tmp_path / "a"), "s"), read_beir(write_beir(tmp_path / "b", zipped=True), "s")
    assert plain == zipped
    assert list(plain.documents) == [f"d{i}" for i in range(12)]
    assert {s: len(q) for s, q in plain.qrels.items()} == {"train": 8, "test": 4}


def test_identical_repetitions_are_merged_and_counted(tmp_path: Path) -> None:
    folder = write_beir(tmp_path)
    for name in ("corpus.jsonl", "queries.jsonl"):
        path = folder / name
        path.write_text(path.read_text() * 2)
    append("qrels/test.tsv", "q8\td8\t2")(folder)
    data = read_beir(folder, "s")
    assert data.merged == {"document_repeated": 12, "query_repeated": 12, "judgement_repeated": 1}
    assert data.qrels["test"]["q8", "d8"] == 2, "the last judgement counts"


def test_numeric_ids_null_titles_bom_and_crlf(tmp_path: Path) -> None:
    write_beir(tmp_path, {}, {}, {})
    replace("corpus.jsonl", '\ufeff{"_id": 7, "title": null, "text": "a"}\r\n\r\n')(tmp_path)
    replace("queries.jsonl", '{"_id": 8, "text": "b"}\n')(tmp_path)
    replace("qrels/test.tsv", "\ufeff" + HEADER.replace("\n", "\r\n") + "8\t7\t1\r\n")(tmp_path)
    data = read_beir(tmp_path, "s")
    assert data.documents == {"7": ("", "a")}
    assert data.qrels == {"test": {("8", "7"): 1}}


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(ID, st.tuples(TEXT, TEXT), min_size=1, max_size=5),
    st.dictionaries(ID, TEXT, min_size=1, max_size=5),
)
def test_what_is_written_reads_back_character_for_character(
    tmp_path_factory: pytest.TempPathFactory, documents: dict[str, tuple[str, str]], queries: dict[str, str]
) -> None:
    folder = tmp_path_factory.mktemp("beir")
    qrels = {(q, d): i - 1 for q in queries for i, d in enumerate(documents)}
    write_artifact(folder, [(i, *d) for i, d in documents.items()], queries.items(), "test", qrels)
    data = read_beir(folder, "s")
    assert data.documents == documents
    assert list(data.documents) == list(documents)
    assert data.queries == queries
    assert data.qrels == {"test": qrels}


def test_digest_sees_every_row(tmp_path: Path) -> None:
    data = read_beir(write_beir(tmp_path), "s")
    digests = {digest_rows(data, "test"), digest_rows(data, "train")}
    data.documents["d3"] = ("title 3", data.documents["d3"][1] + " ")
    digests.add(digest_rows(data, "test"))
    data.queries["q9"] += "!"
    digests.add(digest_rows(data, "test"))
    data.qrels["test"]["q9", "d9"] = 2
    digests.add(digest_rows(data, "test"))
    assert len(digests) == 5


def test_json_is_compact_and_ascii(tmp_path: Path) -> None:
    write_artifact(tmp_path, [("1", "é", "\ud800")], [("q", "?")], "test", {("q", "1"): 1})
    assert (tmp_path / "corpus.jsonl.gz").read_bytes()[4:8] == bytes(4), "no time in the header: same rows, same bytes"
    line = gzip.decompress((tmp_path / "corpus.jsonl.gz").read_bytes()).decode("ascii")
    assert json.loads(line) == {"_id": "1", "title": "é", "text": "\ud800"}
