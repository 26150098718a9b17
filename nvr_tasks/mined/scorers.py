"""How each teacher makes candidates of some training queries: by searching its vectors, or by rescoring another's.

Rows are independent of each other, so that any division of the queries gives the same rows, to the byte.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Protocol, cast

from nvr_tasks.artifacts import Identity
from nvr_tasks.config import Runtime
from nvr_tasks.mined.vectors import TeacherVectors, tiles
from nvr_tasks.models import pick_device
from nvr_tasks.pipeline import Context
from nvr_tasks.settings import CrossEncoder, LateInteractionTeacher, Reranker, Teacher

if TYPE_CHECKING:
    import pyarrow as pa

    from nvr_tasks.mined.rescoring import PassageScorer
    from nvr_tasks.mined.task import MiningTask

QUERIES_PER_PART = 64  # that a reranker finishes before they are kept


class Scorer(Protocol):
    """Makes the candidates of one teacher."""

    name: str
    identity: Identity

    def pieces(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Ranges of queries that are worth keeping one by one, in case the task is killed."""

    def score(self, start: int, stop: int) -> pa.Table:
        """Candidates of the training queries `start` up to `stop`."""


class Searcher:
    """An embedding teacher: the best passages of each query by exact search, or those that an index proposes."""

    def __init__(
        self, ctx: Context, teacher: Teacher, identity: Identity, task: MiningTask, vectors: TeacherVectors
    ) -> None:
        self.ctx, self.name, self.identity, self.task, self.vectors = ctx, teacher.name, identity, task, vectors

    def pieces(self, start: int, stop: int) -> list[tuple[int, int]]:
        """One: a pass over the corpus costs nearly the same for few queries as for many."""
        return [(start, stop)]

    def score(self, start: int, stop: int) -> pa.Table:
        """See Scorer."""
        from nvr_tasks.mined.tables import candidates_table
        from nvr_tasks.mining import Approximate, search_candidates
        from nvr_tasks.mining.arrays import Ragged
        from nvr_tasks.mining.guards import positives_of_similar_queries
        from nvr_tasks.mining.search import Tiles

        mine, task = self.ctx.recipe.mine, self.task
        index = mine.search == "faiss_ivf"
        approximate = Approximate(mine.ivf_lists, mine.ivf_probes, mine.min_recall) if index else None
        with self.vectors.named(start):
            queries, passages = self.vectors.both
            queries = queries[start:stop]
            exclude = task.exclude.part(start, stop)
            if mine.query_similarity is not None:
                others = self.vectors.of_queries(task.judged_texts, task.judged_sources)
                device = Tiles(pick_device(self.ctx.recipe.runtime))
                related = positives_of_similar_queries(
                    queries, others, task.judged_positives, mine.query_similarity, device
                )
                exclude = Ragged.joined(exclude, related)
            found = search_candidates(
                queries,
                passages,
                task.positives.part(start, stop),
                mine.depth,
                groups=task.groups,
                exclude=exclude,
                duplicate_similarity=mine.duplicate_similarity,
                approximate=approximate,
                **tiles(self.ctx, f"search {self.name}"),
            )
        return candidates_table(task, start, found)


class Rescorer:
    """A reranker: the best candidates of an embedding teacher in the order of its own scores.

    What the other teacher's guards found is not to be mined here, either.

    Args:
        ctx: of the stage.
        reranker: a cross-encoder, or a late-interaction model.
        identity: of its candidates.
        task: what is mined.
        candidates: gives the other teacher's candidates of a range of queries.
    """

    def __init__(
        self,
        ctx: Context,
        reranker: Reranker,
        identity: Identity,
        task: MiningTask,
        candidates: Callable[[int, int], pa.Table],
    ) -> None:
        self.ctx, self.reranker, self.identity, self.task, self.candidates = ctx, reranker, identity, task, candidates
        self.name = reranker.name
        self.model: PassageScorer | None = None

    def pieces(self, start: int, stop: int) -> list[tuple[int, int]]:
        """A few queries each: every one costs as many forward passes as it has candidates."""
        return [(i, min(i + QUERIES_PER_PART, stop)) for i in range(start, stop, QUERIES_PER_PART)]

    def score(self, start: int, stop: int) -> pa.Table:
        """See Scorer."""
        from nvr_tasks.mined.rescoring import rescored

        if self.model is None:
            self.model = _passage_scorer(self.reranker, self.ctx.recipe.runtime)
        table, queries = self.candidates(start, stop), self.task.query_texts[start:stop]
        return rescored(table, self.model, self.reranker.depth, queries, self._rows, self.task.passages)

    @cached_property
    def _rows(self) -> dict[str, int]:
        """Corpus row of each document."""
        return {doc: row for row, doc in enumerate(self.task.doc_ids.tolist())}


def _passage_scorer(reranker: Reranker, runtime: Runtime) -> PassageScorer:
    if isinstance(reranker, LateInteractionTeacher):
        from nvr_tasks.mined.maxsim import MaxSimScorer

        return MaxSimScorer(reranker, runtime)
    from nvr_tasks.mined.rescoring import PairScorer

    return PairScorer(cast(CrossEncoder, reranker), runtime)
