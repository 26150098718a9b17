"""Instructions of sources and tasks: what a recipe says, which prompt each query gets, and what the saved model tells mteb."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from nvr_tasks import download, mine, mirror, sources, train
from nvr_tasks.artifacts import Artifact, Identity, Store
from nvr_tasks.config import Recipe
from nvr_tasks.errors import NvrError
from nvr_tasks.models import build_student, load_folder, student_identity, teacher_identity
from nvr_tasks.pipeline import Context, execute
from nvr_tasks.settings import InstructedPrompts
from nvr_tasks.stages import stage
from nvr_tasks.tiny_models import TEXTS
from nvr_tasks.training.fit import Job, fit, student_of
from nvr_tasks.vectors import gather, text_keys

Make = Callable[..., Recipe]
DEFAULT, MEDICAL = "Given a question, find passages", "Given a {symptom}, find its cause"
PLACED = "Instruct: {instruction} {now}\nQuery: "
DATA = (
    "data.sources=[{name: a, origin: {type: beir, uri: x}}, "
    f"{{name: b, instruction: '{MEDICAL}', origin: {{type: beir, uri: y}}}}]",
    "data.benchmark=[{task: SciFact, instruction: Given a claim}, {task: Mine, instruction: Mine, official: false, "
    "origin: {type: beir, uri: z}}, {task: NFCorpus}]",
)  # fmt: skip
TINY = "{type: tiny, architecture: bert}"


@pytest.fixture
def recipe(tiny_recipe: Make) -> Make:
    """Makes a recipe whose student and teacher have an instruction in their prompts."""
    given = (
        *DATA,
        f"data.instruction={DEFAULT}",
        f"train.student={{model: {TINY}, max_tokens: 64}}",
        f"embed.teachers=[{{name: t, model: {TINY}, max_tokens: {{query: 64, passage: 32}}}}]",
    )
    prompts = f"{{query: {json.dumps(PLACED)}, passage: 'a {{passage}}: '}}"
    return lambda *more: tiny_recipe(
        *given, f"train.student.prompts={prompts}", f"embed.teachers.0.prompts={prompts}", *more
    )


def said(instruction: str) -> str:
    return f"Instruct: {instruction} {{now}}\nQuery: "


# ── what a recipe says ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_query_gets_its_source_s_prompt_and_other_braces_stay(recipe: Make) -> None:
    for prompts in (recipe().student.prompts, recipe().teacher.prompts):
        assert prompts.of_sources(["a", "b", "unknown"]) == [said(DEFAULT), said(MEDICAL), said(DEFAULT)]
        assert prompts.query == said(DEFAULT)
        assert prompts.passage == "a {passage}: "
        assert prompts.named() == {
            "query": said(DEFAULT),
            "document": "a {passage}: ",
            "SciFact-query": said("Given a claim"),
            "Mine-query": said("Mine"),
        }


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "data.instruction=null",
            "train.student, embed.teachers t has {instruction}, but data.instruction is not given",
        ),
        ("train.student.prompts.passage='{instruction}'", "only query may have it"),
        ("evaluate.prompts={SciFact: {query: '{instruction}: '}}", "evaluate.prompts.SciFact has {instruction}"),
        (
            "train.student.pool_prompt=false",
            "stage train: with train.student.pool_prompt: false all queries of a batch",
        ),
        (
            f"mine.late_interaction=[{{name: l, model: {TINY}, prompts: {{query: '{{instruction}}'}}}}]",
            "mine.late_interaction l has {instruction}",
        ),
    ],
)
def test_recipes_that_cannot_be_meant(recipe: Make, override: str, message: str) -> None:
    with pytest.raises(Exception, match=message.replace("{", r"\{").replace("}", r"\}")):
        recipe(override)


def test_batches_need_one_prompt_only_where_it_is_left_out_of_pooling(recipe: Make) -> None:
    recipe("train.student.pool_prompt=false", "train.batches=homogeneous")
    recipe("train.student.pool_prompt=false", "train.sources={b: 1}")
    recipe("train.student.pool_prompt=false", "train.student.prompts.query='query: '")


# ── what names artefacts ─────────────────────────────────────────────────────────────────────────────────────────


def test_instructions_name_what_they_change_and_nothing_else(recipe: Make, store: Store) -> None:
    def names(*more: str) -> dict[str, Any]:
        made = recipe(*more)
        ctx = Context(made, store)
        return {
            "teacher": teacher_identity(made.teacher),
            "student": student_identity(made.student),
            "model": train.plan(ctx, {"dataset": ["d/d"], "negatives": ["n/n"]})["model"][0].fingerprint,
            "data": [download._reference(ctx), mirror._reference(ctx), sources._reference(ctx, "training")],
        }

    def changed(*more: str) -> set[str]:
        return {name for name, value in names(*more).items() if value != names()[name]}

    assert changed("data.sources.0.instruction=other") == {"teacher", "student", "model"}
    assert changed("data.benchmark.0.instruction=other") == {"student", "model"}
    assert changed("data.instruction=other") == {"teacher", "student", "model"}
    assert changed(f"data.sources.0.instruction={DEFAULT}") == set()
    plain = ("train.student.prompts.query=q", "embed.teachers.0.prompts.query=q")
    assert names(*plain) == names(*plain, "data.sources.1.instruction=null", "data.instruction=null")
    assert set(student_identity(recipe(*plain).student)["prompts"]) == {"query", "passage"}


# ── embeddings and mining ────────────────────────────────────────────────────────────────────────────────────────


def publish(store: Store) -> Artifact:
    """A data set with the same query text in both sources."""
    passages, asked = [*TEXTS, "fever and cough", "a sprained ankle"], ["what is it?", "what is it?", "why?", "where?"]

    def write(folder: Path) -> dict[str, Any]:
        (folder / "corpus").mkdir()
        docs = [f"d{i}" for i in range(len(passages))]
        pd.DataFrame({"doc_id": docs, "title": "", "text": passages, "group": range(len(docs))}).to_parquet(
            folder / "corpus" / "part-00000.parquet", index=False
        )
        ids = [f"q{i}" for i in range(len(asked))]
        pd.DataFrame({"query_id": ids, "text": asked, "split": "train", "source": ["a", "b", "a", "b"]}).to_parquet(
            folder / "queries.parquet", index=False
        )
        pd.DataFrame({"query_id": ids, "doc_id": docs[: len(ids)], "relevance": 1, "split": "train"}).to_parquet(
            folder / "qrels.parquet", index=False
        )
        return {"figures": {}}

    return store.publish(Identity("dataset", 1, {"rows": "two sources"}), write)


def publish_negatives(store: Store) -> Artifact:
    """One for each query of that data set."""

    def write(folder: Path) -> dict[str, Any]:
        rows = {
            "query_id": [f"q{i}" for i in range(4)],
            "positive_id": [f"d{i}" for i in range(4)],
            "positive_score": 0.5,
        }
        pd.DataFrame({**rows, "negative_ids": [[f"d{i + 4}"] for i in range(4)]}).to_parquet(
            folder / "negatives.parquet", index=False
        )
        return {"figures": {}}

    return store.publish(Identity("negatives", 1, {"rows": "one each"}), write)


def test_a_text_of_two_sources_has_two_vectors_and_mining_takes_the_right_one(recipe: Make, store: Store) -> None:
    made = recipe("mine.query_similarity=0.9999", "mine.depth=5", "runtime.embed_shards=2")
    dataset = publish(store)
    embedded = execute(stage("embed"), Context(made, store), {"dataset": [dataset.uri]})
    assert embedded.figures["texts"] == 4 + len(TEXTS) + 2
    teacher = load_folder(store_free_folder(), "cpu")
    teacher.max_seq_length = 64
    texts, prompts = ["what is it?", "what is it?", "why?", "where?"], [said(DEFAULT), said(MEDICAL)] * 2
    expected = np.array(
        [teacher.encode(t, prompt=p, normalize_embeddings=True) for t, p in zip(texts, prompts, strict=True)]
    )
    folders = [store.fetch(store.open(uri)) for uri in embedded.outputs["embeddings"]]
    np.testing.assert_allclose(gather(folders, text_keys(texts, prompts, 64)), expected, atol=1e-5)
    assert np.abs(expected[0] - expected[1]).max() > 1e-3, "prompts change nothing: the test shows nothing"

    ctx, inputs = Context(made, store), {"dataset": [dataset.uri], "embeddings": embedded.outputs["embeddings"]}
    [uri] = mine.build(ctx, inputs, mine.plan(ctx, inputs)).outputs["candidates"]
    found = pd.read_parquet(store.fetch(store.open(uri)) / "candidates.parquet").set_index("query_id")
    teacher.max_seq_length = 32
    passages = [teacher.encode(t, prompt="a {passage}: ", normalize_embeddings=True) for t in TEXTS[:4]]
    for row in range(4):
        [score] = found.loc[f"q{row}", "positive_scores"]
        assert score == pytest.approx(float(expected[row] @ passages[row]), abs=1e-5)
    assert (
        list(found["excluded_ids"].map(len)) == [0] * 4
    )  # equal texts, asked for different things, are not alike to the teacher


def store_free_folder() -> Path:
    from nvr_tasks.tiny_models import folder_of

    return folder_of("bert")


# ── training ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_student_of_messages_takes_one_prompt_per_batch(recipe: Make, store: Store, tmp_path: Path) -> None:
    """A prompt is the turn of a whole batch there."""
    omni = ("train.student.model.architecture=qwen2_5_omni", "train.steps=1", "train.batch_size=2")
    inputs = {"dataset": [publish(store).uri], "negatives": [publish_negatives(store).uri]}

    def steps(*more: str) -> int:
        made = recipe(*omni, *more)
        return fit(Job(made, store, inputs, "f", tmp_path), student_of(made), lambda *_: None).steps

    with pytest.raises(
        NvrError, match=r"stage train mixes sources whose instructions differ, .* set batches: homogeneous"
    ):
        steps()
    assert steps("train.batches=homogeneous") == 1


@pytest.mark.parametrize(
    "settings",
    [
        ["train.max_query_tokens=8"],
        ["train.max_tokens=9", "train.student.pool_prompt=false", "train.batches=homogeneous"],
    ],
)
def test_a_prompt_that_leaves_no_room_for_a_text_is_refused(
    recipe: Make, store: Store, tmp_path: Path, settings: list[str]
) -> None:
    """Every query would have one vector, that of the prompt, or, where that is not pooled, none."""
    made = recipe(*settings, 'train.student.prompts.query="one instruction of many, many, many, many, many words: "')
    inputs = {"dataset": [publish(store).uri], "negatives": [publish_negatives(store).uri]}
    with pytest.raises(
        NvrError, match=r"the prompt 'one inst.*' takes \d+ tokens, and stage train cuts inputs at [89]: nothing"
    ):
        fit(Job(made, store, inputs, "f", tmp_path), student_of(made), lambda *_: None)


# ── the saved model, and its scores ──────────────────────────────────────────────────────────────────────────────


def test_mteb_finds_the_prompt_of_each_task_in_the_saved_model(recipe: Make, tmp_path: Path) -> None:
    import mteb
    from mteb.models.abs_encoder import get_prompt_name
    from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
    from mteb.types import PromptType

    build_student(recipe().student, recipe().runtime).save_pretrained(str(tmp_path))
    model = load_folder(tmp_path, "cpu")
    assert model.prompts == recipe().student.prompts.named()
    wrapper = SentenceTransformerEncoderWrapper(model)
    for task, expected in (("SciFact", said("Given a claim")), ("NFCorpus", said(DEFAULT))):
        name = get_prompt_name(wrapper.model_prompts, mteb.get_task(task).metadata, PromptType.query)
        assert wrapper.model_prompts[name] == expected


def test_every_task_is_scored_with_its_own_prompt(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nvr_tasks.evaluation.run import score_task
    from nvr_tasks.fast_model import FastModel

    model = build_student(recipe().student, recipe().runtime)
    seen: list[str | None] = []
    for kind in ("encode_query", "encode_document"):
        original = getattr(FastModel, kind)

        def encode(self: Any, texts: Any, *, prompt: str | None = None, _original: Any = original, **more: Any) -> Any:
            seen.append(prompt)
            return _original(self, texts, prompt=prompt, **more)

        monkeypatch.setattr(FastModel, kind, encode)
    (tmp_path / "qrels").mkdir()
    for name in ("corpus", "queries"):
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(
                json.dumps({"_id": f"{i}", "title": "", "text": text}) + "\n" for i, text in enumerate(TEXTS)
            )
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n0\t1\t1\n")
    for task, official in (("SciFact", True), ("Mine", False), ("NFCorpus", True)):
        facts = {"split": "test", "official": official, "revision": "ab" * 20}
        score_task(model, "nvr/x", "r", task, facts, tmp_path, tmp_path / task, dtype="float32")
    assert seen == [p for i in ("Given a claim", "Mine", DEFAULT) for p in (said(i), "a {passage}: ")]


def test_a_recipe_without_instructions_has_plain_prompts(tiny_recipe: Make) -> None:
    for prompts in (tiny_recipe().student.prompts, tiny_recipe().teacher.prompts):
        assert not isinstance(prompts, InstructedPrompts)
