"""Mined negatives as the columns that sentence-transformers' losses train on.

Shapes: R rows of the result, K negatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from nvr_tasks.errors import NvrError

if TYPE_CHECKING:
    from nvr_tasks.mining.result import MiningResult

Format = Literal["triplet", "n-tuple", "labeled-pair", "labeled-list"]


def columns(
    result: MiningResult, queries: Sequence[str], corpus: Sequence[str], shape: Format, drop_short: bool
) -> dict[str, list[Any]]:
    """Columns of a training set, rows in the order of the result.

    triplet: anchor, positive, negative, one row per negative. n-tuple: anchor, positive, negative_1 … negative_K.
    labeled-pair: anchor, passage, label (1 the positive, 0 a negative). labeled-list: anchor, passages, labels.

    Raises:
        NvrError: the format is unknown, texts do not match the result, or rows are too short for n-tuples and dropping
            them was not asked for.
    """
    if shape not in get_args(Format):
        raise NvrError(f"format {shape!r} is unknown: one of {', '.join(get_args(Format))}")
    if result.candidates != len(result.query_rows) * len(corpus) or int(result.query_rows.max(initial=-1)) >= len(
        queries
    ):
        raise NvrError(
            f"{len(queries)} queries and {len(corpus)} passages are not the ones mined: give the texts in the order of the vectors"
        )
    short = set(result.short_rows.tolist())
    if shape == "n-tuple" and short and not drop_short:
        raise NvrError(
            f"{len(short)} of {len(result.query_rows)} rows have fewer than {result.spec.num_negatives} negatives and make no "
            "n-tuple: pass drop_short=True to leave them out, or take format triplet or labeled-list, which need no fixed number"
        )
    names = {
        "triplet": ["anchor", "positive", "negative"],
        "n-tuple": ["anchor", "positive", *(f"negative_{i + 1}" for i in range(result.spec.num_negatives))],
        "labeled-pair": ["anchor", "passage", "label"],
        "labeled-list": ["anchor", "passages", "labels"],
    }[shape]
    rows: list[tuple[Any, ...]] = []
    lines = zip(result.query_rows.tolist(), result.positive_ids.tolist(), result.negative_ids.tolist(), strict=True)
    for i, (query, positive, ids) in enumerate(lines):
        anchor, good, bad = queries[query], corpus[positive], [corpus[n] for n in ids if n >= 0]
        if shape == "triplet":
            rows += [(anchor, good, negative) for negative in bad]
        elif shape == "n-tuple":
            rows += [] if i in short else [(anchor, good, *bad)]
        elif shape == "labeled-pair":
            rows += [(anchor, good, 1), *((anchor, negative, 0) for negative in bad)]
        else:
            rows.append((anchor, [good, *bad], [1] + [0] * len(bad)))
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}
