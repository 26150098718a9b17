"""Data sets of the hub: tables on disk stand for those of the hub, a local server for the hub itself."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nvr_tasks.data import hub
from nvr_tasks.data.bounds import Bound
from nvr_tasks.data.hub import read_hub
from nvr_tasks.data.training_set import assemble
from nvr_tasks.data_settings import Data, HubSource
from nvr_tasks.errors import NvrError

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that `datasets` reads in place of the repository some/set."""
    folder = tmp_path / "some" / "set"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return folder


def put(folder: Path, tables: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    """config → split → rows."""
    lines = ["---", "configs:"]
    for config, splits in tables.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, rows in splits.items():
            (folder / config).mkdir(exist_ok=True)
            pq.write_table(pa.Table.from_pylist(rows), folder / config / f"{split}.parquet")
            lines += [f"  - split: {split}", f"    path: {config}/{split}.parquet"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


def source(**more: Any) -> HubSource:
    return HubSource.model_validate({"type": "hf", "repo": "some/set", "revision": REVISION, **more})


BEIR = {
    "corpus": {"corpus": [{"_id": "1", "title": "t", "text": " a "}, {"_id": "2", "title": None, "text": "b"}]},
    "queries": {"queries": [{"_id": "q", "text": "x"}, {"_id": "r", "text": "y"}]},
    "default": {
        "train": [{"query-id": "q", "corpus-id": "1", "score": 1.0}],
        "test": [{"query-id": "r", "corpus-id": "2", "score": 2.0}],
    },
}


def test_beir_layout(repo: Path) -> None:
    put(repo, BEIR)
    data = read_hub(source())
    assert data.documents == {"1": ("t", " a "), "2": ("", "b")}, "text untouched"
    assert data.queries == {"q": "x", "r": "y"}
    assert data.qrels == {"train": {("q", "1"): 1}, "test": {("r", "2"): 2}}


def test_a_large_corpus_is_read_in_part(repo: Path) -> None:
    """Documents of kept queries, and as many others as are asked for; the rest is never held."""
    queries = [{"_id": f"q{i}", "text": f"query {i}"} for i in range(30)]
    corpus = [{"_id": f"d{i}", "title": "", "text": f"document {i}"} for i in range(200)]
    qrels = [{"query-id": f"q{i}", "corpus-id": f"d{i}", "score": int(i % 3 > 0)} for i in range(30)]
    corpus[40]["text"] = queries[5]["text"] = " "
    put(repo, {"corpus": {"corpus": corpus}, "queries": {"queries": queries}, "default": {"train": qrels}})
    entry = {"name": "a", "origin": source().model_dump(), "max_queries": 5, "max_passages": 8}
    data = Data.model_validate({"sources": [entry], "benchmark": [{"task": "T"}], "dev_queries": 0})
    part, whole = read_hub(source(), bound=Bound.of(data.sources[0])), read_hub(source())
    made, expected = (assemble([(data.sources[0], raw)], [], data, 1) for raw in (part, whole))
    assert made.digest() == expected.digest()
    for reason in ("query_over_max_queries", "passage_over_max_passages"):
        assert made.stats["removed"][reason] == expected.stats["removed"][reason] > 0
    assert len(made.queries) == 5, "queries without a positive take up no room"
    assert len(part.documents) <= 5 + 8 + 1
    every = data.sources[0].model_copy(update={"max_queries": None})
    assert len(assemble([(every, read_hub(source(), bound=Bound.of(every)))], [], data, 1).queries) == 19


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"queries": None}, "some/set@0123456 has no config queries; it has corpus, default"),
        ({"default": None}, "has no config default; it has corpus, queries"),
        (
            {"default": {"train": [{"query-id": "q", "corpus-id": "9", "score": 1}]}},
            "row 0: document '9' .judged for query 'q'",
        ),
        ({"default": {"train": [{"query-id": "q", "corpus-id": "1", "score": 0.5}]}}, r"score 0\.5 is not an integer"),
        (
            {"queries": {"queries": [{"_id": "q", "text": None}]}},
            'queries/queries row 0: "text" is None, expected a text',
        ),
        (
            {"corpus": {"corpus": [{"docid": "1", "text": "a"}]}},
            "corpus/corpus row 0: no column _id or id; columns: docid, text",
        ),
    ],
)
def test_beir_layout_errors(repo: Path, change: dict[str, Any], words: str) -> None:
    put(repo, {name: splits for name, splits in (BEIR | change).items() if splits})
    with pytest.raises(NvrError, match=words):
        read_hub(source())


