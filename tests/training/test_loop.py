"""Stages end to end on tiny models: what is trained, resuming after a crash at any step, and losses that break."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import tiny_students as tiny
import torch  # noqa: TID253
from torch.optim.optimizer import register_optimizer_step_post_hook  # noqa: TID253
from transformers.models.mistral.modeling_mistral import MistralMLP  # noqa: TID253

from nvr_tasks.errors import NvrError
from nvr_tasks.storage import open_storage
from nvr_tasks.surgery import add_adapters, merge_adapters
from nvr_tasks.training import loop
from nvr_tasks.training.checkpoints import Checkpoints
from nvr_tasks.training.losses import TeacherVectors
from nvr_tasks.training.weights import trained
from nvr_tasks.training_settings import LateInteraction, LatentAttention, Lora, Student

SEED = 5
TWO_STAGES = (
    {"name": "one", "steps": 3, "warmup_steps": 1},
    {
        "name": "two",
        "steps": 4,
        "in_batch_negatives": False,
        "choice": "drawn",
        "cached_batch": 2,
        "matryoshka_dims": (32, 8),
        "false_negatives": {"margin": "relative", "value": 0.05},
    },
)
LATE = ({"name": "one", "steps": 3}, {"name": "two", "steps": 2, "cached_batch": 2})
STUDENTS: dict[str, tuple[Student, tuple[dict[str, Any], ...]]] = {
    "all weights": (tiny.student("bert"), TWO_STAGES),  # with dropout: the random state must come back
    "adapters": (
        tiny.student(
            "mistral",
            bidirectional=True,
            pool_prompt=False,
            prompts={"query": "find: "},
            latent_attention=LatentAttention(latents=4, heads=2),
            lora=Lora(rank=2, dropout=0.2),
        ),
        TWO_STAGES,
    ),
    "late interaction": (tiny.student("modernbert", late_interaction=LateInteraction(dim=8)), LATE),
}


class Crash(BaseException):
    """What a killed process leaves behind is what it had stored; nothing of it runs on."""


def data(settings: tuple[dict[str, Any], ...]) -> list[loop.StageData]:
    mined = tiny.mined()
    stages, vectors = [tiny.stage(**s) for s in settings], None
    if any(s.false_negatives for s in stages):
        guide = tiny.model("modernbert")
        vectors = TeacherVectors(
            guide.encode(list(mined.data.queries["text"]), normalize_embeddings=True),
            guide.encode(mined.data.passages(), normalize_embeddings=True),
        )
    return [
        loop.StageData(s, mined.examples(s, SEED + n), vectors if s.false_negatives else None)
        for n, s in enumerate(stages)
    ]


def train(
    student: Student, stages: list[loop.StageData], place: Path, every: int = 1, **more: Any
) -> tuple[dict[str, torch.Tensor], loop.Outcome, Any, Any]:
    torch.manual_seed(SEED)
    model = tiny.build_student(student, tiny.CPU)
    adapted = add_adapters(model, student.lora) if student.lora else None
    outcome = tiny.train(model, stages, place, seed=SEED, every=every, **more)
    return {name: tensor.clone() for name, tensor in trained(model).items()}, outcome, model, adapted


def crash_in(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """From now on training ends in the middle of this step, counted over all stages and processes."""
    taken = itertools.count(1)
    original = loop.DenseTrainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if next(taken) == step:
            raise Crash
        return original(self, *args, **kwargs)

    for trainer in (loop.DenseTrainer, loop.LateInteractionTrainer):
        monkeypatch.setattr(trainer, "training_step", training_step)


@pytest.mark.parametrize(
    ("kind", "crashes"),
    [  # steps between checkpoints (a stage's end has one, too), step of the crash, step to go on from
        ("all weights", [(1, 3, 2), (1, 4, 3), (2, 5, 3), (2, 7, 5), (3, 6, 3)]),
        ("adapters", [(1, 2, 1), (1, 4, 3), (2, 7, 5)]),
        ("late interaction", [(1, 2, 1), (1, 4, 3), (2, 5, 3)]),
    ],
)
def test_a_crash_at_any_step_changes_nothing(
    kind: str, crashes: list[tuple[int, int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, settings = STUDENTS[kind]
    stages = data(settings)
    undisturbed, outcome, _, _ = train(student, stages, tmp_path / "undisturbed", every=100)
    steps = sum(s.steps for s in stages)
    assert [e["step"] for e in outcome.log] == [float(s) for s in range(1, steps + 1)]
    for every, step, last in crashes:
        place = tmp_path / f"crash-{every}-{step}"
        with monkeypatch.context() as patched:
            crash_in(patched, step)
            with pytest.raises(Crash):
                train(student, stages, place, every=every)
        weights, again, _, _ = train(student, stages, place, every=every)
        assert again.resumed_from == last
        assert again.log == outcome.log, f"crash in step {step}"
        assert weights.keys() == undisturbed.keys()
        for name, tensor in weights.items():
            assert torch.equal(tensor, undisturbed[name]), f"{name} differs after a crash in step {step}"


def test_gradient_checkpointing_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the loss, nor a weight of the adapters, whose dropout is drawn once; but every layer runs a second time."""
    passes: list[int] = []
    original = MistralMLP.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        passes[-1] += self.training
        return original(self, *args, **kwargs)

    monkeypatch.setattr(MistralMLP, "forward", forward)
    stages, found = data(({"steps": 2, "warmup_steps": 0, "learning_rate": 1e-3},)), []
    for on in (False, True):
        passes.append(0)
        found.append(train(STUDENTS["adapters"][0], stages, tmp_path / str(on), gradient_checkpointing=on))
    assert passes[1] == 2 * passes[0] > 0
    (plain, outcome, *_), (again, other, *_) = found
    assert other.log == outcome.log
    for name, tensor in again.items():
        assert torch.equal(tensor, plain[name]), name


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [("float32", 1e-5), ("bfloat16", 2**-6)],  # four of the last places of a bfloat16 between 0.5 and 1
)
def test_adapters_alone_are_trained_and_merge_into_the_same_vectors(
    dtype: str, tolerance: float, tmp_path: Path
) -> None:
    student = STUDENTS["adapters"][0].model_copy(update={"weights_dtype": dtype})
    weights, _, model, adapted = train(student, data(({"steps": 4},)), tmp_path)
    assert all("lora_" in name or not name.startswith("0.") for name in weights)
    assert any("lora_B" in name and bool(tensor.abs().max() > 0) for name, tensor in weights.items())
    texts = ["what is a graph?", "vectors and matrices"]
    model.eval()

    def vectors() -> torch.Tensor:
        return model.encode(texts, prompt="find: ", convert_to_tensor=True, normalize_embeddings=True).float()

    apart = vectors()
    adapted.disable_adapter_layers()
    assert (vectors() - apart).abs().max() > 4 * tolerance, "the adapters do something"
    adapted.enable_adapter_layers()
    merge_adapters(model, adapted)
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
    assert (vectors() - apart).abs().max() < tolerance


