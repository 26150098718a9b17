"""Settings of data: where training data, benchmark and passages come from, and how they are cleaned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from nvr_tasks.settings import (
    INSTRUCTION,
    Closed,
    InstructedPrompts,
    Instruction,
    Name,
    Prompts,
    Revision,
    Sha256,
    refuse_twice,
)
from nvr_tasks.storage import refuse_secrets
from nvr_tasks.suites import expand


class BeirSource(Closed):
    """A data set in BEIR layout: corpus.jsonl[.gz], queries.jsonl[.gz], qrels/<split>.tsv."""

    type: Literal["beir"] = Field(description="A folder or archive in BEIR layout.")
    uri: str = Field(
        min_length=1, description="A folder, or file://, s3://, https:// of a folder (file, s3), .zip or .tar.gz."
    )
    sha256: Sha256 | None = Field(None, description="Digest of the archive; a download that differs is refused.")

    @field_validator("uri")
    @classmethod
    def _no_secret(cls, uri: str) -> str:
        refuse_secrets(uri)
        return uri


class Columns(Closed):
    """Which columns of a table are what."""

    layout: Literal["beir", "pairs", "labels", "scored_pairs"] = Field(
        "pairs",
        description="pairs: a (query, passage) per row; labels: a text and its label (classification, clustering); "
        "scored_pairs: two texts and how alike they are (STS).",
    )
    query_column: str = Field(
        "query", description="pairs, scored_pairs: column of the query; `a.b` is field b of column a."
    )
    passage_column: str | None = Field(
        "passage",
        description="pairs, scored_pairs: column of the passage text; null where the passage is its image or sound alone.",
    )
    title_column: str | None = Field(None, description="pairs: column of the passage title.")
    text_column: str = Field("text", description="labels: column of the text, or of a list of texts.")
    label_column: str | None = Field(None, description="labels: column of the label, or of a list of labels.")
    passages_per_label: int = Field(
        16, ge=1, le=10000, description="labels: texts of each label that are passages; its other texts are queries."
    )
    score_column: str | None = Field(None, description="scored_pairs: column of the score.")
    positive_score: float | None = Field(
        None, description="scored_pairs: pairs that score at least this are positives."
    )
    related_score: float | None = Field(
        None, description="scored_pairs: pairs that score at least this are too alike to be negatives."
    )
    image_column: str | None = Field(
        None, description="pairs: column of the passage's image: a path below the table's folder, or its bytes."
    )
    audio_column: str | None = Field(None, description="pairs: column of the passage's sound, likewise.")
    keep: Mapping[str, str] = Field(
        default_factory=dict,
        description="Column → value; rows that have another value (or, of a list, lack it) are left out.",
    )

    @model_validator(mode="after")
    def _complete(self) -> Columns:
        asked = {"labels": ("label_column",), "scored_pairs": ("score_column", "positive_score", "related_score")}
        missing = [name for name in asked.get(self.layout, ()) if getattr(self, name) is None]
        if missing:
            raise ValueError(f"layout {self.layout} needs {', '.join(missing)}")
        if (
            self.positive_score is not None
            and self.related_score is not None
            and self.related_score > self.positive_score
        ):
            raise ValueError(f"related_score {self.related_score:g} is above positive_score {self.positive_score:g}")
        if self.media_columns and self.layout != "pairs":
            raise ValueError(
                f"layout {self.layout} reads no {' and '.join(self.media_columns)}: use layout pairs (layout beir finds its "
                "columns image and audio by itself)"
            )
        if self.passage_column is None and not self.media_columns:
            raise ValueError(
                "passage_column is null, so passages would be empty: name it, or image_column or audio_column"
            )
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Sources without images and sounds are told from others, and remembered, as they were before there were any."""
        tree: dict[str, Any] = dump(self)
        return {k: v for k, v in tree.items() if v is not None or k not in ("image_column", "audio_column")}

    @property
    def media_columns(self) -> dict[str, str]:
        """Kind of file → its column."""
        return {k: v for k, v in (("image", self.image_column), ("audio", self.audio_column)) if v is not None}


