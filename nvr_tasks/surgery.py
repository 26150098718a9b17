"""What a student gets before it is trained: fewer layers, attention in both directions, another pooling, adapters.

Everything but the adapters is written into the model's own configuration, so that a saved model loads as it was
trained; the adapters are merged into the weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from nvr_tasks.errors import NvrError
from nvr_tasks.media import in_messages
from nvr_tasks.training_settings import LateInteraction, LatentAttention, Lora, Student

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

LAYER_LISTS = (
    "encoder.layer",
    "layers",
    "transformer.layer",
    "encoder.layers",
    "model.layers",
    "language_model.layers",
)


def operate(model: SentenceTransformer, student: Student) -> SentenceTransformer:
    """The model as the recipe's student; the same object, changed, or a multi-vector model made of it.

    Raises:
        NvrError: the model's architecture does not admit what the recipe asks for.
    """
    if student.layers is not None:
        keep_first_layers(model, student.layers)
    if student.bidirectional:
        attend_both_ways(model)
    if student.late_interaction is not None:
        return cast("SentenceTransformer", multi_vector(model, student.late_interaction))
    if student.pooling is not None or not student.pool_prompt:
        set_pooling(model, student.pooling, student.pool_prompt)
    if student.latent_attention is not None:
        add_latent_attention(model, student.latent_attention)
    return model


def keep_first_layers(model: SentenceTransformer, layers: int) -> None:
    """Cut a transformer to its first layers, in place.

    Raises:
        NvrError: it has fewer layers, or an architecture whose layer list is not known here.
    """
    transformer: Any = model[0].auto_model
    for path in LAYER_LISTS:
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
        if getattr(transformer.config, "layer_types", None):
            transformer.config.layer_types = transformer.config.layer_types[:layers]
        return
    raise NvrError(
        f"cannot cut {type(transformer).__name__} to {layers} layers: its layer list is not known; remove train.student.layers"
    )


def attend_both_ways(model: SentenceTransformer) -> None:
    """Make a decoder attend in both directions, in place; saved in its config, which transformers ≥ 5.2 honours.

    Raises:
        NvrError: a later token still does not change an earlier one's state.
    """
    transformer: Any = model[0].auto_model
    for config in _text_configs(transformer.config):
        config.is_causal = False
    if not sees_ahead(model):
        raise NvrError(
            f"{type(transformer).__name__} attends to earlier tokens only, whatever its config says: "
            "remove train.student.bidirectional, or use a decoder that can attend in both directions (Mistral, Llama, Qwen2 …)"
        )


def _text_configs(config: Any) -> list[Any]:
    """A model's config and the one of its text part, where that is another."""
    text = config.get_text_config()
    return [config] if text is config else [config, text]


def sees_ahead(model: SentenceTransformer) -> bool:
    """Whether a later token changes the state of an earlier one."""
    import torch

    transformer: Any = model[0].auto_model
    vocabulary = int(transformer.get_input_embeddings().num_embeddings)
    ids = torch.arange(8, device=model.device)[None] % vocabulary
    other = ids.clone()
    other[0, -1] = (int(ids[0, -1]) + 1) % vocabulary
    training = transformer.training
    transformer.eval()
    try:
        with torch.inference_mode():
            states = [transformer(input_ids=i, attention_mask=torch.ones_like(i))[0][0, 0] for i in (ids, other)]
    finally:
        transformer.train(training)
    return not bool(torch.equal(*states))


def _pooling(model: SentenceTransformer) -> tuple[str, Any]:
    """Name and module of a model's pooling. Raises NvrError when it has none."""
    from sentence_transformers.sentence_transformer.modules import Pooling

    for name, module in model.named_children():
        if isinstance(module, Pooling):
            return name, module
    raise NvrError(
        "the student has no pooling module that could be changed: remove pooling, pool_prompt and latent_attention from "
        "train.student, or start from a transformers model"
    )


