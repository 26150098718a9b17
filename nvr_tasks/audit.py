"""Estimate what share of mined negatives is really relevant, for every method of the paper and with and without guards.

Reads   dataset/<fp> · embeddings/<fp> (every shard of the teacher) · a language model, if NVR_JUDGE_URL names one
Writes  audit/<fp>   audit.json: shares with 95 % intervals · report.html: the same for people

Three ways, each a chapter of the report: part of the judgements is hidden and what comes back is counted; copies of
positives in other words are planted, embedded by the teacher, and counted; a language model judges a sample of what was
mined. Settings: `audit` of the recipe. It is a command and no stage: nothing is trained on its result, it costs searches,
embedding and perhaps money, and whoever chooses a method or a threshold is the one who wants it.

Example  nvr audit --recipe beir-small
         NVR_JUDGE_URL=http://127.0.0.1:8000/v1 NVR_JUDGE_MODEL=… nvr audit --recipe beir-small
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvr_tasks.artifacts import Artifact, Identity
from nvr_tasks.errors import NvrError
from nvr_tasks.judge import RELEVANT_FROM, Budget, Endpoint, Judge
from nvr_tasks.mined.identities import selection_identity
from nvr_tasks.models import load_teacher, teacher_identity
from nvr_tasks.pipeline import Context, Inputs, StageResult, complete_inputs, one
from nvr_tasks.stages import stage

if TYPE_CHECKING:
    from nvr_tasks.mined.task import MiningTask
    from nvr_tasks.mined.vectors import TeacherVectors
    from nvr_tasks.mining import MiningSpec
    from nvr_tasks.mining.arrays import Ints
    from nvr_tasks.mining.audit import Estimate, Planted, Setting

VERSION = 1
RESULT_FILE, REPORT_FILE = "audit.json", "report.html"
POSITIVES = "known positives"  # what the judge says of them tells how far to trust it

log = logging.getLogger(__name__)


def audit(ctx: Context, given: Inputs) -> StageResult:
    """Audit, or find that it was done; with a pipeline run, its MLflow run gets the figures and the page."""
    clock = time.perf_counter()
    inputs = complete_inputs(stage("mine"), ctx, given)
    wanted = identity(ctx, one(inputs, "dataset"), Endpoint.from_environment())
    artifact, reused = ctx.store.find(wanted), True
    if artifact is None:
        artifact, reused = ctx.store.publish(wanted, lambda folder: _write(ctx, inputs, folder)), False
    if ctx.pipeline_run is not None:
        _tell(ctx, ctx.pipeline_run, artifact)
    figures = artifact.manifest.stats["figures"]
    seconds = round(time.perf_counter() - clock, 2)
    return StageResult("audit", {"audit": [artifact.uri]}, figures, reused=reused, seconds=seconds)


def identity(ctx: Context, dataset: str, endpoint: Endpoint | None) -> Identity:
    """What names an audit: all that its shares depend on."""
    recipe = ctx.recipe
    asked = recipe.audit.model_dump()
    if endpoint is None:
        asked = {k: v for k, v in asked.items() if not k.startswith("judge")}
    config = {
        "teacher": teacher_identity(recipe.teacher),
        "audit": asked,
        "as_mined": selection_identity(ctx),
        "duplicate_similarity": recipe.mine.duplicate_similarity,
        "query_similarity": recipe.mine.query_similarity,
        "near_duplicate": recipe.data.near_duplicate,
        "seed": recipe.seed,
        "judge": None if endpoint is None else endpoint.identity,
    }
    return Identity("audit", VERSION, config, {"dataset": dataset})


def what_is_known(ctx: Context, inputs: Inputs) -> list[str]:
    """What an audit of this recipe found, as lines beside a suggestion; or how to make one."""
    from nvr_tasks.audit_report import lines_of

    dataset = one(inputs, "dataset")
    for endpoint in (Endpoint.from_environment(), None):
        artifact = ctx.store.find(identity(ctx, dataset, endpoint))
        if artifact is not None:
            found = read_estimates(ctx.store.fetch(artifact, only=(RESULT_FILE,)) / RESULT_FILE)
            return ["", "audit, all guards on:", *lines_of(found)]
    return ["", "audit: none yet; `nvr audit` says what share of negatives is relevant, method by method"]


def read_estimates(path: Path) -> list[Estimate]:
    """The shares in an `audit.json`."""
    from nvr_tasks.mining.audit import Estimate
    from nvr_tasks.mining.intervals import Share

    rows = json.loads(path.read_text(encoding="utf-8"))["estimates"]
    return [Estimate(**{**row, "share": Share(**row["share"])}) for row in rows]


def _tell(ctx: Context, run: str, artifact: Artifact) -> None:
    from nvr_tasks.tracking import Tracking

    page = ctx.store.fetch(artifact, only=(REPORT_FILE,)) / REPORT_FILE
    tracking = Tracking(ctx.recipe.register_.experiment)
    found = tracking.run(run)
    tracking.log(found, metrics={f"audit.{k}": v for k, v in artifact.manifest.stats["figures"].items()})
    with tracking.explained():
        tracking.client.log_artifact(found.info.run_id, str(page), "mining/audit")


# ── the work ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _write(ctx: Context, inputs: Inputs, folder: Path) -> dict[str, Any]:
    from nvr_tasks.audit_report import audit_report
    from nvr_tasks.dataset import read_dataset
    from nvr_tasks.mined.selecting import spec_of
    from nvr_tasks.mined.task import MiningTask
    from nvr_tasks.mined.vectors import TeacherVectors
    from nvr_tasks.mining.audit import held_out, own_method, paper_specs, planted

    recipe = ctx.recipe
    data = read_dataset(ctx.store.fetch(ctx.store.open(one(inputs, "dataset"))))
    data.refuse_media("nvr audit, which plants reworded copies of passages and asks judges,")
    task = MiningTask.of(data)
    specs = paper_specs(spec_of(recipe.mine, recipe.teacher.name))
    with ctx.store.workdir("audit") as scratch:
        vectors = TeacherVectors(
            ctx, recipe.teacher, inputs["embeddings"], data.queries["query_id"].tolist(), task, scratch
        )
        with vectors.named():
            setting = _setting(ctx, data, task, vectors)
            log.info("%d methods under three sets of guards", len(specs))
            found = held_out(_some(setting, recipe.audit.queries), specs, recipe.audit.hidden_share)
            if recipe.audit.copies:
                found += planted(setting, specs, _copies(ctx, task, setting))
            asked, spent = _judge(ctx, task, setting, specs)
            found += asked
    record = {
        "settings": recipe.audit.model_dump(),
        "teacher": recipe.teacher.name,
        "judge": spent,
        "estimates": [asdict(e) for e in found],
    }
    (folder / RESULT_FILE).write_text(json.dumps(record, ensure_ascii=False, indent=1), encoding="utf-8")
    (folder / REPORT_FILE).write_text(audit_report(found, recipe.audit, recipe.teacher.name, spent), encoding="utf-8")
    return {"figures": _figures(found, own_method(specs, spec_of(recipe.mine, recipe.teacher.name))), "judge": spent}


def _figures(found: Sequence[Estimate], own: str) -> dict[str, Any]:
    """Shares under all guards, in per cent: of the recipe's own method and of the naive one."""
    from nvr_tasks.audit_report import MAIN
    from nvr_tasks.mining.audit import ALL, ARMS

    figures = {}
    for e in found:
        label = {own: "", "naive": "naive_"}.get(e.method)
        told = label is not None and e.measure == MAIN and (e.part, e.guards) == (ALL, ARMS[-1].name)
        if told and e.share.trials:
            figures[f"{label}{e.experiment.replace(' ', '_')}_percent"] = round(100 * e.share.value, 3)
    return figures


