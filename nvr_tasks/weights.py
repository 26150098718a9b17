"""Refuse a model whose checkpoint lacks weights that it uses: transformers would fill them with random numbers.

A tensor that is missing and never used (the pooler of a BERT that is pooled by its mean) is no fault, so what is
missing is tried: made NaN, it either reaches the vector of a text (the score of a pair) or it does not.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nvr_tasks.errors import NvrError

log = logging.getLogger(__name__)


@contextmanager
def noting_missing_weights() -> Iterator[set[str]]:
    """While open, every transformers model that is loaded adds the names of the tensors its checkpoint lacks."""
    from transformers import PreTrainedModel

    original = PreTrainedModel.__dict__["from_pretrained"]
    missing: set[str] = set()

    def from_pretrained(cls: type[Any], *args: Any, **kwargs: Any) -> Any:
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = original.__func__(cls, *args, output_loading_info=True, **kwargs)
        missing.update(info["missing_keys"])
        return (model, info) if wants_info else model

    PreTrainedModel.from_pretrained = classmethod(from_pretrained)  # type: ignore[method-assign,assignment]
    try:
        yield missing
    finally:
        PreTrainedModel.from_pretrained = original  # type: ignore[method-assign]


def refuse_missing_weights(model: Any, missing: set[str], where: str) -> None:
    """Raise NvrError if a vector or score depends on a tensor that the checkpoint lacks.

    Args:
        model: an embedding model or a cross-encoder.
        missing: names of tensors, as `noting_missing_weights` gathered them; a name may lack its first parts.
        where: the model, as people name it.
    """
    import torch
    from sentence_transformers import CrossEncoder

    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    lacking = {
        name: tensor
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and any(name == key or name.endswith(f".{key}") for key in missing)
    }
    if not lacking:
        return
    kept = {name: tensor.detach().clone() for name, tensor in lacking.items()}
    with torch.no_grad():
        for tensor in lacking.values():
            tensor.fill_(float("nan"))
        if isinstance(model, CrossEncoder):
            given = model.predict([("a", "b")], convert_to_tensor=True, show_progress_bar=False)
        else:
            given = model.encode(["a"], convert_to_tensor=True, show_progress_bar=False)[0]
        for name, tensor in lacking.items():
            tensor.copy_(kept[name])
    if not bool(torch.isfinite(given).all()):
        raise NvrError(
            f"the model in {where} lacks weights that it needs ({', '.join(sorted(lacking)[:5])}): what it says would be "
            "random; fetch it again, or save it whole"
        )
    log.info("the checkpoint of %s lacks %d tensors that nothing depends on", where, len(lacking))
