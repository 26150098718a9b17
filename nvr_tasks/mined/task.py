"""What is to be mined: the training queries of a data set, and what is known to be relevant to them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nvr_tasks.errors import NvrError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pandas as pd

    from nvr_tasks.dataset import RetrievalData
    from nvr_tasks.mining.arrays import Ints, Ragged


@dataclass(frozen=True)
class MiningTask:
    """The training queries (sorted by id) and what is known to be relevant to them, as rows of the corpus.

    Attributes:
        query_ids, query_texts, query_sources: of split `train`.
        doc_ids, passages: of the corpus, sorted, so that "lowest row" is "lowest id"; what a model sees of each.
        groups: group of each passage, [N].
        positives: judged relevant for training, per query.
        exclude: judged relevant in any other split, per query.
        judged_texts, judged_sources, judged_positives: every query of any split, and what is relevant to it.
        query_keys: digest of each query id: a draw hangs on it, not on which other queries there are, [Q].
    """

    query_ids: list[str]
    query_texts: list[str]
    query_sources: list[str]
    doc_ids: npt.NDArray[np.object_]
    passages: list[str]
    groups: Ints
    positives: Ragged
    exclude: Ragged
    judged_texts: list[str]
    judged_sources: list[str]
    judged_positives: Ragged
    query_keys: npt.NDArray[np.uint64]

    @staticmethod
    def of(data: RetrievalData) -> MiningTask:
        """What a data set asks to be mined. Raises NvrError if it has no training query or is damaged."""
        import numpy as np
        import pandas as pd

        from nvr_tasks.mining.arrays import Ragged

        queries = data.queries[data.queries["split"] == "train"].sort_values("query_id")
        if queries.empty:
            raise NvrError("the data set has no query in split train: there is nothing to mine; check data.sources")
        corpus = data.corpus.sort_values("doc_id")
        if not data.corpus["doc_id"].is_monotonic_increasing:
            raise NvrError("the data set's corpus is not sorted by doc_id: run `nvr download` again")
        relevant = data.qrels[data.qrels["relevance"] >= 1]
        of_training = relevant["query_id"].isin(queries["query_id"])
        trained = relevant["split"] == "train"

        def lists(judged: pd.DataFrame, queries: pd.DataFrame = queries) -> Ragged:
            query = pd.Index(queries["query_id"]).get_indexer(pd.Index(judged["query_id"]))
            row = pd.Index(corpus["doc_id"]).get_indexer(pd.Index(judged["doc_id"]))
            if (row < 0).any():
                raise NvrError(
                    f"a judgement names document {judged['doc_id'].iloc[int(np.flatnonzero(row < 0)[0])]}, which is not in the corpus"
                )
            pairs = np.unique(np.stack([query, row], axis=1).astype(np.int64), axis=0)
            sizes = np.bincount(pairs[:, 0], minlength=len(queries))
            return Ragged(pairs[:, 1].copy(), np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)]))

        ids = queries["query_id"].tolist()
        digests = b"".join(hashlib.blake2b(i.encode(), digest_size=8).digest() for i in ids)
        return MiningTask(
            query_ids=ids,
            query_texts=queries["text"].tolist(),
            query_sources=queries["source"].tolist(),
            doc_ids=corpus["doc_id"].to_numpy(dtype=object),
            passages=data.passages(),
            groups=corpus["group"].to_numpy(dtype=np.int64),
            positives=lists(relevant[of_training & trained]),
            exclude=lists(relevant[of_training & ~trained]),
            judged_texts=data.queries["text"].tolist(),
            judged_sources=data.queries["source"].tolist(),
            judged_positives=lists(relevant[relevant["query_id"].isin(data.queries["query_id"])], data.queries),
            query_keys=np.frombuffer(digests, dtype="<u8").astype(np.uint64),
        )