def _setting(ctx: Context, data: Any, task: MiningTask, vectors: TeacherVectors) -> Setting:
    import numpy as np

    from nvr_tasks.mined.vectors import tiles
    from nvr_tasks.mining.audit import Setting

    mine = ctx.recipe.mine
    queries, passages = vectors.both
    source = dict(zip(data.queries["query_id"], data.queries["source"], strict=True))
    parts = sorted(set(source.values()))
    others = None
    if mine.query_similarity is not None:
        row = {q: i for i, q in enumerate(task.query_ids)}
        which = np.array([row.get(q, -1) for q in data.queries["query_id"]], np.int64)
        others = vectors.of_queries(task.judged_texts, task.judged_sources), task.judged_positives, which
    search = {k: v for k, v in tiles(ctx, "audit").items() if k != "progress"}
    return Setting(
        queries=queries,
        corpus=passages,
        positives=task.positives,
        exclude=task.exclude,
        groups=task.groups,
        query_keys=task.query_keys,
        part=np.array([parts.index(source[q]) for q in task.query_ids], np.int64),
        parts=parts,
        duplicate_similarity=mine.duplicate_similarity,
        query_similarity=mine.query_similarity,
        others=others,
        seed=ctx.recipe.seed,
        search=search,
    )


def _some(setting: Setting, count: int) -> Setting:
    """At most `count` of the queries that have several positives, by hash."""
    import numpy as np

    several = np.flatnonzero(np.diff(setting.positives.offsets) > 1)
    if len(several) <= count:
        return setting
    return setting.take(np.sort(several[np.argsort(setting.query_keys[several], kind="stable")[:count]]))


