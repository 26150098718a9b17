"""What a user of sentence-transformers would write instead: `mine_hard_negatives`, then `SentenceTransformerTrainer`.

Both in the setting that the library's documentation gives (for mining, the one it names after NV-Retriever) and with its
defaults; student, lengths, steps, batch, learning rate, warm-up, decay, temperature and precision are our recipe's.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset  # noqa: TID253
from sentence_transformers import (  # noqa: TID253
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss  # noqa: TID253
from sentence_transformers.sentence_transformer.training_args import BatchSamplers  # noqa: TID253
from sentence_transformers.util import mine_hard_negatives  # noqa: TID253
from transformers import TrainerCallback  # noqa: TID253

from nvr_tasks.config import Recipe
from nvr_tasks.dataset import RetrievalData
from nvr_tasks.models import build_student, load_teacher
from nvr_tasks.training.dropout import dropping
from nvr_tasks.training_settings import TrainingStage


class Clock(TrainerCallback):
    """Seconds from the begin of each step to its end, as our trainer's `seconds_per_step`; the first one warms up."""

    def __init__(self) -> None:
        self.begun = 0.0
        self.took: list[float] = []

    def on_step_begin(self, *_: object, **__: object) -> None:
        """See TrainerCallback."""
        self.begun = time.perf_counter()

    def on_step_end(self, *_: object, **__: object) -> None:
        """See TrainerCallback."""
        self.took.append(time.perf_counter() - self.begun)

    @property
    def median(self) -> float:
        """Median, seconds."""
        return statistics.median(self.took[1:])


@dataclass(frozen=True)
class Mined:
    """What the peer mined.

    Attributes:
        rows: columns query, answer, negative_1 … negative_n.
        counts: source → (pairs given, rows that came back): the library drops all pairs of a query that is short of negatives.
        seconds: that it took.
    """

    rows: Dataset
    counts: dict[str, tuple[int, int]]
    seconds: float


def mined(recipe: Recipe, data: RetrievalData, cache: Path, one_positive: int | None = None) -> Mined:
    """Mine a row per training query and positive, of the sources that the recipe trains on, among the passages of all.

    Args:
        cache: folder where the library keeps embeddings, so that each text is embedded once.
        one_positive: seed by which one positive of each query is drawn first; its others are then unknown to the library.

    Raises:
        SystemExit: the recipe has settings that the peer would silently go without.
    """
    settings = _plain(recipe)
    texts = dict(zip(data.corpus["doc_id"], data.passages(), strict=True))
    used = data.queries["source"].isin(settings.sources or set(data.queries["source"]))
    queries = data.queries[(data.queries["split"] == "train") & used].set_index("query_id")
    # Judgements of other splits are known positives that nobody may train on: of the benchmark, of the dev set.
    judged = data.qrels[
        (data.qrels["relevance"] >= 1) & (data.qrels["split"] == "train") & data.qrels["query_id"].isin(queries.index)
    ]
    if one_positive is not None:
        judged = judged.sample(frac=1, random_state=one_positive).drop_duplicates("query_id").sort_values("query_id")
    pairs = Dataset.from_dict(
        {"query": [queries["text"][q] for q in judged["query_id"]], "answer": [texts[d] for d in judged["doc_id"]]}
    )
    teacher = load_teacher(recipe.teacher, recipe.runtime)
    teacher.max_seq_length = recipe.teacher.max_tokens.passage
    clock = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        found = mine_hard_negatives(
            pairs,
            teacher,
            corpus=list(texts.values()),
            relative_margin=0.05,
            num_negatives=settings.hard_negatives,
            sampling_strategy="top",
            output_format="n-tuple",
            cache_folder=str(cache),
            verbose=False,
        )
    seconds = time.perf_counter() - clock
    source_of = dict(zip(queries["text"], queries["source"], strict=True))
    given, back = (Counter(source_of[q] for q in of["query"]) for of in (pairs, found))
    return Mined(found, {source: (given[source], back[source]) for source in sorted(given)}, seconds)


def _plain(recipe: Recipe) -> TrainingStage:
    """The recipe's only stage, if the peer can do all of it but what it has no word for (sources' weights, bounds, masks)."""
    stages = recipe.train.schedule
    student, stage = recipe.student, stages[0]
    lacks = {
        "several stages": len(stages) > 1,
        "epochs": stage.steps is None,
        "in_batch_negatives: false": not stage.in_batch_negatives,
        "matryoshka_dims": bool(stage.matryoshka_dims),
        "cached_batch": stage.cached_batch is not None,
        "max_query_tokens": bool(stage.max_query_tokens or student.max_query_tokens),
        "no mined negatives": not stage.hard_negatives,
        "prompts": any((p.query or p.passage) for p in (student.prompts, recipe.teacher.prompts)),
        "dtype float16": stage.dtype == "float16",
        "adapters or late interaction": bool(student.lora or student.late_interaction),
    }
    found = [name for name, there in lacks.items() if there]
    if found:
        raise SystemExit(f"the peer does without {', '.join(found)}: compare a recipe that has none of it")
    return stage


def trained(
    recipe: Recipe, rows: Dataset, folder: Path, dropout: float | None = None
) -> tuple[SentenceTransformer, Clock]:
    """The recipe's student after its steps, with the dropout of its config if none is given."""
    settings = _plain(recipe)
    model: SentenceTransformer = build_student(recipe.student, recipe.runtime)
    longest = model.max_seq_length
    model.max_seq_length = settings.max_tokens or longest
    clock = Clock()
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        seed=recipe.seed,
        max_steps=settings.steps or -1,  # `_plain` wants steps
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        max_grad_norm=settings.max_grad_norm,
        weight_decay=settings.weight_decay,
        bf16=settings.dtype == "bfloat16",
        use_cpu=True,
        batch_sampler=BatchSamplers.NO_DUPLICATES,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    with contextlib.redirect_stdout(io.StringIO()), dropping(model, dropout):
        SentenceTransformerTrainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            loss=MultipleNegativesRankingLoss(model, scale=1 / settings.temperature),
            callbacks=[clock],
        ).train()
    model.max_seq_length = longest
    return model, clock
