"""Images through a model: the library's own vectors, nothing fetched, and a clear word from models that read none."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch  # noqa: TID253
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent / "data"))

from data_helpers import beir_recipe, sentence, write_beir
from test_data_media import illustrate

from nvr_tasks import tiny_models
from nvr_tasks.artifacts import Store
from nvr_tasks.config import Recipe, Runtime
from nvr_tasks.data.page_images import page
from nvr_tasks.dataset import RetrievalData, read_dataset
from nvr_tasks.encoding import Encoder
from nvr_tasks.errors import NvrError
from nvr_tasks.fast_model import FastModel, can_be_fast
from nvr_tasks.media import inputs_of, modality_of, refer, refuse_mixture, refuse_unread
from nvr_tasks.models import load_folder, load_teacher, locate_model, teacher_identity
from nvr_tasks.pipeline import Context, StageResult, execute
from nvr_tasks.serving.nvr_retriever_v1 import Retriever
from nvr_tasks.settings import Teacher, TinyModel
from nvr_tasks.stages import stage
from nvr_tasks.vectors import gather, text_keys

OMNI = {"type": "tiny", "architecture": "qwen2_5_omni"}
CPU = Runtime(device="cpu")


@pytest.fixture(scope="module")
def omni() -> Any:
    return load_folder(locate_model(TinyModel.model_validate(OMNI)), "cpu")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Two images as a data set keeps them."""
    (tmp_path / "media" / "image").mkdir(parents=True)
    for digit, text in (("a", "A river of copper."), ("b", "A violin in the harbour, far from any meadow.")):
        (tmp_path / "media" / named(digit)).write_bytes(page(text))
    return tmp_path / "media"


def named(digit: str) -> str:
    return f"image/{digit * 64}.png"


def unit(model: Any, inputs: list[Any], prompt: str) -> Any:
    return np.stack([model.encode(i, prompt=prompt, normalize_embeddings=True) for i in inputs])


# ── the encoder ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_vectors_are_those_of_sentence_transformers(omni: Any, files: Path) -> None:
    """Its own inputs, one at a time, so that no batch is padded."""
    a, b = str(files / named("a")), str(files / named("b"))
    seen = [refer(named("a"), "a caption"), "plain", refer(named("b"), ""), refer(named("a"), ""), sentence(3), "plain"]
    inputs = [{"image": a, "text": "a caption"}, "plain", {"image": b}, {"image": a}, sentence(3), "plain"]
    made = Encoder(omni, torch.float32, 256, files=files).encode(seen, "passage: ", 64)
    omni.max_seq_length = 64
    np.testing.assert_allclose(made, unit(omni, inputs, "passage: "), atol=1e-5)
    assert made.dtype == np.float32
    assert np.abs(made[2] - made[3]).max() > 1e-2, "another image"
    assert np.abs(made[0] - made[3]).max() > 1e-2, "a text beside it"