PAIRS = [
    {"question": "What?", "passage": "This.", "rating": ["Bad", "Good"], "ref": {"title": "T"}},
    {"question": "what ?", "passage": "That.", "rating": ["Good"], "ref": {"title": None}},
    {"question": "Why?", "passage": None, "rating": ["Good"], "ref": None},
    {"question": "Where?", "passage": "Here.", "rating": ["Bad"], "ref": {"title": "T"}},
]
COLUMNS = {"layout": "pairs", "query_column": "question", "passage_column": "passage"}


def test_pairs(repo: Path) -> None:
    put(repo, {"default": {"train": PAIRS, "validation": [PAIRS[0]]}})
    data = read_hub(source(**COLUMNS))
    assert sorted(text for _, text in data.documents.values()) == ["Here.", "That.", "This."]
    assert sorted(data.queries.values()) == ["What?", "Where?"], "one query per distinct text"
    assert {s: len(q) for s, q in data.qrels.items()} == {"train": 3, "validation": 1}
    assert data.merged == {"row_without_text": 1}


def test_pairs_with_a_condition_and_a_nested_title(repo: Path) -> None:
    put(repo, {"default": {"train": PAIRS}})
    data = read_hub(source(**COLUMNS, title_column="ref.title", keep={"rating": "Good"}))
    assert sorted(data.documents.values()) == [("", "That."), ("T", "This.")]
    assert data.merged == {"row_without_text": 1, "row_not_kept": 1}


def test_pairs_with_a_wrong_column(repo: Path) -> None:
    put(repo, {"default": {"train": PAIRS}})
    with pytest.raises(NvrError, match="train row 0: no column 'answer'; columns: question, passage, rating, ref"):
        read_hub(source(**COLUMNS | {"passage_column": "answer"}))
    with pytest.raises(NvrError, match=r"column rating has list .* expected a text"):
        read_hub(source(**COLUMNS | {"passage_column": "rating"}))


def test_files_of_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repo: str, path: str, *, repo_type: str, revision: str) -> str:
        asked.append((repo, path, repo_type, revision))
        return str(tmp_path / path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    (tmp_path / "a.json").write_text(json.dumps(PAIRS))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(p) + "\n" for p in PAIRS[:1]))
    data = read_hub(source(**COLUMNS, files={"train": "a.json", "dev": "b.jsonl"}))
    assert {s: len(q) for s, q in data.qrels.items()} == {"train": 3, "dev": 1}
    assert ("some/set", "a.json", "dataset", REVISION) in asked
    (tmp_path / "a.json").write_text("[{")
    with pytest.raises(NvrError, match=r"some/set@0123456/a\.json is not JSON"):
        read_hub(source(**COLUMNS, files={"train": "a.json"}))


def test_a_repository_that_wants_to_run_its_code(repo: Path) -> None:
    (repo / "set.py").write_text("raise SystemExit('ran!')")
    with pytest.raises(NvrError, match=r"some/set.*(run its own code|no usable)"):
        read_hub(source(**COLUMNS))


def test_a_private_or_misspelt_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets.exceptions import DatasetNotFoundError

    def refuse(*_: object, **__: object) -> None:
        raise DatasetNotFoundError("Dataset 'some/set' doesn't exist on the Hub or cannot be accessed.\nmore")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(NvrError, match=r"has no usable some/set at revision .* HF_TOKEN .* NVR_DATA"):
        hub.load_tables("some/set", REVISION, None)


@pytest.mark.slow
def test_an_unreachable_hub_is_told_soon(tmp_path: Path) -> None:
    code = (
        "import sys; from nvr_tasks.data_settings import HubSource; from nvr_tasks.data.hub import read_hub\n"
        "from nvr_tasks.errors import NvrError\n"
        f"source = HubSource.model_validate({ {'type': 'hf', 'repo': 'mteb/scifact', 'revision': REVISION}!r})\n"
        "try:\n    read_hub(source)\nexcept NvrError as error:\n    print(error); sys.exit(7)\n"
    )
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ
        | {
            "HF_ENDPOINT": "http://127.0.0.1:9",
            "HF_HOME": str(tmp_path),
            "PYTHONPATH": str(Path(hub.__file__).parents[2]),
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 7, done.stderr
    assert "cannot reach the hub at http://127.0.0.1:9 for mteb/scifact" in done.stdout
    assert "NVR_DATA" in done.stdout
    assert time.monotonic() - started < 60


def test_a_config_that_the_set_lacks(repo: Path) -> None:
    put(repo, {"rows": {"train": [{"query": "a", "passage": "b"}]}})
    with pytest.raises(
        NvrError, match=r"some/set at revision .*: BuilderConfig 'absent' not found.*check config and split"
    ):
        read_hub(source(layout="pairs", config="absent"))
