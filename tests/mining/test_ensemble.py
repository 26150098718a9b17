"""Several teachers against the rules written out row by row, on inputs made to be awkward."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from brute import brute_force
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from nvr_tasks.errors import NvrError
from nvr_tasks.mining import (
    Candidates,
    EnsembleResult,
    MiningSpec,
    combine,
    mine,
    search_candidates,
    select_together,
)

sixteenths = st.integers(-16, 16).map(lambda n: n / 16)  # products and sums are exact, so ties are ties
HOW = ("cross_sample", "intra_sample", "intra_sample_dedup")


@st.composite
def problems(draw: st.DrawFn) -> dict:
    n, q, teachers = draw(st.integers(3, 20)), draw(st.integers(1, 4)), draw(st.integers(2, 3))
    vectors = []
    for _ in range(teachers):
        d = draw(st.integers(1, 3))
        numbers = draw(st.lists(sixteenths, min_size=(n + q) * d, max_size=(n + q) * d))
        matrix = np.array(numbers, dtype=np.float32).reshape(n + q, d)
        vectors.append((matrix[:q], matrix[q:]))
    rows = st.integers(0, n - 1)
    method = draw(st.sampled_from(["perc_pos", "margin_pos", "abs", "naive", "shifted"]))
    ranges = {"perc_pos": [0.5, 1.0], "margin_pos": [0.0, 0.25], "abs": [0.0, 0.5]}.get(method, [None])
    return {
        "vectors": vectors,
        "positives": [draw(st.lists(rows, min_size=1, max_size=3, unique=True)) for _ in range(q)],
        "groups": draw(st.none() | st.lists(st.integers(0, 9), min_size=n, max_size=n)),
        "exclude": [draw(st.lists(rows, max_size=2)) for _ in range(q)],
        "method": method,
        "thresholds": [draw(st.sampled_from(ranges)) for _ in range(teachers)],
        "shift": draw(st.integers(0, 3)),
        "num_negatives": draw(st.integers(teachers, max(teachers, n))),
        "policy": draw(st.sampled_from(["min", "max", "each"])),
        "min_score": draw(st.sampled_from([None, 0.0])),
        "depth": draw(st.integers(1, n)),
        "how": draw(st.sampled_from(HOW)),
        "seed": draw(st.integers(0, 3)),
    }


def specs(p: dict) -> list[MiningSpec]:
    return [
        MiningSpec(
            p["method"],
            t,
            shift=p["shift"],
            num_negatives=p["num_negatives"],
            positive_policy=p["policy"],
            min_score=p["min_score"],
        )
        for t in p["thresholds"]
    ]


def turns(lists: list[list[int]], labels: list[int], count: int, distinct: bool) -> list[tuple[int, int]]:
    """(teacher, passage) in turns, from each teacher's complete list of eligible passages."""
    left = [list(items) for items in lists]
    given: list[tuple[int, int]] = []
    turn = 0
    while len(given) < count and any(left):
        queue, teacher, turn = left[turn % len(left)], turn % len(left), turn + 1
        if distinct:
            there = {labels[n] for _, n in given}
            queue[:] = [n for n in queue if labels[n] not in there]
        if queue:
            given.append((teacher, queue.pop(0)))
    return given


def together(p: dict, order: np.ndarray | None = None) -> tuple[EnsembleResult, list[Candidates]]:
    order = np.arange(len(p["positives"])) if order is None else order
    stored = [
        search_candidates(
            x[order],
            y,
            [p["positives"][q] for q in order],
            p["depth"],
            groups=p["groups"],
            exclude=[p["exclude"][q] for q in order],
        )
        for x, y in p["vectors"]
    ]
    sources = [lambda x=x, y=y: (x[order], y) for x, y in p["vectors"]]
    keys = order.astype(np.uint64)
    return select_together(stored, specs(p), p["how"], sources, seed=p["seed"], query_keys=keys), stored


@settings(max_examples=120, deadline=None)
@given(problems())
def test_an_ensemble_is_what_its_rules_say(p: dict) -> None:
    found, _ = together(p)
    labels = p["groups"] or list(range(len(p["vectors"][0][1])))
    by_teacher = []
    for (x, y), spec in zip(p["vectors"], specs(p), strict=True):
        every = replace(spec, num_negatives=len(y))  # complete lists: how far a turn goes is for the rules to say
        by_teacher.append(brute_force(x, y, p["positives"], every, p["groups"], p["exclude"]))
    assert len(found.query_rows) == len(by_teacher[0])
    cross = p["how"] == "cross_sample"
    for row in range(len(found.query_rows)):
        rows = [of[row] for of in by_teacher]
        if cross:
            t = int(found.drawn[row])
            expected = [(t, n) for n in rows[t].ids[: p["num_negatives"]]]
        else:
            expected = turns([r.ids for r in rows], labels, p["num_negatives"], p["how"] == "intra_sample_dedup")
        mined = list(zip(found.teachers[row].tolist(), found.negative_ids[row].tolist(), strict=True))
        assert [m for m in mined if m[1] >= 0] == expected
        assert all(m == (-1, -1) for m in mined[len(expected) :])
        for slot, (t, _) in enumerate(expected):
            assert found.ceilings[row, slot] == rows[t].ceiling
            assert found.positive_scores[row, slot] == rows[t].positive_score
            assert found.negative_scores[row, slot] < rows[t].ceiling
    for part in found.parts:  # every passage of every (row, teacher) has its heading
        assert part.candidates == part.kept + sum(part.skipped.values())
        part.check_balance()
    assert sum(part.kept for part in found.parts) == int(found.kept_per_row.sum())
    assert sum(len(part.query_rows) for part in found.parts) == len(found.query_rows) * (
        1 if cross else len(found.parts)
    )


