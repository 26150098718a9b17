"""What is done to a student before it is trained, seen from outside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch  # noqa: TID253

from nvr_tasks.config import Runtime
from nvr_tasks.errors import NvrError
from nvr_tasks.models import attend, build_student, load_folder
from nvr_tasks.settings import LocalModel, TinyModel
from nvr_tasks.surgery import add_adapters, merge_adapters, sees_ahead
from nvr_tasks.tiny_models import BUILDERS, make
from nvr_tasks.training_settings import LatentAttention, Lora, Student

CPU = Runtime(device="cpu", threads=1)
TEXTS = ["what is a graph?", "matrices have rows and columns, and functions have arguments"]
PROMPT = "find the passage that answers: "


def student(architecture: str, **settings: Any) -> Student:
    return Student(model=TinyModel(type="tiny", architecture=architecture), max_tokens=64, **settings)


def built(architecture: str, **settings: Any) -> Any:
    return build_student(student(architecture, **settings), CPU).eval()


# ── attention ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("architecture", ["mistral", "llama", "qwen2"])
def test_a_later_token_changes_an_earlier_state_only_after_surgery(architecture: str, tmp_path: Path) -> None:
    assert not sees_ahead(built(architecture))
    model = built(architecture, bidirectional=True)
    assert sees_ahead(model)
    model.save_pretrained(str(tmp_path))
    assert sees_ahead(load_folder(tmp_path, "cpu")), "it must be written into the saved model"


def test_a_decoder_that_cannot_look_ahead_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nvr_tasks.surgery.sees_ahead", lambda _: False)
    with pytest.raises(
        NvrError, match=r"MistralModel attends to earlier tokens only.*remove train\.student\.bidirectional"
    ):
        built("mistral", bidirectional=True)


# ── pooling ──────────────────────────────────────────────────────────────────────────────────────────────────────


def states(model: Any, text: str, prompt: str) -> tuple[torch.Tensor, int]:
    """Token states of prompt + text, and how many tokens the prompt has, from transformers alone."""
    tokens = model.tokenizer(prompt + text, return_tensors="pt")
    length = len(model.tokenizer(prompt)["input_ids"]) - 1  # without the end-of-text token
    with torch.inference_mode():
        return model[0].auto_model(**tokens)[0][0], length


def test_prompt_tokens_are_attended_to_but_not_pooled() -> None:
    model = built("mistral", bidirectional=True, pool_prompt=False, prompts={"query": PROMPT})
    for text in TEXTS:
        tokens, length = states(model, text, PROMPT)
        assert length > 3
        found = model.encode_query([text], normalize_embeddings=False)[0]
        np.testing.assert_allclose(found, tokens[length:].mean(dim=0).numpy(), atol=1e-6)
        assert np.abs(found - tokens.mean(dim=0).numpy()).max() > 1e-3, "the prompt was pooled"
        alone = model.encode([text], normalize_embeddings=False)[0]
        assert np.abs(found - alone).max() > 1e-3, "the prompt was not attended to"


@pytest.mark.parametrize(("pooling", "pick"), [("cls", 0), ("lasttoken", -1)])
def test_other_poolings(pooling: str, pick: int) -> None:
    model = built("llama", pooling=pooling)
    tokens, _ = states(model, TEXTS[1], "")
    np.testing.assert_allclose(model.encode(TEXTS[1], normalize_embeddings=False), tokens[pick].numpy(), atol=1e-6)


def test_latent_attention_is_trained_in_float32_beside_a_base_in_bfloat16() -> None:
    model = built("mistral", latent_attention=LatentAttention(latents=6, heads=4), weights_dtype="bfloat16")
    assert {p.dtype for p in model[0].parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model[1].parameters()} == {torch.float32}
    assert torch.isfinite(model.encode(["a text"], convert_to_tensor=True)).all()


def test_latent_attention_is_cross_attention_and_an_mlp() -> None:
    """arXiv:2405.17428 §3.1, with the matrices multiplied out head by head."""
    model = built("mistral", latent_attention=LatentAttention(latents=6, heads=4))
    layer = model[1]
    tokens, _ = states(model, TEXTS[1], "")
    with torch.inference_mode():
        query, key, value = (w.T for w in layer.attend.in_proj_weight.chunk(3))
        normal, heads = layer.normalise(tokens), []
        for h in range(4):
            cut = slice(8 * h, 8 * h + 8)
            weights = torch.softmax((normal @ query[:, cut]) @ (layer.array @ key[:, cut]).T / 8**0.5, dim=-1)
            heads.append(weights @ (layer.array @ value[:, cut]))
        tokens = tokens + torch.cat(heads, dim=-1) @ layer.attend.out_proj.weight.T
        tokens = tokens + layer.mlp(layer.normalise_again(tokens))
    np.testing.assert_allclose(
        model.encode(TEXTS[1], normalize_embeddings=False), tokens.mean(dim=0).numpy(), rtol=1e-4, atol=1e-5
    )


def test_heads_that_do_not_divide_the_width() -> None:
    with pytest.raises(NvrError, match=r"latent_attention\.heads is 5, which does not divide the model's width of 32"):
        built("mistral", latent_attention=LatentAttention(latents=6, heads=5))


# ── adapters ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("targets", [None, ("q_proj", "v_proj")])
def test_merged_adapters_give_the_same_vectors(targets: tuple[str, ...] | None) -> None:
    model = built("llama", bidirectional=True)
    plain = {name for name, _ in model.named_parameters()}
    before = model.encode(TEXTS)
    adapted = add_adapters(model, Lora(rank=4, targets=targets))
    np.testing.assert_allclose(model.encode(TEXTS), before, atol=1e-6, err_msg="new adapters change nothing yet")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert {name.split(".")[-4] for name in trained} == (set(targets) if targets else {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})  # fmt: skip
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    apart = model.encode(TEXTS)
    assert np.abs(apart - before).max() > 1e-3
    merge_adapters(model, adapted)
    assert {name for name, _ in model.named_parameters()} == plain
    np.testing.assert_allclose(model.encode(TEXTS), apart, atol=1e-5)


def test_adapters_for_layers_that_are_not_there() -> None:
    with pytest.raises(
        NvrError, match=r"lora\.targets \['query'\] fit no layer .*; linear layers there: down_proj, gate_proj"
    ):
        add_adapters(built("llama"), Lora(targets=("query",)))


# ── loading ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_student_without_a_tokenizer(tmp_path: Path) -> None:
    make("bert", tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    with pytest.raises(
        NvrError, match=r"the model in .* has no tokenizer \(none of tokenizer\.json, .*\): add the files"
    ):
        build_student(Student(model=LocalModel(type="path", path=str(tmp_path))), CPU)


@pytest.mark.parametrize("architecture", sorted(BUILDERS))
def test_tiny_models_are_the_same_every_time(architecture: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        make(architecture, tmp_path / name)
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)


def test_attention_is_computed_as_asked() -> None:
    plain, own = built("mistral", bidirectional=True), built("mistral", bidirectional=True)
    attend(plain, "eager", "cpu")
    attend(own, "auto", "cpu")
    assert [m[0].model.config._attn_implementation for m in (plain, own)] == ["eager", "sdpa"]
    torch.testing.assert_close(plain.encode(TEXTS), own.encode(TEXTS), atol=1e-5, rtol=1e-4)
    with pytest.raises(
        NvrError, match=r"flash_attention_2, which .* it runs on GPUs, and training on the cpu; use auto"
    ):
        attend(own, "flash_attention_2", "cpu")


def test_prompt_tokens_of_a_chat_are_not_told_apart() -> None:
    with pytest.raises(NvrError, match=r"pool_prompt is false, but the student reads messages .*: set it to true"):
        built("qwen2_5_omni", pool_prompt=False)
