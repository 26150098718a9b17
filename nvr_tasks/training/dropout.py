"""Whether a student is trained with dropout: then the number of processes that train it changes the model.

Each process draws the masks of its own part of the batch, so no two numbers of processes draw the same ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nvr_tasks.models import locate_configs
from nvr_tasks.training_settings import Student, Train

ADAPTERS = "lora_"  # in names of modules, whose dropout is a setting of its own


@contextmanager
def dropping(model: Any, share: float | None) -> Iterator[None]:
    """Set the dropout of a model, its adapters' aside, inside; None leaves it as it is."""
    import torch

    changed: list[tuple[Any, str, float]] = []
    if share is not None:
        for name, module in model.named_modules():
            if ADAPTERS in name:
                continue
            names = ["p"] if isinstance(module, torch.nn.Dropout) else [n for n in vars(module) if "drop" in n]
            changed += [(module, n, getattr(module, n)) for n in names if isinstance(getattr(module, n), float)]
    for module, name, _ in changed:
        setattr(module, name, share)
    try:
        yield
    finally:
        for module, name, before in changed:
            setattr(module, name, before)


def has_dropout(train: Train) -> bool:
    """Whether any stage of training drops anything."""
    student = train.student
    if student.lora is not None and student.lora.dropout > 0:
        return True
    shares = {stage.dropout for stage in train.schedule}
    return any(shares - {None}) or (None in shares and _of_its_own(student))


def _of_its_own(student: Student) -> bool:
    """By the folder's configs, with transformers' defaults for what they leave out.

    A folder whose configs transformers does not know counts as having dropout.

    Raises:
        NvrError: the model is on the hub, which cannot be reached, or its package or folder is missing.
    """
    folder = locate_configs(student.model)
    configs = [path.parent for path in (folder / "config.json", *folder.glob("0_*/config.json")) if path.is_file()]
    return not configs or _module_of_its_own(folder) or any(_configured(config) for config in configs)


def _module_of_its_own(folder: Path) -> bool:
    listed = folder / "modules.json"
    modules = json.loads(listed.read_text(encoding="utf-8")) if listed.is_file() else []
    return any(str(module.get("type", "")).endswith(".Dropout") for module in modules)


def _configured(folder: Path) -> bool:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError):
        return True
    return _any_above_zero(config.to_dict())


def _any_above_zero(settings: dict[Any, Any]) -> bool:
    """Whether a probability of dropping is: hidden_dropout_prob, attention_dropout, resid_pdrop, layerdrop, …"""
    for name, value in settings.items():
        if isinstance(value, dict):
            if _any_above_zero(value):
                return True
        elif "drop" in str(name) and isinstance(value, int | float) and value > 0:
            return True
    return False