@settings(max_examples=40, deadline=None)
@given(problems(), st.randoms(use_true_random=False))
def test_a_row_does_not_know_which_others_there_are(p: dict, random: object) -> None:
    found, _ = together(p)
    order = np.arange(len(p["positives"]))[::-1][: max(1, len(p["positives"]) - 1)]
    some, _ = together(p, order)
    for row, (query, positive) in enumerate(_rows(some, p, order)):
        same = _rows(found, p, np.arange(len(p["positives"]))).index((query, positive))
        assert some.negative_ids[row].tolist() == found.negative_ids[same].tolist()
        assert some.teachers[row].tolist() == found.teachers[same].tolist()


def _rows(found: EnsembleResult, p: dict, order: np.ndarray) -> list[tuple[int, int]]:
    """(query, which of its positives) of each row."""
    seen: dict[int, int] = {}
    rows = []
    for q in found.query_rows.tolist():
        rows.append((int(order[q]), seen.setdefault(q, 0)))
        seen[q] += 1
    return rows


def test_teachers_are_drawn_evenly_and_by_seed() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((3000, 3)).astype(np.float32), rng.standard_normal((20, 3)).astype(np.float32)
    positives = [[q % 20] for q in range(len(x))]
    (one,) = mine(x, y, positives, MiningSpec("naive", num_negatives=1))
    first = combine([one, one, one], "cross_sample", seed=1)
    assert chisquare(np.bincount(first.drawn, minlength=3)).pvalue > 1e-3
    assert np.array_equal(first.drawn, combine([one, one, one], "cross_sample", seed=1).drawn)
    other = combine([one, one, one], "cross_sample", seed=2).drawn
    assert 0.2 < (other == first.drawn).mean() < 0.47
    # What is drawn for a row is not what its negatives are drawn by.
    spec = MiningSpec("naive", num_negatives=1, sampling="sampled", sample_from=2, temperature=100.0)
    (drawn,) = mine(x, y, positives, spec, seed=1)
    best = drawn.negative_scores[:, 0] == one.negative_scores[:, 0]
    assert abs(np.corrcoef(best, first.drawn == 0)[0, 1]) < 0.06


def test_guards_of_one_teacher_bind_all() -> None:
    """Passage 1 is a near-duplicate of the positive to the first teacher, passage 2 to the second."""

    def at(*angles: float) -> np.ndarray:
        return np.array([[np.cos(a), np.sin(a)] for a in angles], np.float32)

    eyes = [at(0, 0.01, 0.9, 1.0, 1.1), at(0, 0.9, 0.01, 1.1, 1.0)]
    stored = [search_candidates(y[:1], y, [[0]], 5, duplicate_similarity=0.99) for y in eyes]
    spec = MiningSpec("naive", num_negatives=2)
    found = select_together(stored, [spec, spec], "intra_sample", [None, None])
    assert found.negative_ids.tolist() == [[3, 4]]
    assert found.teachers.tolist() == [[0, 1]]
    for part in found.parts:
        assert part.skipped["near_duplicate"] == 2
    alone = [mine(y[:1], y, [[0]], spec, duplicate_similarity=0.99)[0].negative_ids[0].tolist() for y in eyes]
    assert alone == [[2, 3], [1, 4]]  # by itself each would give what the other spares


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_negatives": 3}, "differ in num_negatives or positive_policy"),
        ({"positive_policy": "each"}, "differ in num_negatives or positive_policy"),
        ({"sampling": "sampled"}, "intra_sample takes the best of each teacher: sampling 'sampled' has no meaning"),
        ({"method": "random"}, "random looks at no teacher's scores"),
    ],
)
def test_results_that_do_not_belong_together(change: dict, message: str) -> None:
    y = np.eye(6, dtype=np.float32)
    (one,) = mine(y[:2], y, [[0], [1]], MiningSpec("naive", num_negatives=2))
    (other,) = mine(y[:2], y, [[0], [1]], MiningSpec(**{"method": "naive", "num_negatives": 2, **change}))
    with pytest.raises(NvrError, match=message):
        combine([one, other], "intra_sample")


def test_too_few_teachers_or_negatives_and_other_tasks() -> None:
    y = np.eye(6, dtype=np.float32)
    (one,) = mine(y[:2], y, [[0], [1]], MiningSpec("naive", num_negatives=1))
    with pytest.raises(NvrError, match="an ensemble of 1 teachers: give at least two"):
        combine([one], "cross_sample")
    with pytest.raises(NvrError, match="num_negatives 1 is too few"):
        combine([one, one], "intra_sample")
    with pytest.raises(NvrError, match="ensemble 'vote' is unknown: one of cross_sample, intra_sample"):
        combine([one, one], "vote")  # type: ignore[arg-type]
    stored = [search_candidates(y[:2], y, positives, 4) for positives in ([[0], [1]], [[0], [2]])]
    with pytest.raises(NvrError, match="of different queries, positives or corpora"):
        select_together(stored, [one.spec, one.spec], "cross_sample", [None, None])
