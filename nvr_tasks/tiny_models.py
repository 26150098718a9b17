"""Tiny models with random weights, of the architectures that recipes use: a stand-in that needs no download.

They run the code that a real model of the family runs (attention, masks, padding side, tokenizer, saving), in a second
and on any machine. Their vectors mean nothing.

`qwen2_5_omni` is the thinker of Qwen2.5-Omni with towers for images and sounds. Its own processor has a part for videos, which
wants torchvision; that of PaddleOCR-VL stands in for it, which does the same with images and has no other part.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nvr_tasks.settings import Architecture

VERSION = 1  # part of a tiny model's identity: raise it when the same name gives other weights
SEED = 17
WIDTH = 32
LAYERS = 2
POSITIONS = 2048

# What the tokenizer learns its pieces from; any text will do, for it falls back to bytes.
TEXTS = (
    "Retrieval finds the passages that answer a question among many that merely look as if they did.",
    "A hard negative is a passage that a good model scores nearly as high as the right one.",
    "The distance between two vectors says how much the texts behind them have in common.",
    "An encoder reads a sentence and returns numbers; a decoder writes the next word.",
    "def search(query, corpus): return sorted(corpus, key=lambda text: score(query, text), reverse=True)",
    "Graphs have nodes and edges, matrices have rows and columns, functions have arguments and values.",
    "The algorithm converges when the change between two iterations falls below the tolerance.",
    "서울은 한국의 수도이고, 검색 모델은 질문에 맞는 문서를 찾는다.",
)


def folder_of(architecture: Architecture) -> Path:
    """A local folder with the tiny model, made on first use; the same weights on every machine of one kind."""
    folder = Path(tempfile.gettempdir()) / f"nvr-tiny-{os.getuid()}" / f"{architecture}-{VERSION}"
    if not folder.is_dir():
        work = Path(tempfile.mkdtemp(prefix=f"{architecture}-", dir=_made(folder.parent)))
        try:
            make(architecture, work)
            work.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return folder


def _made(folder: Path) -> Path:
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to someone else: models are not read from there")
    return folder


def make(architecture: Architecture, folder: Path) -> None:
    """Write config, random weights (safetensors) and a tokenizer into a folder, as transformers saves them."""
    import torch

    tokenizer = _tokenizer(OMNI_TOKENS if architecture == "qwen2_5_omni" else {})
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        if architecture == "qwen2_5_omni":
            model, processor = omni_thinker(tokenizer), _image_processor(tokenizer)
        else:
            model, processor = BUILDERS[architecture](len(tokenizer), tokenizer.pad_token_id), tokenizer
    model.save_pretrained(folder, safe_serialization=True)
    processor.save_pretrained(folder)


def _tokenizer(more: dict[str, str]) -> Any:
    """The tokenizer of all tiny models; `more`: names of further special tokens, and the tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    pieces = Tokenizer(models.BPE(unk_token="<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    special = ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    pieces.train_from_iterator(TEXTS, trainer)
    pieces.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=pieces,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        mask_token="<mask>",
        model_max_length=POSITIONS,
        **({"extra_special_tokens": more} if more else {}),
    )


def _encoder(config: str, model: str) -> Callable[[int, int], Any]:
    def build(vocabulary: int, pad: int) -> Any:
        import transformers

        settings = getattr(transformers, config)(
            vocab_size=vocabulary,
            pad_token_id=pad,
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            intermediate_size=2 * WIDTH,
            max_position_embeddings=POSITIONS + 8,  # RoBERTa counts positions from the padding's id
        )
        return getattr(transformers, model)(settings)

    return build


def _modernbert(vocabulary: int, pad: int) -> Any:
    from transformers import ModernBertConfig, ModernBertModel

    return ModernBertModel(
        ModernBertConfig(
            vocab_size=vocabulary,
            pad_token_id=pad,
            bos_token_id=2,
            eos_token_id=3,
            cls_token_id=2,
            sep_token_id=3,
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            intermediate_size=2 * WIDTH,
            max_position_embeddings=POSITIONS,
        )
    )


def _decoder(config: str, model: str) -> Callable[[int, int], Any]:
    def build(vocabulary: int, pad: int) -> Any:
        import transformers

        settings = getattr(transformers, config)(
            vocab_size=vocabulary,
            pad_token_id=pad,
            bos_token_id=2,
            eos_token_id=3,
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=2 * WIDTH,
            max_position_embeddings=POSITIONS,
        )
        return getattr(transformers, model)(settings)

    return build


# ── Qwen2.5-Omni ─────────────────────────────────────────────────────────────────────────────────────────────────

OMNI_TOKENS = {
    "image_token": "<|IMAGE|>", "audio_token": "<|AUDIO|>", "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>", "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>",
    "turn_bos_token": "<|im_start|>", "turn_eos_token": "<|im_end|>",
}  # fmt: skip
OMNI_TEMPLATE = (  # of chats, as the family's own lays them out, without a system prompt of its own
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_bos|><|IMAGE|><|vision_eos|>"
    "{% elif part['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
)
PATCH = 14
MEL_BINS = 16


def omni_thinker(tokenizer: Any) -> Any:
    """The thinker with tiny towers; a tokenizer with `OMNI_TOKENS`."""
    from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerModel

    tower = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH}
    ids = {name: getattr(tokenizer, f"{name}_id") for name in OMNI_TOKENS}
    config = Qwen2_5OmniThinkerConfig(
        text_config={
            **tower,
            "vocab_size": len(tokenizer),
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": POSITIONS,
            "pad_token_id": tokenizer.pad_token_id,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        },
        vision_config={
            **tower,
            "depth": LAYERS,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
            "patch_size": PATCH,
            "fullatt_block_indexes": [LAYERS - 1],
        },
        audio_config={
            "num_mel_bins": MEL_BINS,
            "encoder_layers": LAYERS,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 2 * WIDTH,
            "d_model": WIDTH,
            "output_dim": WIDTH,
        },
        image_token_index=ids["image_token"],
        audio_token_index=ids["audio_token"],
        video_token_index=ids["video_token"],
        audio_start_token_id=ids["audio_bos_token"],
        audio_end_token_id=ids["audio_eos_token"],
        # Which transformers reads, but does not declare.
        **{"vision_start_token_id": ids["vision_bos_token"], "vision_end_token_id": ids["vision_eos_token"]},
    )
    return Qwen2_5OmniThinkerModel(config)


def _image_processor(tokenizer: Any) -> Any:
    """Images of at most 8 tokens, each of which is 2 × 2 patches."""
    from transformers import PaddleOCRVLProcessor, Qwen2VLImageProcessorPil

    token = (2 * PATCH) ** 2
    images = Qwen2VLImageProcessorPil(patch_size=PATCH, size={"shortest_edge": token, "longest_edge": 8 * token})
    return PaddleOCRVLProcessor(images, tokenizer, chat_template=OMNI_TEMPLATE)  # type: ignore[no-untyped-call]


BUILDERS: dict[Architecture, Callable[[int, int], Any]] = {
    "bert": _encoder("BertConfig", "BertModel"),
    "xlm-roberta": _encoder("XLMRobertaConfig", "XLMRobertaModel"),
    "modernbert": _modernbert,
    "mistral": _decoder("MistralConfig", "MistralModel"),
    "llama": _decoder("LlamaConfig", "LlamaModel"),
    "qwen2": _decoder("Qwen2Config", "Qwen2Model"),
}
