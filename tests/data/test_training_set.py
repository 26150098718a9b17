"""From sources to a training set: what stays, what goes, and the count of what went."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from data_helpers import sentence
from hypothesis import given, settings
from hypothesis import strategies as st

from nvr_tasks.data.benchmark import Task, select
from nvr_tasks.data.raw import RawData
from nvr_tasks.data.text import comparison_key
from nvr_tasks.data.training_set import REASONS, TrainingSet, assemble
from nvr_tasks.data_settings import Data, TrainingSource
from nvr_tasks.errors import NvrError

ORIGIN = {"type": "beir", "uri": "/nowhere"}
D = {f"d{i}": ("", sentence(i)) for i in range(6)}


def raw(
    documents: Mapping[str, tuple[str, str]], queries: Mapping[str, str], **qrels: Sequence[tuple[str, str, int]]
) -> RawData:
    return RawData(
        "s", dict(documents), dict(queries), {s: {(q, d): r for q, d, r in rows} for s, rows in qrels.items()}
    )


def bench(queries: Mapping[str, str], documents: Mapping[str, tuple[str, str]], *qrels: tuple[str, str, int]) -> Task:
    return select("Bench", "test", False, raw(documents, queries, test=qrels))


FAR = bench({"b": "entirely unrelated matter"}, {"x": ("", "nothing to do with anything here")}, ("b", "x", 1))


def make(source: RawData, task: Task = FAR, seed: int = 17, **data: Any) -> TrainingSet:
    entry = {k: data.pop(k) for k in ("split", "max_queries", "max_passages") if k in data}
    config = Data.model_validate(
        {
            "sources": [{"name": "a", "origin": ORIGIN, **entry}],
            "benchmark": [{"task": "Bench", "origin": ORIGIN}],
            "dev_queries": 0,
        }
        | data
    )
    return assemble([(config.sources[0], source)], [task], config, seed)


def removed(made: TrainingSet) -> dict[str, int]:
    assert set(made.stats["removed"]) == set(REASONS)
    return {reason: n for reason, n in made.stats["removed"].items() if n}


def test_rows_are_normalised_prefixed_and_sorted() -> None:
    made = make(raw({"2": (" T\u0301 ", "b\n\tb"), "1": ("", "a\x00a")}, {"q": " x  y "}, train=[("q", "2", 1)]))
    assert made.corpus == [("a/1", "", "aa", 0), ("a/2", "T\u0301", "b b", 1)]
    assert made.queries == [("a/q", "x y", "train", "a")]
    assert made.qrels == [("a/q", "a/2", 1, "train")]
    assert removed(made) == {}


def test_empty_texts_go_and_what_points_at_them() -> None:
    documents = {"d": ("", "text"), "title": ("only a title", " "), "none": ("", "\u200b \n")}
    queries = {"q": "who", "blank": " ", "lost": "where"}
    rows = [("q", "d", 1), ("q", "none", 1), ("blank", "d", 1), ("lost", "none", 1)]
    made = make(raw(documents, queries, train=rows))
    assert [row[:3] for row in made.corpus] == [("a/d", "", "text"), ("a/title", "", "only a title")]
    assert made.qrels == [("a/q", "a/d", 1, "train")]
    assert removed(made) == {
        "passage_empty": 1, "query_empty": 1, "judgement_of_empty_passage": 2, "judgement_of_empty_query": 1, "query_without_positive": 1,
    }  # fmt: skip


def test_queries_need_a_relevant_passage_and_zeros_are_kept_as_judgements() -> None:
    made = make(raw(D, {"q": "x one", "r": "y two"}, train=[("q", "d1", 2), ("q", "d2", 0), ("r", "d3", 0)]))
    assert [q[0] for q in made.queries] == ["a/q"]
    assert made.qrels == [("a/q", "a/d1", 2, "train"), ("a/q", "a/d2", 0, "train")]
    assert removed(made) == {"query_without_positive": 1}


def test_judgements_of_the_same_text_in_any_split_are_known_but_not_trained_on() -> None:
    queries = {"q": "What is it?", "r": "what is  it", "t": "WHAT IS IT", "other": "something else"}
    made = make(
        raw(
            D,
            queries,
            train=[("q", "d1", 1), ("r", "d2", 1)],
            dev=[("t", "d3", 1), ("other", "d4", 1)],
            test=[("t", "d1", 1)],
        )
    )
    assert made.queries == [("a/q", "What is it?", "train", "a")]
    assert made.qrels == [("a/q", "a/d1", 1, "train"), ("a/q", "a/d2", 1, "train"), ("a/q", "a/d3", 1, "dev")]
    assert removed(made) == {"query_same_text_merged": 1}


def test_the_higher_judgement_counts() -> None:
    made = make(
        raw(D, {"q": "x", "r": "X"}, train=[("q", "d1", 1), ("q", "d2", 0)], test=[("r", "d2", 1), ("r", "d1", 0)])
    )
    assert made.qrels == [("a/q", "a/d1", 1, "train"), ("a/q", "a/d2", 1, "test")]


def test_only_the_chosen_split_is_trained_on() -> None:
    source = raw(D, {"q": "x one", "r": "x one"}, train=[("q", "d1", 1)], validation=[("r", "d2", 1)])
    made = make(source, split="validation")
    assert made.qrels == [("a/r", "a/d1", 1, "train-unselected"), ("a/r", "a/d2", 1, "train")]


def test_a_split_that_is_not_there() -> None:
    with pytest.raises(NvrError, match="s has no judgements in split 'dev'; splits there: test, train"):
        make(raw(D, {"q": "x"}, train=[("q", "d1", 1)], test=[("q", "d1", 1)]), split="dev")


# ── decontamination ──────────────────────────────────────────────────────────────────────────────────────────────

LONG = "how do the turbines of the old harbour feed the copper mills in winter"


def test_a_query_of_the_benchmark_is_removed() -> None:
    task = bench({"b": "Who built the  Harbour?"}, D, ("b", "d5", 1))
    made = make(
        raw(D, {"q": "who built the harbour", "r": "another thing"}, train=[("q", "d1", 1), ("r", "d2", 1)]), task
    )
    assert [q[0] for q in made.queries] == ["a/r"]
    assert removed(made) == {"query_equals_benchmark": 1}


def test_a_query_judged_irrelevant_everywhere_in_the_benchmark_still_counts() -> None:
    task = bench({"b": "who built it", "c": "c"}, D, ("b", "d5", 0), ("c", "d5", 1))
    made = make(raw(D, {"q": "Who built it?", "r": "another thing"}, train=[("q", "d1", 1), ("r", "d2", 1)]), task)
    assert removed(made) == {"query_equals_benchmark": 1}


def test_nearly_the_same_query_is_removed_at_the_threshold() -> None:
    task = bench({"b": LONG}, D, ("b", "d5", 1))
    source = raw(D, {"q": f"{LONG} now", "r": "another thing"}, train=[("q", "d1", 1), ("r", "d2", 1)])
    assert removed(make(source, task)) == {"query_resembles_benchmark": 1}
    rules = {"decontamination": {"query_similarity": 0.99}}
    assert removed(make(source, task, **rules)) == {}, "and its positive d1 is not what the benchmark wants"


def test_a_pair_of_the_benchmark_is_never_trained_on_but_stays_known() -> None:
    """The passage is recognised by its text, under another id, in another source, even nearly."""
    near = " ".join([*sentence(77, 80).split()[:-1], "changed"])
    documents = D | {"same": ("", sentence(5).upper() + "!"), "near": ("", near)}
    task = bench({"b": LONG}, {"x": ("", sentence(5)), "y": ("", sentence(77, 80))}, ("b", "x", 1), ("b", "y", 1))
    alike = LONG.replace("winter", "summer and autumn")
    rows = [("q", "same", 1), ("q", "near", 1), ("q", "d1", 1), ("r", "same", 1)]
    made = make(raw(documents, {"q": alike, "r": "another thing"}, train=rows), task)
    assert made.qrels == [
        ("a/q", "a/d1", 1, "train"),
        ("a/q", "a/near", 1, "benchmark"),
        ("a/q", "a/same", 1, "benchmark"),
        ("a/r", "a/same", 1, "train"),
    ]
    assert removed(made) == {"positive_judged_in_benchmark": 2}


def test_a_query_without_positives_left_goes_too() -> None:
    task = bench({"b": LONG}, D, ("b", "d5", 1))
    alike = LONG.replace("winter", "summer and autumn")
    made = make(raw(D, {"q": alike, "r": "another thing"}, train=[("q", "d5", 1), ("r", "d5", 1)]), task)
    assert [q[0] for q in made.queries] == ["a/r"]
    assert removed(made) == {"positive_judged_in_benchmark": 1, "query_left_without_positive": 1}


def test_strict_keeps_relevant_passages_out_altogether() -> None:
    documents = D | {"copy": ("", sentence(5).title())}
    task = bench({"b": "who built it"}, D, ("b", "d5", 1), ("b", "d4", 0))
    rows = [("q", "copy", 1), ("q", "d1", 1), ("q", "d4", 1), ("r", "d5", 2)]
    source = raw(documents, {"q": "x one", "r": "y two"}, train=rows)
    assert removed(make(source, task)) == {}
    made = make(source, task, decontamination={"strict": True})
    assert made.qrels == [("a/q", "a/copy", 1, "benchmark"), ("a/q", "a/d1", 1, "train"), ("a/q", "a/d4", 1, "train")]
    assert removed(made) == {"positive_relevant_in_benchmark_strict": 2, "query_left_without_positive": 1}


def test_nothing_left() -> None:
    task = bench({"b": "who"}, D, ("b", "d5", 1))
    with pytest.raises(NvrError, match="no training query is left: query_equals_benchmark 1"):
        make(raw(D, {"q": "Who?"}, train=[("q", "d1", 1)]), task)
    with pytest.raises(NvrError, match=r"data\.dev_queries is 1, and there are 1 queries"):
        make(raw(D, {"q": "x"}, train=[("q", "d1", 1)]), dev_queries=1)
    with pytest.raises(NvrError, match="no passage with text"):
        make(raw({"d": ("", " ")}, {"q": "x"}, train=[("q", "d", 1)]))


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1),
    st.sets(st.integers(0, 9), max_size=4),
    st.booleans(),
)
def test_no_benchmark_query_and_no_judged_pair_survives(
    pairs: list[tuple[int, int]], asked: set[int], strict: bool
) -> None:
    documents = {f"d{i}": ("", sentence(i)) for i in range(10)}
    queries = {f"q{i}": f"please tell us about {sentence(50 + i, 5)}" for i in range(10)}
    task = bench(
        {"far": "far away"} | {f"b{i}": queries[f"q{i}"].upper() for i in asked},
        documents, ("far", "d0", 1), *((f"b{i}", f"d{9 - i}", 1) for i in asked),
    )  # fmt: skip
    source = raw(documents, queries, train=[(f"q{q}", f"d{d}", 1) for q, d in pairs])
    try:
        made = make(source, task, decontamination={"strict": strict})
    except NvrError as error:
        assert "no training query is left" in str(error)
        return
    benchmark_keys = {comparison_key(text) for text in task.data.queries.values()}
    assert not benchmark_keys & {comparison_key(q[1]) for q in made.queries}
    trained = {(q, d) for q, d, r, split in made.qrels if split == "train" and r >= 1}
    assert {q for q, _ in trained} == {q[0] for q in made.queries}, "every query has a positive"
    if strict:
        assert not {d for _, d in trained} & {"a/d0", *(f"a/d{9 - i}" for i in asked)}
    counts = removed(made)
    gone = sum(
        counts.get(r, 0) for r in ("query_equals_benchmark", "query_resembles_benchmark", "query_left_without_positive")
    )
    assert len({q for q, _ in pairs}) == len(made.queries) + gone, "nothing goes uncounted"


# ── groups, draws, determinism ───────────────────────────────────────────────────────────────────────────────────


def test_duplicates_share_a_group() -> None:
    base = sentence(3, 80).split()
    documents = {
        "1": ("", " ".join(base)),
        "2": ("", "something else entirely"),
        "3": ("", " ".join([*base[:-1], "changed"])),
        "4": (base[0], " ".join(base[1:]).upper()),  # title and text joined are the same text
    }
    made = make(raw(documents, {"q": "x"}, train=[("q", "1", 1)]))
    assert [group for *_, group in made.corpus] == [0, 1, 0, 0]
    assert made.stats["counts"]["passages_with_duplicates"] == 3
    assert [g for *_, g in make(raw(documents, {"q": "x"}, train=[("q", "1", 1)]), near_duplicate=1.0).corpus] == [
        0,
        1,
        2,
        0,
    ]


def many(number: int = 60) -> RawData:
    return raw(
        D,
        {f"q{i}": sentence(200 + i, 6) for i in range(number)},
        train=[(f"q{i}", f"d{i % 6}", 1) for i in range(number)],
    )


def test_dev_queries_are_held_out_by_hash_with_their_judgements() -> None:
    made = make(many(), dev_queries=20)
    dev = {q[0] for q in made.queries if q[2] == "dev"}
    assert len(dev) == 20
    assert {(q, split) for q, _, _, split in made.qrels} == {(q[0], q[2]) for q in made.queries}
    other = make(many(), dev_queries=20, seed=18)
    assert {q[0] for q in other.queries if q[2] == "dev"} != dev
    fewer = {q[0] for q in make(many(), dev_queries=10).queries if q[2] == "dev"}
    assert fewer < dev


def test_max_queries_takes_the_same_ones_from_a_larger_source() -> None:
    made = make(many(), max_queries=25)
    assert len(made.queries) == 25
    assert removed(made) == {"query_over_max_queries": 35}
    kept = {q[0] for q in made.queries}
    again = {q[0] for q in make(many(80), max_queries=25).queries}
    assert {q for q in again if int(q[3:]) < 60} <= kept


def test_max_passages_keeps_those_of_kept_queries_and_so_many_others() -> None:
    source = many()
    source.documents |= {f"x{i}": ("", f"judged with none, number {i}") for i in range(30)}
    made = make(source, max_queries=25, max_passages=7)
    judged = {d for _, d, *_ in made.qrels}
    corpus = {row[0] for row in made.corpus}
    assert len(made.queries) == 25
    assert judged <= corpus
    assert len(corpus - judged) == 7
    assert removed(made) == {
        "query_over_max_queries": 35, "passage_over_max_passages": len(source.documents) - len(corpus),
    }  # fmt: skip
    assert made.stats["sources"]["a"]["removed"]["passage_over_max_passages"] == len(source.documents) - len(corpus)
    more = {row[0] for row in make(source, max_queries=25, max_passages=20).corpus}
    assert corpus < more, "the same ones, and others"
    assert make(source, max_passages=1000).digest() == make(source).digest()


def test_order_of_rows_in_the_source_does_not_matter() -> None:
    source = many()
    turned = RawData(
        "s",
        dict(reversed(source.documents.items())),
        dict(reversed(source.queries.items())),
        {"train": dict(reversed(source.qrels["train"].items()))},
    )
    assert make(source, dev_queries=5).digest() == make(turned, dev_queries=5).digest()


def test_digest_sees_every_table() -> None:
    made = make(many())
    digests = {made.digest()}
    for table in ("corpus", "queries", "qrels"):
        rows = list(getattr(made, table))
        digests.add(TrainingSet(**{**vars(made), table: rows[1:]}).digest())
    assert len(digests) == 4


def test_two_sources_keep_apart_and_share_judgements_of_one_text() -> None:
    entries = [TrainingSource.model_validate({"name": name, "origin": ORIGIN}) for name in ("b", "a")]
    config = Data.model_validate(
        {"sources": [e.model_dump() for e in entries], "benchmark": [{"task": "B", "origin": ORIGIN}], "dev_queries": 0}
    )
    one, two = raw(D, {"q": "Same?"}, train=[("q", "d1", 1)]), raw(D, {"q": "same"}, train=[("q", "d2", 1)])
    made = assemble([(entries[0], one), (entries[1], two)], [FAR], config, 17)
    assert made.queries == [("a/q", "same", "train", "a")]
    assert made.qrels == [("a/q", "a/d2", 1, "train"), ("a/q", "b/d1", 1, "train")]
    assert [group for *_, group in made.corpus] == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5], "the same passage in both"
