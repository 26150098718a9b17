"""The recipe's schema: a closed, frozen `Recipe`, every field of which says what it does. `recipe_files` reads one.

Nothing here imports a heavy library, so DAG files and `nvr config` can load a recipe in milliseconds.
Fields under `runtime` never change what is computed; every other field can, and is part of an artefact's identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from nvr_tasks.ablation_settings import Ablation, Method, Sampling, changed
from nvr_tasks.policy import Gate
from nvr_tasks.settings import (
    INSTRUCTION,
    Closed,
    CrossEncoder,
    Dtype,
    InstructedPrompts,
    Instruction,
    LateInteractionTeacher,
    Name,
    Prompts,
    Reranker,
    Revision,
    Sha256,
    Teacher,
    refuse_twice,
)
from nvr_tasks.storage import refuse_secrets
from nvr_tasks.suites import expand
from nvr_tasks.training_settings import Student, Train

# ── data ─────────────────────────────────────────────────────────────────────────────────────────────────────────


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
    dev_queries: int = Field(200, ge=0, description="Training queries held out for the dev nDCG@10, chosen by hash.")
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
            tree[name] = [{k: v for k, v in entry.items() if k != "instruction"} for entry in tree[name]]
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


# ── embed and mine ───────────────────────────────────────────────────────────────────────────────────────────


class Embed(Closed):
    """The teachers at hand; those that mining uses embed every distinct query and passage."""

    teachers: tuple[Teacher, ...] = Field(min_length=1, description="Teachers that mine.teacher(s) may name.")

    @model_validator(mode="after")
    def _unique(self) -> Embed:
        refuse_twice("embed.teachers.name", [t.name for t in self.teachers])
        return self


def _default_threshold(method: str) -> float | None:
    return {"perc_pos": 0.95, "margin_pos": 0.05, "abs": 0.7}.get(method)


class Mine(Closed):
    """arXiv:2407.15831 §3.1: a candidate is kept only below a ceiling that the positive's score sets."""

    teacher: Name | None = Field(None, description="Which of embed.teachers scores; the first by default.")
    teachers: tuple[Name, ...] = Field(
        (),
        description="Instead of `teacher`: names of embed.teachers, mine.cross_encoders and mine.late_interaction; several make "
        "an ensemble, in this order.",
    )
    ensemble: Literal["cross_sample", "intra_sample", "intra_sample_dedup"] = Field(
        "intra_sample",
        description="Several teachers (§3.2). cross_sample: one, drawn per (query, positive), gives all negatives; "
        "intra_sample: they take turns, each giving its best (a passage that two choose is there twice, and counts twice "
        "in the loss); intra_sample_dedup: each its best that is not there yet.",
    )
    cross_encoders: tuple[CrossEncoder, ...] = Field((), description="Rerankers that `teachers` may name.")
    late_interaction: tuple[LateInteractionTeacher, ...] = Field(
        (), description="Late-interaction (MaxSim) models that `teachers` may name; they rescore, as cross-encoders do."
    )
    method: Method = Field(
        "perc_pos",
        description="perc_pos: s < s⁺·threshold; margin_pos: s < s⁺ − threshold; abs: s < threshold; "
        "shifted: drop the `shift` best; naive: keep all; random: drawn from the whole corpus, whatever the score.",
    )
    threshold: float | None = Field(
        None,
        ge=-1,
        le=1,
        description="perc_pos 0.95, margin_pos 0.05, abs 0.7 by default; not for shifted, naive and random.",
    )
    thresholds: Mapping[Name, float] = Field(
        default_factory=dict,
        description="Thresholds of single teachers, by name; the others have `threshold`. Those of a reranker refer to "
        "its scale.",
    )
    min_score: float | None = Field(
        None, description="Candidates that the teacher scores lower are no negatives; null: no bound."
    )
    shift: int = Field(10, ge=0, le=10000, description="shifted: ranks dropped from the top.")
    num_negatives: int = Field(4, ge=1, le=64, description="Hard negatives kept per (query, positive).")
    sampling: Sampling = Field(
        "top",
        description="top: the best n; sampled: n drawn from the best `sample_from`; top1_sampled: the best + n−1 drawn.",
    )
    sample_from: int = Field(10, ge=1, le=1000, description="Candidates that sampling draws from.")
    temperature: float = Field(1.0, gt=0, le=100, description="Softmax temperature of the draw, over teacher scores.")
    positive_policy: Literal["min", "max", "each"] = Field(
        "each", description="Several positives: ceiling of the lowest, of the highest, or one row per positive."
    )
    depth: int = Field(100, ge=1, le=10000, description="Scored candidates stored per query for later re-selection.")
    search: Literal["exact", "faiss_ivf"] = Field(
        "exact",
        description="faiss_ivf: candidates are those that an index proposes; for corpora too large to scan. Not for random.",
    )
    ivf_lists: int | None = Field(None, ge=1, description="faiss_ivf: cells of the index; 4·√(passages) by default.")
    ivf_probes: int = Field(32, ge=1, description="faiss_ivf: cells looked into per query.")
    min_recall: float = Field(
        0.95,
        ge=0,
        le=1,
        description="faiss_ivf: share of the true candidates that must be found, measured; less is an error.",
    )
    duplicate_similarity: float | None = Field(
        0.98,
        gt=0,
        le=1,
        description="Passages whose teacher cosine with a relevant passage is at least this are never mined; null: off.",
    )
    query_similarity: float | None = Field(
        0.98,
        gt=0,
        le=1,
        description="Passages relevant to a query of any split whose teacher cosine is at least this are never mined; null: off.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Mine:
        given = {"threshold": self.threshold, **{f"thresholds.{name}": t for name, t in self.thresholds.items()}}
        for name, threshold in given.items():
            if threshold is None:
                continue
            if _default_threshold(self.method) is None:
                raise ValueError(f"{name} {threshold} has no meaning for method {self.method}; remove it")
            if self.method == "perc_pos" and not 0 < threshold <= 1:
                raise ValueError(f"{name} {threshold} is out of range for perc_pos: 0 < threshold ≤ 1")
            if self.method == "margin_pos" and threshold < 0:
                bound = " ≤ 1" if name == "threshold" else ""  # logits have no bounds
                raise ValueError(f"{name} {threshold} is out of range for margin_pos: 0 ≤ threshold{bound}")
        if self.method == "random" and (self.sampling != "top" or self.min_score is not None):
            raise ValueError("method random draws from all passages alike: leave sampling at top and min_score at null")
        self._check_teachers()
        if self.sampling != "top" and self.sample_from < self.num_negatives:
            raise ValueError(f"sample_from {self.sample_from} must be at least num_negatives {self.num_negatives}")
        return self

    def _check_teachers(self) -> None:
        if self.teacher is not None and self.teachers:
            raise ValueError(
                f"teacher is {self.teacher!r} and teachers are {', '.join(self.teachers)}: give one of both"
            )
        refuse_twice("mine.teachers", list(self.teachers))
        refuse_twice("names of mine.cross_encoders and mine.late_interaction", [r.name for r in self.rerankers])
        for reranker in self.rerankers:
            if reranker.depth > self.depth:
                raise ValueError(
                    f"{reranker.kind} {reranker.name} is to rescore {reranker.depth} candidates, but depth is only {self.depth}"
                )
        if len(self.teachers) > 1:
            if self.method == "random":
                raise ValueError("method random looks at no teacher's scores: name one teacher, not an ensemble")
            if self.ensemble != "cross_sample":
                if self.sampling != "top":
                    raise ValueError(f"{self.ensemble} takes the best of each teacher: sampling must be top")
                if self.num_negatives < len(self.teachers):
                    raise ValueError(
                        f"{self.ensemble} takes one negative from each of {len(self.teachers)} teachers: num_negatives "
                        f"{self.num_negatives} is too few; ask for at least {len(self.teachers)}, or use cross_sample"
                    )

    @property
    def rerankers(self) -> tuple[Reranker, ...]:
        """All that rescore what an embedding teacher found."""
        return (*self.cross_encoders, *self.late_interaction)

    @property
    def resolved_threshold(self) -> float | None:
        """The threshold in force: the recipe's, or the paper's best setting of the method."""
        return self.threshold if self.threshold is not None else _default_threshold(self.method)

    def threshold_of(self, teacher: str) -> float | None:
        """The threshold in force for a teacher's scores."""
        return self.thresholds.get(teacher, self.resolved_threshold)


class Audit(Closed):
    """`nvr audit`: what share of mined negatives is really relevant. None of it touches what is mined."""

    hidden_share: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="Part of each query's judgements that is hidden; queries with one positive take no part.",
    )
    queries: int = Field(5000, ge=1, description="Queries whose judgements are hidden, at most; chosen by hash.")
    copies: int = Field(1000, ge=0, description="Copies of positives in other words that are planted; 0: none.")
    judged_pairs: int = Field(
        200, ge=1, description="Pairs per method that a language model judges, if NVR_JUDGE_URL names one."
    )
    judge_calls: int = Field(2500, ge=0, description="Most requests to the judge, retries included.")
    judge_tokens: int = Field(2_500_000, ge=0, description="Most tokens of its prompts and answers.")


