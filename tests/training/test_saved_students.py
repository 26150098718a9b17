"""Trained students, saved and loaded by a process that knows nothing of their training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tiny_students as tiny

from nvr_tasks.surgery import add_adapters, merge_adapters
from nvr_tasks.training.loop import StageData
from nvr_tasks.training_settings import LateInteraction, LatentAttention, Lora

PROMPTS = {"query": "find the passage that answers: ", "passage": "passage: "}
TEXTS = ["what is a graph?", "matrices have rows and columns, " * 8]  # the second one is cut
KINDS: dict[str, dict[str, Any]] = {
    "nv-retriever": {"architecture": "mistral", "bidirectional": True, "pool_prompt": False},
    "cut": {"architecture": "modernbert", "layers": 1, "pooling": "cls", "max_query_tokens": 16},
    "late": {"architecture": "modernbert", "late_interaction": LateInteraction(dim=8)},
    "latent": {
        "architecture": "mistral",
        "bidirectional": True,
        "latent_attention": LatentAttention(latents=4, heads=2),
        "lora": Lora(rank=2, dropout=0.1),
    },
}
LOAD = """
import json, sys
from pathlib import Path
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
texts, places = json.loads(sys.argv[1]), json.loads(sys.argv[2])
found = {}
for kind, place in places.items():
    if kind == "latent":
        from nvr_tasks.models import load_folder
        model = load_folder(Path(place), "cpu")
    else:
        assert "nvr_tasks" not in sys.modules
        model = (MultiVectorEncoder if kind == "late" else SentenceTransformer)(place, device="cpu")
    found[kind] = [v.tolist() for v in (*model.encode_query(texts), *model.encode_document(texts))]
print(json.dumps(found))
"""


def vectors(model: Any) -> list[np.ndarray]:
    return [np.asarray(v) for v in (*model.encode_query(TEXTS), *model.encode_document(TEXTS))]


def test_a_fresh_process_gives_the_vectors_of_the_model_that_was_trained(
    tmp_path: Path, python: Callable[..., Any]
) -> None:
    """By sentence-transformers alone; the one with a module that the library lacks, by ours."""
    stage = tiny.stage(steps=2, warmup_steps=0, max_tokens=20, max_query_tokens=24)
    examples = tiny.mined().examples(stage, 3)
    places, expected = {}, {}
    for kind, settings in KINDS.items():
        student = tiny.student(prompts=PROMPTS, **settings)
        model = tiny.build_student(student, tiny.CPU)
        untrained = vectors(model)
        adapted = add_adapters(model, student.lora) if student.lora else None
        tiny.train(model, [StageData(stage, examples)], tmp_path / kind)
        if adapted is not None:
            merge_adapters(model, adapted)
        model.max_seq_length = student.max_tokens
        expected[kind] = vectors(model.eval())
        assert all(np.abs(one - other).max() > 1e-3 for one, other in zip(expected[kind], untrained, strict=True))
        place = tmp_path / kind / "model"
        model.save_pretrained(str(place), create_model_card=False)
        assert list(place.rglob("*.safetensors"))
        assert not [*place.rglob("*.bin"), *place.rglob("*.py")]
        places[kind] = str(place)
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # as here: other divisions round otherwise
    fresh = python("-c", LOAD, json.dumps(TEXTS), json.dumps(places), **threads)
    assert fresh.returncode == 0, fresh.stderr[-3000:]
    found = json.loads(fresh.stdout.splitlines()[-1])
    for kind, made in expected.items():
        for one, other in zip(made, found[kind], strict=True):
            np.testing.assert_array_equal(one, np.array(other, np.float32), err_msg=kind)