def _copies(ctx: Context, task: MiningTask, setting: Setting) -> Planted:
    """One copy for each of the first queries by hash: of one of its positives, the kinds by turns."""
    import numpy as np
    import torch

    from nvr_tasks.data.copies import KINDS, copy
    from nvr_tasks.data.text import comparison_key, jaccard, word_shingles
    from nvr_tasks.encoding import Encoder
    from nvr_tasks.mining.audit import Planted

    kinds = list(KINDS)
    texts: list[str] = []
    original, kind, alike = [], [], []
    for query in np.argsort(task.query_keys, kind="stable").tolist():
        if len(texts) == ctx.recipe.audit.copies:
            break
        own = task.positives[query]
        row = int(own[int(task.query_keys[query] >> np.uint64(32)) % len(own)])
        for turn in range(len(kinds)):
            number = (len(texts) + turn) % len(kinds)
            made = copy(task.passages[row], kinds[number], task.query_ids[query])
            if made is not None:
                keys = comparison_key(task.passages[row]), comparison_key(made)
                shingles = word_shingles(keys[0]), word_shingles(keys[1])
                texts.append(made)
                original.append(row)
                kind.append(number)
                alike.append(keys[0] == keys[1] or jaccard(*shingles) >= ctx.recipe.data.near_duplicate)
                break
    log.info("planting %s copies of positives in other words", f"{len(texts):,}")
    teacher = ctx.recipe.teacher
    vectors = np.empty((0, setting.queries.shape[1]), np.float32)
    if texts:
        model = load_teacher(teacher, ctx.recipe.runtime)
        encoder = Encoder(model, getattr(torch, teacher.dtype), ctx.recipe.runtime.embed_batch_tokens or None)
        vectors = encoder.encode(texts, teacher.prompts.passage, teacher.max_tokens.passage)
    return Planted(vectors, np.array(original, np.int64), np.array(alike, bool), np.array(kind, np.int64), kinds)


def _judge(
    ctx: Context, task: MiningTask, setting: Setting, specs: Mapping[str, MiningSpec]
) -> tuple[list[Estimate], dict[str, Any] | None]:
    """What a language model says of a sample of what each method mines with all guards; ([], None) without one."""
    import numpy as np

    from nvr_tasks.mining.audit import ARMS, guarded, judged, sample_pairs, sample_positives

    endpoint = Endpoint.from_environment()
    if endpoint is None:
        return [], None
    settings, seed = ctx.recipe.audit, ctx.recipe.seed
    samples: dict[str, tuple[Ints, Ints]] = {
        method: sample_pairs(result, setting.query_keys, settings.judged_pairs, seed)
        for method, result in guarded(setting, specs).items()
    }
    samples[POSITIVES] = sample_positives(setting.positives, setting.query_keys, settings.judged_pairs, seed)
    # A pair of every method at a time, so that a budget that runs out leaves each with as much as the others.
    order = sorted((i, m) for m, (rows, _) in samples.items() for i in range(len(rows)))
    pairs = [(task.query_texts[int(samples[m][0][i])], task.passages[int(samples[m][1][i])]) for i, m in order]
    budget = Budget(settings.judge_calls, settings.judge_tokens)
    judge = Judge(endpoint, ctx.store.storage, budget, ctx.recipe.runtime.judge_requests)
    verdicts = judge.grade(pairs)
    if verdicts.failed:  # an audit is kept and found again: better none than one that misses what a second try may get
        raise NvrError(
            f"the judge gave no answer for {verdicts.failed} of {len(pairs)} pairs (see the log); what it answered is kept: "
            "run `nvr audit` again"
        )
    grades: dict[str, list[int | None]] = {m: [] for m in samples}
    for (_, m), grade in zip(order, verdicts.grades, strict=True):
        grades[m].append(grade)
    found = []
    for method, (rows, _) in samples.items():
        read = np.array([g is not None for g in grades[method]], bool)
        relevant = np.array([g is not None and g >= RELEVANT_FROM for g in grades[method]], bool)
        found.append(judged(method, ARMS[-1].name, rows[read], relevant[read]))
    spent = {k: v for k, v in asdict(verdicts).items() if k != "grades"}
    return found, {"model": endpoint.model, **spent}