# ── registry, evaluation, index ──────────────────────────────────────────────────────────────────────────────────


class Register(Closed):
    """Where the model goes in the MLflow registry."""

    model_name: Name = Field("nv-retriever", description="Registered model name.")
    experiment: Name = Field("nv-retriever", description="MLflow experiment of the pipeline runs.")


class Evaluate(Closed):
    """How models are scored. Lengths are the model's own, and so are prompts that are not given here."""

    dtype: Dtype = Field("float32", description="Precision of the forward pass.")
    prompts: Mapping[Name, Prompts] = Field(
        default_factory=dict, description="Task → prompts that replace the model's own on that task (`Instruct: …`)."
    )


class Index(Closed):
    """The faiss index that serves passages under the champion's vectors."""

    corpus: PassageSource | None = Field(
        None, description="What is served; by default the passages of the data set. Its queries, if any, try the index."
    )
    kind: Literal["flat", "hnsw"] = Field("hnsw", description="flat: exact; hnsw: approximate and fast.")
    hnsw_links: int = Field(32, ge=4, le=512, description="hnsw: neighbours of a node (M).")
    hnsw_ef_construction: int = Field(200, ge=8, le=10000, description="hnsw: candidates while building.")
    hnsw_ef_search: int = Field(128, ge=8, le=10000, description="hnsw: candidates while searching.")
    min_recall: float = Field(0.95, ge=0, le=1, description="Least share of the true nearest passages that it finds.")
    recall_at: int = Field(10, ge=1, le=1000, description="Nearest passages that recall looks at.")
    recall_queries: int = Field(200, ge=1, le=100000, description="Queries that recall is measured with, by hash.")


