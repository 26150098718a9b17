"""mteb's search over a corpus of any length, by the exact search that mining uses.

The corpus is embedded block by block while it is searched: a block of vectors and the best k of each query are all the
memory. mteb encodes (prompts included) and scores; only what lies between is ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch  # noqa: TID253 - only evaluation.run imports this module
from mteb._create_dataloaders import create_dataloader  # noqa: TID253
from mteb.types import PromptType  # noqa: TID253

from nvr_tasks.errors import NvrError
from nvr_tasks.mining.arrays import Blocked, Ints, Vectors
from nvr_tasks.mining.corpus import NotFiniteError, check_finite
from nvr_tasks.mining.search import Request, Tiles, search

SIMILARITIES = ("cosine", "dot")


class ExactSearch:
    """An mteb `SearchProtocol`: finds the `top_k` passages of every query in one pass over the corpus, exactly.

    Scores are dot products in float64 of the model's float32 vectors (normalised for cosine), ties by corpus order.

    Args:
        encoder: mteb's wrapper of a sentence-transformers model.
        similarity: cosine or dot.
        tiles: how the search is cut up; a corpus block of `block_rows` passages is embedded at a time.
    """

    def __init__(self, encoder: Any, similarity: str, tiles: Tiles) -> None:
        if similarity not in SIMILARITIES:
            raise NvrError(f"similarity {similarity!r} cannot be searched: one of {', '.join(SIMILARITIES)}")
        self.encoder, self.similarity, self.tiles = encoder, similarity, tiles
        self.corpus: Any = None

    @property
    def mteb_model_meta(self) -> Any:
        """What mteb records about the model."""
        return self.encoder.mteb_model_meta

    def index(self, corpus: Any, **_: Any) -> None:
        """Take the corpus (columns id, title, text); it is embedded by `search`."""
        self.corpus = corpus

    def search(
        self,
        queries: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        top_k: int,
        encode_kwargs: dict[str, Any],
        top_ranked: Any = None,
        num_proc: int | None = None,
        **_: Any,
    ) -> dict[str, dict[str, float]]:
        """{query id: {passage id: score}}, at most `top_k` passages per query.

        Raises:
            NvrError: candidates were given to be ranked again (that is no retrieval), or a vector is not finite.
        """
        if top_ranked is not None:
            raise NvrError(f"task {task_metadata.name} ranks given candidates again: it is no retrieval task")
        asked = {"task_metadata": task_metadata, "hf_split": hf_split, "hf_subset": hf_subset}

        def encode(texts: Any, kind: PromptType) -> Vectors:
            loader = create_dataloader(
                texts, task_metadata=task_metadata, prompt_type=kind, num_proc=num_proc, **encode_kwargs
            )
            return self._unit(self.encoder.encode(loader, prompt_type=kind, **asked, **encode_kwargs))

        query_vectors = encode(queries, PromptType.query)
        check_finite(query_vectors, "query_vectors")
        count = len(query_vectors)
        corpus = _EmbeddedCorpus(self.corpus, query_vectors.shape[1], lambda part: encode(part, PromptType.document))
        request = Request(
            np.arange(count, dtype=np.int64),
            np.full(count, np.inf),
            np.full(count, min(top_k, corpus.rows), dtype=np.int64),
        )
        none = np.empty(0, dtype=np.int64)
        blocked = Blocked(none, none, none, np.zeros((count, 4), dtype=np.int64))
        try:
            found = search(query_vectors, corpus, request, blocked, None, self.tiles)
        except NotFiniteError as error:
            raise NvrError(
                f"the model gives passage {self.corpus[error.row]['id']!r} a vector with NaN or infinite numbers: "
                "its weights are damaged, or the dtype overflows"
            ) from None
        ids = np.array(list(self.corpus["id"]), dtype=object)
        return {
            query: dict(zip(ids[rows[rows >= 0]].tolist(), scores[rows >= 0].tolist(), strict=True))
            for query, rows, scores in zip(queries["id"], found.ids, found.scores, strict=True)
        }

    def _unit(self, vectors: Any) -> Vectors:
        tensor = torch.as_tensor(vectors).float()
        if self.similarity == "cosine":
            tensor = torch.nn.functional.normalize(tensor, dim=1)
        array: Vectors = tensor.cpu().numpy()
        return array


class _EmbeddedCorpus:
    """A `mining.corpus.Corpus` whose vectors are made when their block is asked for."""

    def __init__(self, texts: Any, dim: int, encode: Any) -> None:
        self.texts, self.dim, self.encode = texts, dim, encode
        self.rows = len(texts)

    def blocks(self, block_rows: int) -> Iterator[tuple[int, Vectors]]:
        """See Corpus."""
        for start in range(0, self.rows, block_rows):
            yield start, self.encode(self.texts.select(range(start, min(start + block_rows, self.rows))))

    def take(self, rows: Ints) -> Vectors:
        """See Corpus."""
        return np.asarray(self.encode(self.texts.select(rows.tolist())))
