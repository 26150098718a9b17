"""From a data set and its mined negatives to the examples of each training stage, in the order they are trained on."""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from nvr_tasks.errors import NvrError
from nvr_tasks.settings import InstructedPrompts, Prompts
from nvr_tasks.training.batches import Composer, Row, blend, derived, drawn, draws, fill_short, passes
from nvr_tasks.training_settings import sources_of

if TYPE_CHECKING:
    from nvr_tasks.dataset import RetrievalData
    from nvr_tasks.training_settings import TrainingStage

DEV_DISTRACTORS = 2000
FILLS, ORDER, CHOICE = range(3)  # what is drawn per source

Given = Callable[[str], Any]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Examples:
    """Training data of one stage, in training order.

    Attributes:
        texts: every text once, of queries and then of passages, as the student is given it.
        names: the id of the query or passage of each text.
        columns: anchor, positive, negative_1 … negative_n: per example, where its text is in `texts`. An example comes in every
            pass, so texts themselves would outgrow memory.
        batches: indices of the examples of each batch; one batch = one optimizer step.
        rows: per example, rows of its query, its positive and its negatives in the data set, shape [E, 2 + n].
        drawn: negatives that were drawn at random, since too few were mined.
        prompts: what is put before each query, in the order of `texts`; empty: the model's own prompt, always.
    """

    texts: list[Any]
    names: list[str]
    columns: dict[str, npt.NDArray[np.int64]]
    batches: list[list[int]]
    rows: npt.NDArray[np.int64]
    drawn: int = 0
    prompts: Sequence[str] = ()

    @property
    def ids(self) -> list[str]:
        """Per example, the id of its query."""
        return [self.names[n] for n in self.columns["anchor"]]