class Runtime(Closed):
    """How, not what: no result depends on these settings, but for one case.

    A student with dropout is another model for every number of `processes`, for each of them draws its own masks, and another
    with `shard_weights`.
    `embed_shards` decides how many `embeddings` artefacts hold the vectors; nothing after embedding can tell. How many
    blocks mining was divided into (`mine_shards`) nothing can tell.
    """

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is one.")
    threads: int = Field(0, ge=0, le=1024, description="CPU threads of a stage; 0: what the machine has.")
    embed_batch_tokens: int = Field(
        0, ge=0, description="Tokens (padding included) per teacher batch; 0: what suits the device."
    )
    embed_shards: int = Field(
        2, ge=1, le=4096, description="Tasks that a teacher's texts are divided over, by text hash."
    )
    mine_shards: int = Field(
        1, ge=1, le=4096, description="Tasks that the training queries are divided over when candidates are searched."
    )
    embed_part_texts: int = Field(512, ge=1, description="Texts per resumable part of an embedding shard.")
    processes: int = Field(
        1,
        ge=1,
        le=1024,
        description="Processes that train together: one per GPU, or, on CPUs, over gloo. They divide every batch evenly.",
    )
    nodes: int = Field(
        1,
        ge=1,
        le=256,
        description="Machines that train together and divide `processes` evenly: `nvr train --node I/N --rendezvous HOST:PORT` "
        "on each of them.",
    )
    shard_weights: bool = Field(
        False,
        description="Divide weights, gradients and optimizer states over the processes (FSDP), for students that do not fit "
        "one GPU.",
    )
    attention: Literal["auto", "eager", "flash_attention_2"] = Field(
        "auto",
        description="Kernel of the student's attention in training. auto: torch's fused one (sdpa), which on a GPU is flash "
        "attention where inputs admit it, and the plain one for short texts on a CPU; flash_attention_2: that of the package "
        "flash-attn, for half precision on a GPU.",
    )
    gradient_checkpointing: bool = Field(
        False, description="Compute activations anew in the backward pass: a third more time, much less memory."
    )
    checkpoint_every_steps: int = Field(50, ge=1, description="Resumable training checkpoint in storage every n steps.")
    eval_batch_size: int = Field(64, ge=1, description="Texts per batch in evaluation.")
    search_block_rows: int = Field(16384, ge=16, description="Corpus rows scored at a time in mining.")
    judge_requests: int = Field(4, ge=1, le=256, description="Requests at a time to the judge of `nvr audit`.")
    search_block_queries: int = Field(2048, ge=1, description="Queries scored at a time in mining.")


