"""Latent attention of NV-Embed (arXiv:2405.17428 §3.1): tokens attend to trained latents, before they are averaged.

The one module of a model that sentence-transformers does not have. Its class lives here, in the installed package, and
never travels with the weights: a model that has it is loaded by `nvr_tasks.models.load_folder`, which runs no code of
the model's folder.
"""

from __future__ import annotations

from typing import Any

import torch  # noqa: TID253 - imported only with a model that has latent attention
from sentence_transformers.base.modules import Module  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253


class LatentAttentionLayer(Module):
    """Cross-attention from token states (queries) to latents (keys and values), then an MLP with GELU, both residual.

    Args:
        width: width of the token states.
        latents: trained latent vectors.
        heads: attention heads; divide `width`.
    """

    config_keys: list[str] = ["width", "latents", "heads"]  # noqa: RUF012 - as the base class has it

    def __init__(self, width: int, latents: int, heads: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.width, self.latents, self.heads = width, latents, heads
        self.array = nn.Parameter(torch.randn(latents, width) / width**0.5)
        self.normalise = nn.LayerNorm(width)
        self.attend = nn.MultiheadAttention(width, heads, batch_first=True, bias=False)
        self.normalise_again = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Replace token_embeddings, [B, T, width]; a token's result depends on no other token."""
        given: Tensor = features["token_embeddings"]
        tokens = given.to(self.array.dtype)
        latents = self.array[None].expand(len(tokens), -1, -1)
        attended, _weights = self.attend(self.normalise(tokens), latents, latents, need_weights=False)
        tokens = tokens + attended
        features["token_embeddings"] = (tokens + self.mlp(self.normalise_again(tokens))).to(given.dtype)
        return features

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:  # noqa: ARG002
        """Write config and weights (safetensors) into a folder."""
        self.save_config(output_path)
        self.save_torch_weights(output_path, safe_serialization=safe_serialization)

    @classmethod
    def load(cls, model_name_or_path: str, **kwargs: Any) -> LatentAttentionLayer:  # type: ignore[override]
        """Read what `save` wrote."""
        known = ("subfolder", "token", "cache_folder", "revision", "local_files_only")
        where = {k: v for k, v in kwargs.items() if k in known}
        config = cls.load_config(model_name_or_path=model_name_or_path, **where)
        model = cls(**config)
        cls.load_torch_weights(model_name_or_path=model_name_or_path, model=model, **where)
        return model
