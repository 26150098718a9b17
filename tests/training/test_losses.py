"""Our losses against sums written out by hand and against sentence-transformers' own, gradients included."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import tiny_students as tiny
import torch  # noqa: TID253
from sentence_transformers.sentence_transformer.losses import GISTEmbedLoss, MultipleNegativesRankingLoss  # noqa: TID253  # noqa: TID253

from nvr_tasks.training.losses import Admission, TeacherScores, TeacherVectors, make_loss
from nvr_tasks.training_settings import FalseNegatives

B, N, D = 5, 3, 8  # pairs, mined negatives, dimensions
SCALE = 20.0


def unit(generator: np.random.Generator, rows: int) -> np.ndarray:
    vectors = generator.standard_normal((rows, D)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture
def embeddings() -> list[torch.Tensor]:
    generator = np.random.default_rng(1)
    return [torch.from_numpy(unit(generator, B)) for _ in range(2 + N)]


@pytest.fixture
def scores() -> TeacherScores:
    generator = np.random.default_rng(2)
    rows = np.stack([np.arange(B), *(np.arange(B) + B * k for k in range(1 + N))], axis=1)
    return TeacherScores(TeacherVectors(unit(generator, B), unit(generator, B * (1 + N))), rows)


def by_hand(embeddings: list[torch.Tensor], scores: TeacherScores | None, rule: FalseNegatives | None, in_batch: bool):
    """The mean over queries of −log(e^{s⁺/τ} / Σ e^{s/τ}), passage by passage; and how many passages were left out."""
    total, barred = 0.0, 0
    for i in range(B):
        positive = float(embeddings[0][i] @ embeddings[1][i])
        terms = [math.exp(SCALE * positive)]
        for k in range(1 + N):
            for j in range(B):
                if (k == 0 and j == i) or (not in_batch and j != i):
                    continue
                if rule is not None and scores is not None:
                    query = scores.vectors.queries[i]
                    best = float(query @ scores.vectors.passages[i])
                    ceiling = best - (rule.value * abs(best) if rule.margin == "relative" else rule.value)
                    if float(query @ scores.vectors.passages[B * k + j]) >= ceiling:
                        barred += 1
                        continue
                terms.append(math.exp(SCALE * float(embeddings[0][i] @ embeddings[1 + k][j])))
        total -= math.log(terms[0] / sum(terms))
    return total / B, barred


@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize(
    "rule",
    [None, *(FalseNegatives(margin=m, value=v) for m in ("absolute", "relative") for v in (0.0, 0.05, 0.6))],
    ids=str,
)
def test_the_loss_is_the_sum_written_out(
    embeddings: list[torch.Tensor], scores: TeacherScores, rule: FalseNegatives | None, in_batch: bool
) -> None:
    expected, barred = by_hand(embeddings, scores, rule, in_batch)
    assert (rule is None) == (barred == 0), "the case must have something to leave out"
    loss = Admission(in_batch, rule, scores).loss(embeddings[0], embeddings[1:], torch.arange(B), SCALE)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def features(model: Any, *columns: list[str]) -> list[dict[str, torch.Tensor]]:
    return [dict(model.preprocess(texts)) for texts in columns]


def columns(negatives: int) -> tuple[list[list[str]], np.ndarray]:
    made = tiny.mined().examples(tiny.stage(steps=1, batch_size=6, hard_negatives=negatives), seed=1)
    return [[made.texts[n] for n in column] for column in made.columns.values()], made.rows


def gradient(loss: torch.nn.Module, model: Any, texts: list[list[str]]) -> tuple[float, torch.Tensor]:
    model.zero_grad()
    model.eval()  # no dropout
    value = loss(features(model, *texts), torch.arange(len(texts[0])))
    value.backward()
    return value.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def teacher_of(guide: Any) -> TeacherVectors:
    data = tiny.mined().data
    return TeacherVectors(
        guide.encode(list(data.queries["text"]), normalize_embeddings=True),
        guide.encode(data.passages(), normalize_embeddings=True),
    )


def test_without_a_rule_it_is_the_library_s_loss() -> None:
    model, (texts, _) = tiny.model(), columns(2)
    ours, _ = make_loss(model, tiny.stage())
    assert type(ours) is MultipleNegativesRankingLoss
    library = gradient(MultipleNegativesRankingLoss(model, scale=20), model, texts)
    admitted = Admission(in_batch=True)
    vectors = [torch.from_numpy(model.encode(t)) for t in texts]
    assert admitted.loss(vectors[0], vectors[1:], torch.arange(6), 20).item() == pytest.approx(library[0], rel=1e-5)


@pytest.mark.parametrize("margin", ["absolute", "relative"])
def test_masking_is_gist_s_with_the_teacher_s_stored_vectors(margin: str) -> None:
    """GISTEmbedLoss runs the guide in every step, and takes one negative; with one, both must say the same."""
    model, guide = tiny.model(), tiny.model("modernbert")
    texts, rows = columns(1)
    reference = GISTEmbedLoss(
        model,
        guide,
        temperature=0.05,
        margin_strategy=margin,
        margin=0.01,
        contrast_anchors=False,
        contrast_positives=False,
    )
    rule = FalseNegatives(margin=margin, value=0.01)
    ours, wants = make_loss(
        model, tiny.stage(hard_negatives=1, false_negatives=rule), scores=TeacherScores(teacher_of(guide), rows)
    )
    assert wants
    value, grads = gradient(ours, model, texts)
    expected, expected_grads = gradient(reference, model, texts)
    unmasked, _ = gradient(MultipleNegativesRankingLoss(model, scale=20), model, texts)
    assert abs(value - unmasked) > 1e-3, "the guide must leave something out"
    assert value == pytest.approx(expected, rel=1e-5)
    assert (grads - expected_grads).norm() < 1e-5 * expected_grads.norm()


@pytest.mark.parametrize(
    "settings",
    [
        {"in_batch_negatives": False},
        {"false_negatives": {"margin": "relative", "value": 0.05}},
        {"in_batch_negatives": False, "matryoshka_dims": (32, 8)},
        {},
    ],
    ids=str,
)
def test_gradient_caching_changes_nothing(settings: dict[str, Any]) -> None:
    model, (texts, rows) = tiny.model(), columns(2)
    scores = TeacherScores(teacher_of(tiny.model("modernbert")), rows)
    whole = gradient(make_loss(model, tiny.stage(**settings), scores=scores)[0], model, texts)
    cached = gradient(make_loss(model, tiny.stage(**settings, cached_batch=2), scores=scores)[0], model, texts)
    assert cached[0] == pytest.approx(whole[0], rel=1e-5)
    assert (cached[1] - whole[1]).norm() < 1e-5 * whole[1].norm()