def test_a_text_is_never_fetched(omni: Any, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library takes a bare string that ends like an image for an address or a path."""
    texts = ["https://127.0.0.1:9/a.png", str(files / named("a")), "data:image/png;base64,AAAA"]
    assert np.abs(omni.encode(texts[1]) - omni.encode({"text": texts[1]})).max() > 1e-3, "the library reads the file"
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a connection"))
    omni.max_seq_length = 512
    expected = unit(omni, [{"text": t} for t in texts], "")
    np.testing.assert_allclose(Encoder(omni, torch.float32, files=files).encode(texts, "", 512), expected, atol=1e-5)
    assert can_be_fast(omni, "cosine")
    np.testing.assert_allclose(FastModel(omni, torch.float32, 8).encode_document(texts), expected, atol=1e-5)
    served = Retriever(omni).predict(texts, {"kind": "passage"})
    np.testing.assert_array_equal(served, omni.encode_document([{"text": t} for t in texts]))


def test_without_a_data_set_there_are_no_references(omni: Any, files: Path) -> None:
    """Texts of a benchmark are as their source has them; one that looks like a reference is a text."""
    text = refer(named("a"), "x")
    made = Encoder(omni, torch.float32).encode([text], "", 256)
    np.testing.assert_allclose(made, unit(omni, [{"text": text}], ""), atol=1e-5)


def test_an_image_that_takes_too_many_tokens(omni: Any, files: Path) -> None:
    encoder = Encoder(omni, torch.float32, files=files)
    with pytest.raises(
        NvrError, match=r"'\[image bbbbbbbbbbbb…\]' cannot be given to the model: .*at most 8 tokens .*max_tokens"
    ):
        encoder.encode([refer(named("b"), "")], "", 8)
    made = encoder.encode([refer(named("a"), sentence(1, 40))], "", 48)
    omni.max_seq_length = 48
    expected = unit(omni, [{"image": str(files / named("a")), "text": sentence(1, 40)}], "")
    np.testing.assert_allclose(made, expected, atol=1e-5, err_msg="a long text is cut, the image is not")


# ── what a model reads ───────────────────────────────────────────────────────────────────────────────────────────


class Model:
    """The modalities of a model."""

    def __init__(self, *modalities: Any) -> None:
        self.modalities = list(modalities)

    def supports(self, modality: Any) -> bool:
        from sentence_transformers.base.model import BaseModel

        return bool(BaseModel.supports(self, modality))  # type: ignore[arg-type]


IMAGES = [("scans", refer(named("a"), "")), ("scans", refer(named("b"), "")), ("texts", "a text")]


def test_a_model_that_reads_no_images_says_so() -> None:
    with pytest.raises(
        NvrError, match="teacher t reads text only, but 2 texts of source scans have images: use a model"
    ):
        refuse_unread("teacher t", Model("text", "message"), IMAGES)
    refuse_unread("teacher t", Model("text"), IMAGES[2:])
    refuse_unread("teacher t", Model("text", "image"), IMAGES)
    both = [("scans", refer(named("a"), "a caption"))]
    with pytest.raises(
        NvrError, match="reads text, image only, but 1 texts of source scans have images beside their texts"
    ):
        refuse_unread("teacher t", Model("text", "image"), both)
    refuse_unread("teacher t", Model("text", "image", "message"), both)


def test_one_modality_at_a_time() -> None:
    mixed, alike = [text for _, text in IMAGES], [text for _, text in IMAGES[:2]]
    with pytest.raises(NvrError, match=r"the student reads text, image, but one of them at a time.*\(image, text\)"):
        refuse_mixture("the student", Model("text", "image"), mixed)
    refuse_mixture("the student", Model("text", "image"), alike)
    refuse_mixture("the student", Model("text", "image", "message"), mixed)
    assert inputs_of(Model("text"), None)("a text") == "a text"
    assert [modality_of(i) for i in ({"image": "p"}, {"image": "p", "text": "t"})] == ["image", ("image", "text")]


def test_a_model_without_chat_template_takes_one_modality_at_a_time(files: Path, tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    tokenizer = tiny_models._tokenizer({})
    torch.manual_seed(1)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    words = {**tower, "vocab_size": len(tokenizer), "eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 0}
    config = CLIPConfig(
        text_config=words, vision_config={**tower, "image_size": 28, "patch_size": 14}, projection_dim=16
    )
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    CLIPProcessor(images, tokenizer).save_pretrained(tmp_path / "clip")
    clip = load_folder(tmp_path / "clip", "cpu")
    seen = [refer(named("a"), ""), "a text", refer(named("b"), ""), "another text"]
    made = Encoder(clip, torch.float32, files=files).encode(seen, "", 32)
    clip.max_seq_length = 32
    inputs = [{"image": str(files / named("a"))}, "a text", {"image": str(files / named("b"))}, "another text"]
    np.testing.assert_allclose(made, unit(clip, inputs, ""), atol=1e-5)
    with pytest.raises(NvrError, match="the student reads text, image, but one of them at a time"):
        refuse_mixture("the student", clip, seen)


# ── the stage ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def dataset(tmp_path: Path, store: Store) -> tuple[Recipe, str]:
    """Texts and images, the latter with and without texts."""
    folder = write_beir(tmp_path / "set", {f"d{i}": ("", sentence(i) if i % 3 else "") for i in range(12)})
    illustrate(
        folder, {f"d{i}": f"{i}.png" for i in range(0, 12, 3)}, {f"{i}.png": page(sentence(i)) for i in range(0, 12, 3)}
    )
    illustrate(folder, {"d4": "0.png"}, {})
    tree = beir_recipe(folder, write_beir(tmp_path / "bench")).dump()
    tree["embed"]["teachers"][0] |= {"model": OMNI, "max_tokens": {"query": 48, "passage": 64}}
    tree["runtime"] |= {"device": "cpu", "embed_part_texts": 5}
    recipe = Recipe.model_validate(tree)
    [uri] = execute(stage("download"), Context(recipe, store)).outputs["dataset"]
    return recipe, uri


def run(store: Store, recipe: Recipe, uri: str, **options: str) -> StageResult:
    return execute(stage("embed"), Context(recipe, store, None, options), {"dataset": [uri]})


def data_of(store: Store, uri: str) -> RetrievalData:
    return read_dataset(store.fetch(store.open(uri)))


def test_embed_gives_every_passage_its_vector(store: Store, dataset: tuple[Recipe, str], omni: Any) -> None:
    recipe, uri = dataset
    result = run(store, recipe, uri)
    data, teacher = data_of(store, uri), recipe.teacher
    assert result.figures["texts"] == len(set(data.passages())) + len(set(data.queries["text"]))
    folders = [store.fetch(store.open(uri)) for uri in result.outputs["embeddings"]]
    made = gather(folders, text_keys(data.passages(), teacher.prompts.passage, 64))
    omni.max_seq_length = 64
    given = inputs_of(omni, data.files)
    np.testing.assert_allclose(made, unit(omni, [given(text) for text in data.passages()], ""), atol=1e-5)
    assert run(store, recipe, uri).reused


def test_a_teacher_of_texts_is_refused_before_it_embeds(
    store: Store, dataset: tuple[Recipe, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, uri = dataset
    tree = recipe.dump()
    tree["embed"]["teachers"][0]["model"] = {"type": "tiny", "architecture": "bert"}
    monkeypatch.setattr(Encoder, "encode", lambda *_: pytest.fail("it embeds"))
    with pytest.raises(NvrError, match="teacher t reads text only, but 4 texts of source a have images"):
        run(store, Recipe.model_validate(tree), uri)


@pytest.mark.parametrize("name", ["audit", "cross-encoder"])
def test_what_reads_texts_alone_says_so(store: Store, dataset: tuple[Recipe, str], name: str) -> None:
    with pytest.raises(NvrError, match=f"{name} x reads text only, but 5 texts of the data set have images or sounds"):
        data_of(store, dataset[1]).refuse_media(f"{name} x")


# ── loading ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_size_of_images_is_bounded_and_saved(files: Path, tmp_path: Path) -> None:
    """One token is 28 × 28 pixels, made of four patches."""
    loaded = load_teacher(Teacher.model_validate({"name": "t", "model": OMNI, "image_pixels": 4 * 28 * 28}), CPU)
    inputs = [{"image": str(files / named("b"))}]
    tokens = int(loaded.preprocess(inputs)["image_grid_thw"].prod()) // 4
    assert tokens <= 4
    assert (
        int(
            load_teacher(Teacher.model_validate({"name": "t", "model": OMNI}), CPU)
            .preprocess(inputs)["image_grid_thw"]
            .prod()
        )
        > 8
    )
    loaded.save_pretrained(str(tmp_path / "saved"), create_model_card=False)
    again = load_folder(tmp_path / "saved", "cpu")
    np.testing.assert_array_equal(again.encode(inputs), loaded.encode(inputs))


def test_a_model_without_images_has_no_bound() -> None:
    teacher = Teacher.model_validate({"name": "t", "model": {**OMNI, "architecture": "bert"}, "image_pixels": 10_000})
    with pytest.raises(
        NvrError, match=r"image_pixels is 10,000, but the processor of this model \(\w+\) takes no such bound"
    ):
        load_teacher(teacher, CPU)


def test_the_bound_is_part_of_a_teacher_s_identity() -> None:
    plain = Teacher.model_validate({"name": "t", "model": OMNI})
    assert "image_pixels" not in teacher_identity(plain), "as it was before there was one"
    assert teacher_identity(plain.model_copy(update={"image_pixels": 10_000}))["image_pixels"] == 10_000


def test_of_a_whole_qwen_omni_the_thinker_is_loaded(omni: Any, tmp_path: Path) -> None:
    """As it lies on the hub: a config of several parts, and weights that are named by theirs."""
    folder = locate_model(TinyModel.model_validate(OMNI))
    shutil.copytree(folder, tmp_path / "whole")
    config = json.loads((folder / "config.json").read_text())
    whole = {"model_type": "qwen2_5_omni", "thinker_config": {k: v for k, v in config.items() if k != "architectures"}}
    (tmp_path / "whole" / "config.json").write_text(json.dumps(whole))
    weights = load_file(folder / "model.safetensors")
    named_as_there = {
        f"thinker.{name.replace('language_model.', 'model.', 1) if name.startswith('language_model.') else name}": tensor
        for name, tensor in weights.items()
    }
    save_file(
        {**named_as_there, "talker.x": torch.zeros(2)}, tmp_path / "whole" / "model.safetensors", {"format": "pt"}
    )
    loaded = load_folder(tmp_path / "whole", "cpu")
    np.testing.assert_array_equal(loaded.encode("a text"), omni.encode("a text"))
