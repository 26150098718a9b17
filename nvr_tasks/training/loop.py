"""The training loop: stage after stage with sentence-transformers' trainers, resumable from storage at any step.

Steps are counted through all stages. A checkpoint within a stage holds weights, optimizer, schedule and random state;
the one at its end is where the next stage starts from. The batches of a stage are a pure function of data and seed, so
a run that was killed ends with the same weights and log as one that was not.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import statistics
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist  # noqa: TID253
from datasets import Dataset  # noqa: TID253
from sentence_transformers import SentenceTransformer  # noqa: TID253
from transformers import PrinterCallback, TrainerCallback  # noqa: TID253

from nvr_tasks.errors import NvrError
from nvr_tasks.training import weights
from nvr_tasks.training.batches import derived
from nvr_tasks.training.checkpoints import Checkpoints
from nvr_tasks.training.dev_score import dev_evaluator
from nvr_tasks.training.dropout import dropping
from nvr_tasks.training.examples import DevSet, Examples
from nvr_tasks.training.losses import TeacherScores, TeacherVectors, make_loss, refuse_widths
from nvr_tasks.training.pace import SHORT, hurried
from nvr_tasks.training.sharding import meet
from nvr_tasks.training.trainer import (
    DenseArguments,
    DenseTrainer,
    LateInteractionArguments,
    LateInteractionTrainer,
)
from nvr_tasks.training_settings import TrainingStage

log = logging.getLogger(__name__)

LOGGED = ("loss", "learning_rate", "grad_norm", "dev_ndcg_at_10")
SHOW_EVERY = 10  # steps between lines for people and batches for MLflow
RANDOM_STATE = "rng_state_{}.pth"  # in a checkpoint, of each process, as the library names it
EARLIER = "earlier.json"  # in a checkpoint: log entries of the stages before

Entry = dict[str, float]


@dataclass(frozen=True)
class StageData:
    """A stage and what it is trained on; the teacher's vectors of the data set, where its scores decide what counts."""

    settings: TrainingStage
    examples: Examples
    vectors: TeacherVectors | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps: one per batch."""
        return len(self.examples.batches)


@dataclass(frozen=True)
class Outcome:
    """What training leaves beside the model.

    Attributes:
        log: one entry per logged step.
        steps: optimizer steps of all stages.
        random_negatives: negatives that were drawn at random, since too few were mined.
        examples_per_s: rate since this process took its first step.
        resumed_from: step of the checkpoint that it went on from; 0 if it began anew.
        seconds_per_step: the median of this process, without fetching batches, evaluation on the dev set and checkpoints.
            0 after fewer than two steps.
    """

    log: list[Entry]
    steps: int
    random_negatives: int
    examples_per_s: float
    resumed_from: int
    seconds_per_step: float


def train_model(
    model: Any,
    stages: Sequence[StageData],
    dev: DevSet | None,
    *,
    max_tokens: int,
    seed: int,
    checkpoint_every: int,
    checkpoints: Checkpoints,
    folder: Path,
    on_log: Callable[[int, Mapping[str, float]], None],
    gradient_checkpointing: bool = False,
) -> Outcome:
    """Fine-tune `model` (SentenceTransformer or MultiVectorEncoder) in place, stage after stage.

    Args:
        max_tokens: longest input of stages that set none.
        folder: scratch folder for the trainer's own files.
        on_log: called with (step, values) as they are logged.

    Raises:
        NvrError: the loss or a weight is not finite; before the first step: the widest Matryoshka dimension of a stage is not
            the model's width, or the processes cannot divide a batch evenly.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # as torchrun says it
    for stage in stages:
        _refuse_uneven(stage, processes)
        refuse_widths(model, stage.settings)
    ends = list(itertools.accumulate(stage.steps for stage in stages))
    progress = _Progress(ends[-1])
    entries: list[Entry] = []
    query_tokens = getattr(model[0], "query_length", None)  # the student's own, for stages that set none
    first = 0
    resume = checkpoints.restore(folder / "resume")
    if processes > 1:
        _agree(resume, on_cuda=model.device.type == "cuda")
    if resume is not None:
        progress.resumed_from = int(resume.name.removeprefix("checkpoint-"))
        log.info("resuming from the checkpoint of step %d", progress.resumed_from)
        entries = json.loads((resume / EARLIER).read_text(encoding="utf-8"))
        first = bisect_right(ends, progress.resumed_from)
        if first > 0 and progress.resumed_from == ends[first - 1]:  # the end of a stage: the next begins
            weights.load(model, resume)
            entries += _entries(resume / "trainer_state.json", ends[first - 1] - stages[first - 1].steps)
            resume = None
    for number in range(first, len(stages)):
        stage, before = stages[number], ends[number] - stages[number].steps
        recorder = _Recorder(
            progress, before, stage.steps, entries, checkpoints, on_log, last=number == len(stages) - 1
        )
        trainer = make_trainer(
            model,
            stage,
            dev,
            recorder,
            folder=folder / f"stage-{number}",
            seed=derived(seed, number),
            max_tokens=max_tokens,
            query_tokens=query_tokens,
            checkpoint_every=checkpoint_every,
            gradient_checkpointing=gradient_checkpointing,
            processes=processes,
            where=f" of stage {stage.settings.name}" if len(stages) > 1 else "",
        )
        if len(stages) > 1:
            log.info("stage %d of %d: %s, %d steps", number + 1, len(stages), stage.settings.name, stage.steps)
        with dropping(model, stage.settings.dropout), hurried(model, int(model.max_seq_length or SHORT)):
            trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        resume = None
        entries = [*entries, *_offset(trainer.state.log_history, before)]
    model[0].query_length = query_tokens
    drawn = sum(stage.examples.drawn for stage in stages)
    return Outcome(entries, ends[-1], drawn, progress.rate(), progress.resumed_from, progress.seconds_per_step())


