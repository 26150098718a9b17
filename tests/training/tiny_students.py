"""Tiny students and data sets for training tests."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch  # noqa: TID253

from nvr_tasks.config import Runtime
from nvr_tasks.dataset import RetrievalData
from nvr_tasks.models import build_student
from nvr_tasks.settings import TinyModel
from nvr_tasks.storage import open_storage
from nvr_tasks.tiny_models import TEXTS
from nvr_tasks.training import loop
from nvr_tasks.training.checkpoints import Checkpoints
from nvr_tasks.training.examples import DevSet, Mined
from nvr_tasks.training_settings import Student, TrainingStage

CPU = Runtime(device="cpu", threads=1)
WORDS = sorted({word for text in TEXTS for word in text.split()})


def student(architecture: str = "bert", **settings: Any) -> Student:
    return Student(model=TinyModel(type="tiny", architecture=architecture), max_tokens=32, **settings)


def model(architecture: str = "bert", **settings: Any) -> Any:
    return build_student(student(architecture, **settings), CPU)


def stage(**settings: Any) -> TrainingStage:
    return TrainingStage(**{"steps": 4, "batch_size": 4, "hard_negatives": 2, "learning_rate": 1e-2, **settings})


def mined(queries: int = 12, negatives: int = 3, sources: int = 1) -> Mined:
    """A passage per query, and `negatives` of the others as its mined ones; texts of a few words each."""
    generator = torch.Generator().manual_seed(3)

    def text() -> str:
        return " ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (6,), generator=generator))

    count = 3 * queries
    docs, ids = [f"d{i:03}" for i in range(count)], [f"q{i:03}" for i in range(queries)]
    return Mined(
        RetrievalData(
            corpus=pd.DataFrame(
                {"doc_id": docs, "title": "", "text": [text() for _ in docs], "group": list(range(count))}
            ),
            queries=pd.DataFrame(
                {
                    "query_id": ids,
                    "text": [text() for _ in ids],
                    "split": "train",
                    "source": [f"s{i % sources}" for i in range(queries)],
                }
            ),
            qrels=pd.DataFrame({"query_id": ids, "doc_id": docs[:queries], "relevance": 1, "split": "train"}),
        ),
        pd.DataFrame(
            {
                "query_id": ids,
                "positive_id": docs[:queries],
                "negative_ids": [[docs[(i + 1 + k) % queries] for k in range(negatives)] for i in range(queries)],
            }
        ),
    )


def train(
    model: Any,
    stages: list[loop.StageData],
    place: Path,
    dev: DevSet | None = None,
    *,
    seed: int = 1,
    max_tokens: int = 32,
    every: int = 100,
    on_log: Callable[[int, Mapping[str, float]], None] = lambda *_: None,
    gradient_checkpointing: bool = False,
) -> loop.Outcome:
    """Train in place, with checkpoints below `place` after so-many steps: a second call with the same place goes on from them."""
    place.mkdir(parents=True, exist_ok=True)
    return loop.train_model(
        model,
        stages,
        dev,
        max_tokens=max_tokens,
        seed=seed,
        checkpoint_every=every,
        checkpoints=Checkpoints(open_storage(str(place)), "abc"),
        folder=Path(tempfile.mkdtemp(prefix="work-", dir=place)),
        on_log=on_log,
        gradient_checkpointing=gradient_checkpointing,
    )
