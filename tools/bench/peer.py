"""What a user of sentence-transformers would write instead: `mine_hard_negatives`, then `SentenceTransformerTrainer`.

Both in the setting that the library's documentation gives (for mining, the one it names after NV-Retriever) and with its
defaults, weight decay among them; student, lengths, steps, batch, learning rate, warm-up, temperature and precision are our recipe's.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import time
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


def mined(recipe: Recipe, data: RetrievalData) -> tuple[Dataset, float]:
    """Columns query, answer, negative…, a row per training query and positive; and the seconds that it took.

    Of the sources that the recipe trains on; negatives come from the passages of all.
    """
    [settings] = recipe.train.schedule
    texts = dict(zip(data.corpus["doc_id"], data.passages(), strict=True))
    used = data.queries["source"].isin(settings.sources or set(data.queries["source"]))
    queries = data.queries[(data.queries["split"] == "train") & used].set_index("query_id")["text"]
    judged = data.qrels[(data.qrels["relevance"] >= 1) & data.qrels["query_id"].isin(queries.index)]
    pairs = Dataset.from_dict(
        {"query": [queries[q] for q in judged["query_id"]], "answer": [texts[d] for d in judged["doc_id"]]}
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
            verbose=False,
        )
    return found, time.perf_counter() - clock


def trained(
    recipe: Recipe, rows: Dataset, folder: Path, dropout: float | None = None
) -> tuple[SentenceTransformer, Clock]:
    """The recipe's student after its steps, with the dropout of its config if none is given."""
    [settings] = recipe.train.schedule
    model: SentenceTransformer = build_student(recipe.student, recipe.runtime)
    longest = model.max_seq_length
    model.max_seq_length = settings.max_tokens or longest
    clock = Clock()
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        seed=recipe.seed,
        max_steps=settings.steps or 1,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
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
