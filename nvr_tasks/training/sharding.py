"""Weights, gradients and optimizer states divided over the processes of a training (FSDP2, torch's `fully_shard`).

Every transformer layer is gathered when it computes and let go afterwards. What leaves training, checkpoints included, is
whole: neither their files nor the model tell whether it was sharded.
"""

from __future__ import annotations

from typing import Any

import torch  # noqa: TID253 - only the training loop imports this module
import torch.distributed as dist  # noqa: TID253
from torch import Tensor  # noqa: TID253
from torch.distributed.device_mesh import init_device_mesh  # noqa: TID253
from torch.distributed.fsdp import FSDPModule, fully_shard  # noqa: TID253
from torch.distributed.tensor import DTensor, distribute_tensor  # noqa: TID253

from nvr_tasks.errors import NvrError
from nvr_tasks.media import more_than_text


def meet(on_cuda: bool) -> None:
    """Let the processes that torchrun started find each other, before the library's trainer does so itself."""
    if not dist.is_initialized():
        dist.init_process_group("nccl" if on_cuda else "gloo")


def shard(model: Any, on_cuda: bool) -> None:
    """Divide a student over all processes, in place; its weights may lie in host memory and go to the GPUs layer by layer.

    Raises:
        NvrError: transformers does not name the layers of the model's architecture, or trained weights differ in type.
    """
    if more_than_text(model):
        raise NvrError(
            "runtime.shard_weights cannot divide a student that reads more than text: set it to false, or train adapters "
            "(train.student.lora)"
        )
    transformer = model[0].auto_model
    names = set(getattr(transformer, "_no_split_modules", None) or ())
    layers = [module for module in transformer.modules() if type(module).__name__ in names]
    if not layers:
        raise NvrError(
            f"cannot shard {type(transformer).__name__}: transformers does not name its layers; set runtime.shard_weights=false"
        )
    if len({parameter.dtype for parameter in model.parameters() if parameter.requires_grad}) > 1:
        raise NvrError(
            "runtime.shard_weights cannot divide trained weights of two types: set train.student.weights_dtype=float32, or train "
            "adapters (train.student.lora)"
        )
    meet(on_cuda)
    mesh = init_device_mesh("cuda" if on_cuda else "cpu", (dist.get_world_size(),))
    for module in (*layers, model):  # the model: what is not in a layer
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def is_sharded(model: Any) -> bool:
    """Whether `shard` was here."""
    return isinstance(model, FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its parts; of a sharded one, every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def divided_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of a tensor that every process has whole, divided as a parameter of its shape is."""
    if not isinstance(parameter, DTensor) or isinstance(tensor, DTensor) or tensor.shape != parameter.shape:
        return tensor
    mesh = parameter.device_mesh
    return distribute_tensor(tensor.to(parameter.device), mesh, parameter.placements, src_data_rank=None)


def whole_states(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's `state_dict` as without sharding; every process must ask for it."""
    given = optimizer.state_dict()
    states = {
        number: {name: whole(value).cpu() if isinstance(value, Tensor) else value for name, value in state.items()}
        for number, state in given["state"].items()
    }
    return {**given, "state": states}


def load_states(optimizer: torch.optim.Optimizer, given: dict[str, Any]) -> None:
    """Read back what `whole_states` gave."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = {
        number: {
            name: divided_like(value, parameters[number]) if isinstance(value, Tensor) else value
            for name, value in state.items()
        }
        for number, state in given["state"].items()
    }
    optimizer.load_state_dict({**given, "state": states})
