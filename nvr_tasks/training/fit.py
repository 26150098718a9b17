"""What every process of training does: build the student, compose the stages' examples, run the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from nvr_tasks.artifacts import Store, reading
from nvr_tasks.config import Recipe
from nvr_tasks.dataset import RetrievalData, read_dataset
from nvr_tasks.errors import NvrError
from nvr_tasks.media import in_messages, inputs_of, refuse_mixture, refuse_unread
from nvr_tasks.models import attend, build_student, pick_device, teacher_identity
from nvr_tasks.surgery import add_adapters
from nvr_tasks.training.batches import derived
from nvr_tasks.training.checkpoints import Checkpoints
from nvr_tasks.training.examples import Mined, dev_set
from nvr_tasks.training.loop import Outcome, StageData, train_model
from nvr_tasks.training.losses import TeacherVectors
from nvr_tasks.vectors import gather, text_keys

Inputs = Mapping[str, list[str]]


@dataclass(frozen=True)
class Job:
    """One training: the same for all its processes.

    Attributes:
        recipe: the validated recipe.
        store: where inputs are and checkpoints go.
        inputs: URIs of dataset, negatives and, for stages that mask by the teacher's scores, embeddings.
        fingerprint: of the model to be, which names its checkpoints.
        folder: scratch folder.
    """

    recipe: Recipe
    store: Store
    inputs: Inputs
    fingerprint: str
    folder: Path


@dataclass(frozen=True)
class Student:
    """A student in training: the model, and its adapters (for `merge_adapters`), if it has any."""

    model: Any
    adapters: Any


def student_of(recipe: Recipe) -> Student:
    """The untrained student with its adapters; the same in every process."""
    from transformers import set_seed

    set_seed(recipe.seed)
    settings = recipe.student
    runtime = recipe.runtime
    if runtime.shard_weights:  # whole on the host; of the GPUs, each gets its part
        runtime = runtime.model_copy(update={"device": "cpu"})
    model = build_student(settings, runtime)
    attend(model, recipe.runtime.attention, pick_device(recipe.runtime))
    return Student(model, add_adapters(model, settings.lora) if settings.lora else None)


def fit(job: Job, student: Student, on_log: Callable[[int, Mapping[str, float]], None]) -> Outcome:
    """Train the student in place. Raises NvrError as `train_model` does, or when too little was mined."""
    recipe = job.recipe
    _refuse_prompts_alone(recipe, student.model)
    data = read_dataset(job.store.fetch(job.store.open(job.inputs["dataset"][0])))
    if data.files is not None:
        refuse_unread("the student", student.model, data.seen())
        refuse_mixture("the student", student.model, data.queries["text"])
        refuse_mixture("the student", student.model, data.passages())
    if in_messages(student.model) and (mixed := recipe.stages_of_mixed_prompts):
        raise NvrError(
            f"stage {mixed[0]} mixes sources whose instructions differ, and the student reads messages of a "
            "chat template, where a prompt is the turn of a whole batch: set batches: homogeneous"
        )
    prompts = recipe.student.prompts
    given = inputs_of(student.model, data.files)
    stages = _stages(job, Mined(data, _negatives(job), prompts, given))
    return train_model(
        student.model,
        stages,
        dev_set(data, prompts, given, recipe.train.schedule),
        max_tokens=recipe.train.student.max_tokens,
        seed=recipe.seed,
        checkpoint_every=recipe.runtime.checkpoint_every_steps,
        checkpoints=Checkpoints(job.store.storage, job.fingerprint),
        folder=job.folder / "trainer",
        on_log=on_log,
        gradient_checkpointing=recipe.runtime.gradient_checkpointing,
    )


def _refuse_prompts_alone(recipe: Recipe, model: Any) -> None:
    """Raise NvrError if a prompt is as long as inputs may be: of the text behind it nothing would be left."""
    if in_messages(model):
        return  # the template adds to it what it likes
    tokenizer = getattr(model.tokenizer, "tokenizer", model.tokenizer)
    student, prompts = recipe.student, recipe.student.prompts
    for stage in recipe.train.schedule:
        of_queries = set(prompts.of_sources(stage.sources or [s.name for s in recipe.data.sources]))
        longest = stage.max_tokens or student.max_tokens
        rooms = [
            (of_queries, stage.max_query_tokens or student.max_query_tokens or longest),
            ({prompts.passage}, longest),
        ]
        for texts, room in rooms:
            for prompt in sorted(filter(None, texts)):
                taken = len(tokenizer(prompt)["input_ids"])
                if taken >= room:
                    raise NvrError(
                        f"the prompt {prompt!r} takes {taken} tokens, and stage {stage.name} cuts inputs at {room}: nothing of a text would "
                        "be left; raise max_tokens or max_query_tokens, or shorten the prompt"
                    )


def _stages(job: Job, mined: Mined) -> list[StageData]:
    """The recipe's stages with their examples, and the teacher's vectors for those that ask for them."""
    masked = any(stage.false_negatives is not None for stage in job.recipe.train.schedule)
    vectors = _teacher_vectors(job, mined.data) if masked else None
    stages = []
    for number, settings in enumerate(job.recipe.train.schedule):
        examples = mined.examples(settings, derived(job.recipe.seed, number))
        stages.append(StageData(settings, examples, vectors if settings.false_negatives else None))
    return stages


def _teacher_vectors(job: Job, data: RetrievalData) -> TeacherVectors:
    teacher = job.recipe.teacher
    wanted = teacher_identity(teacher)
    shards = [job.store.open(uri) for uri in job.inputs["embeddings"]]
    folders = [job.store.fetch(s) for s in shards if s.manifest.config.get("teacher", wanted) == wanted]
    prompts = teacher.prompts.of_sources(data.queries["source"])
    queries = text_keys(list(data.queries["text"]), prompts, teacher.max_tokens.query)
    passages = text_keys(data.passages(), teacher.prompts.passage, teacher.max_tokens.passage)
    job.folder.mkdir(parents=True, exist_ok=True)
    return TeacherVectors(gather(folders, queries), gather(folders, passages, out=job.folder / "passages.npy"))


def _negatives(job: Job) -> pd.DataFrame:
    """The mined negatives. Raises NvrError when a stage wants more of them than were mined."""
    uri = job.inputs["negatives"][0]
    artifact = job.store.open(uri)
    mined = artifact.manifest.config.get("num_negatives")
    for stage in job.recipe.train.schedule:
        if mined is not None and stage.hard_negatives > mined:
            raise NvrError(
                f"stage {stage.name} trains on {stage.hard_negatives} hard negatives per query, but {uri} holds {mined}: "
                f"mine with mine.num_negatives={stage.hard_negatives}, or train on fewer"
            )
    path = job.store.fetch(artifact) / "negatives.parquet"
    with reading(path):
        columns = ["query_id", "positive_id", "positive_score", "negative_ids"]
        return pd.read_parquet(path, columns=columns, page_checksum_verification=True)