def _refuse_uneven(stage: StageData, processes: int) -> None:
    """Parts of different length would weigh their queries differently, and gathered negatives must be of one shape."""
    name, size = stage.settings.name, stage.settings.batch_size
    for number, batch in enumerate(stage.examples.batches, 1):
        if len(batch) % processes:
            raise NvrError(
                f"batch {number} of stage {name} has {len(batch)} of {size} examples (too few unrelated queries), which "
                f"{processes} processes (runtime.processes) cannot divide evenly: use fewer processes, a smaller batch_size "
                "or more training data"
            )


def _agree(resume: Path | None, *, on_cuda: bool) -> None:
    """Raise NvrError when the processes found different checkpoints: they would train on different batches."""
    meet(on_cuda)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, resume.name if resume else "none")
    if len(set(found)) > 1:
        raise NvrError(
            f"the training processes found different checkpoints ({', '.join(found)}): look for warnings above, make sure that "
            "every machine sees the same root, and start again"
        )


def make_trainer(
    model: Any,
    stage: StageData,
    dev: DevSet | None,
    recorder: Any,
    *,
    folder: Path,
    seed: int,
    max_tokens: int,
    query_tokens: int | None,
    checkpoint_every: int,
    gradient_checkpointing: bool,
    processes: int,
    where: str,
) -> Any:
    """The library's trainer for one stage; `recorder` is a TrainerCallback that is given the way to report a broken step."""
    config, dense = stage.settings, isinstance(model, SentenceTransformer)
    scores = TeacherScores(stage.vectors, stage.examples.rows) if stage.vectors else None
    loss, wants_numbers = make_loss(model, config, scores=scores, processes=processes)
    columns: dict[str, Any] = dict(stage.examples.columns)
    if wants_numbers:
        columns["label"] = list(range(len(stage.examples.rows)))
    prompts = {"anchor": model.prompts.get("query", ""), "positive": model.prompts.get("document", "")}
    prompts |= {name: prompts["positive"] for name in columns if name.startswith("negative")}
    model.max_seq_length = config.max_tokens or max_tokens
    model[0].query_length = config.max_query_tokens or query_tokens
    on_cuda = model.device.type == "cuda"
    arguments = (DenseArguments if dense else LateInteractionArguments)(
        output_dir=str(folder),
        max_steps=stage.steps,
        per_device_train_batch_size=config.batch_size // processes,
        learning_rate=config.learning_rate,
        warmup_steps=min(config.warmup_steps, stage.steps),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        lr_scheduler_type="linear",
        optim="adamw_torch_fused",
        bf16=config.dtype == "bfloat16",
        fp16=config.dtype == "float16",
        activation_checkpointing=gradient_checkpointing,
        use_cpu=not on_cuda,
        ddp_backend=None if on_cuda or processes == 1 else "gloo",
        seed=seed,
        data_seed=seed,
        prompts={name: text for name, text in prompts.items() if text} or None,
        router_mapping={"anchor": "query"} if model[0].query_length and dense else None,
        eval_strategy="steps" if dev else "no",
        eval_steps=config.eval_every_steps,
        save_strategy="steps",
        save_steps=checkpoint_every,
        save_total_limit=1,
        logging_steps=1,  # the trainer's means over several steps would differ after a resume
        logging_nan_inf_filter=False,  # a NaN must be seen, not averaged away
        report_to="none",
        disable_tqdm=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=on_cuda,
    )
    trainer: Any = (DenseTrainer if dense else LateInteractionTrainer)(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict(columns),
        loss=loss,
        evaluator=dev_evaluator(dev, model, config.batch_size) if dev else None,
        callbacks=[recorder],
        examples=stage.examples,
        where=where,
    )
    trainer.remove_callback(PrinterCallback)  # stdout belongs to the result
    recorder.broken = trainer.broken
    return trainer


