"""The bootstrap over queries and seeds: against scipy where it has a counterpart, by simulation where it has none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.stats

from nvr_tasks.evaluation import crossed
from nvr_tasks.evaluation.crossed import seeds_to_queries
from nvr_tasks.evaluation.variants import Row, compared, mean_curve, speed, steps_to

DRAWS = 20_000


def test_with_one_seed_it_is_the_paired_bootstrap_of_scipy() -> None:
    random = np.random.default_rng(1)
    a, b = random.beta(0.5, 1, 150), random.beta(0.6, 1, 150)
    means = crossed.resampled([(a - b)[None, :, None]], [1.0], DRAWS, 7)
    low, high = crossed.interval(means, 0.05)
    expected = scipy.stats.bootstrap(
        (a, b), lambda x, y, axis: (x - y).mean(axis=axis), paired=True, method="percentile", n_resamples=DRAWS, rng=3
    )
    spread = (a - b).std() / np.sqrt(150)
    assert low[0] == pytest.approx(expected.confidence_interval.low, abs=0.05 * spread)
    assert high[0] == pytest.approx(expected.confidence_interval.high, abs=0.05 * spread)
    assert means.std() == pytest.approx(expected.standard_error, rel=0.03)


def test_seeds_alone_have_the_standard_error_of_their_mean() -> None:
    """All queries alike, so only seeds differ: S − 1 draws of S give s²/S exactly, which S draws would underestimate."""
    by_seed = np.array([0.1, 0.2, 0.4, 0.7])
    values = np.repeat(by_seed[:, None, None], 50, axis=1)
    means = crossed.resampled([values], [1.0], 200_000, 5)
    assert means.std() == pytest.approx(scipy.stats.sem(by_seed), rel=0.01)
    assert means.mean() == pytest.approx(by_seed.mean(), abs=1e-3)


def test_a_seed_is_drawn_for_all_tasks_at_once() -> None:
    """The model of a seed is good or bad on every task: its luck does not average out over tasks."""
    by_seed = np.array([-1.0, 0.0, 1.0])
    one = np.repeat(by_seed[:, None, None], 20, axis=1)
    both = crossed.resampled([one, one], [0.5, 0.5], DRAWS, 5)
    assert both.std() == pytest.approx(crossed.resampled([one], [1.0], DRAWS, 5).std(), rel=1e-9)
    opposite = crossed.resampled([one, -one], [0.5, 0.5], DRAWS, 5)
    assert np.abs(opposite).max() < 1e-12


@pytest.mark.parametrize(("seeds", "seed_spread", "least"), [(3, 0.0, 0.92), (3, 0.5, 0.92), (5, 2.0, 0.92)])
def test_intervals_cover_what_they_say(seeds: int, seed_spread: float, least: float) -> None:
    """True difference 0, with spreads of seed, query and their interaction: how often does the interval hold it?

    With 300 trials it was 97 %, 97 % and 98 %, and 94 % for three seeds that spread twice as much as queries do.
    """
    random = np.random.default_rng(11)
    held, trials, queries = 0, 150, 60
    for trial in range(trials):
        of_seed = seed_spread * random.normal(size=(seeds, 1)) / np.sqrt(queries)
        values = of_seed + random.normal(size=(1, queries)) + random.normal(size=(seeds, queries))
        low, high = crossed.interval(crossed.resampled([values[:, :, None]], [1.0], 1000, trial), 0.05)
        held += low[0] <= 0 <= high[0]
    assert least <= held / trials


def test_p_is_below_alpha_where_the_interval_excludes_zero() -> None:
    random = np.random.default_rng(2)
    values = random.normal(np.linspace(-0.5, 0.5, 41), 1, size=(3, 80, 41))
    means = crossed.resampled([values], [1.0], 4000, 1)
    low, high = crossed.interval(means, 0.05)
    p = crossed.two_sided_p(means)
    outside = (low > 0) | (high < 0)
    clear = np.abs(p - 0.05) > 0.002
    assert ((p < 0.05) == outside)[clear].all()
    assert outside.any()
    assert not outside.all()
    assert p.min() > 0


# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────


def row(name: str, gain: float, curves: list[list[tuple[int, float]]] | None = None, pace: float = 0.5) -> Row:
    random = np.random.default_rng(9)  # the same noise for all: only the gain differs
    values = {t: np.clip(random.beta(1, 1, (3, n)) * 0.5 + gain, 0, 1) for t, n in (("A", 40), ("B", 60))}
    return Row(name, values, curves or [], [pace, pace * 2, pace])


def test_the_table_has_means_differences_and_holm_s_p() -> None:
    rows = [row("naive", 0.0), row("same", 0.0), row("better", 0.2), row("worse", -0.0001)]
    weights = {"A": 0.5, "B": 0.5}
    table = {r["name"]: r for r in compared(rows, "naive", weights, alpha=0.05, draws=2000, seed=1)}
    naive = rows[0].values
    assert table["naive"]["difference"] is None
    assert table["naive"]["tasks"]["A"]["mean"] == pytest.approx(naive["A"].mean())
    assert table["naive"]["tasks"]["B"]["by_seed"] == pytest.approx(naive["B"].mean(axis=1))
    assert table["naive"]["mean"]["mean"] == pytest.approx((naive["A"].mean() + naive["B"].mean()) / 2)
    assert table["naive"]["mean"]["by_seed"] == pytest.approx((naive["A"].mean(axis=1) + naive["B"].mean(axis=1)) / 2)
    better, same = table["better"]["difference"], table["same"]["difference"]
    assert (better["mean"], better["low"], better["high"]) == pytest.approx((0.2, 0.2, 0.2), abs=1e-9)
    assert (same["mean"], same["low"], same["high"], same["p_holm"]) == (0, 0, 0, 1)
    ordered = sorted((r["difference"] for r in table.values() if r["difference"]), key=lambda d: d["p"])
    assert ordered[0]["p_holm"] == pytest.approx(3 * ordered[0]["p"])
    assert (
        table["better"]["tasks"]["A"]["low"]
        < table["better"]["tasks"]["A"]["mean"]
        < table["better"]["tasks"]["A"]["high"]
    )


def test_how_fast_a_variant_learns_is_read_off_its_mean_curve() -> None:
    slow = [[(10, 0.1), (20, 0.2), (30, 0.4)], [(10, 0.1), (20, 0.2), (30, 0.4)]]
    fast = [[(10, 0.3), (20, 0.38), (30, 0.39)], [(10, 0.1), (20, 0.40), (30, 0.41)]]
    never = [[(10, 0.1), (20, 0.2), (30, 0.3)]] * 2
    rows = [row("slow", 0, slow), row("fast", 0, fast), row("never", 0, never)]
    told = speed(rows, 0.95)
    assert told["best_final"] == pytest.approx(0.4)
    assert told["target"] == pytest.approx(0.38)
    assert told["variants"]["slow"]["steps"] == pytest.approx(20 + 10 * 0.18 / 0.2)
    assert told["variants"]["fast"]["steps"] == pytest.approx(10 + 10 * 0.18 / 0.19)
    assert told["variants"]["fast"]["by_seed"] == pytest.approx([20, 10 + 10 * 0.28 / 0.3])
    assert told["variants"]["never"]["steps"] is told["variants"]["never"]["seconds"] is None
    assert told["variants"]["slow"]["seconds"] == pytest.approx(29 * 0.5)  # at the median pace
    assert told["variants"]["fast"]["curve"][0] == pytest.approx([10, 0.2, 0.1, 0.3])


def test_cells_of_equal_work_share_a_pace() -> None:
    curve = [[(10, 0.1), (20, 0.4)]] * 3
    idle, beside = row("idle", 0, curve, pace=0.5), row("beside", 0, curve, pace=2.0)
    told = speed([idle, beside], 0.95)["variants"]
    assert told["idle"]["seconds_per_step"] == told["beside"]["seconds_per_step"] == np.median([0.5, 1, 0.5, 2, 4, 2])
    elsewhere = speed([replace(idle, machines=["a", "a"]), replace(beside, machines=["a", "b"])], 0.95)
    assert elsewhere["machines"] == ["a", "b"]
    assert [v["seconds"] for v in elsewhere["variants"].values()] == [None, None], "seconds of different machines"
    apart = speed([idle, replace(beside, work="other")], 0.95)["variants"]
    assert (apart["idle"]["seconds_per_step"], apart["beside"]["seconds_per_step"]) == (0.5, 2.0)


def test_seeds_that_differ_more_than_queries_do_are_told() -> None:
    random = np.random.default_rng(3)
    noise = {"A": random.normal(0, 0.1, 400), "B": random.normal(0, 0.2, 100)}
    shifts = np.array([-0.03, 0.0, 0.03])
    strata = [shifts[:, None] + noise["A"], shifts[:, None] + noise["B"]]
    error = np.sqrt(0.25 * (noise["A"].var(ddof=1) / 400 + noise["B"].var(ddof=1) / 100))
    assert seeds_to_queries(strata, [0.5, 0.5]) == pytest.approx(0.03 / error)
    assert seeds_to_queries([d[:1] for d in strata], [0.5, 0.5]) is None
    assert seeds_to_queries([np.ones((3, 1))], [1.0]) is None


def test_curves_are_compared_where_all_seeds_have_a_point() -> None:
    assert mean_curve([[(1, 0.1), (2, 0.2)], [(2, 0.4)]]) == [(2, pytest.approx(0.3), 0.2, 0.4)]
    assert mean_curve([[(1, 0.1)], []]) == []
    assert steps_to([(5, 0.9)], 0.5) == 5  # there at the first look
    assert steps_to([(5, 0.9), (10, 0.4), (20, 0.6)], 0.5) == 15, "a curve that falls away again had not got there"
    assert steps_to([(5, 0.9), (10, 0.4)], 0.5) is None
    assert speed([row("a", 0)], 0.9)["variants"] == {}
