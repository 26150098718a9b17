"""A sentence-transformers model that our Encoder embeds with: the same vectors up to rounding, without padding, on all cores.

mteb and sentence-transformers' evaluators call `encode_query` and `encode_document`; what these do is all that changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch  # noqa: TID253 - only what runs a model imports this module
from sentence_transformers import SentenceTransformer  # noqa: TID253

from nvr_tasks.encoding import Encoder, Vectors
from nvr_tasks.media import more_than_text

PART = 2048  # texts that are sorted by length together; the next part is tokenised meanwhile
USUAL_TOKENS = 512  # of a text, whatever a model could read
PROMPTS = {"query": ("query",), "document": ("document", "passage", "corpus")}  # names, as sentence-transformers looks


class FastModel:
    """A sentence-transformers model with unit vectors, embedded by `Encoder`; all else is the model's own.

    Args:
        model: it serves nothing else meanwhile, since its longest input is set for every kind of text.
        dtype: as for `Encoder`.
        batch_size: texts of usual length that memory is known to hold; it bounds batches on a GPU.
    """

    def __init__(self, model: SentenceTransformer, dtype: torch.dtype, batch_size: int) -> None:
        self._model = model
        self._longest = int(model.max_seq_length or USUAL_TOKENS)
        batch_tokens = batch_size * min(self._longest, USUAL_TOKENS) if model.device.type == "cuda" else None
        self._encoder = Encoder(model, dtype, batch_tokens, every_gpu=False)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def encode_query(self, texts: Sequence[str], *, prompt: str | None = None, **_: Any) -> Vectors:
        """Unit vectors of queries, float32 [n, D]."""
        return self._encode(texts, "query", prompt)

    def encode_document(self, texts: Sequence[str], *, prompt: str | None = None, **_: Any) -> Vectors:
        """Unit vectors of passages, float32 [n, D]."""
        return self._encode(texts, "document", prompt)

    def _encode(self, texts: Sequence[str], kind: str, prompt: str | None) -> Vectors:
        if prompt is None:
            names = [n for n in (*PROMPTS[kind], self._model.default_prompt_name) if n in self._model.prompts]
            prompt = self._model.prompts[names[0]] if names else None
        longest = int(getattr(self._model[0], f"{kind}_length", None) or self._longest)
        parts = [texts[start : start + PART] for start in range(0, len(texts), PART)]
        found = []
        try:
            for number, part in enumerate(parts):
                if number + 1 < len(parts):
                    self._encoder.prepare(parts[number + 1], prompt or "", longest)
                found.append(self._encoder.encode(part, prompt or "", longest))
        finally:
            self._model.max_seq_length = self._longest
        vectors: Vectors = np.concatenate(found)
        return vectors


def can_be_fast(model: Any, similarity: str) -> bool:
    """Whether `FastModel` gives what the model would: one cosine vector per text, from one transformer for all texts.

    Of a model that reads images, too, it makes sure that no text is taken for the path of one.
    """
    return (
        isinstance(model, SentenceTransformer)
        and similarity == "cosine"
        and model.truncate_dim is None
        and type(model[0]).__name__ == "Transformer"
        and getattr(model[0], "query_expansion", None) is None
        and (model.modalities == ["text"] or more_than_text(model))
    )
