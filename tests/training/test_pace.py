"""Faster steps: the gradients they had before, with fewer tokens computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch  # noqa: TID253
from hypothesis import given
from hypothesis import strategies as st
from tiny_students import WORDS, model

from nvr_tasks.training import pace
from nvr_tasks.training.dropout import dropping
from nvr_tasks.training.pace import group, hurried

LENGTHS = (3, 20, 4, 11, 20, 1, 5)


def gradients(student: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Vectors of texts of many lengths, and every weight's gradient of what is between them and a target."""
    texts = [" ".join(WORDS[(i + k) % len(WORDS)] for k in range(n)) for i, n in enumerate(LENGTHS)]
    student.zero_grad()
    vectors = student(student.preprocess(texts))["sentence_embedding"]
    target = torch.linspace(-1, 1, vectors.numel()).view_as(vectors)
    ((vectors - target) ** 2).sum().backward()
    return vectors.detach(), {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("bert", {}),
        ("modernbert", {}),
        ("xlm-roberta", {}),
        ("mistral", {"bidirectional": True, "pooling": "mean"}),
        ("llama", {"bidirectional": True, "pooling": "mean"}),
        ("qwen2", {"pooling": "mean"}),
        ("mistral", {"pooling": "lasttoken"}),
        ("mistral", {"bidirectional": True, "latent_attention": {"latents": 4, "heads": 2}}),
    ],
)
def test_gradients_are_those_of_the_whole_batch(
    architecture: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "WORTH_IT", 1)
    student = model(architecture, **settings)
    student.train()
    widths = []
    with dropping(student, 0.0):
        vectors, wanted = gradients(student)
        forward = student[0].model.forward

        def noted(*args: Any, **kwargs: Any) -> Any:
            widths.append(tuple(kwargs["attention_mask"].shape))
            return forward(*args, **kwargs)

        monkeypatch.setattr(student[0].model, "forward", noted)
        with hurried(student, 32):
            assert student[0].model.config._attn_implementation == "eager"
            hastened, found = gradients(student)
        again, _ = gradients(student)
    *widths, whole = widths  # the last one was after
    assert len(widths) > 1
    assert sum(rows * columns for rows, columns in widths) < 0.7 * whole[0] * whole[1]
    torch.testing.assert_close(hastened, vectors, atol=2e-6, rtol=1e-5)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=name)
    torch.testing.assert_close(again, vectors, atol=0, rtol=0)


def test_texts_padded_at_their_start_are_taken_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "WORTH_IT", 1)
    student = model("mistral", pooling="lasttoken")
    student.tokenizer.padding_side = "left"
    with hurried(student, 32):
        hastened, _ = gradients(student)
    torch.testing.assert_close(hastened, gradients(student)[0], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("expanded", [False, True])
def test_token_vectors_of_late_interaction(expanded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Expansion tokens are not attended and yet scored: they are no padding."""
    monkeypatch.setattr(pace, "WORTH_IT", 1)
    student = model("modernbert", late_interaction={"dim": 8})
    if expanded:
        student[0].query_expansion = {"strategy": "fixed", "attend": False, "length": 32}
    texts = [" ".join(WORDS[:n]) for n in LENGTHS]

    def scored() -> torch.Tensor:
        with torch.no_grad():
            features = student(student.preprocess(texts, task="query"), task="query")
        tokens: torch.Tensor = features["token_embeddings"] * features["attention_mask"].bool()[..., None]
        return tokens

    wanted = scored()
    assert (wanted.abs().sum(-1) > 0).all(dim=1).any() or not expanded
    with hurried(student, 32):
        torch.testing.assert_close(scored(), wanted, atol=2e-6, rtol=1e-5)


def test_long_texts_keep_their_attention() -> None:
    student = model("bert")
    with hurried(student, pace.SHORT + 1):
        assert student[0].model.config._attn_implementation == "sdpa"


@given(st.lists(st.integers(1, 500), min_size=1, max_size=60))
def test_groups_hold_every_text_and_pad_less(lengths: list[int]) -> None:
    lengths = sorted(lengths, reverse=True)
    sizes = group(lengths)
    assert sum(sizes) == len(lengths)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    computed = sum(lengths[start] * size for start, size in zip(starts, sizes, strict=True))
    assert computed <= lengths[0] * len(lengths) - pace.WORTH_IT * (len(sizes) - 1)
    assert computed - sum(lengths) <= pace.WORTH_IT * len(lengths)


def test_dropout_is_what_training_says_and_the_models_own_afterwards() -> None:
    student = model("bert", lora={"rank": 2, "dropout": 0.5})
    own = {n: m.p for n, m in student.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert set(own.values()) == {0.1}
    student.train()
    with dropping(student, 0.0):
        assert torch.equal(gradients(student)[0], gradients(student)[0])
    assert not torch.equal(gradients(student)[0], gradients(student)[0])
    with dropping(student, None):
        assert {n: m.p for n, m in student.named_modules() if isinstance(m, torch.nn.Dropout)} == own
