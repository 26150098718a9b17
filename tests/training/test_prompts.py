"""Queries of different sources with different prompts: losses, pooling and the dev score are those of prompts put there by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_students as tiny
import torch  # noqa: TID253
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss  # noqa: TID253

from nvr_tasks.settings import InstructedPrompts
from nvr_tasks.training import loop
from nvr_tasks.training.dev_score import dev_evaluator
from nvr_tasks.training.examples import dev_set
from nvr_tasks.training_settings import LateInteraction, Student

OWN = {"s0": "find the passage: ", "s1": "which function sorts? "}
PROMPTS = InstructedPrompts(query="search: ", passage="text: ", sources=tuple(OWN.items()))
DENSE = tiny.student("bert", prompts=PROMPTS)
UNPOOLED = tiny.student("mistral", prompts=PROMPTS, pool_prompt=False, bidirectional=True)
LATE = tiny.student("modernbert", prompts=PROMPTS, late_interaction=LateInteraction(dim=8))


def first_loss(student: Student, data: loop.StageData, folder: Path) -> float:
    return tiny.train(tiny.build_student(student, tiny.CPU), [data], folder).log[0]["loss"]


def stage_data(mined: Any, **settings: Any) -> loop.StageData:
    stage = tiny.stage(steps=1, batch_size=6, dropout=0.0, **settings)
    return loop.StageData(stage, mined.examples(stage, 3))


def columns(data: loop.StageData) -> tuple[list[str], list[str], dict[str, list[str]]]:
    """Sources and texts of the queries of the first batch, and the texts of the other columns."""
    [batch] = data.examples.batches
    texts = {name: [data.examples.texts[column[i]] for i in batch] for name, column in data.examples.columns.items()}
    return [f"s{int(data.examples.ids[i][1:]) % 2}" for i in batch], texts.pop("anchor"), texts


def contrasted(anchors: torch.Tensor, others: list[torch.Tensor], temperature: float) -> float:
    """InfoNCE of unit vectors over the positives and negatives of the whole batch, by its definition."""
    scores = anchors @ torch.cat(others).T / temperature
    return float(torch.nn.functional.cross_entropy(scores, torch.arange(len(anchors))))


@pytest.mark.parametrize("cached", [None, 2])
def test_a_mixed_batch_has_the_loss_of_texts_prefixed_by_hand(tmp_path: Path, cached: int | None) -> None:
    data = stage_data(replace(tiny.mined(sources=2), prompts=PROMPTS), cached_batch=cached)
    sources, queries, others = columns(data)
    assert set(sources) == {"s0", "s1"}, "the batch is of one source: the test shows nothing"
    model = tiny.build_student(DENSE, tiny.CPU).eval()
    model.max_seq_length = 32
    prefixed = [
        [OWN[s] + q for s, q in zip(sources, queries, strict=True)],
        *([f"text: {t}" for t in c] for c in others.values()),
    ]
    features = [model.preprocess(texts) for texts in prefixed]
    with torch.no_grad():
        expected = MultipleNegativesRankingLoss(model, scale=1 / data.settings.temperature)(features, None)
        plain = [model.preprocess([f"search: {q}" for q in queries]), *features[1:]]
        other = MultipleNegativesRankingLoss(model, scale=1 / data.settings.temperature)(plain, None)
    assert first_loss(DENSE, data, tmp_path) == pytest.approx(float(expected), abs=2e-5)
    assert abs(float(expected) - float(other)) > 1e-3, "the prompt changes no loss: the test shows nothing"


def test_what_is_not_pooled_is_the_prompt_of_the_batch_s_source(tmp_path: Path) -> None:
    seen = set()
    for number, source in enumerate(("s0", "s1")):
        data = stage_data(replace(tiny.mined(sources=2), prompts=PROMPTS), batches="homogeneous", sources={source: 1.0})
        sources, queries, others = columns(data)
        seen |= set(sources)
        model = tiny.build_student(UNPOOLED, tiny.CPU).eval()
        model.max_seq_length = 32

        def pooled(prompt: str, text: str, model: Any = model) -> torch.Tensor:
            """The mean of the states of the text's own tokens; of the prompt's, <s> and </s> the tokenizer adds both."""
            features = model.preprocess([prompt + text])
            length = len(model.tokenizer(prompt)["input_ids"]) - 1
            states = model[0](features)["token_embeddings"][0, length:]
            return torch.nn.functional.normalize(states.mean(dim=0), dim=0)

        with torch.no_grad():
            anchors = torch.stack([pooled(OWN[source], q) for q in queries])
            rest = [torch.stack([pooled("text: ", t) for t in texts]) for texts in others.values()]
        expected = contrasted(anchors, rest, data.settings.temperature)
        assert first_loss(UNPOOLED, data, tmp_path / str(number)) == pytest.approx(expected, abs=2e-5)
    assert seen == {"s0", "s1"}


def test_late_interaction_has_the_prompts_too(tmp_path: Path) -> None:
    data = stage_data(replace(tiny.mined(sources=2), prompts=PROMPTS))
    sources, queries, others = columns(data)
    model = tiny.build_student(LATE, tiny.CPU).eval()
    model.max_seq_length = 32
    asked = [model.encode_query(q, prompt=OWN[s]) for s, q in zip(sources, queries, strict=True)]
    said = [model.encode_document(t) for texts in others.values() for t in texts]
    scores = model.similarity(asked, said) / data.settings.temperature
    expected = float(torch.nn.functional.cross_entropy(scores, torch.arange(len(asked))))
    assert first_loss(LATE, data, tmp_path) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("student", [DENSE, UNPOOLED, LATE], ids=["dense", "unpooled", "late"])
def test_the_dev_score_is_that_of_each_query_s_own_prompt(student: Student, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiny.mined(queries=40, sources=2).data
    data.queries["split"] = "dev"
    dev = dev_set(data, PROMPTS)
    assert dev is not None
    model = tiny.build_student(student, tiny.CPU).eval()
    model.max_seq_length = 32
    found = dev_evaluator(dev, model, 8)(model)
    [score] = [value for name, value in found.items() if name.endswith("ndcg@10")]
    source = dict(zip(data.queries["query_id"], data.queries["source"], strict=True))
    asked = [model.encode_query(text, prompt=OWN[source[q]]) for q, text in dev.queries.items()]
    said = model.encode_document(list(dev.corpus.values()))
    expected = ndcg(
        model.similarity(asked if student is LATE else torch.tensor([a.tolist() for a in asked]), said), dev
    )
    assert score == pytest.approx(expected, abs=1e-6)
    same = dev_evaluator(replace(dev, prompts={}), model, 8)(model)
    assert [v for n, v in same.items() if n.endswith("ndcg@10")] != [score], "prompts change nothing here"


def ndcg(scores: torch.Tensor, dev: Any) -> float:
    """nDCG@10 with one relevant passage per query, by its definition."""
    docs, total = list(dev.corpus), 0.0
    for row, relevant in zip(scores, dev.relevant.values(), strict=True):
        [doc] = relevant
        rank = int((row > row[docs.index(doc)]).sum())
        total += 1 / float(torch.log2(torch.tensor(rank + 2.0))) if rank < 10 else 0.0
    return total / len(scores)