class _Progress:
    """Steps and examples of this process, over all stages."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.resumed_from = 0
        self.started: float | None = None
        self.begun = self.finished = 0.0
        self.examples = 0
        self.intervals: list[float] = []

    def step_began(self) -> None:
        """Note when a step began: after the batch was fetched, the last evaluation and the last checkpoint."""
        self.begun = time.perf_counter()
        if self.started is None:
            self.started = self.begun

    def step_ended(self, examples: int) -> None:
        """Count a step of so many examples."""
        self.finished = time.perf_counter()
        if self.examples:  # the first one warms up
            self.intervals.append(self.finished - self.begun)
        self.examples += examples

    def seconds_per_step(self) -> float:
        """Median time of a step."""
        return statistics.median(self.intervals) if self.intervals else 0.0

    def rate(self) -> float:
        """Examples per second since this process took its first step."""
        if self.started is None or not self.examples:
            return 0.0
        return self.examples / max(self.finished - self.started, 1e-9)


class _Recorder(TrainerCallback):
    """Logs one stage, watches for broken gradients and carries every checkpoint to storage."""

    def __init__(
        self,
        progress: _Progress,
        before: int,
        steps: int,
        earlier: list[Entry],
        checkpoints: Checkpoints,
        on_log: Callable[[int, Mapping[str, float]], None],
        *,
        last: bool,
    ) -> None:
        self.progress, self.before, self.steps, self.earlier = progress, before, steps, earlier
        self.checkpoints, self.report, self.last = checkpoints, on_log, last
        self.broken: Callable[[str, int], Exception] = lambda what, step: RuntimeError(f"{what} in step {step}")

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.step_began()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.step_ended(args.train_batch_size * args.world_size)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        entry = _entry({**(logs or {}), "step": state.global_step})
        within = int(entry.pop("step"))
        if not entry:
            return
        if not args.fp16 and not math.isfinite(entry.get("grad_norm", 0.0)):  # float16 steps over such gradients
            raise self.broken(f"the gradient became {entry['grad_norm']}", within)
        if not state.is_world_process_zero:
            return
        step, rate = self.before + within, self.progress.rate()
        if "loss" in entry and step % SHOW_EVERY == 0:
            left = (self.progress.steps - step) * args.train_batch_size * args.world_size / rate if rate else 0.0
            log.info(
                "step %d/%d · loss %.4f · lr %.2e · %.0f examples/s · %.0f s left",
                step,
                self.progress.steps,
                entry["loss"],
                entry.get("learning_rate", 0),
                rate,
                left,
            )
        if "dev_ndcg_at_10" in entry:
            log.info("step %d/%d · dev nDCG@10 %.4f", step, self.progress.steps, entry["dev_ndcg_at_10"])
        if step % SHOW_EVERY == 0 or step == self.progress.steps or "dev_ndcg_at_10" in entry:
            self.report(step, {**entry, "examples_per_s": rate})

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.last and state.global_step == self.steps:
            return  # that is the model itself
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        _gather_random_states(folder)
        if state.is_world_process_zero:
            (folder / EARLIER).write_text(json.dumps(self.earlier), encoding="utf-8")
            self.checkpoints.save(folder, self.before + state.global_step)
        _barrier()


def _gather_random_states(folder: Path) -> None:
    """Bring every process's random state, which it has just written to its own folder, to the first one's."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, (folder / RANDOM_STATE.format(dist.get_rank())).read_bytes())
    for rank, state in enumerate(states):
        (folder / RANDOM_STATE.format(rank)).write_bytes(state)


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _entries(state: Path, before: int) -> list[Entry]:
    return _offset(json.loads(state.read_text(encoding="utf-8"))["log_history"], before)


def _offset(history: Sequence[Mapping[str, Any]], before: int) -> list[Entry]:
    """A stage's log with steps counted through all stages."""
    found = [e for e in map(_entry, history) if len(e) > 1]
    return [{**e, "step": e["step"] + before} for e in found]


def _entry(raw: Mapping[str, Any]) -> Entry:
    """The deterministic part of a log entry: no seconds, no rates."""
    values = {}
    for key, value in raw.items():
        name = "dev_ndcg_at_10" if key.endswith("ndcg@10") else key
        if name in LOGGED or name == "step":
            values[name] = round(float(value), 6)
    return values


def write_log(entries: list[Entry], path: Path) -> None:
    """One JSON object per line."""
    path.write_text("".join(json.dumps(e, sort_keys=True) + "\n" for e in entries), encoding="utf-8")
