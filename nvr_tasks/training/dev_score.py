"""The dev nDCG@10 of a student in training, by sentence-transformers' evaluators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch  # noqa: TID253 - only the training loop imports this module
from sentence_transformers import SentenceTransformer  # noqa: TID253
from sentence_transformers.multi_vector_encoder.evaluation import (  # noqa: TID253
    MultiVectorInformationRetrievalEvaluator,
)
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator  # noqa: TID253

from nvr_tasks.fast_model import FastModel, can_be_fast
from nvr_tasks.training.examples import DevSet
from nvr_tasks.training.sharding import is_sharded


def dev_evaluator(dev: DevSet, model: Any, batch_size: int) -> Any:
    """The library's evaluator for a student, each query with its prompt."""
    dense = isinstance(model, SentenceTransformer)
    fast = not is_sharded(model)  # whose processes must make the same forward passes in the same order
    make = (_FastEvaluator if fast else _Evaluator) if dense else _LateInteractionEvaluator
    evaluator: Any = make(
        dev.queries,
        dev.corpus,
        dev.relevant,
        name="dev",
        batch_size=batch_size,
        write_csv=False,
        show_progress_bar=False,
        query_prompt=model.prompts.get("query") or None,
        corpus_prompt=model.prompts.get("document") or None,
    )
    if dev.prompts:
        evaluator.prompts = [dev.prompts[query] for query in evaluator.queries_ids]
    return evaluator


class _Prompted:
    """A mixin: queries with a prompt each, instead of one for all."""

    prompts: Sequence[str] = ()

    def __call__(self, model: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        if self.prompts:
            model = _WithPrompts(model, self.prompts)
        found: dict[str, float] = super().__call__(model, *args, **kwargs)  # type: ignore[misc]
        return found


class _Evaluator(_Prompted, InformationRetrievalEvaluator):
    pass


class _LateInteractionEvaluator(_Prompted, MultiVectorInformationRetrievalEvaluator):
    pass


class _FastEvaluator(_Evaluator):
    """Embeds with our Encoder where that gives the same vectors; a dev set is embedded again and again."""

    def __call__(self, model: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        if can_be_fast(model, str(model.similarity_fn_name or "cosine")):
            model = FastModel(model, torch.float32, self.batch_size)
        return super().__call__(model, *args, **kwargs)


class _WithPrompts:
    """A model that puts its own prompt before each of the queries it is given; all else is the model's.

    Args:
        model: SentenceTransformer, FastModel or MultiVectorEncoder.
        prompts: of all queries, which are encoded in one call.
    """

    def __init__(self, model: Any, prompts: Sequence[str]) -> None:
        self._model, self._prompts = model, prompts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def encode_query(self, texts: Sequence[str], **settings: Any) -> Any:
        """As the model's, whatever `prompt` says. Texts with the same prompt are encoded together."""
        found: list[Any] = [None] * len(texts)
        for own in dict.fromkeys(self._prompts):
            rows = [row for row, other in enumerate(self._prompts) if other == own]
            vectors = self._model.encode_query([texts[row] for row in rows], **{**settings, "prompt": own})
            for row, vector in zip(rows, vectors, strict=True):
                found[row] = vector
        if isinstance(found[0], np.ndarray):
            return np.stack(found)
        return torch.stack(found) if found[0].ndim == 1 else found
