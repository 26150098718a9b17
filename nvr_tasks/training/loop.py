"""The training loop: sentence-transformers' trainer, InfoNCE, our batches, resumable from storage."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch  # noqa: TID253 - this module owns the training loop; only train.build imports it
from datasets import Dataset  # noqa: TID253
from sentence_transformers import (  # noqa: TID253
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.sampler import DefaultBatchSampler  # noqa: TID253
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator  # noqa: TID253
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss  # noqa: TID253
from transformers import PrinterCallback, TrainerCallback  # noqa: TID253

from nvr_tasks.config import Train
from nvr_tasks.errors import NvrError
from nvr_tasks.training.checkpoints import Checkpoints

log = logging.getLogger(__name__)

LOGGED = ("loss", "learning_rate", "grad_norm", "dev_ndcg_at_10")
SHOW_EVERY = 10  # steps between lines for people and batches for MLflow


@dataclass(frozen=True)
class Examples:
    """Training data in training order.

    Attributes:
        columns: anchor, positive, negative_1 … negative_n, one text per example.
        batches: indices of the examples of each batch; one batch = one optimizer step.
    """

    columns: dict[str, list[str]]
    batches: list[list[int]]


@dataclass(frozen=True)
class DevSet:
    """Held-out queries with the passages they are searched in."""

    queries: dict[str, Any]  # text; the library's type admits images and more
    corpus: dict[str, Any]
    relevant: dict[str, set[str]]


@dataclass(frozen=True)
class Outcome:
    """What training leaves beside the model: one entry per logged step, and the rate of this process."""

    log: list[dict[str, float]]
    examples_per_s: float
    resumed_from: int


def train_model(
    model: SentenceTransformer,
    examples: Examples,
    dev: DevSet | None,
    config: Train,
    *,
    seed: int,
    checkpoint_every: int,
    checkpoints: Checkpoints,
    folder: Path,
    on_log: Callable[[int, Mapping[str, float]], None],
) -> Outcome:
    """Fine-tune `model` in place with InfoNCE at temperature τ over in-batch and mined negatives.

    Args:
        folder: scratch folder for the trainer's own files.
        on_log: called with (step, values) as they are logged.

    Raises:
        NvrError: the loss is not finite.
    """
    prompts = {"anchor": model.prompts.get("query", ""), "positive": model.prompts.get("document", "")}
    prompts |= {name: prompts["positive"] for name in examples.columns if name.startswith("negative")}
    on_cuda = model.device.type == "cuda"
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        warmup_steps=min(config.warmup_steps, config.steps),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        lr_scheduler_type="linear",
        optim="adamw_torch",
        bf16=config.dtype == "bfloat16",
        fp16=config.dtype == "float16",
        use_cpu=not on_cuda,
        seed=seed,
        data_seed=seed,
        prompts={name: text for name, text in prompts.items() if text} or None,
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
    recorder = _Recorder(config.steps, checkpoints, on_log)
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict(examples.columns),
        loss=MultipleNegativesRankingLoss(model, scale=1 / config.temperature),
        evaluator=_evaluator(dev, model, config) if dev else None,
        callbacks=[recorder],
        batches=examples.batches,
    )
    trainer.remove_callback(PrinterCallback)  # stdout belongs to the result
    resume = checkpoints.restore(folder)
    if resume is not None:
        recorder.resumed_from = int(resume.name.removeprefix("checkpoint-"))
        log.info("resuming from the checkpoint of step %d", recorder.resumed_from)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    entries = [e for e in map(_entry, trainer.state.log_history) if len(e) > 1]
    return Outcome(entries, recorder.rate(config.batch_size), recorder.resumed_from)


class _Trainer(SentenceTransformerTrainer):
    """The library's trainer, fed with batches that were composed beforehand."""

    def __init__(self, *args: Any, batches: list[list[int]], **kwargs: Any) -> None:
        self._batches = batches
        super().__init__(*args, **kwargs)

    def get_batch_sampler(self, dataset: Any, batch_size: int, *_: Any, **__: Any) -> Any:
        return _Batches(dataset, batch_size, self._batches)

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """No automatic card: it asks the hub, measures energy and dates itself; ours is written from the lineage."""


class _Batches(DefaultBatchSampler):
    """A batch sampler that plays given batches in order; the trainer resumes by skipping the first ones."""

    def __init__(self, dataset: Any, batch_size: int, batches: list[list[int]]) -> None:
        super().__init__(torch.utils.data.SequentialSampler(dataset), batch_size=batch_size, drop_last=False)
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _Recorder(TrainerCallback):
    """Logs, watches for a broken loss and carries every checkpoint to storage."""

    def __init__(
        self, steps: int, checkpoints: Checkpoints, on_log: Callable[[int, Mapping[str, float]], None]
    ) -> None:
        self.steps, self.checkpoints, self.report = steps, checkpoints, on_log
        self.resumed_from = 0
        self.started: float | None = None
        self.finished = 0.0
        self.last_step = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.started is None:
            self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.finished, self.last_step = time.perf_counter(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        entry = _entry({**(logs or {}), "step": state.global_step})
        step = int(entry.pop("step"))
        if not entry:
            return
        loss = entry.get("loss", 0.0)
        if not math.isfinite(loss):
            raise NvrError(
                f"the training loss became {loss} by step {step}: lower train.learning_rate, or use dtype float32; "
                "the last good checkpoint is kept"
            )
        rate = self.rate(args.train_batch_size)
        if "loss" in entry and step % SHOW_EVERY == 0:
            left = (self.steps - step) * args.train_batch_size / rate if rate else 0.0
            log.info(
                "step %d/%d · loss %.4f · lr %.2e · %.0f examples/s · %.0f s left",
                step,
                self.steps,
                loss,
                entry.get("learning_rate", 0),
                rate,
                left,
            )
        if "dev_ndcg_at_10" in entry:
            log.info("step %d/%d · dev nDCG@10 %.4f", step, self.steps, entry["dev_ndcg_at_10"])
        if step % SHOW_EVERY == 0 or step == self.steps or "dev_ndcg_at_10" in entry:
            self.report(step, {**entry, "examples_per_s": rate})

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.global_step < self.steps:  # the last one is the model itself
            self.checkpoints.save(folder, state.global_step)

    def rate(self, batch_size: int) -> float:
        """Examples per second since this process took its first step."""
        done = self.last_step - self.resumed_from
        if self.started is None or done <= 0:
            return 0.0
        return done * batch_size / max(self.finished - self.started, 1e-9)


def _evaluator(dev: DevSet, model: SentenceTransformer, config: Train) -> InformationRetrievalEvaluator:
    return InformationRetrievalEvaluator(
        dev.queries,
        dev.corpus,
        dev.relevant,
        name="dev",
        batch_size=config.batch_size,
        write_csv=False,
        show_progress_bar=False,
        query_prompt=model.prompts.get("query") or None,
        corpus_prompt=model.prompts.get("document") or None,
    )


def _entry(raw: Mapping[str, Any]) -> dict[str, float]:
    """The deterministic part of a log entry: no seconds, no rates."""
    values = {}
    for key, value in raw.items():
        name = "dev_ndcg_at_10" if key.endswith("cosine_ndcg@10") else key
        if name in LOGGED or name == "step":
            values[name] = round(float(value), 6)
    return values


def write_log(entries: list[dict[str, float]], path: Path) -> None:
    """One JSON object per line."""
    path.write_text("".join(json.dumps(e, sort_keys=True) + "\n" for e in entries), encoding="utf-8")
