"""The paper's rules on a matrix small enough to check by hand, and the random baseline."""

from __future__ import annotations

import numpy as np
import pytest

from nvr_tasks.mine_settings import Mine
from nvr_tasks.mining import MiningResult, MiningSpec, mine

# One query, eight passages; with the query (1) a passage's vector is its score.
#                    0     1     2     3     4     5     6      7
SCORES = np.array([0.80, 0.90, 0.78, 0.76, 0.74, 0.60, 0.10, -0.50], dtype=np.float32)[:, None]
ONE = np.ones((1, 1), dtype=np.float32)


def mined(spec: MiningSpec, positives: list[int] | None = None, **options) -> MiningResult:
    (result,) = mine(ONE, SCORES, [positives or [0]], spec, **options)
    return result


@pytest.mark.parametrize(
    ("spec", "ids", "above"),
    [
        # s⁺ = 0.80. Naive Top-K: the best, positives removed; passage 1 is likely an unlabelled positive.
        (MiningSpec("naive", num_negatives=3), [1, 2, 3], 0),
        # Shifted by 2: ranks 1 and 2 of the rest (passages 1 and 2) are dropped.
        (MiningSpec("shifted", shift=2, num_negatives=3), [3, 4, 5], 0),
        # TopK-Abs 0.7: 0.90, 0.78, 0.76 and 0.74 are not below.
        (MiningSpec("abs", num_negatives=3), [5, 6, 7], 4),
        # TopK-MarginPos 0.05: below 0.75.
        (MiningSpec("margin_pos", num_negatives=3), [4, 5, 6], 3),
        # TopK-PercPos 95 %: below 0.76; float32 0.76 lies just below 95 % of float32 0.80, so passage 3 stays.
        (MiningSpec("perc_pos", num_negatives=3), [3, 4, 5], 2),
        # 90 %: below 0.72.
        (MiningSpec("perc_pos", 0.9, num_negatives=3), [5, 6, 7], 4),
        # More than there are: short, never padded with what the rule forbids.
        (MiningSpec("perc_pos", 0.9, num_negatives=6), [5, 6, 7, -1, -1, -1], 4),
        # min_score cuts the list and does not let worse passages move up.
        (MiningSpec("perc_pos", 0.9, num_negatives=3, min_score=0.0), [5, 6, -1], 4),
    ],
)
def test_methods(spec: MiningSpec, ids: list[int], above: int) -> None:
    result = mined(spec)
    assert result.negative_ids.tolist() == [ids]
    assert result.skipped["at_or_above_ceiling"] == above
    expected = [float(SCORES[i, 0]) if i >= 0 else np.nan for i in ids]
    np.testing.assert_array_equal(result.negative_scores, [expected])
    assert result.short_rows.tolist() == ([0] if -1 in ids else [])


def test_a_score_equal_to_the_ceiling_is_not_below_it() -> None:
    result = mine(
        ONE,
        np.array([[0.5], [0.25], [0.125]], dtype=np.float32),
        [[0]],
        MiningSpec("margin_pos", 0.25, num_negatives=2),
    )[0]
    assert result.ceilings.tolist() == [0.25]
    assert result.negative_ids.tolist() == [[2, -1]]


def test_perc_pos_of_a_negative_score_lies_below_it() -> None:
    """s⁺·0.95 would be −0.38, above s⁺ = −0.40, and let the positive's betters in."""
    scores = np.array([[-0.4], [-0.39], [-0.41], [-0.43]], dtype=np.float32)
    result = mine(ONE, scores, [[0]], MiningSpec("perc_pos", num_negatives=2))[0]
    assert result.ceilings[0] == pytest.approx(-0.42)
    assert result.negative_ids.tolist() == [[3, -1]]


@pytest.mark.parametrize(
    ("policy", "ceilings", "ids"),
    [
        ("min", [0.50], [[6, 7]]),  # of 0.80 and 0.60 the lower sets the ceiling
        ("max", [0.70], [[6, 7]]),
        ("each", [0.70, 0.50], [[6, 7], [6, 7]]),
    ],
)
def test_several_positives(policy: str, ceilings: list[float], ids: list[list[int]]) -> None:
    result = mined(MiningSpec("margin_pos", 0.1, num_negatives=2, positive_policy=policy), [0, 5])
    assert result.ceilings == pytest.approx(ceilings)
    assert result.negative_ids.tolist() == ids
    assert result.positive_ids.tolist() == {"min": [5], "max": [0], "each": [0, 5]}[policy]


def test_policies_differ_where_passages_lie_between_the_ceilings() -> None:
    found = {p: mined(MiningSpec("abs", 2.0, num_negatives=1, positive_policy=p), [2, 4]) for p in ("min", "max")}
    assert found["min"].positive_ids.tolist() == [4]
    assert found["max"].positive_ids.tolist() == [2]
    margins = {
        p: mined(MiningSpec("margin_pos", 0.01, num_negatives=1, positive_policy=p), [2, 5]) for p in ("min", "max")
    }
    assert margins["min"].negative_ids.tolist() == [[6]]
    assert margins["max"].negative_ids.tolist() == [[3]]