class HubSource(Columns):
    """A data set of the Hugging Face Hub at a pinned commit, read with the `datasets` library."""

    type: Literal["hf"] = Field(description="A data set of the Hugging Face Hub.")
    repo: str = Field(pattern=r"^[\w.-]+/[\w.-]+$", description="owner/name on the hub.")
    revision: Revision
    layout: Literal["beir", "pairs", "labels", "scored_pairs"] = Field(
        "beir",
        description="beir: configs corpus, queries and qrels; pairs: a (query, passage) per row; labels: a text and its "
        "label (classification, clustering); scored_pairs: two texts and how alike they are (STS).",
    )
    config: str | None = Field(None, description="Config of the table, or of the qrels (`default`).")
    files: Mapping[Name, str] = Field(
        default_factory=dict,
        description="Tables: split → .json, .jsonl, .csv or .parquet file of the repository, for repositories that "
        "`datasets` cannot read without running their code.",
    )


class TableSource(Columns):
    """Tables on disk: pairs, labelled texts or scored pairs."""

    type: Literal["table"] = Field(description="Tables on disk.")
    files: Mapping[Name, str] = Field(min_length=1, description="Split → .json, .jsonl, .csv or .parquet file.")
    layout: Literal["pairs", "labels", "scored_pairs"] = Field(
        "pairs",
        description="pairs: a (query, passage) per row; labels: a text and its label (classification, clustering); "
        "scored_pairs: two texts and how alike they are (STS).",
    )


