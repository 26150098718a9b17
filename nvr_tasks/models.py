"""Loading embedding models: from a package, a folder or the hub; never remote code, never pickled weights.

Light to import: identities are computed from file digests, torch is loaded only when a model is.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvr_tasks.artifacts import sha256_once
from nvr_tasks.config import CrossEncoder, HubModel, LocalModel, ModelRef, PackageModel, Runtime, Student, Teacher
from nvr_tasks.errors import NvrError
from nvr_tasks.weights import noting_missing_weights, refuse_missing_weights

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder as STCrossEncoder
    from sentence_transformers import SentenceTransformer

log = logging.getLogger(__name__)

# What decides a model's vectors; a changed README must not make a new model.
MODEL_FILES = (".json", ".safetensors", ".txt", ".model", ".jinja")
HUB_FILES = [f"*{suffix}" for suffix in MODEL_FILES]


# ── identity ─────────────────────────────────────────────────────────────────────────────────────────────────────


def digest_of_files(files: Iterable[tuple[str, str]]) -> str:
    """Identity of a model from (relative path, sha256) of its files; files that cannot change a vector are left out."""
    lines = sorted(f"{path}\0{digest}" for path, digest in files if path.endswith(MODEL_FILES))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


def digest_of_folder(folder: Path) -> str:
    """Identity of the model in a folder."""
    paths = [
        p for p in folder.rglob("*") if p.is_file() and p.name.endswith(MODEL_FILES) and not p.name.startswith(".")
    ]
    return digest_of_files((p.relative_to(folder).as_posix(), sha256_once(p)) for p in paths)


def model_identity(ref: ModelRef) -> dict[str, str]:
    """What names a model's weights: a pinned commit on the hub, else the digest of its files.

    Raises:
        NvrError: the package or folder is missing.
    """
    if isinstance(ref, HubModel):
        return {"repo": ref.repo, "revision": ref.revision}
    return {"digest": digest_of_folder(_local_folder(ref))}


def teacher_identity(teacher: Teacher) -> dict[str, Any]:
    """Everything about a teacher that its vectors depend on; its name in the recipe is not among it."""
    return {
        "model": model_identity(teacher.model),
        "dtype": teacher.dtype,
        "prompts": teacher.prompts.model_dump(),
        "max_tokens": teacher.max_tokens.model_dump(),
    }


def cross_encoder_identity(reranker: CrossEncoder) -> dict[str, Any]:
    """Everything about a cross-encoder that its output for a pair depends on."""
    return {"model": model_identity(reranker.model), "dtype": reranker.dtype, "max_tokens": reranker.max_tokens}


def student_identity(student: Student) -> dict[str, Any]:
    """Everything that the untrained student depends on."""
    return {"model": model_identity(student.model), **student.model_dump(mode="json", exclude={"model"})}


# ── loading ──────────────────────────────────────────────────────────────────────────────────────────────────────


def pick_device(runtime: Runtime) -> str:
    """The torch device of a stage; applies the recipe's thread limit on the way."""
    import torch

    if runtime.threads:
        torch.set_num_threads(runtime.threads)
    if runtime.device == "cuda" and not torch.cuda.is_available():
        raise NvrError(
            "runtime.device is cuda, but torch sees no CUDA device: set runtime.device=auto or cpu, or run on a GPU node"
        )
    return "cuda" if runtime.device == "cuda" or (runtime.device == "auto" and torch.cuda.is_available()) else "cpu"


