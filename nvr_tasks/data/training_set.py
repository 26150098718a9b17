"""From raw sources to the `dataset` artefact: normalised, grouped, decontaminated, every removal counted by reason."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nvr_tasks.data.benchmark import Task
from nvr_tasks.data.bounds import place
from nvr_tasks.data.media_files import MediaFiles
from nvr_tasks.data.near_duplicates import groups, matches, similar_pairs
from nvr_tasks.data.raw import RawData
from nvr_tasks.data.text import comparison_key, normalise
from nvr_tasks.data_settings import Data, TrainingSource
from nvr_tasks.dataset import passage_text
from nvr_tasks.errors import NvrError
from nvr_tasks.media import parted, refer

log = logging.getLogger(__name__)

BENCHMARK_SPLIT = "benchmark"  # judgements that mining knows as positives and training never uses
ROWS_PER_PART = 200_000

# Every reason is always reported: a 0 says that the check ran.
REASONS = (
    "passage_empty",
    "query_empty",
    "judgement_of_empty_passage",
    "judgement_of_empty_query",
    "query_without_positive",
    "query_over_max_queries",
    "passage_over_max_passages",
    "query_same_text_merged",
    "query_equals_benchmark",
    "query_resembles_benchmark",
    "positive_judged_in_benchmark",
    "positive_relevant_in_benchmark_strict",
    "query_left_without_positive",
)


@dataclass
class Query:
    """A training query and all that is known to be (or not to be) relevant to it."""

    query_id: str
    text: str
    key: str
    source: str
    media: str = ""
    split: str = "train"
    judgements: dict[str, tuple[int, str]] = field(default_factory=dict)  # document id → (relevance, split)

    def judge(self, doc_id: str, relevance: int, split: str) -> None:
        """Add a judgement; of several for one document the highest relevance counts, then the trainable one."""
        known = self.judgements.get(doc_id)
        if known is None or (relevance, split == "train", known[1]) > (known[0], known[1] == "train", split):
            self.judgements[doc_id] = (relevance, split)

    def positives(self) -> list[str]:
        """Documents it may be trained on."""
        return [d for d, (relevance, split) in self.judgements.items() if split == "train" and relevance >= 1]


@dataclass(frozen=True)
class TrainingSet:
    """The tables of a `dataset` artefact as sorted rows, and how they came about.

    Attributes:
        media, query_media: document id, query id → the image or sound beside its text; `files` keeps them.
    """

    corpus: list[tuple[str, str, str, int]]
    queries: list[tuple[str, str, str, str]]
    qrels: list[tuple[str, str, int, str]]
    stats: dict[str, Any]
    media: dict[str, str] = field(default_factory=dict)
    query_media: dict[str, str] = field(default_factory=dict)
    files: MediaFiles | None = None

    def digest(self) -> str:
        """Content hash over every row."""
        digest = hashlib.sha256()
        tables: list[Iterable[tuple[Any, ...]]] = [self.corpus, self.queries, self.qrels]
        if self.media or self.query_media:  # a data set of texts is named as it was before there was anything else
            tables += [sorted(self.media.items()), sorted(self.query_media.items())]
        for table in tables:
            for row in table:
                digest.update(json.dumps(row).encode() + b"\n")
            digest.update(b"\n")
        return digest.hexdigest()

    def write(self, folder: Path) -> dict[str, Any]:
        """Write the parquet files; the same rows give the same bytes. Returns the manifest's stats."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        text, number = pa.string(), pa.int64()

        def put(path: Path, rows: Sequence[tuple[Any, ...]], **columns: Any) -> None:
            path.parent.mkdir(exist_ok=True)
            values = list(zip(*rows, strict=True)) or [()] * len(columns)
            arrays = [pa.array(v, type=t) for v, t in zip(values, columns.values(), strict=True)]
            table = pa.Table.from_arrays(arrays, names=list(columns))
            pq.write_table(table, path, compression="zstd", write_page_checksum=True)

        def beside(rows: Sequence[tuple[Any, ...]], media: dict[str, str]) -> Sequence[tuple[Any, ...]]:
            """Rows with their files, where any row of the table has one."""
            return [(*row, media.get(row[0], "")) for row in rows] if media else rows

        more, query_more = ({"media": text} if media else {} for media in (self.media, self.query_media))
        for part, start in enumerate(range(0, len(self.corpus), ROWS_PER_PART)):
            rows = beside(self.corpus[start : start + ROWS_PER_PART], self.media)
            path = folder / "corpus" / f"part-{part:05}.parquet"
            put(path, rows, doc_id=text, title=text, text=text, group=number, **more)
        rows = beside(self.queries, self.query_media)
        put(folder / "queries.parquet", rows, query_id=text, text=text, split=text, source=text, **query_more)
        put(folder / "qrels.parquet", self.qrels, query_id=text, doc_id=text, relevance=number, split=text)
        if self.files is not None:
            self.files.publish([*self.media.values(), *self.query_media.values()], folder)
        return self.stats


