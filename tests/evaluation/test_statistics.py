"""Statistics against scipy, worked examples and simulation."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from scipy import stats

from nvr_tasks.evaluation import statistics
from nvr_tasks.evaluation.comparison import compare, fall_short
from nvr_tasks.policy import Gate

ALPHA, POWER = 0.05, 0.8
log = logging.getLogger(__name__)


def noise(random: np.random.Generator, n: int, columns: int) -> np.ndarray:
    """Differences of nDCG@10 between two runs of one system: many ties, small changes, now and then a hit more or less."""
    small = random.normal(0, 0.12, (n, columns)) * (random.random((n, columns)) < 0.55)
    hits = (
        (random.random((n, columns)) < 0.04)
        * random.choice([-1, 1], (n, columns))
        * random.uniform(0.3, 1, (n, columns))
    )
    return np.clip(small + hits, -1, 1)


@pytest.fixture(scope="module")
def strata() -> list[np.ndarray]:
    random = np.random.default_rng(5)
    return [noise(random, n, 1)[:, 0] + 0.012 for n in (120, 60)]


@pytest.mark.parametrize("margin", [0.0, -0.01])
def test_sign_flips_equal_scipys_permutation_test(strata: list[np.ndarray], margin: float) -> None:
    weights = np.concatenate([np.full(len(d), 1 / (len(d) * len(strata))) for d in strata])
    flat = np.concatenate(strata) - margin

    def macro(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
        return ((x - y) * weights).sum(axis=axis)

    theirs = stats.permutation_test(
        (flat, np.zeros(len(flat))),
        macro,
        permutation_type="samples",
        alternative="greater",
        n_resamples=20_000,
        vectorized=True,
        rng=np.random.default_rng(1),
    ).pvalue
    ours = statistics.superiority_p(strata, margin, 20_000, 3)
    assert float(ours) == pytest.approx(theirs, abs=4 * np.sqrt(theirs * (1 - theirs) * 2 / 20_000) + 1e-4)


def test_few_queries_give_the_exact_permutation_p() -> None:
    few = np.array([0.3, 0.1, -0.05, 0.2, 0.02, 0.4, 0.0])
    exact = stats.permutation_test(
        (few, np.zeros(7)), lambda x, y: np.mean(x - y), permutation_type="samples", alternative="greater"
    ).pvalue
    assert float(statistics.superiority_p([few], 0, 100_000, 2)) == pytest.approx(exact, abs=0.003)
    two_sided = stats.permutation_test(
        (few, np.zeros(7)), lambda x, y: np.mean(x - y), permutation_type="samples"
    ).pvalue
    assert statistics.difference_p(few, 100_000, 2) == pytest.approx(two_sided, abs=0.004)


def test_the_interval_equals_scipys_stratified_bootstrap(strata: list[np.ndarray]) -> None:
    def macro(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
        return (a.mean(axis=axis) + b.mean(axis=axis)) / 2

    theirs = stats.bootstrap(
        strata, macro, n_resamples=20_000, confidence_level=0.9, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    ours = statistics.bootstrap_interval(strata, 0.9, 20_000, 3)
    assert (float(ours[0]), float(ours[1])) == pytest.approx((theirs.low, theirs.high), abs=5e-4)


def test_standard_error_is_that_of_independent_means(strata: list[np.ndarray]) -> None:
    expected = np.sqrt(sum(stats.sem(d) ** 2 for d in strata)) / len(strata)
    assert float(statistics.standard_error(strata)) == pytest.approx(expected, rel=1e-12)


def test_holm_on_a_worked_example() -> None:
    # sorted .005·4, .01·3, .03·2, .04·1, each at least the one before it
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0]
    assert statistics.holm([]) == []


def test_equal_systems_give_p_of_one_and_an_interval_of_zero() -> None:
    same = [np.zeros(50), np.zeros(30)]
    assert float(statistics.superiority_p(same, 0, 999, 1)) == 1
    assert statistics.difference_p(same[0], 999, 1) == 1
    low, high = statistics.bootstrap_interval(same, 0.9, 999, 1)
    assert (float(low), float(high)) == (0, 0)


def test_the_same_seed_gives_the_same_verdict(strata: list[np.ndarray]) -> None:
    assert statistics.superiority_p(strata, 0, 2000, 7) == statistics.superiority_p(strata, 0, 2000, 7)
    assert statistics.bootstrap_interval(strata, 0.9, 2000, 7) == statistics.bootstrap_interval(strata, 0.9, 2000, 7)


def test_chunks_change_nothing(strata: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = statistics.bootstrap_interval(strata, 0.9, 1000, 7)
    monkeypatch.setattr(statistics, "CHUNK", 5000)
    assert np.allclose(statistics.bootstrap_interval(strata, 0.9, 1000, 7), whole, rtol=0, atol=1e-12)


def promoted(strata: list[np.ndarray], margin: float = 0.0, draws: int = 999) -> np.ndarray:
    p = statistics.superiority_p(strata, margin, draws, 11)
    low, _ = statistics.bootstrap_interval(strata, 1 - 2 * ALPHA, draws, 11)
    return (p <= ALPHA) & (low > margin)


@pytest.mark.parametrize("sizes", [(300, 323), (50, 49)])
def test_identical_systems_are_rarely_promoted_and_detectable_gains_mostly(sizes: tuple[int, ...]) -> None:
    runs = 1500
    random = np.random.default_rng(sum(sizes))
    null = [noise(random, n, runs) for n in sizes]
    three_sigma = 3 * np.sqrt(ALPHA * (1 - ALPHA) / runs)
    assert promoted(null).mean() <= ALPHA + three_sigma
    # Not inferior by more than the margin, when inferior by exactly that: the same level.
    assert promoted([d - 0.01 for d in null], margin=-0.01).mean() <= ALPHA + three_sigma
    detectable = statistics.detectable_difference(null, ALPHA, POWER)
    assert promoted([d + detectable for d in null]).mean() >= POWER
    # The reported size is not padded either: two thirds of it would be missed often.
    assert promoted([d + 2 / 3 * detectable for d in null]).mean() < POWER - 0.15


def stopped(strata: list[np.ndarray], limit: float = 0.0, draws: int = 999) -> np.ndarray:
    """Whether a quick tier of these tasks stops: shown to gain less than the limit."""
    p = statistics.superiority_p([-d for d in strata], -limit, draws, 11)
    _, high = statistics.bootstrap_interval(strata, 1 - 2 * ALPHA, draws, 11)
    return (p <= ALPHA) & (high < limit)


@pytest.mark.parametrize("sizes", [(300, 323), (50, 323)])
def test_a_quick_tier_costs_little_power(sizes: tuple[int, int]) -> None:
    """The first task is the tier. Its figures are in DESIGN.md: `pytest tests/evaluation/test_statistics.py -k quick_tier
    --log-cli-level=INFO`."""
    runs = 1500
    random = np.random.default_rng(sum(sizes) + 1)
    null = [noise(random, n, runs) for n in sizes]
    three_sigma = 3 * np.sqrt(ALPHA * (1 - ALPHA) / runs)
    detectable = statistics.detectable_difference(null, ALPHA, POWER)
    of_tier = statistics.detectable_difference(null[:1], ALPHA, POWER)
    for name, gains in {
        "identical": (0.0, 0.0),
        "better by the detectable difference on both tasks": (detectable, detectable),
        "better by twice that on the other task, equal on the tier": (0.0, 2 * detectable),
        "worse on the tier by its own detectable difference": (-of_tier, 0.0),
    }.items():
        strata = [d + gain for d, gain in zip(null, gains, strict=True)]
        halted, plain = stopped(strata[:1]), promoted(strata)
        both = plain & ~halted
        log.info("%s, %s: stopped %.3f, promoted %.3f → %.3f", sizes, name, halted.mean(), plain.mean(), both.mean())
        if name == "identical":
            assert both.mean() <= ALPHA + three_sigma
            assert halted.mean() <= ALPHA + three_sigma
        elif name.startswith("better by the"):
            assert plain.mean() - both.mean() <= 0.005
            assert both.mean() >= POWER - 0.005
        elif name.startswith("better by twice"):
            assert plain.mean() - both.mean() <= ALPHA + three_sigma
        else:
            assert halted.mean() >= POWER


def test_a_quick_tier_stops_as_the_simulated_rule_does() -> None:
    random = np.random.default_rng(8)
    policy = Gate(resamples=999, resample_seed=11)
    columns = noise(random, 80, 12) - np.linspace(0, 0.06, 12)
    decided = []
    for column in columns.T:
        champion = random.random(80)
        ours = {"A": {f"q{i:02}": float(x) for i, x in enumerate(champion + column)}}
        theirs = {"A": {f"q{i:02}": float(x) for i, x in enumerate(champion)}}
        decided.append(fall_short(policy, 0.0, ours, theirs).shown)
    assert decided == stopped([columns]).tolist()
    assert 0 < sum(decided) < len(decided)


def test_a_comparison_decides_as_the_simulated_rule_does() -> None:
    random = np.random.default_rng(8)
    policy = Gate(resamples=999, resample_seed=11)
    decided = []
    columns = noise(random, 80, 12) + np.linspace(0, 0.06, 12)
    for column in columns.T:
        champion = random.random(80)
        ours = {"A": {f"q{i:02}": float(x) for i, x in enumerate(champion + column)}}
        theirs = {"A": {f"q{i:02}": float(x) for i, x in enumerate(champion)}}
        decided.append(compare(policy, ours, theirs).passed)
    assert decided == promoted([columns]).tolist()
    assert 0 < sum(decided) < len(decided)


def test_parts_of_a_task_count_as_one_task() -> None:
    """As mteb counts CQADupstack: the mean over its forums is one of the benchmark's scores."""
    random = np.random.default_rng(9)
    scores = {task: random.random(40) for task in ("A", "forum-1", "forum-2")}
    ours = {task: {f"q{i}": float(x) for i, x in enumerate(values)} for task, values in scores.items()}
    theirs = {task: dict.fromkeys(values, 0.0) for task, values in ours.items()}
    found = compare(Gate(resamples=999), ours, theirs, {"Forums": ["forum-1", "forum-2"]})
    forums = (scores["forum-1"].mean() + scores["forum-2"].mean()) / 2
    assert found.gain == pytest.approx((scores["A"].mean() + forums) / 2)
    assert found.low < found.gain < found.high
    flat = np.concatenate([scores["A"] / 80, scores["forum-1"] / 160, scores["forum-2"] / 160])
    signs = np.random.default_rng(1).choice([-1, 1], (4000, 120))
    assert found.p <= (signs @ flat >= flat.sum()).mean() + 0.01