@dataclass(frozen=True)
class DevSet:
    """Held-out queries with the passages they are searched in; `prompts`: put before each query, if not the model's own."""

    queries: dict[str, Any]  # as the student is given them
    corpus: dict[str, Any]
    relevant: dict[str, set[str]]
    prompts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Mined:
    """Mined negatives over a data set.

    Attributes:
        data: the data set.
        negatives: query_id · positive_id · negative_ids, hardest first; one row per (query, positive); and positive_score, for
            stages that look at it.
        prompts: of the student.
        given: makes the student's input of what a model sees (`nvr_tasks.media.inputs_of`).
    """

    data: RetrievalData
    negatives: pd.DataFrame
    prompts: Prompts = field(default_factory=Prompts)
    given: Given = str

    def examples(self, stage: TrainingStage, seed: int) -> Examples:
        """The examples of a stage.

        Raises:
            NvrError: a source has no training query, or no batches can be composed.
        """
        by_source = self._by_source(stage)
        try:
            filled, short = self._filled(by_source, stage, seed)
            batches, lost = self._compose(filled, stage, seed)
        except ValueError as error:
            raise NvrError(
                f"cannot compose training batches of stage {stage.name}: {error}; "
                "use more training data, a smaller batch_size or fewer hard negatives"
            ) from None
        small = sum(len(b) < stage.batch_size for b in batches)
        if small:
            log.warning(
                "%d of %d batches are smaller than %d: too few unrelated queries", small, len(batches), stage.batch_size
            )
        if lost:
            log.warning("%s rows lost their turn: too many queries share a positive to come once per pass", f"{lost:,}")
        flat = list(itertools.chain.from_iterable(batches))
        log.info(
            "%s examples of %s queries in %d batches; %s negatives drawn at random",
            f"{len(flat):,}",
            f"{len({r.query for r in flat}):,}",
            len(batches),
            f"{short:,}",
        )
        ends = list(itertools.accumulate(len(b) for b in batches))
        indices = [list(range(end - len(b), end)) for b, end in zip(batches, ends, strict=True)]
        rows = np.array([(r.query, r.positive, *r.negatives) for r in flat], dtype=np.int64)
        names = ["anchor", "positive", *(f"negative_{i + 1}" for i in range(stage.hard_negatives))]
        columns = {name: rows[:, i] + (len(self.data.queries) if i else 0) for i, name in enumerate(names)}
        prompts = prompts_of(self.data.queries, self.prompts)
        named = [*self.data.queries["query_id"], *self.data.corpus["doc_id"]]
        return Examples(self._texts, named, columns, indices, rows, short, prompts)

    def _by_source(self, stage: TrainingStage) -> dict[str, list[tuple[int, int, list[int]]]]:
        """(query, positive, negatives) as rows of the data set, per source; one nameless source if they are not told apart."""
        apart = bool(stage.sources) or stage.batches == "homogeneous"
        source_of = self.data.queries["source"].tolist()
        found: dict[str, list[tuple[int, int, list[int]]]] = {name: [] for name in (stage.sources if apart else [""])}
        for row in itertools.compress(self._mined, trained_on(stage, self.data, self.negatives)):
            found.setdefault(str(source_of[row[0]]) if apart else "", []).append(row)
        empty = [name for name, rows in found.items() if not rows]
        if empty and empty != [""]:
            raise NvrError(
                f"stage {stage.name} trains on source {', '.join(empty)}, which has no training query with mined negatives: "
                "correct the stage's sources"
            )
        return dict(sorted(found.items()))

    def _filled(
        self, by_source: Mapping[str, Sequence[tuple[int, int, list[int]]]], stage: TrainingStage, seed: int
    ) -> tuple[dict[str, list[Row]], int]:
        filled: dict[str, list[Row]] = {}
        short = 0
        for number, (name, rows) in enumerate(by_source.items()):
            filled[name], added = fill_short(
                rows,
                self._relevant,
                self._groups,
                stage.hard_negatives,
                derived(seed, number, FILLS),
                keep_all=stage.choice == "drawn",
            )
            short += added
        return filled, short

    def _compose(self, filled: Mapping[str, list[Row]], stage: TrainingStage, seed: int) -> tuple[list[list[Row]], int]:
        """Batches in training order, and how many rows lost their turn."""
        queries = {name: len({r.query for r in rows}) for name, rows in filled.items()}
        weights = {name: stage.sources.get(name, float(queries[name])) for name in filled}
        relevant = self._relevant if stage.in_batch_negatives else None
        streams = {
            name: passes(rows, derived(seed, number, ORDER)) for number, (name, rows) in enumerate(filled.items())
        }
        if stage.choice == "drawn":
            streams = {
                name: drawn(stream, stage.hard_negatives, derived(seed, number, CHOICE))
                for number, (name, stream) in enumerate(streams.items())
            }

        def composer(stream: Any) -> Composer:
            return Composer(stream, relevant, self._groups, self._query_groups)

        steps = stage.steps or math.ceil((stage.epochs or 1) * sum(queries.values()) / stage.batch_size)
        if stage.batches == "homogeneous":
            composers = {name: composer(stream) for name, stream in streams.items()}
            order = draws(weights, seed)
            batches = [composers[next(order)].batch(stage.batch_size) for _ in range(steps)]
            return batches, sum(c.lost for c in composers.values())
        one = composer(blend(streams, weights, seed) if len(streams) > 1 else next(iter(streams.values())))
        return [one.batch(stage.batch_size) for _ in range(steps)], one.lost

    # ── the data set as rows ─────────────────────────────────────────────────────────────────────────────────────

    @cached_property
    def _texts(self) -> list[Any]:
        return [self.given(text) for text in (*self.data.queries["text"], *self.data.passages())]

    @cached_property
    def _groups(self) -> npt.NDArray[np.int64]:
        return self.data.corpus["group"].to_numpy(dtype=np.int64)

    @cached_property
    def _query_groups(self) -> npt.NDArray[np.int64]:
        return pd.factorize(self.data.queries["text"])[0].astype(np.int64)

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {doc: row for row, doc in enumerate(self.data.corpus["doc_id"])}

    @cached_property
    def _query_of(self) -> dict[str, int]:
        return {query: index for index, query in enumerate(self.data.queries["query_id"])}

    @cached_property
    def _relevant(self) -> list[frozenset[int]]:
        """Per query, the groups of all passages judged relevant to it."""
        relevant: list[set[int]] = [set() for _ in self._query_of]
        judged = self.data.qrels[self.data.qrels["relevance"] >= 1]
        for query, doc in zip(judged["query_id"], judged["doc_id"], strict=True):
            if query in self._query_of:
                relevant[self._query_of[query]].add(int(self._groups[self._row_of[doc]]))
        return [frozenset(r) for r in relevant]

    @cached_property
    def _mined(self) -> list[tuple[int, int, list[int]]]:
        columns = (self.negatives[name] for name in ("query_id", "positive_id", "negative_ids"))
        return [
            (self._query_of[q], self._row_of[p], [self._row_of[n] for n in ids])
            for q, p, ids in zip(*columns, strict=True)
        ]


