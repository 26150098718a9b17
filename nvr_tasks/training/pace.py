"""Faster steps on a CPU for the same gradients: attention that suits short texts, and less padding.

Shapes: n texts of a column (queries, positives, the first negatives, …), L tokens of the longest, H the model's width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch  # noqa: TID253 - only the training loop imports this module

from nvr_tasks.media import more_than_text
from nvr_tasks.training.sharding import is_sharded

SHORT = 512  # tokens: up to here plain attention is faster than the fused one, whose backward pass is slow on CPUs
TOKEN_BY_TOKEN = frozenset(
    {"Pooling", "LatentAttentionLayer", "Dense", "Normalize", "MultiVectorMask"}
)  # pass padding over
WORTH_IT = 64  # tokens of padding, below which another pass through the model costs more than they do


@contextmanager
def hurried(model: Any, longest: int) -> Iterator[None]:
    """Train faster inside.

    Args:
        model: a sentence-transformers model; left as it is unless it is on a CPU, whole, and starts with a transformer for all
            texts, and nothing but texts: places of images' tokens follow from more than one row's words.
        longest: tokens of the longest text.
    """
    first = model[0]
    if (
        model.device.type != "cpu"
        or is_sharded(model)
        or type(first).__name__ != "Transformer"
        or more_than_text(model)
    ):
        yield
        return
    network = first.model
    attention = network.config._attn_implementation
    if attention == "sdpa" and longest <= SHORT:
        network.set_attn_implementation("eager")
    grouped = all(type(module).__name__ in TOKEN_BY_TOKEN for module in list(model)[1:])
    if grouped:
        first.forward = _Grouped(first.forward, network.get_input_embeddings())
    try:
        yield
    finally:
        if grouped:
            del first.forward
        network.set_attn_implementation(attention)


class _Grouped:
    """A transformer's `forward` that takes texts of like length together.

    Words are looked up once for all groups: each look-up has a gradient as large as the vocabulary.
    """

    def __init__(self, forward: Callable[..., dict[str, Any]], words: torch.nn.Module) -> None:
        self.forward, self.words = forward, words

    def __call__(self, features: dict[str, Any], **more: Any) -> dict[str, Any]:
        """States of every token, [n, L, H]; zeros where there is padding."""
        lengths = _lengths(features)
        if lengths is None:
            return self.forward(features, **more)
        order = lengths.argsort(descending=True, stable=True)
        sizes = group(lengths[order].tolist())
        if len(sizes) == 1:
            return self.forward(features, **more)
        whole = features["input_ids"].shape[1]
        given = {name: value for name, value in features.items() if name != "input_ids"}
        given["inputs_embeds"] = self.words(features["input_ids"])
        found = []
        for rows in torch.split(order, sizes):
            longest = int(lengths[rows[0]])
            part = {k: v[rows, :longest] if isinstance(v, torch.Tensor) and v.ndim > 1 else v for k, v in given.items()}
            states = self.forward(part, **more)["token_embeddings"]
            found.append(torch.nn.functional.pad(states, (0, 0, 0, whole - longest)))
        features["token_embeddings"] = torch.cat(found)[order.argsort()]
        return features


def _lengths(features: dict[str, Any]) -> torch.Tensor | None:
    """Tokens of each text, [n]; None where there is more than text padded at its end, or padding that is scored."""
    ids, mask = features.get("input_ids"), features.get("attention_mask")
    if ids is None or mask is None or mask.shape != ids.shape or "query_expansion_positions" in features:
        return None
    if any(isinstance(v, torch.Tensor) and v.ndim > 0 and v.shape != ids.shape for v in features.values()):
        return None
    if not (mask.bool() == mask.bool().cummin(dim=1).values).all() or not mask[:, 0].all():
        return None
    found: torch.Tensor = mask.sum(dim=1)
    return found


def group(lengths: list[int]) -> list[int]:
    """How many texts to take together, longest first, so that padding is no more than what it costs to avoid it."""
    count, longest = len(lengths), lengths[0]
    saved = [(longest - lengths[cut]) * (count - cut) for cut in range(1, count)]
    if not saved or max(saved) < WORTH_IT:
        return [count]
    cut = 1 + saved.index(max(saved))
    return [*group(lengths[:cut]), *group(lengths[cut:])]
