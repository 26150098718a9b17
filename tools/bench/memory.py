"""What a training step of a recipe takes of a GPU's memory, counted without its weights and without a GPU: `make memory`.

The student is built, adapted and trained by the stages' own code, on tensors that have shapes and no content (torch's
FakeTensorMode); torch's MemTracker counts what is alive. Base models have their published shape and no published weight, so
nothing is downloaded. Every text is as long as the stage lets it be: the worst batch, not the usual one.

Two steps are counted, since the optimizer's states exist from the first one's end only. Attention is the CPU's flash kernel,
which keeps what the GPU's do (output and log-sum-exp). Not counted, and therefore added by hand: the buckets in which
DistributedDataParallel reduces gradients, one more copy of them. Not seen at all: the CUDA context and NCCL's buffers (about
1.5 GiB) and what the allocator loses to fragmentation.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import logging
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch  # noqa: TID253
from sentence_transformers import SentenceTransformer  # noqa: TID253
from sentence_transformers.sentence_transformer.modules import Pooling  # noqa: TID253
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: TID253
from torch.distributed._tools.mem_tracker import MemTracker  # noqa: TID253
from transformers import MistralConfig, MistralModel, TrainerCallback  # noqa: TID253

from nvr_tasks import surgery, tiny_models
from nvr_tasks.models import load_folder, prepared
from nvr_tasks.recipe_files import load_recipe
from nvr_tasks.settings import HubModel
from nvr_tasks.training.examples import Examples
from nvr_tasks.training.loop import StageData, make_trainer
from nvr_tasks.training_settings import Student, TrainingStage

GIB = 2**30
GPU_GIB = 80e9 / GIB  # what is sold as 80 GB; an H100 shows 79.6 GiB, an A100 79.2
# transformers' defaults are Mistral-7B-v0.1's published config: 32 layers of 4096, MLP 14336, 32 heads, 8 of keys, 32,000 pieces.
SHAPES: dict[str, Callable[[], MistralConfig]] = {"mistralai/Mistral-7B-v0.1": MistralConfig}
RECIPES = ("nv-embed-v2", "nv-retriever-v1")
STEPS = 2
FEW = 2  # layers


@dataclass(frozen=True)
class Counted:
    """Bytes.

    Attributes:
        frozen: weights that are not trained.
        trained: weights that are.
        optimizer: its states.
        gradients: of all trained weights, when the optimizer takes its step.
        peak: of all that is alive at the same time, buckets of several processes not included.
    """

    frozen: int
    trained: int
    optimizer: int
    gradients: int
    peak: int

    @property
    def activations(self) -> int:
        """What is alive at the peak besides weights and optimizer: activations, what is computed anew, gradients so far."""
        return self.peak - self.frozen - self.trained - self.optimizer

    @property
    def with_buckets(self) -> int:
        """The peak in one of several processes."""
        return self.peak + self.gradients


class _NoHook:
    def remove(self) -> None:
        """Nothing to remove."""


class Tracker(MemTracker):  # type: ignore[no-untyped-call]
    """torch's, for models with frozen weights, and with answers for code that asks a tensor without content for its value."""

    def _track_module_params_and_buffers(self, module: Any, install_grad_hooks: bool = True) -> tuple[int, int]:
        for parameter in module.parameters():
            if not parameter.requires_grad and parameter not in self._param_to_grad_hook_handles:
                self._param_to_grad_hook_handles[parameter] = (_NoHook(), _NoHook())  # a frozen one takes no hook
        counted: tuple[int, int] = super()._track_module_params_and_buffers(module, install_grad_hooks)
        return counted

    def _update_peak_stats(self, peak_state: Any) -> None:  # noqa: ARG002 - named as torch calls it
        """Of devices alone: torch's goes through all modules at each operation, hours for a 7B model."""
        for device, now in self._curr_mem_snap.items():
            if self._peak_mem.get(device, 0) < now["Total"]:
                self._peak_mem[device] = now["Total"]
                self._peak_mem_snap[device] = dict(now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:  # item(), bool(): a finite loss, no padding
            return 1.0 if args[0].is_floating_point() else 1
        return super().__torch_dispatch__(func, types, args, kwargs)  # type: ignore[no-untyped-call]

    def now(self, kind: str = "current") -> dict[str, int]:
        """Bytes by category on the one device there is."""
        [(_, snapshot)] = self.get_tracker_snapshot(kind).items()
        return {str(getattr(name, "value", name)): size for name, size in snapshot.items()}


class Watch(TrainerCallback):
    """Notes optimizer states and gradients where they are whole, and lets the tracker begin each step anew."""

    broken: Any = None

    def __init__(self, tracker: Tracker | None) -> None:
        self.tracker = tracker
        self.optimizer = self.gradients = 0

    def on_pre_optimizer_step(self, *_: Any, **kwargs: Any) -> None:
        """See TrainerCallback; after the backward pass."""
        grads = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        self.gradients = sum(g.numel() * g.element_size() for g in grads)

    def on_step_end(self, *_: Any, **kwargs: Any) -> None:
        """See TrainerCallback; after the optimizer's step."""
        states = [v for s in kwargs["optimizer"].state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        self.optimizer = sum(v.numel() * v.element_size() for v in states)
        if self.tracker is not None:
            self.tracker.reset_mod_stats()


def base_of(shape: MistralConfig, student: Student) -> SentenceTransformer:
    """A model of that shape with a tiny one's tokenizer; call it where tensors are fake."""
    frame = load_folder(tiny_models.folder_of("mistral"), "cpu")
    dtype: torch.dtype = getattr(torch, student.weights_dtype)
    shape.dtype = dtype
    with _default_dtype(dtype):
        frame[0].model = MistralModel(shape)
    return SentenceTransformer(modules=[frame[0], Pooling(shape.hidden_size, "mean")], device="cpu")


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def without_content() -> Iterator[FakeTensorMode]:
    """Tensors have no content within; nothing is moved, since all is on one device, and no attention is tried out."""

    def stay(module: Any, *wanted: Any, **_: Any) -> Any:
        for dtype in (w for w in wanted if isinstance(w, torch.dtype)):  # the library gives all modules the first one's
            for parameter in module.parameters():
                parameter.data = parameter.data.to(dtype)
        return module

    with (
        mock.patch.object(torch.nn.Module, "to", stay),
        mock.patch.object(SentenceTransformer, "to", stay),
        mock.patch.object(surgery, "sees_ahead", lambda _: True),
        FakeTensorMode(allow_non_fake_inputs=True) as mode,
    ):
        yield mode


def student_of(shape: MistralConfig, student: Student) -> SentenceTransformer:
    """The student as training has it, adapters included."""
    model = prepared(base_of(shape, student), student)
    if student.lora is not None:
        surgery.add_adapters(model, student.lora)
    return model


def train_two_steps(
    model: SentenceTransformer, student: Student, stage: TrainingStage, watch: Watch, *, checkpointing: bool
) -> None:
    """Two steps of the project's trainer with full-length texts; `stage.batch_size` is this process's part of the batch."""
    count = stage.batch_size
    text = "x " * (stage.max_tokens or student.max_tokens)
    names = ["anchor", "positive", *(f"negative_{i + 1}" for i in range(stage.hard_negatives))]
    rows = np.zeros((count, len(names)), dtype=np.int64)
    examples = Examples([text], ["q"], dict.fromkeys(names, rows[:, 0]), [list(range(count))] * STEPS, rows)
    with tempfile.TemporaryDirectory(prefix="nvr-memory-") as folder:
        trainer = make_trainer(
            model,
            StageData(stage.model_copy(update={"steps": STEPS, "epochs": None}), examples),
            None,
            watch,
            folder=Path(folder),
            seed=1,
            max_tokens=student.max_tokens,
            query_tokens=student.max_query_tokens,
            checkpoint_every=STEPS,
            gradient_checkpointing=checkpointing,
            processes=1,
            where="",
        )
        trainer.args.save_strategy = "no"
        trainer.train()


def sizes(model: Any) -> tuple[int, int]:
    """Bytes of frozen and of trained weights."""
    found = [(p.requires_grad, p.numel() * p.element_size()) for p in model.parameters()]
    return sum(size for trained, size in found if not trained), sum(size for trained, size in found if trained)


def count(shape: MistralConfig, student: Student, stage: TrainingStage, *, checkpointing: bool) -> Counted:
    """What two steps of a stage take in one process whose part of the batch is `stage.batch_size`."""
    tracker = Tracker()
    watch = Watch(tracker)
    with without_content():
        model = student_of(shape, student)
        tracker.track_external(model)
        with tracker:
            train_two_steps(model, student, stage, watch, checkpointing=checkpointing)
    return Counted(*sizes(model), watch.optimizer, watch.gradients, tracker.now("peak")["Total"])


def extended(shape: MistralConfig, student: Student, stage: TrainingStage, *, checkpointing: bool) -> Counted:
    """As `count`, from the model with few and with one more of its layers, which are all alike; minutes become seconds."""
    whole = shape.num_hidden_layers

    def with_layers(layers: int) -> dict[str, int]:
        cut = copy.deepcopy(shape)
        cut.num_hidden_layers = layers
        return asdict(count(cut, student, stage, checkpointing=checkpointing))

    few, more = with_layers(FEW), with_layers(FEW + 1)
    return Counted(**{name: size + (whole - FEW) * (more[name] - size) for name, size in few.items()})


def main() -> None:
    """Count, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipes", nargs="*", default=RECIPES, choices=RECIPES)
    parser.add_argument("--processes", type=int, nargs="*", help="other numbers of GPUs; by default as the recipe says")
    parser.add_argument("--no-checkpointing", action="store_true", help="count without gradient checkpointing, too")
    parser.add_argument("--cached-batch", type=int, nargs="*", default=[], help="count with gradient caching, too")
    parser.add_argument("--whole", action="store_true", help="count every layer instead of extending from two of them")
    args = parser.parse_args()
    counting = count if args.whole else extended
    logging.disable(logging.WARNING)
    print("| recipe, stage | GPUs | pairs × texts per GPU | variant | frozen | trained | optimizer | the rest | peak |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in args.recipes:
        recipe = load_recipe(name, [])
        student = recipe.student
        if not isinstance(student.model, HubModel):
            raise SystemExit(f"{name} starts from a model that is here already: train it, and look")
        shape = SHAPES[student.model.repo]
        usual = recipe.runtime.gradient_checkpointing
        for stage in recipe.train.schedule:
            for processes in args.processes or [recipe.runtime.processes]:
                own = stage.model_copy(update={"batch_size": stage.batch_size // processes})
                variants = [("as shipped", own, usual)]
                variants += [("no checkpointing", own, False)] * args.no_checkpointing
                variants += [
                    (f"cached_batch {n}", own.model_copy(update={"cached_batch": n}), usual) for n in args.cached_batch
                ]
                for label, settings, checkpointing in variants:
                    found = counting(shape(), student, settings, checkpointing=checkpointing)
                    if processes > 1:
                        found = replace(found, peak=found.with_buckets)
                    figures = (found.frozen, found.trained, found.optimizer, found.activations, found.peak)
                    print(
                        f"| {name}, {stage.name} | {processes} | {own.batch_size} × {2 + stage.hard_negatives} | {label} | "
                        + " | ".join(f"{figure / GIB:.1f}" for figure in figures)
                        + " |",
                        flush=True,
                    )
    print(f"\nGiB; a GPU of 80 GB has {GPU_GIB:.1f}.")


if __name__ == "__main__":
    main()