def trained_on(stage: TrainingStage, data: RetrievalData, negatives: pd.DataFrame) -> npt.NDArray[np.bool_]:
    """Which rows of mined negatives a stage trains on, [R]: those of its sources whose positives the teacher does not doubt.

    Args:
        negatives: as in `Mined`.

    Raises:
        NvrError: the stage looks at scores of positives, and rows have several, by several teachers.
    """
    source_of = data.queries.set_index("query_id")["source"]
    sources = set(stage.sources) or set(source_of)
    kept = negatives["query_id"].map(source_of).isin(sources)
    lowest = stage.min_positive_score
    if lowest is not None:
        scores = negatives["positive_score"]
        if scores.isna().any():
            raise NvrError(
                f"stage {stage.name} leaves out positives by the teacher's score (min_positive_score), but several teachers share a "
                "row of these negatives: mine with one teacher, or remove min_positive_score"
            )
        best = scores.groupby(negatives["query_id"]).transform("max")
        believed = (scores >= lowest) | (scores == best)
        log.info(
            "%s of %s pairs are left out: the teacher scores their positives below %s",
            f"{int((kept & ~believed).sum()):,}",
            f"{int(kept.sum()):,}",
            lowest,
        )
        kept &= believed
    return kept.to_numpy(dtype=bool)


def prompts_of(queries: pd.DataFrame, prompts: Prompts) -> list[str]:
    """What is put before each query; nothing if that is the same for all sources, as then it is the model's own prompt."""
    return prompts.of_sources(queries["source"]) if isinstance(prompts, InstructedPrompts) else []


def dev_set(
    data: RetrievalData, prompts: Prompts, given: Given = str, stages: Sequence[TrainingStage] = ()
) -> DevSet | None:
    """Held-out queries, their relevant passages and a fixed sample of others to search among; `given` as in `Mined`.

    Of the sources that the stages train on: what a model does elsewhere says little of how far its training is.
    """
    dev = data.queries[data.queries["split"] == "dev"]
    trained = sources_of(stages)
    if trained:
        of_those = dev[dev["source"].isin(trained)]
        if of_those.empty and len(dev):
            log.warning(
                "none of the %s dev queries is of %s: no dev score", f"{len(dev):,}", ", ".join(sorted(trained))
            )
        dev = of_those
    if dev.empty:
        return None
    judged = data.qrels[(data.qrels["relevance"] >= 1) & data.qrels["query_id"].isin(set(dev["query_id"]))]
    relevant = {str(query): set(map(str, docs)) for query, docs in judged.groupby("query_id")["doc_id"]}
    needed = set(judged["doc_id"])
    others = sorted(
        (d for d in data.corpus["doc_id"] if d not in needed), key=lambda d: hashlib.sha256(d.encode()).digest()
    )
    kept = needed | set(others[:DEV_DISTRACTORS])
    corpus = {doc: given(text) for doc, text in zip(data.corpus["doc_id"], data.passages(), strict=True) if doc in kept}
    own = dict(zip(dev["query_id"], prompts_of(dev, prompts), strict=False))
    return DevSet(dict(zip(dev["query_id"], map(given, dev["text"]), strict=True)), corpus, relevant, own)
