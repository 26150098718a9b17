"""What serving costs, of real tiny models: one vector per passage, or one per token."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from nvr_tasks.config import Runtime
from nvr_tasks.evaluation import footprint
from nvr_tasks.models import build_student
from nvr_tasks.settings import TinyModel
from nvr_tasks.tiny_models import TEXTS
from nvr_tasks.training_settings import LateInteraction, Student

PASSAGES = 40


def benchmark(folder: Path) -> Path:
    (folder / "Task").mkdir(parents=True)
    for name, count in (("corpus", PASSAGES), ("queries", 25)):
        with gzip.open(folder / "Task" / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps({"_id": str(i), "text": TEXTS[i % len(TEXTS)]}) + "\n" for i in range(count))
    return folder


def test_of_one_vector_and_of_many(tmp_path: Path) -> None:
    folders, models = [], []
    for name, late in (("one", None), ("many", LateInteraction(dim=8))):
        student = Student(model=TinyModel(type="tiny", architecture="modernbert"), max_tokens=32, late_interaction=late)
        model = build_student(student, Runtime(device="cpu", threads=1))
        folder = tmp_path / name
        model.save(str(folder))
        folders.append(folder)
        models.append(model)
    one, many = footprint.measure(folders, models, benchmark(tmp_path / "benchmark"))
    for found, folder in zip((one, many), folders, strict=True):
        assert found.model_mb * 1e6 == sum(p.stat().st_size for p in folder.rglob("*.safetensors")) > 0
        assert found.p95_ms > 0
    width = models[0].encode(["a"]).shape[1]
    assert (one.dimension, many.dimension) == (width, 8)
    assert one.index_mb * 1e6 == PASSAGES * width * 4
    tokens = [len(v) for v in models[1].encode_document(TEXTS[:16])]
    assert abs(many.index_mb * 1e6 - PASSAGES * sum(tokens) / len(tokens) * 8 * 4) < 1
    assert many.index_mb > PASSAGES * 8 * 4 / 1e6