def assemble(
    sources: Sequence[tuple[TrainingSource, RawData]],
    tasks: Sequence[Task],
    config: Data,
    seed: int,
    files: MediaFiles | None = None,
) -> TrainingSet:
    """Make the training set.

    Passages with an image or sound are duplicates where file and text are equal; how alike two images look is not asked.

    Args:
        files: keeps the sources' images and sounds.

    Raises:
        NvrError: a split is not there, or no training query is left; the message says where they went.
    """
    removed: dict[str, Counter[str]] = {reason: Counter() for reason in REASONS}
    passages = _passages(sources, removed)
    left_out = {d for entry, raw in sources for d in _over_bounds(entry, raw, passages)}
    for doc_id in left_out:
        del passages[doc_id]
        removed["passage_over_max_passages"][doc_id.partition("/")[0]] += 1
    for entry, raw in sources:
        removed["query_over_max_queries"][entry.name] += raw.unread_queries
        removed["passage_over_max_passages"][entry.name] += raw.unread_documents
    if not passages:
        raise NvrError(f"no passage with text in {', '.join(raw.where for _, raw in sources)}: {_account(removed)}")
    doc_ids = sorted(passages)
    media = {d: file for d, file in _media((entry, raw.media) for entry, raw in sources).items() if d in passages}
    texts = [comparison_key(passage_text(*passages[d])) for d in doc_ids]
    keys = [refer(media.get(d, ""), text) for d, text in zip(doc_ids, texts, strict=True)]
    benchmark = _Benchmark(tasks)
    distinct = sorted({*filter(None, texts), *benchmark.relevant})
    pairs = [(distinct[i], distinct[j]) for i, j in similar_pairs(distinct, config.near_duplicate)]
    group = groups(keys, pairs)
    group_of = dict(zip(doc_ids, group.tolist(), strict=True))
    # The benchmark knows texts alone; that of an image is no secret because of the image.
    relevant = _relevant_groups([t or k for t, k in zip(texts, keys, strict=True)], group, pairs, benchmark)

    queries = _queries(sources, passages, left_out, removed)
    queries = _decontaminate(queries, group_of, relevant, benchmark, config, removed)
    if not queries:
        raise NvrError(f"no training query is left: {_account(removed)}; check data.sources and data.decontamination")
    _hold_out(queries, config.dev_queries, seed)

    corpus = [(d, *passages[d], g) for d, g in group_of.items()]
    rows = sorted((q.query_id, q.text, q.split, q.source) for q in queries)
    qrels = sorted((q.query_id, d, relevance, split) for q in queries for d, (relevance, split) in q.judgements.items())
    query_media = {q.query_id: q.media for q in queries if q.media}
    stats = _stats(sources, corpus, queries, removed)
    if media or query_media:
        stats["counts"] |= {"passages_with_media": len(media), "queries_with_media": len(query_media)}
    return TrainingSet(corpus, rows, qrels, stats, media, query_media, files)


# ── passages and queries ─────────────────────────────────────────────────────────────────────────────────────────


def _passages(
    sources: Sequence[tuple[TrainingSource, RawData]], removed: dict[str, Counter[str]]
) -> dict[str, tuple[str, str]]:
    """Document id → (title, text), normalised. A document with only a title becomes one with only a text."""
    passages = {}
    for entry, raw in sources:
        for doc_id, (title, text) in raw.documents.items():
            title, text = normalise(title), normalise(text)  # noqa: PLW2901
            if not text:
                title, text = "", title  # noqa: PLW2901
            if text or doc_id in raw.media:
                passages[f"{entry.name}/{doc_id}"] = (title, text)
            else:
                removed["passage_empty"][entry.name] += 1
    return passages


def _over_bounds(entry: TrainingSource, raw: RawData, passages: dict[str, tuple[str, str]]) -> list[str]:
    """Documents that no kept query is judged with, beyond `max_passages`."""
    if entry.max_passages is None:
        return []
    keys = {f"{entry.name}/{q}" for q, key in _keys(raw, _normalised(raw)).items() if key}
    chosen = set(_kept_queries(entry, raw, keys, passages)[0])
    judged = {f"{entry.name}/{d}" for qrels in raw.qrels.values() for q, d in qrels if q in chosen}
    others = [d for d in passages if d.startswith(f"{entry.name}/") and d not in judged]
    return sorted(others, key=lambda d: place(0, d))[entry.max_passages :]