def test_a_loss_that_breaks_names_its_batch_and_keeps_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = data(TWO_STAGES)
    original = loop.DenseTrainer.compute_loss
    taken = itertools.count(1)

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = original(self, *args, **kwargs)
        return loss * float("nan") if next(taken) == 5 else loss

    monkeypatch.setattr(loop.DenseTrainer, "compute_loss", compute_loss)
    batch = stages[1].examples.batches[1]
    named = ", ".join(stages[1].examples.ids[i] for i in batch)
    message = rf"loss became nan in step 2 of stage two, whose batch has the queries {named}: lower learning_rate"
    with pytest.raises(NvrError, match=message):
        train(STUDENTS["all weights"][0], stages, tmp_path)
    assert (
        Checkpoints(open_storage(str(tmp_path)), "abc").restore(tmp_path / "out") == tmp_path / "out" / "checkpoint-4"
    )


def test_weights_that_overflow_are_never_saved(tmp_path: Path) -> None:
    """The loss of the step was still finite: its update was too large, so the checkpoint after it must not be."""
    model = tiny.model()
    stages = data(({"steps": 3},))
    embeddings = next(iter(model.parameters())).data

    def overflow(*_: Any) -> None:
        embeddings.fill_(float("inf"))

    hook = register_optimizer_step_post_hook(overflow)
    try:
        with pytest.raises(NvrError, match="NaN or infinite weights: lower learning_rate"):
            tiny.train(model, stages, tmp_path, every=1)
    finally:
        hook.remove()
    assert Checkpoints(open_storage(str(tmp_path)), "abc").restore(tmp_path / "out") is None


@pytest.mark.parametrize("dims", [(16, 64), (16, 8)], ids=["too wide", "not the whole"])
def test_widths_of_any_stage_are_checked_before_the_first_step(dims: tuple[int, ...], tmp_path: Path) -> None:
    stages = data(({"name": "one", "steps": 2}, {"name": "two", "steps": 2, "matryoshka_dims": dims}))
    message = (
        rf"matryoshka_dims of stage two go up to {max(dims)}, but the student's vectors have 32 dimensions: give 32 and"
    )
    with pytest.raises(NvrError, match=message):
        tiny.train(tiny.model(), stages, tmp_path, every=1)
    assert not open_storage(str(tmp_path)).list("checkpoints"), "nothing was trained"


@pytest.mark.parametrize("late", [False, True], ids=["one vector", "late interaction"])
def test_a_process_trains_on_one_gpu_of_several(late: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer would put a replica on each, with a batch of its own."""
    kind = "LateInteractionArguments" if late else "DenseArguments"
    original, seen = getattr(loop, kind), []

    def among_two(**settings: Any) -> Any:
        with pytest.MonkeyPatch.context() as machine:
            machine.setattr("torch.cuda.device_count", lambda: 2)
            seen.append(original(**{**settings, "use_cpu": False}))  # from here on the trainer counts GPUs
        return seen[-1]

    monkeypatch.setattr(loop, kind, among_two)
    settings = {"late_interaction": LateInteraction(dim=8)} if late else {}
    tiny.train(tiny.model("modernbert", **settings), data(({"steps": 1},)), tmp_path)
    [arguments] = seen
    assert (arguments.n_gpu, arguments.train_batch_size, arguments.parallel_mode.name) == (1, 4, "NOT_PARALLEL")


def test_queries_are_cut_at_their_own_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    original = loop.DenseTrainer.compute_loss

    def compute_loss(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((inputs["anchor_input_ids"].shape[1], inputs["positive_input_ids"].shape[1]))
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(loop.DenseTrainer, "compute_loss", compute_loss)
    train(tiny.student(), data(({"steps": 2, "max_query_tokens": 8, "max_tokens": 11},)), tmp_path)
    assert seen == [(8, 11), (8, 11)]
