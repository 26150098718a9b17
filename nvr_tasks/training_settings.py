"""Settings of training: the student, its surgery, and the stages it is trained in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from nvr_tasks.settings import Closed, Dtype, ImagePixels, ModelRef, Name, Prompts, refuse_twice

DEFAULT_STEPS = 200
Dimension = Annotated[int, Field(ge=1, le=65536)]


# ── the student ──────────────────────────────────────────────────────────────────────────────────────────────────


class Lora(Closed):
    """Low-rank adapters (PEFT) that are trained instead of the weights, and merged into them when the model is saved."""

    rank: int = Field(16, ge=1, le=1024, description="r: rank of every adapter.")
    alpha: float = Field(32, gt=0, le=10000, description="α: an adapter's output is scaled by α / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before every adapter.")
    targets: tuple[str, ...] | None = Field(
        None, min_length=1, description="Names of the linear layers that get an adapter (q_proj, …); all by default."
    )


class LatentAttention(Closed):
    """Pooling of NV-Embed (arXiv:2405.17428 §3.1): every token attends to trained latents, then an MLP, then the mean."""

    latents: int = Field(512, ge=1, le=65536, description="Trained latent vectors.")
    heads: int = Field(8, ge=1, le=1024, description="Attention heads; they divide the model's width.")


class LateInteraction(Closed):
    """One vector per token, scored by MaxSim (ColBERT, arXiv:2004.12832)."""

    dim: int = Field(128, ge=1, le=65536, description="Width of the token vectors; a projection is added if need be.")


class Student(Closed):
    """The model that is trained."""

    model: ModelRef = Field(description="The weights that training starts from.")
    layers: int | None = Field(None, ge=1, le=1000, description="Keep only the first n transformer layers.")
    prompts: Prompts = Prompts()
    max_tokens: int = Field(256, ge=8, le=131072, description="Longest input in tokens, prompt included.")
    max_query_tokens: int | None = Field(None, ge=8, le=131072, description="The same for queries, if it differs.")
    bidirectional: bool = Field(False, description="Let every token of a decoder attend to later ones, too.")
    pooling: Literal["mean", "cls", "lasttoken"] | None = Field(
        None,
        description="How token states become one vector; as the model's folder says (mean if it does not) if unset.",
    )
    pool_prompt: bool = Field(
        True, description="False: tokens of the prompt are attended to, but left out of pooling (arXiv:2407.15831 §4)."
    )
    latent_attention: LatentAttention | None = Field(None, description="Attend to trained latents before pooling.")
    late_interaction: LateInteraction | None = Field(None, description="Train a multi-vector model (MaxSim).")
    lora: Lora | None = Field(None, description="Train low-rank adapters instead of all weights.")
    image_pixels: ImagePixels = None
    weights_dtype: Dtype = Field(
        "float32",
        description="Type the weights are kept in. bfloat16 halves the memory and suits adapters, which stay float32.",
    )

    @model_validator(mode="after")
    def _one_head(self) -> Student:
        if self.late_interaction is not None:
            beside = [n for n in ("pooling", "latent_attention") if getattr(self, n) is not None]
            if beside or not self.pool_prompt:
                raise ValueError(
                    f"late_interaction keeps every token vector, so {', '.join(beside) or 'pool_prompt'} has no meaning "
                    "beside it; remove one of them"
                )
        return self


# ── stages ───────────────────────────────────────────────────────────────────────────────────────────────────────


class FalseNegatives(Closed):
    """Which negatives of a batch are left out of the loss, by the teacher's scores (arXiv:2402.16829, with a margin).

    The same rule as in mining: a passage counts as a negative of a query only if its score is below the ceiling that
    the query's positive sets.
    """

    margin: Literal["absolute", "relative"] = Field(
        "relative", description="absolute: s < s⁺ − value; relative: s < s⁺ − |s⁺|·value."
    )
    value: float = Field(0.05, ge=0, le=1, description="The margin; 0 leaves out what scores at least as the positive.")


class StageSettings(Closed):
    """Settings of one training stage; given beside `train.stages`, the defaults of all stages."""

    steps: int | None = Field(
        None, ge=1, description=f"Optimizer steps; {DEFAULT_STEPS} if neither steps nor epochs are given."
    )
    epochs: float | None = Field(None, gt=0, le=10000, description="Passes over the stage's queries, instead of steps.")
    batch_size: int = Field(
        32, ge=2, le=65536, description="(query, positive) pairs per optimizer step, over all GPUs."
    )
    max_tokens: int | None = Field(
        None,
        ge=8,
        le=131072,
        description="Training texts are cut here, in tokens; the student's own longest input if unset.",
    )
    max_query_tokens: int | None = Field(None, ge=8, le=131072, description="The same for queries, if it differs.")
    hard_negatives: int = Field(1, ge=0, le=64, description="Mined negatives per query in the loss.")
    choice: Literal["best", "drawn"] = Field(
        "best", description="best: the hardest of the mined negatives, always; drawn: others of them in every pass."
    )
    min_positive_score: float | None = Field(
        None,
        description="Positives that the teacher scores lower, on its scale, are left out, but for each query's best one; null: all "
        "are trained on.",
    )
    in_batch_negatives: bool = Field(
        True, description="False: a query's negatives are its own mined ones only, as NV-Embed trains its second stage."
    )
    false_negatives: FalseNegatives | None = Field(
        None, description="Leave likely positives among a batch's negatives out of the loss."
    )
    sources: Mapping[Name, Annotated[float, Field(gt=0, le=1e9)]] = Field(
        default_factory=dict,
        description="Data sources trained on → weight: how often their queries come. By default all, each as often as it "
        "has queries.",
    )
    batches: Literal["mixed", "homogeneous"] = Field(
        "mixed", description="homogeneous: all queries of a batch are of one source."
    )
    learning_rate: float = Field(1e-4, gt=0, le=1, description="Peak learning rate of AdamW.")
    warmup_steps: int = Field(20, ge=0, description="Linear warm-up, then linear decay to zero.")
    weight_decay: float = Field(0.01, ge=0, le=1, description="Weight decay of AdamW.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradient clipping.")
    dropout: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Dropout of the student, its adapters aside, where its layers have one; as its config says if unset. 0 is a fifth "
        "faster on a CPU.",
    )
    temperature: float = Field(0.05, gt=0, le=10, description="τ of InfoNCE over cosine similarity.")
    matryoshka_dims: tuple[Dimension, ...] = Field(
        (),
        description="Train the first n dimensions, for each of these n, to be vectors of their own (arXiv:2205.13147); the widest n "
        "is the student's whole width.",
    )
    cached_batch: int | None = Field(
        None,
        ge=1,
        le=65536,
        description="Gradient caching (arXiv:2101.06983): pairs in memory at a time; the batch may then be of any size.",
    )
    dtype: Dtype = Field("float32", description="float32, or mixed precision (autocast) in the other type.")
    eval_every_steps: int = Field(50, ge=1, description="Dev nDCG@10 every n steps.")

    @model_validator(mode="after")
    def _consistent(self) -> StageSettings:
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                f"steps is {self.steps} and epochs {self.epochs:g}: give one of them, and null for the other"
            )
        if not self.in_batch_negatives and self.hard_negatives == 0:
            raise ValueError("no negatives at all: in_batch_negatives is false and hard_negatives 0")
        refuse_twice("matryoshka_dims", [str(d) for d in self.matryoshka_dims])
        return self


FLAT = tuple(StageSettings.model_fields)


class TrainingStage(StageSettings):
    """One stage of training; it starts from the weights that the one before left, with an optimizer of its own."""

    name: Name = Field("train", description="Name of the stage in logs and records.")


class Train(StageSettings):
    """Contrastive fine-tuning with InfoNCE over in-batch and mined negatives, in one stage or several."""

    student: Student
    stages: tuple[TrainingStage, ...] = Field(
        (),
        description="Stages, in their order. Settings of `train` that a stage does not have itself apply to it, too.",
    )

    @model_validator(mode="before")
    @classmethod
    def _shared(cls, given: Any) -> Any:
        """Hand the settings given beside `stages` down to the stages that have none of their own."""
        if not isinstance(given, dict):
            return given
        if not given.get("stages"):
            return _with_length(given)
        stages = given["stages"]
        if not isinstance(stages, list | tuple) or not all(isinstance(s, dict) for s in stages):
            return given  # for pydantic to refuse
        shared = {name: value for name, value in given.items() if name in FLAT}
        for name in shared:
            own = {"steps", "epochs"} if name in ("steps", "epochs") else {name}
            if all(own & set(stage) for stage in stages):
                raise ValueError(
                    f"{name} is given for all stages, but every stage has its own: change train.stages.0.{name} …, or remove them"
                )
        merged = [_with_length(_inherit(shared, stage)) for stage in stages]
        return {**{k: v for k, v in given.items() if k not in FLAT}, "stages": merged}

    @model_validator(mode="after")
    def _supported(self) -> Train:
        refuse_twice("train.stages.name", [s.name for s in self.stages])
        if self.student.late_interaction is not None:
            for stage in self.schedule:
                unsupported = [
                    name
                    for name, used in {
                        "in_batch_negatives: false": not stage.in_batch_negatives,
                        "false_negatives": stage.false_negatives is not None,
                        "matryoshka_dims": bool(stage.matryoshka_dims),
                    }.items()
                    if used
                ]
                if unsupported:
                    raise ValueError(
                        f"stage {stage.name}: {', '.join(unsupported)} cannot be combined with student.late_interaction yet; "
                        "remove it"
                    )
        return self

    @model_serializer(mode="wrap")
    def _flat_or_staged(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """With stages, they say it all; what was given beside them has gone into them."""
        tree: dict[str, Any] = dump(self)
        return {k: v for k, v in tree.items() if k not in FLAT} if self.stages else tree

    @property
    def schedule(self) -> tuple[TrainingStage, ...]:
        """The stages in force: those given, or the one that the flat settings describe."""
        return self.stages or (TrainingStage(**{name: getattr(self, name) for name in FLAT}),)


def sources_of(stages: Sequence[StageSettings]) -> frozenset[str]:
    """The sources that stages train on; empty: all that there are."""
    named = [stage.sources for stage in stages]
    return frozenset(name for sources in named for name in sources) if all(named) else frozenset()


def _inherit(shared: Mapping[str, Any], stage: Mapping[str, Any]) -> dict[str, Any]:
    own_length = "steps" in stage or "epochs" in stage
    return {**{k: v for k, v in shared.items() if not (own_length and k in ("steps", "epochs"))}, **stage}


def _with_length(given: Mapping[str, Any]) -> dict[str, Any]:
    """With the default number of steps when neither steps nor epochs are given."""
    if given.get("steps") is None and given.get("epochs") is None:
        return {**given, "steps": DEFAULT_STEPS}
    return dict(given)


# Settings that came later than the first recipes. At their defaults they change nothing, so they are left out of
# identities: whoever adds one need not train every model again.
LATER = {
    "epochs", "max_query_tokens", "choice", "in_batch_negatives", "false_negatives", "sources", "batches",
    "matryoshka_dims", "cached_batch", "stages", "dropout", "min_positive_score",
    "bidirectional", "pooling", "pool_prompt", "latent_attention", "late_interaction", "lora", "weights_dtype", "image_pixels",
}  # fmt: skip


def identity_of(settings: StageSettings | Student, **options: Any) -> dict[str, Any]:
    """Settings as part of an artefact's identity: plain values, later additions only where they differ from the default."""
    dumped = settings.model_dump(mode="json", **options)
    fields = type(settings).model_fields
    return {
        name: value
        for name, value in dumped.items()
        if name not in LATER or getattr(settings, name) != fields[name].get_default(call_default_factory=True)
    }
