"""Training on images: the library's own loss, gradients and vectors."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_students as tiny
import torch  # noqa: TID253
from datasets import Dataset  # noqa: TID253
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments  # noqa: TID253
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss  # noqa: TID253

from nvr_tasks.data.page_images import page
from nvr_tasks.errors import NvrError
from nvr_tasks.media import inputs_of
from nvr_tasks.surgery import add_adapters, merge_adapters
from nvr_tasks.training import loop
from nvr_tasks.training.examples import Mined, dev_set
from nvr_tasks.training.pace import hurried
from nvr_tasks.training_settings import Lora, Student

PROMPTS = {"query": "query: ", "passage": "passage: "}


def omni(**settings: Any) -> Student:
    return tiny.student("qwen2_5_omni", bidirectional=True, prompts=PROMPTS, **settings)


def illustrated(mined: Mined, folder: Path, model: Any, every: int = 1, texts: bool = False) -> Mined:
    """The same with images for every so-many-th passage, alone or beside their texts."""
    corpus = mined.data.corpus.copy()
    corpus["media"] = ""
    (folder / "image").mkdir(parents=True)
    for row in range(0, len(corpus), every):
        corpus.loc[row, "media"] = f"image/{row:064x}.png"
        (folder / corpus.loc[row, "media"]).write_bytes(page(f"{corpus.loc[row, 'text']} {row}"))
        if not texts:
            corpus.loc[row, "text"] = ""
    data = dataclasses.replace(mined.data, corpus=corpus, files=folder)
    return Mined(data, mined.negatives, given=inputs_of(model, folder))


def train(model: Any, mined: Mined, place: Path, dev: Any = None, **settings: Any) -> list[loop.Entry]:
    stage = tiny.stage(**{"steps": 2, "warmup_steps": 0, "max_tokens": 64, **settings})
    data = loop.StageData(stage, mined.examples(stage, 3))
    return tiny.train(model, [data], place, dev, seed=3, max_tokens=64).log


def losses(log: list[loop.Entry]) -> list[float]:
    return [entry["loss"] for entry in log if "loss" in entry]


def test_a_step_is_that_of_the_library_s_trainer(tmp_path: Path) -> None:
    """Which takes the path of an image for the image, so that it can be given the same batch as plain strings."""
    ours, theirs = (tiny.build_student(omni(), tiny.CPU) for _ in range(2))
    mined = illustrated(tiny.mined(), tmp_path / "files", ours)
    stage = tiny.stage(steps=1, warmup_steps=0, max_tokens=64)
    examples = mined.examples(stage, 3)
    plain = [text.get("image") or text["text"] for text in examples.texts]
    table = {name: [plain[n] for n in numbers] for name, numbers in examples.columns.items()}
    log = train(ours, mined, tmp_path, steps=1)
    theirs.max_seq_length = 64
    trainer = SentenceTransformerTrainer(
        model=theirs,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path / "theirs"),
            max_steps=1,
            per_device_train_batch_size=stage.batch_size,
            learning_rate=stage.learning_rate,
            weight_decay=stage.weight_decay,
            max_grad_norm=stage.max_grad_norm,
            optim="adamw_torch_fused",
            use_cpu=True,
            prompts={"anchor": "query: "} | dict.fromkeys((n for n in table if n != "anchor"), "passage: "),
            save_strategy="no",
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict(table),
        loss=MultipleNegativesRankingLoss(theirs, scale=1 / stage.temperature),
    )
    trainer.train()
    for value in ("loss", "grad_norm"):  # not the weights: Adam makes a whole step of a gradient that is rounding
        [one] = [entry[value] for entry in log if value in entry]
        [other] = [float(entry[value]) for entry in trainer.state.log_history if value in entry]
        assert one == pytest.approx(other, rel=1e-3), value
    visual = dict(ours[0].auto_model.visual.named_parameters())
    untrained = dict(tiny.build_student(omni(), tiny.CPU)[0].auto_model.visual.named_parameters())
    assert any((visual[name] != weight).any() for name, weight in untrained.items()), "the images have gradients"


@pytest.mark.parametrize("texts", [False, True])
def test_images_and_texts_share_a_batch(tmp_path: Path, texts: bool) -> None:
    """The loss is InfoNCE over the vectors that each input has by itself."""
    model = tiny.build_student(omni(), tiny.CPU)
    mined = illustrated(tiny.mined(), tmp_path / "files", model, every=2, texts=texts)
    stage = tiny.stage(steps=1, warmup_steps=0, max_tokens=64)
    examples = mined.examples(stage, 3)
    model.max_seq_length = 64
    vectors = {}
    for name, numbers in examples.columns.items():
        prompt = "query: " if name == "anchor" else "passage: "
        made = [model.encode(examples.texts[n], prompt=prompt, normalize_embeddings=True) for n in numbers]
        vectors[name] = torch.from_numpy(np.stack(made))
    kinds = {tuple(sorted(examples.texts[n])) for n in examples.columns["positive"]}
    assert kinds == {("text",), ("image", "text") if texts else ("image",)}
    passages = torch.cat([v for name, v in vectors.items() if name != "anchor"])
    scores = vectors["anchor"] @ passages.T / stage.temperature
    expected = torch.nn.functional.cross_entropy(scores, torch.arange(len(scores)))
    assert losses(train(model, mined, tmp_path, steps=1)) == pytest.approx([float(expected)], rel=1e-4)


def test_gradient_caching_takes_images_along(tmp_path: Path) -> None:
    """Parts of a batch have the images of their own rows."""
    found = []
    for number, cached in enumerate((None, 2)):
        model = tiny.build_student(omni(), tiny.CPU)
        mined = illustrated(tiny.mined(), tmp_path / f"files{number}", model, every=2, texts=True)
        found.append(losses(train(model, mined, tmp_path / str(number), cached_batch=cached)))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_a_model_of_images_takes_no_short_cuts() -> None:
    """Nor for its texts: where a token is follows from the words, which a group of texts would not hand on."""
    for architecture, hurries in (("qwen2_5_omni", False), ("qwen2", True)):
        model = tiny.model(architecture)
        with hurried(model, 64):
            assert ("forward" in vars(model[0])) == hurries


def test_an_image_that_is_too_long_for_the_student(tmp_path: Path) -> None:
    model = tiny.build_student(omni(), tiny.CPU)
    mined = illustrated(tiny.mined(), tmp_path / "files", model)
    with pytest.raises(
        NvrError, match=r"d\d+ in a batch cannot be given to the student: .*raise train\.student\.max_tokens"
    ):
        train(model, mined, tmp_path, max_tokens=8)


RELOAD = """
import json, sys
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], device="cpu", trust_remote_code=False)
inputs = [{"image": sys.argv[2]}, {"image": sys.argv[2], "text": "a caption"}, {"text": "a text"}]
print(json.dumps([model.encode_document(i).tolist() for i in inputs] + [model.encode_query("a text").tolist()]))
"""


def test_a_saved_model_gives_the_same_vectors_anywhere(tmp_path: Path, python: Callable[..., Any]) -> None:
    """With the library alone, in a fresh process; trained with adapters, in both directions, on a dev set of images."""
    settings = omni(lora=Lora(rank=2))
    model = tiny.build_student(settings, tiny.CPU)
    model.max_seq_length = 64
    image = {"image": str(tmp_path / "files" / "image" / f"{0:064x}.png")}
    mined = illustrated(tiny.mined(), tmp_path / "files", model, every=2, texts=True)
    before = model.encode_document(image)
    assert settings.lora is not None
    adapted = add_adapters(model, settings.lora)
    mined.data.queries.loc[:3, "split"] = "dev"
    log = train(model, mined, tmp_path, dev_set(mined.data, mined.prompts, mined.given), eval_every_steps=2)
    assert [entry["dev_ndcg_at_10"] for entry in log if "dev_ndcg_at_10" in entry], "images are searched, too"
    merge_adapters(model, adapted)
    model.max_seq_length = 64
    model.save_pretrained(str(tmp_path / "model"), create_model_card=False)
    inputs = [image, {**image, "text": "a caption"}, {"text": "a text"}]
    here = [model.encode_document(i) for i in inputs] + [model.encode_query("a text")]
    assert np.abs(here[0] - before).max() > 1e-4, "it was trained"
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # as here: other divisions round otherwise
    fresh = python("-c", RELOAD, str(tmp_path / "model"), image["image"], **threads)
    assert fresh.returncode == 0, fresh.stderr[-3000:]
    for one, other in zip(here, json.loads(fresh.stdout.splitlines()[-1]), strict=True):
        np.testing.assert_array_equal(one, np.array(other, np.float32))