def load_folder(folder: Path, device: str) -> SentenceTransformer:
    """Load the sentence-transformers model in a folder, safely.

    Raises:
        NvrError: it asks for remote code, has pickled weights only, lacks weights that it uses, or cannot be read.
    """
    refuse_remote_code(folder)
    from safetensors import SafetensorError
    from sentence_transformers import SentenceTransformer

    try:
        with noting_missing_weights() as missing:
            model = SentenceTransformer(
                str(folder),
                device=device,
                trust_remote_code=False,
                local_files_only=True,
                model_kwargs={"use_safetensors": True, "dtype": "float32"},
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise NvrError(
            f"cannot load the model in {folder}: {error}; expected a sentence-transformers folder with safetensors"
        ) from error
    refuse_missing_weights(model, missing, str(folder))
    return model


def load_teacher(teacher: Teacher, runtime: Runtime) -> SentenceTransformer:
    """The teacher, ready to encode."""
    return load_folder(locate_model(teacher.model), pick_device(runtime))


def load_cross_encoder(reranker: CrossEncoder, runtime: Runtime) -> STCrossEncoder:
    """A cross-encoder, ready to score pairs.

    Raises:
        NvrError: it asks for remote code, has pickled weights only, cannot be read, or gives more than one number.
    """
    folder, device = locate_model(reranker.model), pick_device(runtime)
    refuse_remote_code(folder)
    from safetensors import SafetensorError
    from sentence_transformers import CrossEncoder as STCrossEncoder

    try:
        model: STCrossEncoder = STCrossEncoder(
            str(folder),
            device=device,
            trust_remote_code=False,
            local_files_only=True,
            model_kwargs={"use_safetensors": True, "dtype": "float32"},
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise NvrError(
            f"cannot load the cross-encoder in {folder}: {error}; expected a sentence-transformers CrossEncoder (or a "
            "transformers sequence classifier) with safetensors"
        ) from error
    if model.num_labels != 1:
        raise NvrError(
            f"the cross-encoder in {folder} gives {model.num_labels} numbers per pair, and a teacher needs one: use a reranker "
            "with one output"
        )
    longest = model.max_seq_length
    if longest is not None and reranker.max_tokens > longest:
        raise NvrError(
            f"cross-encoder {reranker.name} reads at most {longest} tokens, but its max_tokens is {reranker.max_tokens}: lower it"
        )
    model.max_seq_length = reranker.max_tokens
    model.eval()
    return model


def build_student(student: Student, runtime: Runtime) -> SentenceTransformer:
    """The untrained student: the base model, cut to its first `layers`, with the recipe's prompts and length."""
    model = load_folder(locate_model(student.model), pick_device(runtime))
    if student.layers is not None:
        keep_first_layers(model, student.layers)
    model.max_seq_length = student.max_tokens
    model.prompts = {"query": student.prompts.query, "document": student.prompts.passage}
    return model


def locate_model(ref: ModelRef) -> Path:
    """A local folder with the model; a hub model is downloaded (or found in the hub cache) at its pinned commit."""
    return _download(ref) if isinstance(ref, HubModel) else _local_folder(ref)


def _local_folder(ref: PackageModel | LocalModel) -> Path:
    if isinstance(ref, LocalModel):
        folder = Path(ref.path).absolute()
        if not (folder / "config.json").is_file() and not (folder / "modules.json").is_file():
            raise NvrError(
                f"no model at {folder} (neither config.json nor modules.json there): correct the recipe's model.path"
            )
        return folder
    try:
        spec = importlib.util.find_spec(ref.package)
    except ModuleNotFoundError:  # of the parent of a dotted name
        spec = None
    if spec is None or spec.origin is None:
        raise NvrError(
            f"package {ref.package}, which holds a model of this recipe, is not installed: pip install {ref.package.replace('_', '-')}"
        )
    folder = Path(spec.origin).parent / ref.path
    if not folder.is_dir():
        raise NvrError(f"package {ref.package} has no folder {ref.path!r}: correct the recipe's model.path")
    return folder


def _download(ref: HubModel) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(ref.repo, revision=ref.revision, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub client raises its own, httpx's and OS errors for "not reachable"
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        raise NvrError(
            f"cannot get model {ref.repo} at {ref.revision[:12]} from {endpoint}: {str(error).splitlines()[0]}; "
            "check the network, HF_ENDPOINT and HF_TOKEN, or use a local copy (model: {type: path})"
        ) from error


def refuse_remote_code(folder: Path) -> None:
    """Raise NvrError when a model folder asks to run code that came with it, or holds only pickled weights."""
    for path in sorted(folder.rglob("*config.json")):
        settings = _read_json(path)
        if not isinstance(settings, dict):
            if path.name != "config.json":
                continue  # sentence-transformers' data_config.json is a list
            raise NvrError(f"{path} is not a JSON object: the model folder is damaged")
        if "auto_map" in settings:
            raise NvrError(
                f"the model in {folder} asks for remote code ({path.name}: auto_map), which NVR never runs: "
                "use a model that transformers or sentence-transformers supports natively"
            )
    listed = folder / "modules.json"
    modules = _read_json(listed) if listed.is_file() else []
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise NvrError(f"{listed} is not a list of modules: the model folder is damaged")
    for module in modules:
        if not str(module.get("type", "")).startswith("sentence_transformers."):
            raise NvrError(
                f"the model in {folder} asks for remote code (modules.json: {module.get('type')}), which NVR never runs: "
                "use a model whose modules are sentence_transformers' own"
            )
    for pickled in sorted(folder.rglob("pytorch_model*.bin")):
        if not any(pickled.parent.glob("*.safetensors")):
            raise NvrError(
                f"the model in {folder} has no safetensors weights for {pickled.relative_to(folder)}, and pickled ones are "
                "never loaded: convert it to safetensors first"
            )
    if not any(folder.rglob("*.safetensors")):
        raise NvrError(
            f"the model in {folder} has no safetensors weights, and pickled ones are never loaded: convert it to safetensors first"
        )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise NvrError(f"{path} is not JSON ({error}): the model folder is damaged") from None


def keep_first_layers(model: SentenceTransformer, layers: int) -> None:
    """Cut a transformer to its first layers, in place.

    Raises:
        NvrError: it has fewer layers, or an architecture whose layer list is not known here.
    """
    transformer: Any = model[0].auto_model
    for path in ("encoder.layer", "layers", "transformer.layer", "encoder.layers", "model.layers"):
        parent: Any = transformer
        *parents, name = path.split(".")
        for part in parents:
            parent = getattr(parent, part, None)
        blocks = getattr(parent, name, None) if parent is not None else None
        if blocks is None:
            continue
        if layers > len(blocks):
            raise NvrError(f"train.student.layers is {layers}, but the model has only {len(blocks)} layers")
        setattr(parent, name, blocks[:layers])
        transformer.config.num_hidden_layers = layers
        return
    raise NvrError(
        f"cannot cut {type(transformer).__name__} to {layers} layers: its layer list is not known; remove train.student.layers"
    )
