"""sentence-transformers' trainers with batches that were composed beforehand, a watch on the loss, and lean checkpoints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch  # noqa: TID253 - only the training loop imports this module
from sentence_transformers import (  # noqa: TID253
    MultiVectorEncoderTrainer,
    MultiVectorEncoderTrainingArguments,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.sampler import DefaultBatchSampler  # noqa: TID253
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME  # noqa: TID253

from nvr_tasks.errors import NvrError
from nvr_tasks.training import sharding, weights
from nvr_tasks.training.examples import Examples

SHOWN_QUERIES = 8


class _OneGpu:
    """A process has one GPU, however many it sees; a mixin that comes before the library's arguments.

    Without it the trainer puts a replica on each GPU (nn.DataParallel), with a batch of its own.
    """

    n_gpu = 1


class DenseArguments(_OneGpu, SentenceTransformerTrainingArguments):
    """For `DenseTrainer`."""


class LateInteractionArguments(_OneGpu, MultiVectorEncoderTrainingArguments):
    """For `LateInteractionTrainer`."""


class _Composed:
    """What both trainers add to the library's; a mixin that comes before it."""

    model: Any
    args: Any
    state: Any
    optimizer: Any
    lr_scheduler: Any
    is_fsdp_enabled: bool

    def __init__(self, *args: Any, examples: Examples, where: str, **kwargs: Any) -> None:
        self._examples, self._where = examples, where
        super().__init__(*args, **kwargs)
        # The model brings its own sharding; told before, the trainer refuses to save, which it cannot do for such a model.
        self.is_distributed_loading_by_transformers = sharding.is_sharded(self.model)

    def get_batch_sampler(self, dataset: Any, batch_size: int, *_: Any, **__: Any) -> Any:
        """The composed batches; of each, every process gets its part."""
        return _Batches(dataset, batch_size, split(self._examples.batches, self.args.world_size))

    def get_data_collator(self, *args: Any, **kwargs: Any) -> Any:
        """The library's, for columns that say where a text is, and for queries with prompts of their own."""
        collator = super().get_data_collator(*args, **kwargs)  # type: ignore[misc]
        preprocess, texts, prompts = collator.preprocess_fn, self._examples.texts, self._examples.prompts

        def refused(given: Any, **more: Any) -> bool:
            try:
                preprocess([given], **more)
            except ValueError:
                return True
            return False

        def of_numbers(numbers: Sequence[int], *, prompt: str | None = None, **more: Any) -> Any:
            found = [texts[n] for n in numbers]
            if numbers[0] < len(prompts):  # queries come first
                own = [prompts[n] for n in numbers]
                prompt = own[0]  # as the prompt of the batch, so that the library knows what not to pool
                if len(set(own)) > 1:  # it is pooled, or the recipe would have been refused
                    found, prompt = [_put_before(p, text) for p, text in zip(own, found, strict=True)], None
            try:
                return preprocess(found, prompt=prompt, **more)
            except ValueError as error:
                if not any(isinstance(text, dict) for text in found):
                    raise
                alone = [n for n, one in zip(numbers, found, strict=True) if refused(one, prompt=prompt, **more)]
                which = f"{self._examples.names[alone[0]]} in " if alone else ""
                raise NvrError(
                    f"{which}a batch{self._where} cannot be given to the student: {error}; if an image takes more tokens than it may, raise "
                    "train.student.max_tokens and the stage's max_tokens"
                ) from error

        collator.preprocess_fn = of_numbers
        return collator

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """No automatic card: it asks the hub, measures energy and dates itself; ours is written from the lineage."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One step; a loss that is not finite ends training before the optimizer sees its gradient."""
        loss: torch.Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if not math.isfinite(loss.item()):
            raise self.broken(f"the training loss became {loss.item()}", self.state.global_step + 1)
        return loss

    def broken(self, what: str, step: int) -> NvrError:
        """The error for a step that cannot be gone on from; `step` counts from 1 within the stage."""
        batch = self._examples.batches[step - 1]
        asked = self._examples.columns["anchor"]
        ids = list(dict.fromkeys(self._examples.names[asked[i]] for i in batch))
        more = f" and {len(ids) - SHOWN_QUERIES} more" if len(ids) > SHOWN_QUERIES else ""
        return NvrError(
            f"{what} in step {step}{self._where}, whose batch has the queries {', '.join(ids[:SHOWN_QUERIES])}{more}: "
            "lower learning_rate, or use dtype float32; the last good checkpoint is kept"
        )

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Of a sharded model every process evaluates all: each forward pass needs them all, in one order."""
        self.is_fsdp_enabled = sharding.is_sharded(self.model)
        try:
            return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.is_fsdp_enabled = False

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        if sharding.is_sharded(self.model):  # what was written has this process's part alone
            states = sharding.whole_states(self.optimizer)
            if self.args.should_save:
                torch.save(states, Path(output_dir, OPTIMIZER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not sharding.is_sharded(self.model):
            return super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc,no-any-return]
        given = torch.load(Path(checkpoint, OPTIMIZER_NAME), map_location="cpu", weights_only=True)
        sharding.load_states(self.optimizer, given)
        schedule = torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True)
        return self.lr_scheduler.load_state_dict(schedule)  # type: ignore[no-any-return]

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        weights.save(self.model, Path(output_dir or self.args.output_dir) if self.args.should_save else None)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        weights.load(self.model, Path(resume_from_checkpoint))


class DenseTrainer(_Composed, SentenceTransformerTrainer):
    """For models with one vector per text."""


class LateInteractionTrainer(_Composed, MultiVectorEncoderTrainer):
    """For models with one vector per token."""


def _put_before(prompt: str, given: Any) -> Any:
    """A text with a prompt, whether it stands alone or beside an image or sound."""
    return prompt + given if isinstance(given, str) else {**given, "text": prompt + given.get("text", "")}


def split(batches: list[list[int]], processes: int) -> list[list[int]]:
    """Batches cut into one part per process, all of one length, in the order of the processes, which divide them evenly."""
    parts = []
    for batch in batches:
        size = len(batch) // processes
        parts += [batch[i * size : (i + 1) * size] for i in range(processes)]
    return parts


class _Batches(DefaultBatchSampler):
    """A batch sampler that plays given batches in order; the trainer resumes by skipping the first ones.

    Of n processes, accelerate lets each take every n-th of them.
    """

    def __init__(self, dataset: Any, batch_size: int, batches: list[list[int]]) -> None:
        super().__init__(torch.utils.data.SequentialSampler(dataset), batch_size=batch_size, drop_last=False)
        self.batches = batches
        self.batch_size = None  # type: ignore[assignment] # or accelerate would skip batches that are shorter than that

    def __iter__(self) -> Any:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)
