"""The recipe's schema: a closed, frozen `Recipe`, every field of which says what it does. `recipe_files` reads one.

Nothing here imports a heavy library, so DAG files and `nvr config` can load a recipe in milliseconds.
Fields under `runtime` never change what is computed; every other field can, and is part of an artefact's identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from nvr_tasks.ablation_settings import Ablation, changed
from nvr_tasks.data_settings import Data, PassageSource
from nvr_tasks.mine_settings import Audit, Embed, Mine
from nvr_tasks.policy import Gate
from nvr_tasks.settings import INSTRUCTION, Closed, Dtype, Name, Prompts, Reranker, Teacher, refuse_twice
from nvr_tasks.training_settings import Student, Train

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
            if stage.min_positive_score is not None:
                self._check_doubt(where)
        self._check_teachers()
        self._check_instructions()
        self.gate.check_tasks([t.task for t in self.data.benchmark])
        return self

    def _check_doubt(self, where: str) -> None:
        """`min_positive_score` leaves rows out after mining: it wants one teacher's scale, and ceilings of each row's own."""
        names = self.mine.teachers
        if len(names) > 1:
            raise ValueError(
                f"{where}.min_positive_score is on the scale of one teacher, but mine.teachers has {', '.join(names)}: mine with one, "
                "or remove it"
            )
        if self.mine.positive_policy == "min":
            raise ValueError(
                f"{where}.min_positive_score has no effect on ceilings while mine.positive_policy is min: the doubted positive sets them "
                "for the rows that stay; use positive_policy each or max"
            )

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
        if not student.pool_prompt and (mixed := self.stages_of_mixed_prompts):
            raise ValueError(
                f"stage {mixed[0]}: with train.student.pool_prompt: false all queries of a batch need one "
                "prompt, but the sources have different instructions: set batches: homogeneous"
            )

    @property
    def stages_of_mixed_prompts(self) -> list[str]:
        """Stages of training whose batches hold queries of different prompts: those of sources with other instructions."""
        names = [s.name for s in self.data.sources]
        prompts = self.student.prompts
        return [
            stage.name
            for stage in self.train.schedule
            if stage.batches != "homogeneous" and len(set(prompts.of_sources(stage.sources or names))) > 1
        ]

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
