"""Fine-tune the student with InfoNCE over in-batch and mined hard negatives.

Reads   dataset/<fp> · negatives/<fp> · embeddings/<fp> where the teacher's scores mask false negatives of a batch
Writes  model/<fp>: a sentence-transformers folder (safetensors), README.md (model card), log.jsonl (loss, learning
        rate, dev nDCG@10 per step)

One stage or several, each with its own data, negatives, loss and schedule. Every query comes once per pass; no batch
holds a passage that is relevant to another of its queries. Checkpoints go to the artefact store, so a killed run
resumes where its last checkpoint was and ends with the same weights.

On several machines (`runtime.nodes`) it is started on each with the same recipe and root: `nvr train --node I/N --rendezvous
HOST:PORT`.

Example  nvr train --recipe beir-small --set train.steps=100
"""

from __future__ import annotations

import logging
import platform
from pathlib import Path
from typing import Any

from nvr_tasks.artifacts import Identity
from nvr_tasks.config import Runtime
from nvr_tasks.models import digest_of_folder, pick_device, student_identity, teacher_identity
from nvr_tasks.pipeline import Context, Inputs, Plan, StageResult, one
from nvr_tasks.training_settings import Train, identity_of

VERSION = 3

log = logging.getLogger(__name__)


def plan(ctx: Context, inputs: Inputs) -> Plan:
    """One `model` artefact."""
    recipe = ctx.recipe
    config = {
        **training_identity(recipe.train),
        "student": student_identity(recipe.student),
        "seed": recipe.seed,
    }
    if _masks(recipe.train):
        config["teacher"] = teacher_identity(recipe.teacher)
    if recipe.runtime.processes > 1:
        from nvr_tasks.training.dropout import has_dropout

        if has_dropout(recipe.train):
            config["processes"] = recipe.runtime.processes
            if recipe.runtime.shard_weights:  # whose texts are not taken in groups, which have masks of their own
                config["shard_weights"] = True
    roles = {"dataset": one(inputs, "dataset"), "negatives": one(inputs, "negatives")}
    return {"model": [Identity("model", VERSION, config, roles)]}


def training_identity(train: Train) -> dict[str, Any]:
    """What of the settings of training decides the model, the student aside; names of stages do not."""
    if not train.stages:
        return identity_of(train, exclude={"student"})
    return {"stages": [identity_of(stage, exclude={"name"}) for stage in train.stages]}


def needs(ctx: Context) -> tuple[str, ...]:
    """The teacher's vectors are read, too, when its scores decide which negatives of a batch count."""
    return ("dataset", "negatives", "embeddings") if _masks(ctx.recipe.train) else ("dataset", "negatives")


def _masks(train: Train) -> bool:
    return any(stage.false_negatives is not None for stage in train.schedule)


def build(ctx: Context, inputs: Inputs, plan: Plan) -> StageResult:
    """Train and publish."""
    from nvr_tasks.model_card import model_card
    from nvr_tasks.surgery import merge_adapters
    from nvr_tasks.tracking import Tracking
    from nvr_tasks.training.checkpoints import Checkpoints
    from nvr_tasks.training.division import refuse_impossible
    from nvr_tasks.training.fit import Job, fit, student_of
    from nvr_tasks.training.loop import write_log
    from nvr_tasks.training.processes import fit_in_processes, node_of
    from nvr_tasks.training.weights import refuse_broken

    [identity] = plan["model"]
    recipe, store = ctx.recipe, ctx.store
    node = node_of(ctx.options, recipe.runtime.nodes)
    refuse_impossible(recipe)
    store.discard_finished("checkpoints", "model")
    tracking = Tracking(recipe.register_.experiment)
    run = tracking.run(ctx.pipeline_run) if ctx.pipeline_run else None

    def report(step: int, values: Any) -> None:
        if run is not None:
            tracking.log(run, metrics={f"train/{k}": v for k, v in values.items()}, step=step)

    with store.workdir(f"train-{identity.fingerprint[:8]}") as scratch:
        job = Job(recipe, store, inputs, identity.fingerprint, scratch / "work")
        if recipe.runtime.processes > 1:
            fitted = fit_in_processes(job, report, node)
            if fitted is None:
                return StageResult("train", {}, skipped="machine 0 has the model and publishes it")
            student, outcome = fitted
        else:
            student = student_of(recipe)
            outcome = fit(job, student, report)
        model = student.model
        refuse_broken(model)
        if student.adapters is not None:
            merge_adapters(model, student.adapters)
        folder = scratch / "model"
        model.max_seq_length = recipe.train.student.max_tokens
        model.save_pretrained(str(folder), create_model_card=False, safe_serialization=True)
        losses = [e["loss"] for e in outcome.log if "loss" in e]
        scores = [e["dev_ndcg_at_10"] for e in outcome.log if "dev_ndcg_at_10" in e]
        figures = {
            "steps": outcome.steps,
            "loss": round(losses[-1], 4) if losses else None,
            "examples_per_s": round(outcome.examples_per_s, 1),
        }
        if scores:
            figures["dev_ndcg_at_10"] = round(scores[-1], 4)
        write_log(outcome.log, folder / "log.jsonl")
        (folder / "README.md").write_text(model_card(recipe, identity, figures), encoding="utf-8")
        stats = {
            "figures": figures,
            "digest": digest_of_folder(folder),
            "random_negatives": outcome.random_negatives,
            "resumed_from": outcome.resumed_from,
            "seconds_per_step": round(outcome.seconds_per_step, 4),
            "machine": _machine(recipe.runtime),
        }
        artifact = store.publish_folder(identity, folder, stats)
    Checkpoints(store.storage, identity.fingerprint).clear()
    return StageResult("train", {"model": [artifact.uri]}, figures)


def _machine(runtime: Runtime) -> str:
    """What trained, for whoever compares seconds."""
    import torch

    together = f"{runtime.processes} × " if runtime.processes > 1 else ""
    if pick_device(runtime) == "cuda":
        return f"{together}{torch.cuda.get_device_name()}"
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{together}{next(named, platform.machine())}, {torch.get_num_threads()} threads"
