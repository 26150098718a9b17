"""The weights that training changes: saved for a checkpoint, read back, checked.

Only these: of a 7B model with adapters they are a thousandth, and what stays as it was need not be written.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch  # noqa: TID253 - only the training loop imports this module
from safetensors.torch import load_file, save_file

from nvr_tasks.errors import NvrError
from nvr_tasks.training.sharding import divided_like, whole

FILE = "trained.safetensors"


def trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Trained parameters and all buffers of the state, by name."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return state | {name: b for name, b in model.state_dict().items() if name not in parameters}


def save(model: torch.nn.Module, folder: Path | None) -> None:
    """Write them into a folder, whole; of a sharded model, every process must take part, those without a folder, too.

    Raises:
        NvrError: one is NaN or infinite.
    """
    state = {name: whole(tensor).contiguous().cpu() for name, tensor in trained(model).items()}
    _refuse({name: state[name] for name, p in model.named_parameters() if p.requires_grad})
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / FILE)


def load(model: torch.nn.Module, folder: Path) -> None:
    """Read them back, in place. Raises NvrError when they are another model's."""
    state = load_file(folder / FILE)
    own = trained(model)
    differing = sorted(set(state) ^ set(own))
    if differing:
        raise NvrError(
            f"the checkpoint in {folder} is of another model ({differing[0]} …): remove it, or use the code that wrote it"
        )
    model.load_state_dict({name: divided_like(tensor, own[name]) for name, tensor in state.items()}, strict=False)


def refuse_broken(model: torch.nn.Module) -> None:
    """Raise NvrError when a weight is NaN or infinite; the watch on the loss does not cover the last update."""
    _refuse({name: weight for name, weight in model.named_parameters() if weight.requires_grad})


def _refuse(trained_weights: Mapping[str, torch.Tensor]) -> None:
    for name, weight in trained_weights.items():
        if not bool(weight.isfinite().all()):
            raise NvrError(
                f"training left {name} with NaN or infinite weights: lower learning_rate, or use dtype float32; "
                "the last good checkpoint is kept"
            )