def _media(named: Iterable[tuple[TrainingSource, dict[str, str]]]) -> dict[str, str]:
    """Document id → its image or sound."""
    return {f"{entry.name}/{doc_id}": file for entry, media in named for doc_id, file in media.items()}


def _queries(
    sources: Sequence[tuple[TrainingSource, RawData]],
    passages: dict[str, tuple[str, str]],
    left_out: Collection[str],
    removed: dict[str, Counter[str]],
) -> list[Query]:
    """Training queries sorted by id, one per distinct text, with the judgements of every query of that text."""
    chosen: dict[str, Query] = {}  # comparison key → query
    keys: dict[str, str] = {}  # query id → comparison key
    candidates: list[Query] = []
    known: Collection[str] = {*passages, *left_out} if left_out else passages
    for entry, raw in sources:
        texts = _normalised(raw)
        own = _keys(raw, texts)
        removed["query_empty"][entry.name] += sum(not key for key in own.values())
        keys |= {f"{entry.name}/{i}": key for i, key in own.items() if key}
        candidates += _train_queries(entry, raw, texts, keys, known, removed)
    for query in sorted(candidates, key=lambda q: q.query_id):
        if chosen.setdefault(query.key, query) is not query:
            removed["query_same_text_merged"][query.source] += 1
    for entry, raw in sources:
        for split, qrels in raw.qrels.items():
            label = "train" if split == entry.split else {"train": "train-unselected"}.get(split, split)
            for (query_id, doc_id), relevance in qrels.items():
                key, document = keys.get(f"{entry.name}/{query_id}"), f"{entry.name}/{doc_id}"
                if key is None:
                    removed["judgement_of_empty_query"][entry.name] += 1
                elif document in left_out:
                    continue  # of a query that is not kept
                elif document not in passages:
                    removed["judgement_of_empty_passage"][entry.name] += 1
                elif key in chosen:
                    chosen[key].judge(document, relevance, label)
    return sorted(chosen.values(), key=lambda q: q.query_id)


def _train_queries(
    entry: TrainingSource,
    raw: RawData,
    texts: dict[str, str],
    keys: dict[str, str],
    passages: Collection[str],
    removed: dict[str, Counter[str]],
) -> list[Query]:
    """Queries of the source's split that have a relevant passage."""
    kept, judged, positive = _kept_queries(entry, raw, keys, passages)
    removed["query_without_positive"][entry.name] += judged - positive
    removed["query_over_max_queries"][entry.name] += positive - len(kept)
    media = raw.query_media
    return [Query(f"{entry.name}/{q}", texts[q], keys[f"{entry.name}/{q}"], entry.name, media.get(q, "")) for q in kept]


def _normalised(raw: RawData) -> dict[str, str]:
    """Query id → text."""
    return {i: normalise(text) for i, text in raw.queries.items()}


def _keys(raw: RawData, texts: dict[str, str]) -> dict[str, str]:
    """Query id → what tells its text from others; empty if there is none."""
    return {i: refer(raw.query_media.get(i, ""), comparison_key(text)) for i, text in texts.items()}


def _kept_queries(
    entry: TrainingSource, raw: RawData, asked: Collection[str], passages: Collection[str]
) -> tuple[list[str], int, int]:
    """Ids of the queries of the source's split that are kept; how many are judged, and have a relevant passage.

    Args:
        asked: of all queries that have a text, `source/id`.
    """
    qrels = raw.split(entry.split)
    judged = {q for q, _ in qrels if f"{entry.name}/{q}" in asked}
    positive = {
        q for (q, d), relevance in qrels.items() if relevance >= 1 and q in judged and f"{entry.name}/{d}" in passages
    }
    kept = sorted(positive, key=lambda q: place(0, f"{entry.name}/{q}"))[: entry.max_queries]
    return kept, len(judged), len(positive)


def _hold_out(queries: list[Query], number: int, seed: int) -> None:
    """Move `number` queries from train to dev, judgements included."""
    if number >= len(queries):
        raise NvrError(
            f"no training query is left: data.dev_queries is {number}, and there are {len(queries)} queries in all; lower it"
        )
    for query in sorted(queries, key=lambda q: place(seed, q.query_id))[:number]:
        query.split = "dev"
        query.judgements = {
            d: (relevance, "dev" if split == "train" else split) for d, (relevance, split) in query.judgements.items()
        }


# ── decontamination ──────────────────────────────────────────────────────────────────────────────────────────────


