"""Large tables of pairs are read in part: what is left of them is what would have been left of the whole."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from nvr_tasks.data.bounds import Bound
from nvr_tasks.data.raw import RawData
from nvr_tasks.data.sources import read
from nvr_tasks.data.training_set import TrainingSet, assemble
from nvr_tasks.data_settings import Data
from nvr_tasks.errors import NvrError

QUERIES, PASSAGES = 400, 150


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Pairs of two splits; passages have several queries, and queries of the split `test` some of the same passages."""
    draw = random.Random(5)
    words = [f"w{i}" for i in range(4000)]
    passages = [" ".join(draw.sample(words, 12)) for _ in range(PASSAGES)]
    for split, start in (("train", 0), ("test", QUERIES)):
        rows = [{"query": f"what is number {start + i}", "passage": draw.choice(passages)} for i in range(QUERIES)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def config(table: Path, **bounds: Any) -> Data:
    origin = {"type": "table", "files": {s: str(table / f"{s}.jsonl") for s in ("train", "test")}}
    return Data.model_validate(
        {
            "sources": [{"name": "a", "origin": origin, **bounds}],
            "benchmark": [{"task": "T", "origin": origin}],
            "dev_queries": 0,
        }
    )


def read_all(data: Data, folder: Path, *, bound: bool) -> tuple[TrainingSet, list[RawData]]:
    raws = [read(s.origin, folder, folder, bound=Bound.of(s) if bound else None) for s in data.sources]
    return assemble(list(zip(data.sources, raws, strict=True)), [], data, 17), raws


@pytest.mark.parametrize(("queries", "passages"), [(20, 10), (1, 0), (20, 1000), (1000, 3), (None, 3)])
def test_a_part_gives_what_the_whole_gives(table: Path, queries: int | None, passages: int) -> None:
    data = config(table, max_queries=queries, max_passages=passages)
    whole, [everything] = read_all(data, table, bound=False)
    part, [some] = read_all(data, table, bound=True)
    assert part.digest() == whole.digest()
    assert part.stats["removed"] == whole.stats["removed"]
    assert len(everything.documents) == PASSAGES
    most = PASSAGES if queries is None else min(PASSAGES, 2 * queries + passages)
    assert len(some.documents) <= most, "no more is held than is wanted"


def test_what_another_source_knows_as_a_positive_stays_one(table: Path) -> None:
    """A query that is not kept of one source is kept of another: the passage that it has there is no negative of it."""
    (table / "other.jsonl").write_text((table / "train.jsonl").read_text())
    data = config(table, max_queries=20, max_passages=60)
    other = data.sources[0].model_copy(
        update={
            "name": "b",
            "origin": data.sources[0].origin.model_copy(update={"files": {"train": str(table / "other.jsonl")}}),
            "max_queries": None,
            "max_passages": None,
        }
    )
    data = data.model_copy(update={"sources": (data.sources[0], other)})
    whole, _ = read_all(data, table, bound=False)
    part, _ = read_all(data, table, bound=True)
    assert part.digest() == whole.digest()
    judged = {(q, d.partition("/")[0]) for q, d, *_ in part.qrels}
    assert any(q.startswith("b/") and source == "a" for q, source in judged), "the test shows nothing"


def test_a_split_that_is_not_there_is_named_with_those_that_are(table: Path) -> None:
    data = config(table, max_queries=20, max_passages=60, split="trian")
    with pytest.raises(NvrError, match="source a has no judgements in split 'trian'; splits there: test, train"):
        read_all(data, table, bound=True)


def test_a_source_without_a_bound_on_passages_is_read_whole(table: Path) -> None:
    for bounds in ({}, {"max_queries": 20}):
        assert Bound.of(config(table, **bounds).sources[0]) is None
