"""Blends, homogeneous batches, epochs, and a stage that asks for what is not there."""

import logging
from dataclasses import replace

import pandas as pd
import pytest
import tiny_students as tiny

from nvr_tasks.errors import NvrError
from nvr_tasks.settings import Prompts
from nvr_tasks.training.examples import dev_set


def source_of(mined, example_id: str) -> str:
    return dict(zip(mined.data.queries["query_id"], mined.data.queries["source"], strict=True))[example_id]


def test_homogeneous_batches_are_of_one_source_each() -> None:
    mined = tiny.mined(queries=30, sources=3)
    made = mined.examples(tiny.stage(steps=40, batch_size=4, batches="homogeneous"), seed=1)
    of = [{source_of(mined, made.ids[i]) for i in batch} for batch in made.batches]
    assert all(len(sources) == 1 for sources in of)
    assert {s for sources in of for s in sources} == {"s0", "s1", "s2"}


def test_weights_decide_how_often_a_source_comes_and_others_stay_out() -> None:
    mined = tiny.mined(queries=30, sources=3)
    made = mined.examples(tiny.stage(steps=200, batch_size=4, sources={"s0": 3, "s2": 1}), seed=1)
    counts = {name: sum(source_of(mined, i) == name for i in made.ids) for name in ("s0", "s1", "s2")}
    assert counts["s1"] == 0
    assert 0.7 < counts["s0"] / len(made.ids) < 0.8


def test_an_epoch_is_every_query_once() -> None:
    made = tiny.mined(queries=12).examples(
        tiny.stage(steps=None, epochs=2, batch_size=4, in_batch_negatives=False), seed=1
    )
    assert len(made.batches) == 6
    assert {made.ids.count(i) for i in set(made.ids)} == {2}


def test_rows_say_what_the_columns_hold() -> None:
    mined = tiny.mined()
    made = mined.examples(tiny.stage(hard_negatives=2), seed=1)
    passages, queries = mined.data.passages(), list(mined.data.queries["text"])
    for number, (query, *docs) in enumerate(made.rows.tolist()):
        texts = [made.texts[column[number]] for column in made.columns.values()]
        assert texts == [queries[query], *(passages[d] for d in docs)]
    assert list(made.columns) == ["anchor", "positive", "negative_1", "negative_2"]


def test_a_source_without_training_queries() -> None:
    with pytest.raises(NvrError, match="stage train trains on source s7, which has no training query"):
        tiny.mined(sources=2).examples(tiny.stage(sources={"s0": 1, "s7": 1}), seed=1)


def test_the_dev_score_is_over_queries_of_the_sources_trained_on(caplog: pytest.LogCaptureFixture) -> None:
    data = tiny.mined(queries=30, sources=3).data
    data.queries.loc[:8, "split"] = "dev"
    source = dict(zip(data.queries["query_id"], data.queries["source"], strict=True))

    def found(*sources: dict[str, float]) -> set[str]:
        dev = dev_set(data, Prompts(), stages=[tiny.stage(sources=s) for s in sources])
        return {source[query] for query in dev.queries} if dev else set()

    assert found({"s0": 1}, {"s0": 1, "s2": 1}) == {"s0", "s2"}
    assert found({"s0": 1}, {}) == {"s0", "s1", "s2"}, "a stage that names none trains on all"
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert found({"s7": 1}) == set()
    assert "none of the 9 dev queries is of s7: no dev score" in caplog.text


def test_positives_that_the_teacher_doubts_are_left_out_but_for_each_query_s_best(
    caplog: pytest.LogCaptureFixture,
) -> None:
    mined = tiny.mined(queries=12)
    docs = list(mined.data.corpus["doc_id"])
    more = mined.negatives.assign(positive_id=docs[12:24])  # a second positive of every query
    #          q000  q001  q002  the others
    scores = [0.90, 0.10, 0.30, *[0.8] * 9, 0.20, 0.05, 0.31, *[0.8] * 9]
    negatives = pd.concat([mined.negatives, more], ignore_index=True).assign(positive_score=scores)
    mined = replace(mined, negatives=negatives)
    stage = tiny.stage(steps=60, batch_size=4, min_positive_score=0.3)
    with caplog.at_level(logging.INFO):
        made = mined.examples(stage, seed=1)
    seen = {(row[0], docs[row[1]]) for row in made.rows.tolist()}
    assert {d for q, d in seen if q == 0} == {"d000"}
    assert {d for q, d in seen if q == 1} == {"d001"}, "its best, though below"
    assert {d for q, d in seen if q == 2} == {"d002", "d014"}, "0.3 is not lower than 0.3"
    assert "2 of 24 pairs are left out: the teacher scores their positives below 0.3" in caplog.text
    assert len({(row[0], docs[row[1]]) for row in mined.examples(tiny.stage(steps=60), seed=1).rows.tolist()}) == 24


def test_positives_that_several_teachers_score_cannot_be_doubted() -> None:
    mined = tiny.mined()
    mined.negatives["positive_score"] = float("nan")
    with pytest.raises(NvrError, match=r"stage train leaves out positives .* mine with one teacher"):
        mined.examples(tiny.stage(min_positive_score=0.3), seed=1)