class _Benchmark:
    """What the benchmark asks and what it holds relevant, as comparison keys.

    Attributes:
        queries: key of every judged query.
        relevant: key of a passage → indices of the queries that it answers.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.queries: list[str] = []
        self.relevant: dict[str, set[int]] = defaultdict(set)
        for task in tasks:
            index = {}
            for query_id, text in task.data.queries.items():
                index[query_id] = len(self.queries)
                self.queries.append(comparison_key(text))
            document_keys: dict[str, str] = {}
            for (query_id, doc_id), score in task.data.qrels[task.split].items():
                if score >= 1:
                    if doc_id not in document_keys:
                        document_keys[doc_id] = comparison_key(passage_text(*task.data.documents[doc_id]))
                    self.relevant[document_keys[doc_id]].add(index[query_id])


def _relevant_groups(
    keys: Sequence[str], group: np.ndarray, pairs: Iterable[tuple[str, str]], benchmark: _Benchmark
) -> dict[int, set[int]]:
    """Group of passages → benchmark queries that one of its passages, or a near-duplicate of one, answers."""
    answers: dict[str, set[int]] = defaultdict(set)
    for key, found in benchmark.relevant.items():
        answers[key] |= found
    for a, b in pairs:
        answers[a] |= benchmark.relevant.get(b, set())
        answers[b] |= benchmark.relevant.get(a, set())
    relevant: dict[int, set[int]] = defaultdict(set)
    for key, number in zip(keys, group.tolist(), strict=True):
        if key in answers:
            relevant[number] |= answers[key]
    return relevant


def _decontaminate(
    queries: list[Query],
    group_of: dict[str, int],
    relevant: dict[int, set[int]],
    benchmark: _Benchmark,
    config: Data,
    removed: dict[str, Counter[str]],
) -> list[Query]:
    """Queries without those that the benchmark asks, and without positives that it judges."""
    rules = config.decontamination
    lowest = min(rules.query_similarity, rules.pair_similarity)
    near: dict[int, dict[int, float]] = defaultdict(dict)
    texts = [parted(q.key)[1] for q in queries]  # a benchmark is of texts: what is asked beside an image counts alike
    for i, b, similarity in matches(texts, benchmark.queries, lowest):
        near[i][b] = similarity
    asked = set(benchmark.queries)
    kept = []
    for i, query in enumerate(queries):
        if texts[i] in asked:
            removed["query_equals_benchmark"][query.source] += 1
            continue
        if max(near[i].values(), default=0.0) >= rules.query_similarity:
            removed["query_resembles_benchmark"][query.source] += 1
            continue
        alike = {b for b, similarity in near[i].items() if similarity >= rules.pair_similarity}
        for doc_id in query.positives():
            answers = relevant.get(group_of[doc_id], set())
            if answers & alike:
                reason = "positive_judged_in_benchmark"
            elif rules.strict and answers:
                reason = "positive_relevant_in_benchmark_strict"
            else:
                continue
            # Still known as a positive, so that mining never takes it for a negative.
            query.judgements[doc_id] = (query.judgements[doc_id][0], BENCHMARK_SPLIT)
            removed[reason][query.source] += 1
        if query.positives():
            kept.append(query)
        else:
            removed["query_left_without_positive"][query.source] += 1
    return kept


# ── figures ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _account(removed: dict[str, Counter[str]]) -> str:
    lines = [f"{reason} {sum(by.values()):,}" for reason, by in removed.items() if sum(by.values())]
    return ", ".join(lines) or "the sources have no judged query"


def _stats(
    sources: Sequence[tuple[TrainingSource, RawData]],
    corpus: list[tuple[str, str, str, int]],
    queries: list[Query],
    removed: dict[str, Counter[str]],
) -> dict[str, Any]:
    sizes = Counter(group for *_, group in corpus)
    by_source = Counter((q.source, q.split) for q in queries)
    per_passage = Counter(doc_id.partition("/")[0] for doc_id, *_ in corpus)
    totals = {reason: sum(by.values()) for reason, by in removed.items()}
    counts = {
        "passages": len(corpus),
        "passage_groups": len(sizes),
        "passages_with_duplicates": sum(n for n in sizes.values() if n > 1),
        "train_queries": sum(q.split == "train" for q in queries),
        "dev_queries": sum(q.split == "dev" for q in queries),
        "train_positives": sum(len(q.positives()) for q in queries),
        "judgements": sum(len(q.judgements) for q in queries),
    }
    return {
        "figures": {
            **{name: counts[name] for name in ("passages", "train_queries", "dev_queries", "passages_with_duplicates")},
            "decontaminated": sum(n for reason, n in totals.items() if "benchmark" in reason),
        },
        "counts": counts,
        "removed": totals,
        "sources": {
            entry.name: {
                "from": raw.where,
                "split": entry.split,
                "passages": per_passage[entry.name],
                "train_queries": by_source[entry.name, "train"],
                "dev_queries": by_source[entry.name, "dev"],
                "repeated": dict(sorted(raw.merged.items())),
                "removed": {reason: by[entry.name] for reason, by in removed.items() if by[entry.name]},
            }
            for entry, raw in sources
        },
    }
