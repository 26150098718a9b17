"""What the quick tier says of chosen scores, and which tasks are scored after it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from nvr_tasks.artifacts import Artifact, Identity, Store
from nvr_tasks.errors import NvrError
from nvr_tasks.evaluation.tiers import narrowed, screen, tier_identity
from nvr_tasks.pipeline import Context
from nvr_tasks.policy import Gate, Quick

QUERIES = 60


def per_query(means: Mapping[str, float], seed: int, spread: float = 0.1) -> dict[str, dict[str, float]]:
    random = np.random.default_rng(seed)
    found = {}
    for task, mean in means.items():
        values = random.normal(0, spread, QUERIES)
        found[task] = {f"q{i:02}": float(mean + v) for i, v in enumerate(values - values.mean())}
    return found


def policy(**quick: Any) -> Gate:
    return Gate(resamples=999, quick=Quick(**{"tasks": ("A", "B"), **quick}))


OLD = {"A": 0.5, "B": 0.4}


@pytest.mark.parametrize(
    ("quick", "gate", "challenger", "stopped"),
    [
        ({}, {}, {"A": 0.40, "B": 0.35}, True),
        ({}, {}, {"A": 0.50, "B": 0.40}, False),  # equal: nothing is shown
        ({}, {}, {"A": 0.49, "B": 0.40}, False),  # a little worse: nothing is shown with so few queries
        ({}, {}, {"A": 0.60, "B": 0.45}, False),
        ({"max_shortfall": 0.2}, {}, {"A": 0.40, "B": 0.35}, False),
        ({"max_shortfall": None, "min_mean": 0.3}, {}, {"A": 0.40, "B": 0.35}, False),  # the floor alone
        ({"max_shortfall": None, "min_mean": 0.38}, {}, {"A": 0.40, "B": 0.35}, True),
        ({"min_mean": 0.6}, {}, {"A": 0.60, "B": 0.45}, True),  # better, but below the floor
        # What the comparison asks for moves the limit: a large gain, or none to speak of.
        ({}, {"min_gain_over_champion": 0.1}, {"A": 0.50, "B": 0.40}, True),
        ({}, {"comparison": "non_inferiority", "non_inferiority_margin": 0.2}, {"A": 0.40, "B": 0.35}, False),
    ],
)
def test_it_stops_what_is_shown_to_fall_short_and_nothing_else(
    quick: dict[str, Any], gate: dict[str, Any], challenger: dict[str, float], stopped: bool
) -> None:
    rules = policy(**quick).model_copy(update=gate)
    found = screen(rules, per_query(challenger, 1), per_query(OLD, 2), {})
    assert found.stopped is stopped
    assert found.mean == pytest.approx(np.mean(list(challenger.values())))
    if rules.quick is not None and rules.quick.max_shortfall is not None:
        assert found.gain == pytest.approx(found.mean - 0.45)
        assert found.limit == rules.margin - rules.quick.max_shortfall
        assert found.high is not None
        assert found.high > found.gain


def test_without_a_champion_only_the_floor_can_stop() -> None:
    ours = per_query({"A": 0.1, "B": 0.1}, 1)
    assert not screen(policy(), ours, None, {}).stopped
    assert screen(policy(min_mean=0.2), ours, None, {}).stopped


def test_one_query_shows_nothing() -> None:
    """Its bootstrap interval has no width; the sign-flip test has to agree."""
    ours, theirs = {"A": {"q": 0.0}}, {"A": {"q": 1.0}}
    found = screen(policy(tasks=("A",)), ours, theirs, {})
    assert found.high == found.gain == -1
    assert not found.stopped


def test_parts_of_a_task_count_as_one_task() -> None:
    names = {"A": 0.9, "forum-1": 0.1, "forum-2": 0.3}
    rules = policy(tasks=tuple(names))
    found = screen(rules, per_query(names, 1), per_query(names, 2), {"Forums": ["forum-1", "forum-2", "forum-3"]})
    assert found.mean == pytest.approx((0.9 + 0.2) / 2)


def test_other_queries_are_refused() -> None:
    theirs = {**per_query(OLD, 2), "B": {"q": 0.1}}
    with pytest.raises(NvrError, match="scored on different queries of B"):
        screen(policy(), per_query(OLD, 1), theirs, {})


def test_what_names_a_screening_is_what_decides_it() -> None:
    plain = tier_identity(policy())
    assert tier_identity(policy(counts=False)) == plain
    assert tier_identity(policy().model_copy(update={"min_queries": 99, "approval": "always"})) == plain
    for other in (policy(max_shortfall=0.1), policy(min_mean=0.1), policy().model_copy(update={"alpha": 0.01})):
        assert tier_identity(other) != plain


@pytest.fixture
def benchmark(store: Store) -> Artifact:
    tasks = {name: {"split": "test"} for name in ("A", "B", "C")}
    return store.publish(Identity("benchmark", 1, {}), lambda _: {"tasks": tasks})


@pytest.mark.parametrize(
    ("quick", "stopped", "tasks"),
    [
        ("null", None, None),
        ("{tasks: [C, A]}", None, None),  # scored by hand, without screening
        ("{tasks: [C, A]}", False, None),
        ("{tasks: [C, A]}", True, ["A", "C"]),
        ("{tasks: [A], counts: false}", False, ["B", "C"]),
        ("{tasks: [A], counts: false}", True, ["A"]),
    ],
)
def test_which_tasks_are_scored_next(
    tiny_recipe: Callable[..., Any],
    store: Store,
    benchmark: Artifact,
    quick: str,
    stopped: bool | None,
    tasks: list[str] | None,
) -> None:
    listed = [{"task": t, "official": False, "origin": {"type": "beir", "uri": "docs"}} for t in ("A", "B", "C")]
    ctx = Context(tiny_recipe(f"data.benchmark={json.dumps(listed)}", f"gate.quick={quick}"), store)
    inputs = {}
    if stopped is not None:
        screening = store.publish(Identity("screening", 1, {}), lambda _: {"stopped": stopped})
        inputs["screening"] = [screening.uri]
    assert narrowed(ctx, inputs, benchmark) == tasks
