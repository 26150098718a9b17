"""No batch may hold a passage that is relevant to another of its queries."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvr_tasks.training.batches import Composer, Row, blend, derived, drawn, fill_short, passes


def compose(stream, relevant, groups, query_groups, size: int, batches: int) -> tuple[list[list[Row]], int]:
    """That many batches, and how many rows lost their turn."""
    composer = Composer(stream, relevant, groups, query_groups)
    return [composer.batch(size) for _ in range(batches)], composer.lost


@st.composite
def training_sets(draw: st.DrawFn) -> tuple[list[Row], list[frozenset[int]], np.ndarray, np.ndarray]:
    """Rows over a small corpus with near-duplicates, queries with several positives, and equal query texts."""
    passages = draw(st.integers(6, 40))
    queries = draw(st.integers(3, 20))
    groups = np.array([draw(st.integers(0, passages - 1)) for _ in range(passages)], dtype=np.int64)
    query_groups = np.array([draw(st.integers(0, queries - 1)) for _ in range(queries)], dtype=np.int64)
    rows, relevant = [], []
    for query in range(queries):
        positives = draw(st.lists(st.integers(0, passages - 1), min_size=1, max_size=3, unique=True))
        judged = frozenset(int(groups[p]) for p in positives)
        relevant.append(judged)
        others = [p for p in range(passages) if int(groups[p]) not in judged]
        for positive in positives:
            rows.append(Row(query, positive, tuple(others[:1])))
    return rows, relevant, groups, query_groups


@settings(max_examples=200, deadline=None)
@given(training_sets(), st.integers(2, 8), st.integers(0, 3))
def test_no_hidden_positive_in_a_batch(data, batch_size: int, seed: int) -> None:
    rows, relevant, groups, query_groups = data
    try:
        batches, _ = compose(passes(rows, seed), relevant, groups, query_groups, batch_size, batches=5)
    except ValueError:
        return  # everything is related to everything: two rows never fit
    assert len(batches) == 5
    for batch in batches:
        assert 2 <= len(batch) <= batch_size
        assert len({int(query_groups[r.query]) for r in batch}) == len(batch)
        for one, other in itertools.permutations(batch, 2):
            theirs = {int(groups[p]) for p in (other.positive, *other.negatives)}
            assert not theirs & relevant[one.query], "a passage of one row is relevant to another row's query"


def test_every_query_comes_once_per_pass_with_its_next_positive() -> None:
    rows = [Row(0, p, ()) for p in range(40)] + [Row(1, 50, ()), Row(2, 60, ())]
    stream = passes(rows, seed=3)
    first, second = [[next(stream) for _ in range(3)] for _ in range(2)]
    assert {r.query for r in first} == {r.query for r in second} == {0, 1, 2}
    positive = {n: next(r.positive for r in part if r.query == 0) for n, part in enumerate((first, second))}
    assert positive[0] != positive[1], "a query with many positives must show another one in the next pass"


def test_same_seed_same_batches() -> None:
    rows = [Row(q, q, ()) for q in range(50)]
    relevant = [frozenset({q}) for q in range(50)]
    index = np.arange(50)
    made = [compose(passes(rows, seed), relevant, index, index, 8, 10)[0] for seed in (1, 1, 2)]
    assert made[0] == made[1]
    assert made[0] != made[2]


def test_no_stage_or_source_repeats_another_seeds_order() -> None:
    every = {
        derived(seed, *of)
        for seed in range(20)
        for of in [(), *itertools.product(range(6)), *itertools.product(range(6), range(3))]
    }
    assert len(every) == 20 * (1 + 6 + 18)
    assert derived(17, 1) == derived(17, 1)


def test_short_rows_are_filled_with_unrelated_passages_never_dropped() -> None:
    groups = np.array([0, 0, 2, 3, 4, 5], dtype=np.int64)  # 0 and 1 are the same text
    relevant = [frozenset({0, 3})]
    rows, drawn = fill_short([(0, 0, [2])], relevant, groups, count=3, seed=1)
    assert drawn == 2
    assert rows[0].negatives[0] == 2, "mined negatives come first"
    assert set(rows[0].negatives[1:]) == {4, 5}, "never the positive, its duplicate, another positive or one twice"


def test_a_negative_that_two_teachers_gave_stays_twice() -> None:
    """Without dedup (arXiv:2407.15831 §3.2) it is two terms of the loss; nothing is drawn in its place."""
    rows, drawn = fill_short([(0, 0, [2, 2, 3])], [frozenset({0})], np.arange(6), count=3, seed=1)
    assert rows[0].negatives == (2, 2, 3)
    assert drawn == 0


def test_impossible_fill_is_refused() -> None:
    with pytest.raises(ValueError, match="no 2 passages"):
        fill_short([(0, 0, [])], [frozenset({0})], np.array([0, 0, 2]), count=2, seed=1)


def test_rows_that_never_fit_are_counted_when_they_lose_their_turn() -> None:
    rows = [Row(q, 0 if q < 300 else q, ()) for q in range(400)]
    relevant = [frozenset({0 if q < 300 else q}) for q in range(400)]
    index = np.arange(400)
    batches, lost = compose(passes(rows, 1), relevant, index, index, 8, 50)
    assert lost > 0
    assert {len(b) for b in batches} == {8}


@pytest.mark.parametrize(("fitting", "size"), [(37, 32), (16, 16), (9, 8), (7, 7), (40, 40)])
def test_a_short_batch_is_one_that_processes_can_divide(fitting: int, size: int) -> None:
    """Batches of 40 out of so many queries that have nothing to do with each other."""
    rows, index = [Row(q, q, ()) for q in range(fitting)], np.arange(fitting)
    order = list(itertools.islice(passes(rows, seed=1), fitting))
    taken: list[Row] = []
    stream = (taken.append(row) or row for row in passes(rows, seed=1))
    composer = Composer(stream, [frozenset({q}) for q in range(fitting)], index, index)
    first, second = composer.batch(40), composer.batch(40)
    assert (first, len(second)) == (order[:size], size)
    over = order[size:]
    assert second[: len(over)] == over, "what was left over is next"
    assert len(taken) == 2 * size + len(composer._waiting) + composer.lost


def test_a_blend_follows_its_weights_and_each_source_its_own_order() -> None:
    streams = {name: passes([Row(100 * n + q, q, ()) for q in range(10)], n) for n, name in enumerate("ab")}
    alone = {name: passes([Row(100 * n + q, q, ()) for q in range(10)], n) for n, name in enumerate("ab")}
    mixed = blend(streams, {"a": 3.0, "b": 1.0}, seed=5)
    rows = [next(mixed) for _ in range(4000)]
    of_a = [r for r in rows if r.query < 100]
    assert 0.72 < len(of_a) / 4000 < 0.78
    assert of_a == [next(alone["a"]) for _ in of_a]


def test_drawn_negatives_differ_from_pass_to_pass_and_keep_their_order() -> None:
    stream = drawn(passes([Row(0, 99, tuple(range(50)))], seed=1), count=15, seed=2)
    rows = [next(stream) for _ in range(20)]
    assert {len(set(r.negatives)) for r in rows} == {15}
    assert len({r.negatives for r in rows}) == 20
    assert all(list(r.negatives) == sorted(r.negatives) for r in rows), "hardest first, as they were mined"
    assert {n for r in rows for n in r.negatives} == set(range(50)), "each of them comes some time"


def test_without_in_batch_negatives_queries_of_one_class_may_share_a_batch() -> None:
    """Ten texts of a class have the same positive: harmless where only own negatives count."""
    rows = [Row(q, 0, (1,)) for q in range(10)]
    index = np.arange(10)
    [batch] = compose(passes(rows, 1), None, index, index, 8, 1)[0]
    assert len({r.query for r in batch}) == 8
    with pytest.raises(ValueError, match="fewer than two training rows"):
        compose(passes(rows, 1), [frozenset({0})] * 10, index, index, 8, 1)


def test_all_mined_negatives_are_kept_to_draw_from() -> None:
    groups, relevant = np.arange(9), [frozenset({0}), frozenset({0})]
    rows, drawn_at_random = fill_short(
        [(0, 0, [3, 4, 5, 6]), (1, 0, [3])], relevant, groups, count=2, seed=1, keep_all=True
    )
    assert rows[0].negatives == (3, 4, 5, 6)
    assert len(rows[1].negatives) == 2
    assert drawn_at_random == 1