def test_duplicates_of_a_positive_are_positives_and_a_list_has_one_of_each_text() -> None:
    groups = [0, 0, 1, 2, 2, 3, 4, 4]  # passage 1 has the positive's text; 3 and 4 share one, 6 and 7 share one
    result = mined(MiningSpec("naive", num_negatives=5), groups=groups)
    assert result.negative_ids.tolist() == [[2, 3, 5, 6, -1]]
    assert result.skipped["positive"] == 1
    assert result.skipped["duplicate_of_positive"] == 1


def test_of_a_group_that_straddles_the_ceiling_the_best_member_below_it_is_kept() -> None:
    result = mined(MiningSpec("margin_pos", 0.05, num_negatives=2), groups=[0, 1, 2, 3, 4, 4, 3, 5])
    assert result.negative_ids.tolist() == [[4, 6]]  # 5 duplicates 4; 6 duplicates 3, which is above the ceiling


def test_excluded_passages_and_their_duplicates_are_never_mined() -> None:
    result = mined(MiningSpec("naive", num_negatives=3), exclude=[[2]], groups=[0, 1, 2, 2, 4, 5, 6, 7])
    assert result.negative_ids.tolist() == [[1, 4, 5]]
    assert result.skipped["excluded"] == 2


def test_ties_go_to_the_lowest_row() -> None:
    scores = np.array([[1.0]] + [[0.5]] * 500, dtype=np.float32)
    for size in (1, 7, 64, 1000):
        (result,) = mine(ONE, scores, [[0]], MiningSpec("naive"), block_rows=size)
        assert result.negative_ids.tolist() == [[1, 2, 3, 4]]


# ── draws ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_draws_follow_the_softmax() -> None:
    """Of two candidates one is drawn, over 4,000 queries, with the odds of softmax(score / temperature)."""
    y = np.array([[1.0], [0.5], [0.25]], dtype=np.float32)
    spec = MiningSpec("naive", num_negatives=1, sampling="sampled", sample_from=2, temperature=0.25)
    (result,) = mine(np.ones((4000, 1), np.float32), y, [[0]] * 4000, spec, seed=3)
    share = float((result.negative_ids == 1).mean())
    assert share == pytest.approx(1 / (1 + np.exp(-1)), abs=4 * np.sqrt(0.2 / 4000))


def test_a_draw_depends_on_seed_and_query_alone() -> None:
    rng = np.random.default_rng(0)
    y = rng.standard_normal((60, 8)).astype(np.float32)
    x = rng.standard_normal((20, 8)).astype(np.float32)
    keys = np.arange(20, dtype=np.uint64) * np.uint64(977)
    spec = MiningSpec("naive", sampling="sampled", positive_policy="each")
    positives = [[i, i + 20] for i in range(20)]
    whole = mine(x, y, positives, spec, query_keys=keys, seed=1)[0].negative_ids.reshape(20, 2, 4)
    order = rng.permutation(20)[:7]
    part = mine(x[order], y, [positives[i] for i in order], spec, query_keys=keys[order], seed=1)[0]
    assert np.array_equal(part.negative_ids.reshape(7, 2, 4), whole[order])
    assert not np.array_equal(
        mine(x, y, positives, spec, query_keys=keys, seed=2)[0].negative_ids.reshape(20, 2, 4), whole
    )


@pytest.mark.parametrize("rows", [30, 6000])  # shuffled whole; drawn one by one
def test_random_draws_evenly_and_never_what_is_blocked(rows: int) -> None:
    rng = np.random.default_rng(0)
    y = rng.standard_normal((rows, 4)).astype(np.float32)
    x = rng.standard_normal((300, 4)).astype(np.float32)
    groups = np.arange(rows) // 2
    (result,) = mine(x, y, [[0]] * 300, MiningSpec("random"), groups=groups, exclude=[[2]] * 300)
    ids, scores = result.negative_ids, result.negative_scores
    assert not np.isin(ids, [0, 1, 2, 3]).any()
    assert all(len(set(row // 2)) == 4 for row in ids)
    assert (np.diff(scores, axis=1) <= 0).all()
    assert scores == pytest.approx(np.einsum("qd,qkd->qk", x.astype(float), y[ids].astype(float)))
    assert ids.mean() == pytest.approx(rows / 2, rel=0.1)
    assert result.candidates == result.kept + sum(result.skipped.values())


def test_random_takes_all_there_is_when_that_is_little() -> None:
    (result,) = mine(ONE, SCORES, [[0, 1, 2, 3, 4]], MiningSpec("random"))
    assert result.negative_ids.tolist() == [[5, 6, 7, -1]]


def test_defaults_of_recipe_and_core_agree() -> None:
    for method in ("perc_pos", "margin_pos", "abs"):
        assert Mine(method=method).resolved_threshold == MiningSpec(method).resolved_threshold
