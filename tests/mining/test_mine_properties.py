"""`mine` and `reselect` against the rules written out pair by pair, on inputs made to be awkward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch  # noqa: TID253
from brute import brute_force
from hypothesis import given, settings
from hypothesis import strategies as st

from nvr_tasks.mining import REASONS, MiningResult, MiningSpec, mine, reselect, search_candidates
from nvr_tasks.mining.scan_shards import ShardedScan
from nvr_tasks.mining.scan_torch import TorchScan
from nvr_tasks.mining.screening import BFLOAT16, INT8

# Sixteenths: products and sums are exact, so ties are ties and ceilings are hit exactly.
sixteenths = st.integers(-16, 16).map(lambda n: n / 16)


@st.composite
def specs(draw: st.DrawFn, most: int) -> MiningSpec:
    method = draw(st.sampled_from(["perc_pos", "margin_pos", "abs", "shifted", "naive"]))
    threshold = {
        "perc_pos": st.sampled_from([None, 0.5, 0.75, 1.0]),
        "margin_pos": st.sampled_from([None, 0.0, 0.25]),
        "abs": st.sampled_from([None, 0.0, 0.25, -0.5]),
    }.get(method, st.none())
    count = draw(st.integers(1, most))
    return MiningSpec(
        method=method,
        threshold=draw(threshold),
        shift=draw(st.integers(0, 4)),
        num_negatives=count,
        sampling=draw(st.sampled_from(["top", "sampled", "top1_sampled"])),
        sample_from=count + draw(st.integers(0, 5)),
        temperature=draw(st.sampled_from([0.05, 1.0])),
        min_score=draw(st.sampled_from([None, None, 0.0, -0.25])),
        positive_policy=draw(st.sampled_from(["min", "max", "each"])),
    )


@st.composite
def problems(draw: st.DrawFn) -> dict:
    n, q, d = draw(st.integers(1, 24)), draw(st.integers(1, 5)), draw(st.integers(1, 4))
    numbers = draw(st.lists(sixteenths, min_size=(n + q) * d, max_size=(n + q) * d))
    matrix = np.array(numbers, dtype=np.float32).reshape(n + q, d)
    rows = st.integers(0, n - 1)
    lists = [draw(st.lists(rows, min_size=1, max_size=4, unique=True)) for _ in range(q)]
    return {
        "x": matrix[:q],
        "y": matrix[q:],
        "positives": lists,
        "groups": draw(st.none() | st.lists(st.integers(0, 9), min_size=n, max_size=n)),
        "exclude": draw(st.none() | st.lists(st.lists(rows, max_size=2), min_size=q, max_size=q)),
        "specs": draw(st.lists(specs(n), min_size=1, max_size=3)),
        "seed": draw(st.integers(0, 3)),
        "blocks": (draw(st.integers(1, 30)), draw(st.integers(1, 6))),
        "depth": draw(st.integers(1, 30)),
        "scan": draw(st.sampled_from(["cpu", "torch", "shards"])),
        "screen": draw(st.sampled_from(["float32", "bfloat16", "int8"])),
    }


def run(p: dict, **other) -> list[MiningResult]:
    block_rows, block_queries = p["blocks"]
    arguments = {"groups": p["groups"], "exclude": p["exclude"], "seed": p["seed"], "device": "cpu"}
    arguments |= {"block_rows": block_rows, "block_queries": block_queries, "screen": p["screen"]}
    with scanning_with(p["scan"]):
        return mine(p["x"], p["y"], p["positives"], p["specs"], **(arguments | other))


def torch_scan(*given) -> TorchScan:
    *others, coding, block_queries = given
    return TorchScan(*others, BFLOAT16 if coding is INT8 else coding, block_queries, torch.device("cpu"))


def sharded_scan(*given) -> ShardedScan:
    """Three devices, which here are all the CPU; given: query vectors, centre, request, blocked, groups, …"""
    return ShardedScan([torch_scan(*given) for _ in range(3)], given[4])


@contextmanager
def scanning_with(scan: str) -> Iterator[None]:
    """Let a search on the CPU use the tensor operations that CUDA uses."""
    with pytest.MonkeyPatch.context() as patch:
        if scan != "cpu":
            patch.setattr("nvr_tasks.mining.scan_cpu.CpuScan", torch_scan if scan == "torch" else sharded_scan)
        yield


def same(a: MiningResult, b: MiningResult) -> None:
    for name in ("query_rows", "positive_ids", "positive_scores", "ceilings", "negative_ids", "negative_scores"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    assert a.skipped == b.skipped
    assert a.candidates == b.candidates


@settings(max_examples=250, deadline=None)
@given(problems())
def test_equals_the_rules_written_out(p: dict) -> None:
    for spec, result in zip(p["specs"], run(p), strict=True):
        rows = brute_force(p["x"], p["y"], p["positives"], spec, p["groups"], p["exclude"])
        assert result.query_rows.tolist() == [r.query for r in rows]
        assert result.positive_ids.tolist() == [r.positive for r in rows]
        assert result.positive_scores.tolist() == [r.positive_score for r in rows]
        assert result.ceilings.tolist() == [r.ceiling for r in rows]
        for i, row in enumerate(rows):
            got = [n for n in result.negative_ids[i].tolist() if n >= 0]
            if spec.sampling == "top":
                assert got == row.ids
            else:
                assert len(got) == len(row.ids)
                assert [n for n in row.pool if n in got] == got  # drawn from the pool, in its order
                assert spec.sampling == "sampled" or got[:1] == row.pool[:1]
            assert result.negative_ids.shape[1] == result.negative_scores.shape[1] == spec.num_negatives
            expected = [float(p["x"][row.query].astype(float) @ p["y"][n].astype(float)) for n in got]
            assert result.negative_scores[i][: len(got)].tolist() == expected
            assert np.isnan(result.negative_scores[i][len(got) :]).all()
            assert {reason: int(count[i]) for reason, count in result.skipped_per_row.items()} == row.skipped
        assert set(result.skipped) == set(REASONS) - {"not_rescored"}
        assert result.candidates == result.kept + sum(result.skipped.values()) == len(rows) * len(p["y"])


@settings(max_examples=150, deadline=None)
@given(problems())
def test_selecting_from_stored_candidates_equals_a_new_search(p: dict) -> None:
    options = {"device": "cpu", "block_rows": p["blocks"][0], "block_queries": p["blocks"][1], "screen": p["screen"]}
    with scanning_with(p["scan"]):
        stored = search_candidates(
            p["x"], p["y"], p["positives"], p["depth"], groups=p["groups"], exclude=p["exclude"], **options
        )
    for spec, fresh in zip(p["specs"], run(p), strict=True):
        again = reselect(stored, spec, lambda: (p["x"], p["y"]), seed=p["seed"], **options)
        same(again.result, fresh)
        if p["depth"] >= len(p["y"]):
            assert not len(again.searched_again)


@settings(max_examples=150, deadline=None)
@given(problems(), st.integers(1, 30), st.integers(1, 6), st.integers(1, 9))
def test_blocks_and_sources_never_change_the_result(p: dict, block_rows: int, block_queries: int, size: int) -> None:
    first = run(p)
    blocks = [p["y"][i : i + size] for i in range(0, len(p["y"]), size)]
    for a, b, c in zip(
        first,
        run(p, block_rows=block_rows, block_queries=block_queries),
        mine(
            p["x"],
            blocks,
            p["positives"],
            p["specs"],
            groups=p["groups"],
            exclude=p["exclude"],
            seed=p["seed"],
            device="cpu",
        ),
        strict=True,
    ):
        same(a, b)
        same(a, c)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([1, 3, 384]),
    st.sampled_from([1e-3, 1.0, 30.0]),
    st.sampled_from(["float32", "bfloat16", "int8"]),
    st.sampled_from(["cpu", "torch", "shards"]),
)
def test_real_numbers_are_decided_in_float64(seed: int, dim: int, scale: float, screen: str, scan: str) -> None:
    """Clouds so tight that float32 scores are in the wrong order; the brute force sums exactly."""
    rng = np.random.default_rng(seed)
    centre = rng.standard_normal(dim)
    y = ((centre + 1e-5 * rng.standard_normal((40, dim))) * scale).astype(np.float32)
    x = ((centre + 1e-5 * rng.standard_normal((3, dim))) * scale).astype(np.float32)
    positives = [[0], [1, 2], [39]]
    for spec in (
        MiningSpec("margin_pos", 0.0, num_negatives=7, positive_policy="each"),
        MiningSpec("naive", num_negatives=7),
        MiningSpec("perc_pos", 1.0, num_negatives=7, positive_policy="max"),
    ):
        with scanning_with(scan):
            (result,) = mine(x, y, positives, spec, block_rows=8, block_queries=2, screen=screen)
        exact = x.astype(np.float64) @ y.astype(np.float64).T
        spread = np.abs(np.diff(np.sort(exact, axis=1), axis=1)).min()
        if spread < 1e-13 * np.abs(exact).max():
            continue  # closer than float64 sums can tell apart
        rows = brute_force(x, y, positives, spec)
        assert [[n for n in ids if n >= 0] for ids in result.negative_ids.tolist()] == [r.ids for r in rows]


def test_float32_alone_would_get_these_wrong() -> None:
    """The clouds of the test above are hard enough: plain float32 ranks some of them wrongly."""
    rng = np.random.default_rng(0)
    centre = rng.standard_normal(384)
    y = (centre + 1e-5 * rng.standard_normal((40, 384))).astype(np.float32)
    x = (centre + 1e-5 * rng.standard_normal((3, 384))).astype(np.float32)
    exact = np.argsort(-(x.astype(np.float64) @ y.astype(np.float64).T), axis=1)
    assert (np.argsort(-(x @ y.T), axis=1) != exact).any()


@pytest.mark.parametrize("screen", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("scan", ["cpu", "torch", "shards"])
@pytest.mark.parametrize("spread", [1e-6, 1e-3, 0.1])
@pytest.mark.parametrize("seed", range(2))
def test_later_blocks_are_screened_with_the_error_in_mind(seed: int, spread: float, scan: str, screen: str) -> None:
    """Many blocks after the list is full, each with scores that float32 cannot tell from the last one on it."""
    rng = np.random.default_rng(seed)
    centre = rng.standard_normal(384)
    y = (centre + spread * rng.standard_normal((1500, 384))).astype(np.float32)
    x = (centre + spread * rng.standard_normal((12, 384))).astype(np.float32)
    exact = x.astype(np.float64) @ y.astype(np.float64).T
    with scanning_with(scan):
        (result,) = mine(x, y, [[0]] * 12, MiningSpec("naive", num_negatives=16), block_rows=50, screen=screen)
    exact[:, 0] = -np.inf
    assert np.array_equal(result.negative_ids, np.argsort(-exact, axis=1, kind="stable")[:, :16])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_never_change_the_result(threads: int) -> None:
    import torch

    rng = np.random.default_rng(5)
    y = rng.standard_normal((3000, 32)).astype(np.float32)
    x = rng.standard_normal((200, 32)).astype(np.float32)
    positives = [[int(i)] for i in rng.integers(0, 3000, 200)]
    spec = MiningSpec("naive", sampling="sampled", temperature=0.1)
    before = torch.get_num_threads()
    (one,) = mine(x, y, positives, spec, block_rows=700, block_queries=64)
    try:
        torch.set_num_threads(threads)
        (other,) = mine(x, y, positives, spec, block_rows=1100, block_queries=33)
    finally:
        torch.set_num_threads(before)
    same(one, other)
