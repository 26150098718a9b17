"""What share of mined negatives is really relevant, by method: counted where the truth is known.

Two experiments, each mining anew with every method, under three sets of guards (`ARMS`):

held out  Part of each query's judgements is hidden; what is hidden and comes back as a negative is a false negative that
          mining could not know of. It says what happens where judgements are missing, as they are in most corpora.
planted   Copies of positives in other words (really embedded by the teacher) are put into the corpus; they are as relevant
          as what they were made from, and nobody judged them.

Neither is the rate of false negatives in the training data, which nobody knows: the first overstates it where judgements
are nearly complete, the second depends on how many copies a corpus has. They compare methods and guards on equal terms.
A judge (a person, a model) that looks at a sample of mined pairs estimates the rate itself: `sample_pairs`, `judged`.

Shapes: Q queries, N corpus rows, P planted copies, D dimensions, R rows of a result, K negatives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from nvr_tasks.errors import NvrError
from nvr_tasks.mining.api import mine
from nvr_tasks.mining.arrays import Ints, Ragged, Vectors
from nvr_tasks.mining.draws import Keys, stream
from nvr_tasks.mining.guards import positives_of_similar_queries
from nvr_tasks.mining.intervals import Share, clustered
from nvr_tasks.mining.result import MiningResult
from nvr_tasks.mining.search import Tiles
from nvr_tasks.mining.spec import Method, MiningSpec

HIDE = 4  # purpose of the draws, see `draws`
ALL = "all"

Words = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Arm:
    """Which guards are on: passages of one group count as one; teacher similarity of passages and of queries."""

    name: str
    groups: bool
    similarity: bool


ARMS = (
    Arm("positives by id", groups=False, similarity=False),
    Arm("and same texts", groups=True, similarity=False),
    Arm("and similar vectors", groups=True, similarity=True),
)


@dataclass(frozen=True)
class Setting:
    """What is audited.

    Attributes:
        queries: [Q, D]; corpus: [N, D] array or memory map.
        positives: corpus rows per query, at least one; exclude: further rows that are never mined, per query.
        groups: of passages, [N].
        query_keys: what names a query in draws, uint64 [Q].
        part: which part of the data a query belongs to (its source), index into `parts`, [Q].
        duplicate_similarity, query_similarity: bounds of the guards; None: there is no such guard.
        others: vectors [O, D] and positives of all judged queries, and which of them are `queries` (row, or −1), for the
            guard of similar queries; None: it is off.
        seed: of draws.
        search: further arguments of `mine` that do not change its result.
    """

    queries: Vectors
    corpus: Any
    positives: Ragged
    exclude: Ragged
    groups: Ints
    query_keys: Keys
    part: Ints
    parts: Sequence[str]
    duplicate_similarity: float | None = None
    query_similarity: float | None = None
    others: tuple[Vectors, Ragged, Ints] | None = None
    seed: int = 0
    search: Mapping[str, Any] = field(default_factory=dict)

    def take(self, rows: Ints) -> Setting:
        """Some of the queries (sorted rows)."""
        others = self.others
        if others is not None:
            place = np.full(len(self.queries) + 1, -1, np.int64)
            place[rows] = np.arange(len(rows))
            others = others[0], others[1], place[others[2]]
        return replace(
            self,
            queries=self.queries[rows],
            positives=_lists(self.positives, rows),
            exclude=_lists(self.exclude, rows),
            query_keys=self.query_keys[rows],
            part=self.part[rows],
            others=others,
        )


@dataclass(frozen=True)
class Estimate:
    """One share of one method under one set of guards.

    Attributes:
        experiment: held out, planted or judged.
        method: key of the specs that were given; guards: name of an arm.
        part: a source of queries, a kind of copy, or `all`.
        measure: negatives: mined negatives that are relevant; rows: rows with at least one such; found: hidden or planted
            passages that came back as negatives.
    """

    experiment: str
    method: str
    guards: str
    part: str
    measure: str
    share: Share


def paper_specs(like: MiningSpec) -> dict[str, MiningSpec]:
    """Every method of arXiv:2407.15831 §3.1 at its best setting, and the given spec if it is none of them.

    Number of negatives and policy are those of `like`.
    """
    count, policy = like.num_negatives, like.positive_policy
    settings: tuple[tuple[str, Method, float | None], ...] = (
        ("random", "random", None),
        ("naive", "naive", None),
        ("shifted 10", "shifted", None),
        ("abs 0.7", "abs", 0.7),
        ("margin_pos 0.05", "margin_pos", 0.05),
        ("perc_pos 0.95", "perc_pos", 0.95),
    )
    found = {
        name: MiningSpec(method, threshold, num_negatives=count, positive_policy=policy)
        for name, method, threshold in settings
    }
    found["perc_pos 0.95, drawn from 10"] = replace(
        found["perc_pos 0.95"], sampling="sampled", sample_from=max(10, count)
    )
    if all(_effective(spec) != _effective(like) for spec in found.values()):
        found[f"as mined: {describe(like)}"] = like
    return found


def own_method(specs: Mapping[str, MiningSpec], like: MiningSpec) -> str:
    """Which of `paper_specs(like)` is `like`."""
    return next(name for name, spec in specs.items() if _effective(spec) == _effective(like))


def describe(spec: MiningSpec) -> str:
    """Method and threshold in words."""
    name: str = spec.method
    if np.isfinite(spec.resolved_threshold):
        name += f" {spec.resolved_threshold:g}"
    elif spec.method == "shifted":
        name += f" {spec.shift}"
    return name if spec.sampling == "top" else f"{name}, {spec.sampling} from {spec.sample_from}"


def _effective(spec: MiningSpec) -> tuple[Any, ...]:
    draws = (spec.sample_from, spec.temperature) if spec.sampling != "top" else ()
    shift = spec.shift if spec.method == "shifted" else 0
    return spec.method, str(spec.resolved_threshold), shift, spec.sampling, draws, spec.min_score


# ── held out ─────────────────────────────────────────────────────────────────────────────────────────────────────


def hide(positives: Ragged, groups: Ints, share: float, keys: Keys, seed: int) -> tuple[Ints, Ragged, Ragged]:
    """Hide `share` of the positives of each query that has several: (query rows [H], what is shown, what is hidden).

    Positives of one group are hidden together, at least one group is and at least one is not. The draw hangs on
    the query's key and the seed alone.

    Raises:
        NvrError: the share is not between 0 and 1.
    """
    if not 0 < share < 1:
        raise NvrError(f"share {share} of judgements to hide is not allowed: give a number above 0 and below 1")
    rows, shown, hidden = [], [], []
    for query, own in enumerate(positives):
        label, index = np.unique(groups[own], return_inverse=True)
        if len(label) < 2:
            continue
        count = int(np.clip(round(share * len(label)), 1, len(label) - 1))
        order = np.argsort(stream(seed, int(keys[query]), -1, HIDE, len(label)), kind="stable")
        gone = np.isin(index, order[:count])
        rows.append(query)
        shown.append(own[~gone])
        hidden.append(own[gone])
    return np.array(rows, np.int64), Ragged.of(shown, "shown"), Ragged.of(hidden, "hidden")


def held_out(setting: Setting, specs: Mapping[str, MiningSpec], share: float) -> list[Estimate]:
    """Hide a share of the judgements, mine, and count what comes back; [] if no query has positives of two groups."""
    rows, shown, hidden = hide(setting.positives, setting.groups, share, setting.query_keys, setting.seed)
    if not len(rows):
        return []
    audited = replace(setting.take(rows), positives=shown)
    if audited.others is not None:
        vectors, positives, row = audited.others
        known = [shown[int(r)] if r >= 0 else positives[i] for i, r in enumerate(row)]
        audited = replace(audited, others=(vectors, Ragged.of(known, "others"), row))
    relevant = Ragged.joined(shown, hidden)
    truth = _Truth.of(setting.groups, relevant, hidden)
    strata = {ALL: np.ones(len(rows), bool)}
    if len(setting.parts) > 1:
        strata |= {name: audited.part == i for i, name in enumerate(setting.parts)}
    found = []
    for arm, method, result in _mined(audited, specs, audited.groups):
        negatives, with_any, back = truth.count(result)
        for part, chosen in strata.items():
            if not chosen.any():
                continue
            for measure, (hits, trials) in (("negatives", negatives), ("rows", with_any), ("found", back)):
                counted = clustered(hits[chosen], trials[chosen])
                found.append(Estimate("held out", method, arm, part, measure, counted))
    return found


# ── planted ──────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Planted:
    """Copies of passages in other words.

    Attributes:
        vectors: [P, D], of the copies' own texts.
        original: corpus row that each was made from, [P].
        alike: whether the data set's own test of near-duplicate texts finds the copy, bool [P].
        kind: how it was made, index into `kinds`, [P].
    """

    vectors: Vectors
    original: Ints
    alike: npt.NDArray[np.bool_]
    kind: Ints
    kinds: Sequence[str]


def planted(setting: Setting, specs: Mapping[str, MiningSpec], copies: Planted) -> list[Estimate]:
    """Put the copies into the corpus, mine for the queries whose positives they copy, and count what comes back."""
    rows_N, count = len(setting.groups), len(copies.original)
    _, label = np.unique(setting.groups, return_inverse=True)
    of_group: dict[int, list[int]] = {}
    for number, original in enumerate(copies.original.tolist()):
        of_group.setdefault(int(label[original]), []).append(rows_N + number)
    hunted = [sorted({c for p in own for c in of_group.get(int(label[p]), ())}) for own in setting.positives]
    rows = np.array([q for q, found in enumerate(hunted) if found], np.int64)
    if not len(rows):
        return []
    audited = setting.take(rows)
    copies_Q = Ragged.of([hunted[q] for q in rows.tolist()], "copies")
    audited = replace(audited, corpus=[setting.corpus, copies.vectors])
    own_label = label.max() + 1 + np.arange(count)
    # What is relevant: the originals, their copies of the same text, and the planted copies.
    truth = _Truth.of(np.concatenate([label, own_label]), Ragged.joined(audited.positives, copies_Q), copies_Q)
    by_text = np.concatenate([label, np.where(copies.alike, label[copies.original], own_label)]).astype(np.int64)
    found = []
    for arm, method, result in _mined(audited, specs, by_text):
        negatives, with_any, back = truth.count(result)
        for measure, (hits, trials) in (("negatives", negatives), ("rows", with_any), ("found", back)):
            found.append(Estimate("planted", method, arm, ALL, measure, clustered(hits, trials)))
        for number, kind in enumerate(copies.kinds):
            chosen = copies.kind[copies_Q.values - rows_N] == number
            if chosen.any():
                hits, trials = truth.back(result, chosen)
                found.append(Estimate("planted", method, arm, kind, "found", clustered(hits, trials)))
    return found


# ── judged ───────────────────────────────────────────────────────────────────────────────────────────────────────


def sample_pairs(result: MiningResult, query_keys: Keys, count: int, seed: int) -> tuple[Ints, Ints]:
    """At most `count` of the (query, negative) pairs of a result, each once: (query rows [S], corpus rows [S]).

    Pairs are ranked by a hash of (seed, query key, corpus row), so results of several specs share the pairs they can.
    """
    real = result.negative_ids >= 0
    query = np.broadcast_to(result.query_rows[:, None], real.shape)[real]
    pairs = np.unique(np.stack([query, result.negative_ids[real]], axis=1), axis=0)
    return _fewest(pairs[:, 0], pairs[:, 1], query_keys, count, seed)


def sample_positives(positives: Ragged, query_keys: Keys, count: int, seed: int) -> tuple[Ints, Ints]:
    """At most `count` of the (query, positive) pairs, as `sample_pairs`: what a judge says of them tells how far to trust it."""
    return _fewest(positives.owners, positives.values, query_keys, count, seed)


def judged(method: str, guards: str, query: Ints, relevant: npt.NDArray[np.bool_]) -> Estimate:
    """The share of judged pairs that a judge calls relevant; `query` [S] says which belong together."""
    clusters, index = np.unique(query, return_inverse=True)
    hits = np.bincount(index, relevant, minlength=len(clusters)).astype(np.int64)
    return Estimate("judged", method, guards, ALL, "negatives", clustered(hits, np.bincount(index).astype(np.int64)))


def _fewest(query: Ints, row: Ints, keys: Keys, count: int, seed: int) -> tuple[Ints, Ints]:
    with np.errstate(over="ignore"):
        ranks = _mix(_mix(keys[query] + np.uint64(seed)) ^ _mix(row.astype(np.uint64)))
    chosen = np.sort(np.lexsort((row, query, ranks))[:count])
    return query[chosen], row[chosen]


def _mix(words: Words) -> Words:
    """splitmix64 (Steele, Lea, Flood 2014): every bit of a word decides every bit of the result."""
    with np.errstate(over="ignore"):
        z = words + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: Words = z ^ (z >> np.uint64(31))
    return mixed


# ── both experiments ─────────────────────────────────────────────────────────────────────────────────────────────

Counts = tuple[Ints, Ints]  # hits and trials per query, [Q] each


@dataclass(frozen=True)
class _Truth:
    """What is relevant to each of Q queries, and which of it is hunted, as sorted keys of (query, group)."""

    queries: int
    base: int
    label: Ints
    relevant: Ints
    hunted: Ints
    hunted_pairs: Ints  # as the caller gave them, [E]

    @staticmethod
    def of(groups: Ints, relevant: Ragged, hunted: Ragged) -> _Truth:
        _, label = np.unique(groups, return_inverse=True)
        label = label.astype(np.int64)
        base = int(label.max()) + 1

        def keys(lists: Ragged) -> Ints:
            found: Ints = lists.owners * base + label[lists.values]
            return found

        return _Truth(len(relevant), base, label, np.unique(keys(relevant)), np.unique(keys(hunted)), keys(hunted))

    def count(self, result: MiningResult) -> tuple[Counts, Counts, Counts]:
        """Relevant negatives of negatives, rows with one of rows, and hunted groups that came back of those hunted; per query."""
        mined, real = self._keys(result)
        false: npt.NDArray[np.bool_] = real & np.isin(mined, self.relevant)
        query, size = result.query_rows, self.queries

        def per_query(values: Any) -> Ints:
            return np.bincount(query, values, minlength=size).astype(np.int64)

        negatives = per_query(false.sum(axis=1)), per_query(real.sum(axis=1))
        rows = per_query(np.any(false, axis=1)), per_query(np.any(real, axis=1))
        return negatives, rows, self._back(self.hunted, mined[real])

    def back(self, result: MiningResult, chosen: npt.NDArray[np.bool_]) -> Counts:
        """As the last of `count`, for some of the hunted pairs."""
        mined, real = self._keys(result)
        return self._back(np.unique(self.hunted_pairs[chosen]), mined[real])

    def _back(self, hunted: Ints, mined: Ints) -> Counts:
        came = hunted[np.isin(hunted, mined)]
        hits = np.bincount(came // self.base, minlength=self.queries).astype(np.int64)
        return hits, np.bincount(hunted // self.base, minlength=self.queries).astype(np.int64)

    def _keys(self, result: MiningResult) -> tuple[Ints, npt.NDArray[np.bool_]]:
        real = result.negative_ids >= 0
        labels = self.label[np.where(real, result.negative_ids, 0)]
        return result.query_rows[:, None] * self.base + labels, real


def guarded(setting: Setting, specs: Mapping[str, MiningSpec]) -> dict[str, MiningResult]:
    """What each spec mines with all guards on and nothing hidden."""
    return dict(_mined_under(ARMS[-1], setting, specs, setting.groups))


def _mined(setting: Setting, specs: Mapping[str, MiningSpec], groups: Ints) -> Iterator[tuple[str, str, MiningResult]]:
    """(arm, method, result) of every spec under every set of guards: one search per arm serves all specs."""
    for arm in ARMS:
        for method, result in _mined_under(arm, setting, specs, groups):
            yield arm.name, method, result


def _mined_under(
    arm: Arm, setting: Setting, specs: Mapping[str, MiningSpec], groups: Ints
) -> Iterator[tuple[str, MiningResult]]:
    exclude = setting.exclude
    if arm.similarity and setting.others is not None and setting.query_similarity is not None:
        vectors, positives, _ = setting.others
        tiles = Tiles(str(setting.search.get("device", "auto")))
        related = positives_of_similar_queries(setting.queries, vectors, positives, setting.query_similarity, tiles)
        exclude = Ragged.joined(exclude, related)
    results = mine(
        setting.queries,
        setting.corpus,
        setting.positives,
        list(specs.values()),
        groups=groups if arm.groups else None,
        exclude=exclude,
        duplicate_similarity=setting.duplicate_similarity if arm.similarity else None,
        seed=setting.seed,
        query_keys=setting.query_keys,
        **setting.search,
    )
    return zip(specs, results, strict=True)


def _lists(lists: Ragged, rows: Ints) -> Ragged:
    return Ragged.of([lists[int(q)] for q in rows], "lists")