def set_pooling(model: SentenceTransformer, mode: str | None, include_prompt: bool) -> None:
    """Pool by `mode` (as before if None); without `include_prompt` prompt tokens are attended to, but not pooled."""
    from sentence_transformers.sentence_transformer.modules import Pooling

    if not include_prompt and in_messages(model):
        raise NvrError(
            "train.student.pool_prompt is false, but the student reads messages of a chat template, in which sentence-transformers "
            "does not tell the prompt's tokens apart: set it to true"
        )
    name, old = _pooling(model)
    new: Any = Pooling(old.embedding_dimension, mode or old.pooling_mode, include_prompt=include_prompt)
    if new.pooling_output_dimension != old.pooling_output_dimension:
        raise NvrError(
            f"train.student.pooling {mode} gives vectors of another width than the model's {old.pooling_mode}"
        )
    setattr(model, name, new)


def add_latent_attention(model: SentenceTransformer, settings: LatentAttention) -> None:
    """Put latent attention between the transformer and its pooling.

    Raises:
        NvrError: the heads do not divide the model's width.
    """
    import torch
    from sentence_transformers import SentenceTransformer

    from nvr_tasks.latent_attention import LatentAttentionLayer

    _, pooling = _pooling(model)
    width = pooling.embedding_dimension
    if width % settings.heads:
        raise NvrError(
            f"train.student.latent_attention.heads is {settings.heads}, which does not divide the model's width of {width}"
        )
    layer = LatentAttentionLayer(width, settings.latents, settings.heads).to(model.device)
    modules: list[Any] = []
    for module in model.children():
        modules += [layer, module] if module is pooling else [module]
    rebuilt = SentenceTransformer(modules=modules, device=str(model.device))
    model._modules = rebuilt._modules
    if layer.array.dtype != torch.float32:  # the first module's type, in which updates would round away
        layer.float()


def multi_vector(model: SentenceTransformer, settings: LateInteraction) -> Any:
    """A multi-vector model (MaxSim) on the transformer of a dense one, with a projection of its own.

    A model that is one already is kept, if its width is the wished one.
    """
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.base.modules import Dense, Normalize
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
    from torch import nn

    if isinstance(model, MultiVectorEncoder):
        width = model.get_embedding_dimension()
        if width != settings.dim:
            raise NvrError(
                f"train.student.late_interaction.dim is {settings.dim}, but the model's token vectors have {width}: set it to {width}"
            )
        return model
    transformer: Any = model[0]
    project = Dense(
        transformer.get_embedding_dimension(),
        settings.dim,
        bias=False,
        activation_function=nn.Identity(),
        module_input_name="token_embeddings",
    )
    modules = [transformer, project, MultiVectorMask(), Normalize(module_input_name="token_embeddings")]
    return MultiVectorEncoder(modules=modules, device=str(model.device))


# ── adapters ─────────────────────────────────────────────────────────────────────────────────────────────────────


def add_adapters(model: Any, lora: Lora) -> Any:
    """Put low-rank adapters into the transformer; only they, and modules after the transformer, are trained from now on.

    Returns:
        What `merge_adapters` needs.

    Raises:
        NvrError: no layer has one of the names in `targets`.
    """
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    transformer = model[0].auto_model
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT divides it by r, whatever its type
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets) if lora.targets else "all-linear",
    )
    try:
        adapted = LoraModel(transformer, {"default": config}, "default")
    except ValueError as error:
        names = sorted({n.rsplit(".", 1)[-1] for n, m in transformer.named_modules() if "Linear" in type(m).__name__})
        raise NvrError(
            f"train.student.lora.targets {list(lora.targets or ())} fit no layer ({str(error).splitlines()[0]}); "
            f"linear layers there: {', '.join(names)}"
        ) from error
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return adapted


def merge_adapters(model: Any, adapted: Any) -> None:
    """Add the adapters to the weights, in place; the model then has its plain architecture again."""
    merged = adapted.merge_and_unload(safe_merge=True)
    assert merged is model[0].auto_model  # noqa: S101 - PEFT replaces layers inside of it
    for parameter in merged.parameters():
        parameter.requires_grad_(True)
