"""The data that a recipe names, as stages read them: every source once, and a cheap look at whether one has changed."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from typing import Any

from nvr_tasks.artifacts import Artifact, Identity
from nvr_tasks.data import benchmark, sources
from nvr_tasks.data.bounds import Bound
from nvr_tasks.data.media_files import MediaFiles
from nvr_tasks.data.raw import RawData
from nvr_tasks.data_settings import BenchmarkTask, HubSource, MtebSource, WithOrigin
from nvr_tasks.official import official_task
from nvr_tasks.pipeline import Context

log = logging.getLogger(__name__)

Entries = Iterable[tuple[str, WithOrigin]]


def training_entries(ctx: Context) -> Entries:
    """The training sets, by name."""
    return [(f"source {source.name}", source) for source in ctx.recipe.data.sources]


def benchmark_entries(ctx: Context) -> Entries:
    """The tasks of the benchmark, by name."""
    return [(f"task {task.task}", task) for task in ctx.recipe.data.benchmark]


def probe(entries: Entries) -> dict[str, Any]:
    """Identity of every source as it is now: cheap to ask, different when the content is."""
    known: dict[str, Any] = {}
    found = {}
    for name, entry in entries:
        source = sources.resolve(entry)
        key = source.model_dump_json()
        if key not in known:
            known[key] = sources.probe(source)
        found[name] = {"source": source.model_dump(mode="json"), "version": known[key]}
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]  # as it reads back from a record


def check_names(ctx: Context) -> None:
    """Raise NvrError, naming the nearest ones, if mteb lacks a task: told now, not when everything is downloaded."""
    for task in ctx.recipe.data.benchmark:
        if task.official:
            official_task(task.task)


class Reader:
    """Reads sources, each one once; `media` keeps images and sounds, without which sources that have some are refused."""

    def __init__(self, ctx: Context, stage: str, media: MediaFiles | None = None) -> None:
        self.ctx, self.stage, self.media = ctx, stage, media
        self.read: dict[str, RawData] = {}

    def load(self, entry: WithOrigin) -> RawData:
        """The content of a source, or of its mirror."""
        source, bound = sources.resolve(entry), Bound.of(entry)
        key = f"{source.model_dump_json()} {bound}"
        if key not in self.read:
            with self.ctx.store.workdir("sources") as work:
                raw = sources.read(source, work, self.ctx.store.scratch / "downloads", self.media, bound)
            log.info(
                "%s: %s: %s documents, %s queries, splits %s",
                self.stage,
                sources.describe(source),
                f"{len(raw.documents):,}",
                f"{len(raw.queries):,}",
                ", ".join(f"{split} {len(rows):,}" for split, rows in sorted(raw.qrels.items())),
            )
            self.read[key] = raw
        return self.read[key]

    def task(self, entry: BenchmarkTask) -> benchmark.Task:
        """A task of the benchmark."""
        subset = entry.origin.subset if isinstance(entry.origin, MtebSource) else None
        raw = self.load(entry)
        return benchmark.select(entry.task, entry.split, entry.official, raw, part_of=entry.part_of, subset=subset)


def benchmark_identity(tasks: list[benchmark.Task], version: int) -> Identity:
    """A benchmark is named by its content."""
    return Identity("benchmark", version, {"tasks": {t.name: t.entry() for t in tasks}})


def publish_benchmark(ctx: Context, tasks: list[benchmark.Task], version: int) -> Artifact:
    """Find or write the mirror of the tasks."""
    identity = benchmark_identity(tasks, version)
    return ctx.store.find(identity) or ctx.store.publish(
        identity, lambda folder: benchmark.write(tasks, folder, hub_revisions(ctx))
    )


def hub_revisions(ctx: Context) -> dict[str, str]:
    """Task → commit that mteb pins, for tasks whose data were read from the hub at that very commit."""
    found = {}
    for entry in ctx.recipe.data.benchmark:
        if not entry.official:
            continue
        source = sources.resolve(entry)
        pinned = official_task(entry.task).metadata.dataset
        if isinstance(source, MtebSource) or (
            isinstance(source, HubSource) and (source.repo, source.revision) == (pinned["path"], pinned["revision"])
        ):
            found[entry.task] = str(pinned["revision"])
    return found