class PackageDocsSource(Closed):
    """Documentation that installed Python packages ship: summary line = query, the rest of the docstring = passage.

    Read as text with `ast`; nothing is imported or run.
    """

    type: Literal["package_docs"] = Field(description="Documentation of installed Python packages.")
    packages: tuple[Name, ...] = Field(min_length=1, description="Distribution names of installed packages.")
    min_words: int = Field(30, ge=5, description="Shortest passage kept, in words.")
    max_words: int = Field(120, ge=10, description="Longer passages are cut here, in words.")
    test_percent: int = Field(15, ge=0, le=90, description="Share of queries (by hash) in split `test`; rest: `train`.")
    part: str | None = Field(
        None, pattern=r"^\d+/[1-9]\d*$", description="Only the i-th of n disjoint parts (i/n, by hash of the name)."
    )

    pages: bool = Field(
        False,
        description="Passages are images of pages with their texts drawn on them, as in retrieval of screenshots.",
    )

    @model_serializer(mode="wrap")
    def _as_before(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As before there were pages, unless there are some."""
        tree: dict[str, Any] = dump(self)
        return tree if self.pages else {k: v for k, v in tree.items() if k != "pages"}

    @model_validator(mode="after")
    def _consistent(self) -> PackageDocsSource:
        if self.min_words > self.max_words:
            raise ValueError(f"min_words {self.min_words} exceeds max_words {self.max_words}: no passage would be left")
        return self


class MtebSource(Closed):
    """The data set of an mteb Retrieval task, read by mteb's own loader at the commit that mteb pins."""

    type: Literal["mteb"] = Field(description="An mteb Retrieval task.")
    task: Name = Field(description="Name of the task.")
    subset: str | None = Field(None, description="Subset (language) of a task that has several.")


SourceRef = Annotated[
    BeirSource | HubSource | TableSource | PackageDocsSource | MtebSource, Field(discriminator="type")
]


class WithOrigin(Closed):
    """Where a data set comes from, and the folder of the same set under $NVR_DATA, if there is one."""

    origin: SourceRef = Field(description="Where the data come from.")
    mirror: str | None = Field(
        None,
        pattern=r"^[\w-][\w.-]*$",
        description="When NVR_DATA is set: read the BEIR folder $NVR_DATA/<mirror> instead of `origin`.",
    )


class TrainingSource(WithOrigin):
    """A training set: its passages are mined, the queries of `split` are trained on."""

    name: Name = Field(description="Prefix of its query and document ids.")
    split: Name = Field("train", description="Split of the qrels whose queries are trained on.")
    max_queries: int | None = Field(None, ge=1, description="Keep at most this many queries, chosen by hash of the id.")
    max_passages: int | None = Field(
        None,
        ge=0,
        description="Keep the passages that kept queries are judged with, and at most this many others, chosen by hash of the id. "
        "Corpora and tables that `datasets` reads from the hub are then not held whole.",
    )
    instruction: Instruction | None = Field(
        None, description="What its queries ask for, where a prompt has `{instruction}`; data.instruction if unset."
    )


class BenchmarkTask(WithOrigin):
    """One MTEB Retrieval task, mirrored so that evaluation needs no hub.

    An official task needs no origin: it is mteb's own data set. `suite: NAME` stands for all tasks of a suite.
    """

    task: Name = Field(description="Name of the MTEB task (SciFact, NFCorpus, …).")
    split: Name = Field("test", description="Split of the qrels that is scored.")
    official: bool = Field(True, description="False: a task of our own that mteb runs but does not list.")
    part_of: Name | None = Field(
        None, description="mteb's aggregate that this task is a part of (CQADupstackRetrieval)."
    )
    instruction: Instruction | None = Field(
        None, description="What its queries ask for, where a prompt has `{instruction}`; data.instruction if unset."
    )


class PassageSource(WithOrigin):
    """A corpus that is served."""


class Decontamination(Closed):
    """What keeps benchmark data out of training."""

    query_similarity: float = Field(
        0.85,
        gt=0,
        le=1,
        description="Train queries at least this similar (Jaccard of 5-character shingles) are removed.",
    )
    pair_similarity: float = Field(
        0.6,
        gt=0,
        le=1,
        description="A positive is removed when its passage is judged relevant to a benchmark query at least this similar.",
    )
    strict: bool = Field(
        False,
        description="Also keep benchmark-relevant passages out of the positives. Off by default: SciFact and NFCorpus "
        "share one corpus between their train and test splits.",
    )


class Data(Closed):
    """Everything `nvr download` needs."""

    sources: tuple[TrainingSource, ...] = Field(min_length=1, description="Training sets, read in this order.")
    benchmark: tuple[BenchmarkTask, ...] = Field(
        min_length=1, description="Tasks that decide promotion; `suite: NAME` stands for those of a suite."
    )
    near_duplicate: float = Field(
        0.9, gt=0, le=1, description="Passages at least this similar (Jaccard of 5-word shingles) form one group."
    )
    decontamination: Decontamination = Decontamination()
    dev_queries: int = Field(
        200,
        ge=0,
        description="Training queries held out, chosen by hash; the dev nDCG@10 is over those of the sources trained on.",
    )
    instruction: Instruction | None = Field(
        None,
        description="What `{instruction}` in a prompt stands for where a source or task has none of its own, and in the `query` "
        "prompt of the trained model.",
    )

    @field_validator("benchmark", mode="before")
    @classmethod
    def _suites(cls, given: Any) -> Any:
        return expand(given) if isinstance(given, list | tuple) else given

    @model_validator(mode="after")
    def _unique(self) -> Data:
        refuse_twice("data.sources.name", [s.name for s in self.sources])
        refuse_twice("data.benchmark.task", [t.task for t in self.benchmark])
        return self

    def as_read(self) -> dict[str, Any]:
        """What decides which data are read, and how they are cleaned: instructions do not."""
        tree = self.model_dump(mode="json", exclude={"instruction"})
        for name in ("sources", "benchmark"):
            tree[name] = [
                {k: v for k, v in entry.items() if k != "instruction" and (k, v) != ("max_passages", None)}
                for entry in tree[name]
            ]
        return tree

    def instructed(self, prompts: Prompts) -> Prompts:
        """Prompts with the instructions of sources and tasks filled in; the same object if they have no place for one."""
        if INSTRUCTION not in prompts.query:
            return prompts

        def filled(own: Mapping[str, str | None]) -> tuple[tuple[str, str], ...]:
            said = {name: prompts.query.replace(INSTRUCTION, i) for name, i in own.items() if i is not None}
            return tuple((name, prompt) for name, prompt in sorted(said.items()) if prompt != default)

        default = prompts.query.replace(INSTRUCTION, self.instruction or "")
        return InstructedPrompts(
            query=default,
            passage=prompts.passage,
            sources=filled({s.name: s.instruction for s in self.sources}),
            tasks=filled({t.task: t.instruction for t in self.benchmark}),
        )
