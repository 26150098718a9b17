"""The audit against counting by hand, on data where the truth is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from nvr_tasks.errors import NvrError
from nvr_tasks.mining import MiningSpec, mine
from nvr_tasks.mining.arrays import Ragged
from nvr_tasks.mining.audit import (
    ALL,
    ARMS,
    Estimate,
    Planted,
    Setting,
    held_out,
    hide,
    judged,
    paper_specs,
    planted,
    sample_pairs,
    sample_positives,
)

Q, N, D = 40, 160, 8
SPECS = paper_specs(MiningSpec("perc_pos", 0.9, num_negatives=3, positive_policy="min"))


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def setting(seed: int = 0, **changes: object) -> Setting:
    """Each query has 1 to 4 positives near it; every tenth passage is a copy of the one before."""
    rng = np.random.default_rng(seed)
    corpus = unit(rng.standard_normal((N, D)))
    groups = np.arange(N)
    groups[9::10] = groups[8::10]
    corpus[9::10] = corpus[8::10]
    queries = unit(rng.standard_normal((Q, D)))
    near = np.argsort(-(queries @ corpus.T), axis=1)
    positives = [rng.choice(near[q, :10], q % 4 + 1, replace=False).tolist() for q in range(Q)]
    whole = Setting(
        queries=queries,
        corpus=corpus,
        positives=Ragged.of(positives, "positives"),
        exclude=Ragged.of([()] * Q, "exclude"),
        groups=groups,
        query_keys=np.arange(Q, dtype=np.uint64) * np.uint64(977),
        part=np.arange(Q) % 2,
        parts=("a", "b"),
        duplicate_similarity=0.98,
        seed=3,
        search={"device": "cpu"},
    )
    return replace(whole, **changes)


def find(estimates: list[Estimate], **wanted: str) -> Estimate:
    [one] = [e for e in estimates if all(getattr(e, k) == v for k, v in wanted.items())]
    return one


def test_half_of_the_judgements_are_hidden_group_by_group() -> None:
    s = setting()
    rows, shown, hidden = hide(s.positives, s.groups, 0.5, s.query_keys, 3)
    several = [q for q in range(Q) if len(set(s.groups[s.positives[q]].tolist())) > 1]
    assert rows.tolist() == several
    for at, q in enumerate(several):
        assert sorted([*shown[at], *hidden[at]]) == sorted(s.positives[q].tolist())
        assert not set(s.groups[shown[at]].tolist()) & set(s.groups[hidden[at]].tolist())
        groups = len(set(s.groups[s.positives[q]].tolist()))
        assert len(set(s.groups[hidden[at]].tolist())) == min(max(1, round(groups / 2)), groups - 1)
    # The draw of a query does not hang on which others there are.
    few = s.take(np.array([q for q in range(Q) if q % 3]))
    again, shown_again, _ = hide(few.positives, few.groups, 0.5, few.query_keys, 3)
    names = [q for q in range(Q) if q % 3]
    for at, row in enumerate(again.tolist()):
        assert shown_again[at].tolist() == shown[several.index(names[row])].tolist()
    assert [h.tolist() for h in hide(s.positives, s.groups, 0.5, s.query_keys, 4)[2]] != [h.tolist() for h in hidden]


@pytest.mark.parametrize("policy", ["min", "each"])
def test_held_out_is_what_counting_gives(policy: str) -> None:
    s = setting()
    specs = paper_specs(MiningSpec("perc_pos", 0.9, num_negatives=3, positive_policy=policy))
    found = held_out(s, specs, 0.5)
    rows, shown, hidden = hide(s.positives, s.groups, 0.5, s.query_keys, s.seed)
    for arm, guards in (
        (ARMS[0], {}),
        (ARMS[1], {"groups": s.groups}),
        (ARMS[2], {"groups": s.groups, "duplicate_similarity": 0.98}),
    ):
        for name, spec in specs.items():
            options = {"seed": s.seed, "query_keys": s.query_keys[rows], "device": "cpu", **guards}
            (result,) = mine(s.queries[rows], s.corpus, shown, spec, **options)
            for part in (ALL, "a", "b"):
                false = total = bad_rows = all_rows = back = hunted = 0
                for q in range(len(rows)):
                    if part != ALL and s.parts[s.part[rows[q]]] != part:
                        continue
                    relevant = set(s.groups[s.positives[int(rows[q])]].tolist())
                    gone = set(s.groups[hidden[q]].tolist())
                    came: set[int] = set()
                    for row in np.flatnonzero(result.query_rows == q):
                        labels = [int(s.groups[n]) for n in result.negative_ids[row] if n >= 0]
                        false += sum(g in relevant for g in labels)
                        total += len(labels)
                        all_rows += bool(labels)
                        bad_rows += any(g in relevant for g in labels)
                        came |= gone & set(labels)
                    back, hunted = back + len(came), hunted + len(gone)
                for measure, expected in (
                    ("negatives", (false, total)),
                    ("rows", (bad_rows, all_rows)),
                    ("found", (back, hunted)),
                ):
                    share = find(found, method=name, guards=arm.name, part=part, measure=measure).share
                    assert (share.hits, share.trials) == expected, (name, arm, part, measure)
                    assert share.low <= share.value <= share.high
    naive = find(found, method="naive", guards=ARMS[0].name, part=ALL, measure="negatives").share
    random = find(found, method="random", guards=ARMS[0].name, part=ALL, measure="negatives").share
    assert naive.value > 3 * random.value, "the world is such that the nearest are the hidden ones"


def test_positives_of_similar_queries_guard_only_with_what_is_shown() -> None:
    """A twin query in another split has all positives of its training query: then nothing hidden comes back."""
    s = setting()
    others = (s.queries, s.positives, np.full(Q, -1))
    twin = held_out(replace(s, query_similarity=0.99, others=others), SPECS, 0.5)
    share = find(twin, method="naive", guards=ARMS[2].name, part=ALL, measure="found").share
    assert share.hits == 0
    itself = held_out(replace(s, query_similarity=0.99, others=(s.queries, s.positives, np.arange(Q))), SPECS, 0.5)
    without = held_out(s, SPECS, 0.5)
    for e, f in zip(itself, without, strict=True):
        assert e == f, "a query's own hidden judgements must not guard it"


def copies(s: Setting, noise: float, alike: bool = False) -> Planted:
    rng = np.random.default_rng(1)
    original = np.array([s.positives[q][0] for q in range(0, Q, 2)])
    made = unit(s.corpus[original] + noise * rng.standard_normal((len(original), D)))
    kind = np.arange(len(original)) % 2
    return Planted(made, original, np.full(len(original), alike), kind, ("exact", "loose"))


def test_planted_copies_are_what_counting_gives() -> None:
    s = setting()
    c = copies(s, 0.1)
    found = planted(s, SPECS, c)
    corpus = np.concatenate([s.corpus, c.vectors])
    owners = [
        [N + p for p in range(len(c.original)) if s.groups[c.original[p]] in s.groups[s.positives[q]]] for q in range(Q)
    ]
    rows = [q for q in range(Q) if owners[q]]
    for name, spec in SPECS.items():
        (result,) = mine(
            s.queries[rows],
            corpus,
            [s.positives[q].tolist() for q in rows],
            spec,
            seed=3,
            query_keys=s.query_keys[rows],
        )
        false = total = 0
        came = {"exact": 0, "loose": 0}
        for at, q in enumerate(rows):
            ids = [n for n in result.negative_ids[at].tolist() if n >= 0]
            twins = {n for n in range(N) if s.groups[n] in s.groups[s.positives[q]]}
            false += sum(n in owners[q] or n in twins for n in ids)
            total += len(ids)
            for n in set(ids) & set(owners[q]):
                came[c.kinds[c.kind[n - N]]] += 1
        share = find(found, method=name, guards=ARMS[0].name, part=ALL, measure="negatives").share
        assert (share.hits, share.trials) == (false, total)
        for kind, hits in came.items():
            assert find(found, method=name, guards=ARMS[0].name, part=kind, measure="found").share.hits == hits
        every = find(found, method=name, guards=ARMS[0].name, part=ALL, measure="found").share
        assert (every.hits, every.trials) == (sum(came.values()), sum(map(len, owners)))


def test_guards_stop_what_they_see() -> None:
    s = setting()
    by_vector = planted(s, SPECS, copies(s, 0.001))
    by_text = planted(s, SPECS, copies(s, 0.3, alike=True))
    neither = planted(s, SPECS, copies(s, 0.3))

    def back(found: list[Estimate], arm: int) -> int:
        return find(found, method="naive", guards=ARMS[arm].name, part=ALL, measure="found").share.hits

    assert back(by_vector, 1) >= back(by_vector, 0) > 0, "copies of other texts take no places any more"
    assert back(by_vector, 2) == 0
    assert back(by_text, 0) > 0
    assert back(by_text, 1) == back(by_text, 2) == 0
    assert back(neither, 2) > 0


def test_nothing_to_hide_and_nothing_planted_say_nothing() -> None:
    s = setting()
    assert held_out(replace(s, positives=Ragged.of([p[:1] for p in s.positives], "positives")), SPECS, 0.5) == []
    elsewhere = replace(
        copies(s, 0.1),
        original=np.full(Q // 2, next(n for n in range(N) if n not in s.positives.values and n % 10 < 8)),
    )
    assert planted(s, SPECS, elsewhere) == []
    with pytest.raises(NvrError, match=r"share 1\.0 of judgements to hide"):
        held_out(s, SPECS, 1.0)


def test_a_sample_hangs_on_seed_and_pair_alone() -> None:
    s = setting()
    naive, perc = mine(
        s.queries, s.corpus, s.positives, [MiningSpec("naive"), MiningSpec("perc_pos", 0.9)], device="cpu"
    )
    query, row = sample_pairs(naive, s.query_keys, 30, 7)
    assert len(query) == 30 == len(set(zip(query.tolist(), row.tolist(), strict=True)))
    pairs = {
        (q, n) for q, line in zip(naive.query_rows, naive.negative_ids, strict=True) for n in line.tolist() if n >= 0
    }
    assert set(zip(query.tolist(), row.tolist(), strict=True)) < pairs
    assert [a.tolist() for a in sample_pairs(naive, s.query_keys, 30, 7)] == [query.tolist(), row.tolist()]
    assert [a.tolist() for a in sample_pairs(naive, s.query_keys, 30, 8)] != [query.tolist(), row.tolist()]
    # What two methods both mined has the same rank in both: of common pairs both samples hold the same first ones.
    common = pairs & {
        (q, n) for q, line in zip(perc.query_rows, perc.negative_ids, strict=True) for n in line.tolist() if n >= 0
    }
    mine_ = set(zip(query.tolist(), row.tolist(), strict=True)) & common
    other = set(zip(*(a.tolist() for a in sample_pairs(perc, s.query_keys, 30, 7)), strict=True)) & common
    assert mine_ <= other or other <= mine_
    own = sample_positives(s.positives, s.query_keys, 10, 7)
    assert all(n in s.positives[q] for q, n in zip(*own, strict=True))
    assert len(sample_pairs(naive, s.query_keys, 10**6, 7)[0]) == len(pairs)


def test_judged_counts_by_query() -> None:
    e = judged("naive", "g", np.array([5, 5, 9, 9]), np.array([True, True, False, False]))
    assert (e.share.hits, e.share.trials) == (2, 4)
    assert e.share.low < 0.1, "two queries that each agree with themselves are two trials"


def test_specs_are_the_paper_s_and_one_s_own() -> None:
    own = MiningSpec("perc_pos", 0.9, num_negatives=2)
    assert list(paper_specs(own))[-1] == "as mined: perc_pos 0.9"
    assert len(paper_specs(MiningSpec())) == 7
    assert all(s.num_negatives == 2 for s in paper_specs(own).values())
