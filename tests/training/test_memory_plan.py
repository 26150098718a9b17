"""The counted memory of a training step is what real tensors take, where it can be seen: a small student on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tiny_students as tiny
import torch  # noqa: TID253
from torch.profiler import ProfilerActivity, profile  # noqa: TID253
from transformers import MistralConfig  # noqa: TID253

from nvr_tasks.training_settings import LatentAttention, Lora

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "bench"))
import memory

TOLERANCE = 0.08  # of the peak: the worst seen is 5.7 % too much, with adapters and checkpointing


def shape() -> MistralConfig:
    return MistralConfig(
        vocab_size=1000,
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=256,
    )


def test_layers_are_alike() -> None:
    student, stage = tiny.student("mistral", lora=Lora(rank=4)), tiny.stage(batch_size=8)
    longer = shape()
    longer.num_hidden_layers = 5
    extended = memory.extended(longer, student, stage, checkpointing=True)
    assert extended == memory.count(longer, student, stage, checkpointing=True)


def really_used(student: memory.Student, stage: memory.TrainingStage, checkpointing: bool) -> memory.Counted:
    """The same two steps on real tensors: sizes of what is there, and the peak of what torch's allocator gave out."""
    model = memory.student_of(shape(), student)
    held = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    watch = memory.Watch(None)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        memory.train_two_steps(model, student, stage, watch, checkpointing=checkpointing)
    events = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    peak = now = held
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return memory.Counted(*memory.sizes(model), watch.optimizer, watch.gradients, peak)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
def test_counted_is_what_is_used(adapted: bool, checkpointing: bool) -> None:
    extra = {"lora": Lora(rank=4, dropout=0.1), "weights_dtype": "bfloat16"} if adapted else {}
    student = tiny.student(
        "mistral", bidirectional=True, pool_prompt=False, latent_attention=LatentAttention(latents=16, heads=4), **extra
    )
    stage = tiny.stage(batch_size=16, hard_negatives=3, dtype="bfloat16" if adapted else "float32")
    counted = memory.count(shape(), student, stage, checkpointing=checkpointing)
    used = really_used(student, stage, checkpointing)
    for what in ("frozen", "trained", "optimizer", "gradients"):
        assert getattr(counted, what) == getattr(used, what), what
    assert counted.gradients == counted.trained
    assert counted.optimizer == pytest.approx(2 * counted.trained, rel=1e-3), "AdamW's two moments, and a step each"
    assert counted.peak == pytest.approx(used.peak, rel=TOLERANCE)
    assert torch.get_default_dtype() is torch.float32