class Recipe(Closed):
    """One retraining workflow, from sources to verdict."""

    name: Name = Field(description="Name of the recipe in runs, records and messages.")
    description: str = Field("", description="One sentence for people.")
    seed: int = Field(17, ge=0, le=2**31 - 1, description="Seed of every draw: sampling, shuffling, initialisation.")
    data: Data
    embed: Embed
    mine: Mine = Mine()
    audit: Audit = Audit()
    train: Train
    register_: Register = Field(Register(), alias="register")
    evaluate: Evaluate = Evaluate()
    gate: Gate = Gate()
    index: Index = Index()
    ablation: Ablation | None = Field(None, description="Variants that `nvr ablate` trains, scores and compares.")
    runtime: Runtime = Runtime()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        sources = [s.name for s in self.data.sources]
        for index, stage in enumerate(self.train.schedule):
            where = f"train.stages.{index}" if self.train.stages else "train"
            if stage.hard_negatives > self.mine.num_negatives:
                raise ValueError(
                    f"{where}.hard_negatives is {stage.hard_negatives} but mine.num_negatives is only "
                    f"{self.mine.num_negatives}: mine at least as many as are trained on"
                )
            unknown = sorted(set(stage.sources) - set(sources))
            if unknown:
                raise ValueError(
                    f"{where}.sources names {', '.join(unknown)}, which data.sources lacks; it has: {', '.join(sources)}"
                )
        self._check_teachers()
        self._check_instructions()
        self.gate.check_tasks([t.task for t in self.data.benchmark])
        return self

    def _check_teachers(self) -> None:
        names = [t.name for t in self.embed.teachers]
        rerankers = [r.name for r in self.mine.rerankers]
        refuse_twice("names of embed.teachers, mine.cross_encoders and mine.late_interaction", names + rerankers)
        if self.mine.teacher is not None and self.mine.teacher not in names:
            raise ValueError(f"mine.teacher is {self.mine.teacher!r}, but embed.teachers has {', '.join(names)}")
        for name in self.mine.teachers:
            if name not in names + rerankers:
                raise ValueError(
                    f"mine.teachers names {name!r}, but embed.teachers, mine.cross_encoders and mine.late_interaction have "
                    f"{', '.join(names + rerankers)}"
                )
        for reranker in self.mine.rerankers:
            if reranker.candidates_of not in (None, *names):
                raise ValueError(
                    f"{reranker.kind} {reranker.name} is to rescore candidates of {reranker.candidates_of!r}, but embed.teachers "
                    f"has {', '.join(names)}"
                )
        chosen = [t.name for t in self.mining_teachers]
        unused = sorted(set(self.mine.thresholds) - set(chosen))
        if unused:
            raise ValueError(f"mine.thresholds names {', '.join(unused)}, but the teachers are {', '.join(chosen)}")
        first = self.mining_teachers[0]
        if self.mine.method == "random" and isinstance(first, Reranker):
            raise ValueError(f"method random draws from the whole corpus, which a {first.kind} does not score")

    def _check_instructions(self) -> None:
        student = self.train.student
        places = {
            "train.student": student.prompts,
            **{f"embed.teachers {t.name}": t.prompts for t in self.embed.teachers},
        }
        asking = [where for where, prompts in places.items() if INSTRUCTION in prompts.query]
        if asking and self.data.instruction is None:
            raise ValueError(
                f"prompts.query of {', '.join(asking)} has {INSTRUCTION}, but data.instruction is not given: say there what sources "
                "and tasks without an instruction of their own ask for, and what the trained model's `query` prompt says"
            )
        others = {f"evaluate.prompts.{task}": p for task, p in self.evaluate.prompts.items()}
        others |= {f"mine.late_interaction {t.name}": t.prompts for t in self.mine.late_interaction if t.prompts}
        for where, prompts in others.items():
            if INSTRUCTION in prompts.query:
                raise ValueError(
                    f"{where} has {INSTRUCTION} in its query prompt, which is not filled in there: write it out"
                )
        if not student.pool_prompt:
            self._check_batches()

    def _check_batches(self) -> None:
        """sentence-transformers leaves one prompt length per batch out of pooling."""
        names = [s.name for s in self.data.sources]
        for stage in self.train.schedule:
            differ = len(set(self.student.prompts.of_sources(stage.sources or names))) > 1
            if differ and stage.batches != "homogeneous":
                raise ValueError(
                    f"stage {stage.name}: with train.student.pool_prompt: false all queries of a batch need one prompt, but the "
                    "sources have different instructions: set batches: homogeneous"
                )

    @model_validator(mode="after")
    def _variants(self) -> Recipe:
        """Every variant of the ablation must be a valid recipe."""
        for variant in self.ablation.rows if self.ablation is not None else ():
            try:
                self.varied(variant.changes, self.seed)
            except ValidationError as error:
                first = error.errors()[0]
                said = first["ctx"]["error"] if first["type"] == "value_error" else first["msg"]
                where = ".".join(str(part) for part in first["loc"])
                raise ValueError(f"ablation, variant {variant.name}: {where}{': ' if where else ''}{said}") from None
            except ValueError as error:
                raise ValueError(f"ablation, variant {variant.name}: {error}") from None
        return self

    def varied(self, changes: Mapping[str, Any], seed: int) -> Recipe:
        """This recipe with the changes of an ablation's variant and another seed, scored on every task of the benchmark.

        Raises:
            ValueError: the changes make no recipe.
        """
        tree = changed(self.dump(), changes)
        tree.get("gate", {}).pop("quick", None)  # what a quick tier leaves out would be missing from the table
        return Recipe.model_validate({**tree, "seed": seed, "ablation": None})

    @property
    def mining_teachers(self) -> tuple[Teacher | Reranker, ...]:
        """Whose scores decide what is a negative, in the order of mine.teachers."""
        both: tuple[Teacher | Reranker, ...] = (*self.embed.teachers, *self.mine.rerankers)
        every = {t.name: self._instructed(t) if isinstance(t, Teacher) else t for t in both}
        return tuple(every[n] for n in self.mine.teachers or (self.mine.teacher or self.embed.teachers[0].name,))

    @property
    def teachers(self) -> tuple[Teacher, ...]:
        """The embedding teachers at work: those that mine, and those whose candidates a reranker rescores."""
        needed = [self.retriever(t) if isinstance(t, Reranker) else t for t in self.mining_teachers]
        return tuple(dict.fromkeys(needed))

    def retriever(self, reranker: Reranker) -> Teacher:
        """The embedding teacher whose candidates a reranker rescores."""
        return self._instructed(next(t for t in self.embed.teachers if reranker.candidates_of in (None, t.name)))

    def _instructed(self, teacher: Teacher) -> Teacher:
        return teacher.model_copy(update={"prompts": self.data.instructed(teacher.prompts)})

    @property
    def student(self) -> Student:
        """The student, with the instructions of sources and tasks in its prompts."""
        student = self.train.student
        return student.model_copy(update={"prompts": self.data.instructed(student.prompts)})

    @property
    def teacher(self) -> Teacher:
        """The first embedding teacher at work."""
        return self.teachers[0]

    def dump(self) -> dict[str, Any]:
        """The resolved recipe as plain JSON values, under the names that YAML uses."""
        tree = self.model_dump(mode="json", by_alias=True)
        tree["mine"]["threshold"] = self.mine.resolved_threshold  # the one in force, not only one that was given
        return tree
