"""A teacher's vectors of a mining task, gathered from its embeddings; and how searches over them report."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from nvr_tasks.errors import NvrError
from nvr_tasks.models import pick_device, teacher_identity
from nvr_tasks.pipeline import Context

if TYPE_CHECKING:
    from tqdm import tqdm

    from nvr_tasks.mined.task import MiningTask
    from nvr_tasks.settings import Teacher
    from nvr_tasks.vectors import Vectors

SECONDS_PER_LINE = 15.0  # of progress in a log

log = logging.getLogger(__name__)


class TeacherVectors:
    """A teacher's vectors, gathered on first use: a selection that the candidates can serve needs none.

    Args:
        ctx: of the stage.
        teacher: whose vectors.
        uris: embeddings of all teachers at work.
        judged_ids: id of every query of the data set, as in `task.judged_texts`.
        task: what is mined.
        scratch: folder for the gathered passages.
    """

    def __init__(
        self,
        ctx: Context,
        teacher: Teacher,
        uris: Sequence[str],
        judged_ids: list[str],
        task: MiningTask,
        scratch: Path,
    ) -> None:
        self.ctx, self.teacher, self.task = ctx, teacher, task
        self.uris, self.judged_ids, self.scratch = uris, judged_ids, scratch

    @cached_property
    def folders(self) -> list[Path]:
        """Local folders of the teacher's shards. Raises NvrError if one is of no teacher of the recipe."""
        wanted = teacher_identity(self.teacher)
        known = [teacher_identity(t) for t in self.ctx.recipe.teachers]
        folders = []
        for uri in self.uris:
            shard = self.ctx.store.open(uri)
            made_by = shard.manifest.config.get("teacher", wanted)
            if made_by not in known:
                names = ", ".join(t.name for t in self.ctx.recipe.teachers)
                raise NvrError(
                    f"{uri} holds vectors of another teacher than {names} (or of another version of it): run `nvr embed` with this recipe"
                )
            if made_by == wanted:
                folders.append(self.ctx.store.fetch(shard))
        return folders

    @cached_property
    def both(self) -> tuple[Vectors, Vectors]:
        """Queries [Q, D] in memory, passages [N, D] memory-mapped; not yet checked for NaN."""
        from nvr_tasks.vectors import gather, text_keys

        keys = text_keys(self.task.passages, self.teacher.prompts.passage, self.teacher.max_tokens.passage)
        return self.of_queries(self.task.query_texts, self.task.query_sources), gather(
            self.folders, keys, out=self.scratch / f"{self.teacher.name}.npy"
        )

    def of_queries(self, texts: list[str], sources: list[str]) -> Vectors:
        """Vectors of queries, each of a source, [n, D], in memory."""
        from nvr_tasks.vectors import gather, text_keys

        prompts = self.teacher.prompts.of_sources(sources)
        return gather(self.folders, text_keys(texts, prompts, self.teacher.max_tokens.query))

    @contextmanager
    def named(self, first_query: int = 0) -> Iterator[None]:
        """Turn a row number in an error into the id that people know; `first_query`: what row 0 of the queries is."""
        from nvr_tasks.mining.corpus import NotFiniteError

        try:
            yield
        except NotFiniteError as error:
            what, ids = {
                "query_vectors": ("query", self.task.query_ids[first_query:]),
                "other_vectors": ("query", self.judged_ids),
            }.get(error.name, ("passage", self.task.doc_ids))
            raise NvrError(
                f"teacher {self.teacher.name}'s vector of {what} {ids[error.row]} has NaN or infinite numbers: delete the embeddings "
                f"({', '.join(self.uris)}) and run `nvr embed` again, with teacher dtype float32 if it was another"
            ) from None


def tiles(ctx: Context, label: str) -> dict[str, Any]:
    """Arguments of a search that never change its result."""
    runtime = ctx.recipe.runtime
    return {
        "device": pick_device(runtime),
        "block_rows": runtime.search_block_rows,
        "block_queries": runtime.search_block_queries,
        "progress": Progress(label),
    }


class Progress:
    """A bar on a terminal, a line with rate and time left every few seconds in a log."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.bar: tqdm[NoReturn] | None = None
        self.begun = self.told = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if sys.stderr.isatty():
            from tqdm import tqdm

            if self.bar is None:
                self.bar = tqdm(total=total, desc=self.label, unit="score", unit_scale=True)
            self.bar.update(done - self.bar.n)
            if done == total:
                self.bar.close()
            return
        now = time.monotonic()
        if now - self.told >= SECONDS_PER_LINE or done == total:
            self.told = now
            rate = done / max(now - self.begun, 1e-9)
            log.info(
                "%s: %.0f %% · %.3g scores/s · %.0f s left", self.label, 100 * done / total, rate, (total - done) / rate
            )
