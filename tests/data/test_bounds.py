"""Large tables of pairs are read in part: what is left of them is what would have been left of the whole."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from nvr_tasks.data.bounds import Bound
from nvr_tasks.data.raw import RawData
from nvr_tasks.data.sources import read
from nvr_tasks.data.training_set import assemble
from nvr_tasks.data_settings import Data

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


def config(table: Path, **bounds: int) -> Data:
    origin = {"type": "table", "files": {s: str(table / f"{s}.jsonl") for s in ("train", "test")}}
    return Data.model_validate(
        {
            "sources": [{"name": "a", "origin": origin, **bounds}],
            "benchmark": [{"task": "T", "origin": origin}],
            "dev_queries": 0,
        }
    )


def content(data: Data, tmp_path: Path, bound: Bound | None) -> tuple[str, RawData]:
    raw = read(data.sources[0].origin, tmp_path, tmp_path, bound=bound)
    return assemble([(data.sources[0], raw)], [], data, 17).digest(), raw


@pytest.mark.parametrize(("queries", "passages"), [(20, 10), (1, 0), (20, 1000), (1000, 3)])
def test_a_part_gives_what_the_whole_gives(table: Path, tmp_path: Path, queries: int, passages: int) -> None:
    data = config(table, max_queries=queries, max_passages=passages)
    whole, everything = content(data, tmp_path, None)
    part, some = content(data, tmp_path, Bound.of(data.sources[0]))
    assert part == whole
    assert len(everything.documents) == PASSAGES
    assert len({q for q, _ in some.split("train")}) == min(queries, QUERIES)
    assert len(some.queries) <= 4 * queries
    assert len(some.documents) <= min(PASSAGES, 5 * queries + passages), "no more is held than is wanted"


def test_a_source_without_both_bounds_is_read_whole(table: Path) -> None:
    for bounds in ({}, {"max_queries": 20}):
        assert Bound.of(config(table, **bounds).sources[0]) is None
