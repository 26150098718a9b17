"""A late-interaction model as teacher: its scores are the library's MaxSim, however queries are divided."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mine_world import World

from nvr_tasks import mine as stage
from nvr_tasks.config import Recipe, Runtime
from nvr_tasks.errors import NvrError
from nvr_tasks.mined import maxsim
from nvr_tasks.mined.identities import rescore_identity
from nvr_tasks.mined.maxsim import MaxSimScorer
from nvr_tasks.models import load_folder, load_teacher
from nvr_tasks.pipeline import Context
from nvr_tasks.settings import CrossEncoder, LateInteractionTeacher, Teacher
from nvr_tasks.surgery import multi_vector
from nvr_tasks.tiny_models import folder_of
from nvr_tasks.training_settings import LateInteraction

QUERY = "which passages answer, and why?"
PASSAGES = ["short", "a passage, of some more words! " * 3, "and one that is cut " * 40, "short again", "short"]


@pytest.fixture(scope="session")
def colbert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real late-interaction model with random weights, prompts, a skiplist and expanded queries."""
    import torch

    folder = tmp_path_factory.mktemp("colbert")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = multi_vector(load_folder(folder_of("modernbert"), "cpu"), LateInteraction(dim=16))
    model.prompts = {"query": "ask: ", "document": "say: "}
    model[0].document_length = 64
    model[0].query_expansion = {"strategy": "fixed", "length": 24, "attend": False}
    model[2].skiplist_words = list(string.punctuation)
    model.save_pretrained(str(folder))
    return folder


def load_library(folder: Path) -> Any:
    from sentence_transformers import MultiVectorEncoder

    return MultiVectorEncoder(str(folder), device="cpu")


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def teacher(folder: Path, **settings: Any) -> LateInteractionTeacher:
    return LateInteractionTeacher(name="late", model={"type": "path", "path": str(folder)}, **settings)


def scorer(folder: Path, **settings: Any) -> MaxSimScorer:
    return MaxSimScorer(teacher(folder, **settings), Runtime(device="cpu"))


def mined_by(
    world: World, folder: Path, runtime: dict[str, Any] | None = None, depth: int = 12, **settings: Any
) -> Recipe:
    own = {"name": "late", "model": {"type": "path", "path": str(folder)}, "depth": depth}
    return world.recipe(runtime, teachers=["late"], late_interaction=[own], **settings)


@pytest.mark.parametrize("scale", ["mean", "sum"])
def test_scores_are_those_of_the_library(colbert: Path, scale: str) -> None:
    found = scorer(colbert, scale=scale).score(QUERY, PASSAGES)
    library = load_library(colbert)
    queries, passages = library.encode_query([QUERY]), library.encode_document(PASSAGES)
    assert len(queries[0]) == 24, "the query was not expanded: the test shows less than it should"
    expected = library.similarity(queries, passages)[0].double().numpy()
    np.testing.assert_allclose(found, expected / (24 if scale == "mean" else 1), atol=1e-5)
    by_hand = [sum(float((q @ p.T).max()) for q in queries[0]) for p in passages]  # without the library's own MaxSim
    np.testing.assert_allclose(found, np.array(by_hand) / (24 if scale == "mean" else 1), atol=1e-5)
    assert np.ptp(found) > 0.01, "all pairs score alike: the test shows nothing"
    assert found[0] == found[4]
    assert scale == "sum" or np.abs(found).max() <= 1 + 1e-6


def test_the_recipes_prompts_and_lengths_replace_the_folders(colbert: Path) -> None:
    own = scorer(colbert, prompts={"query": "other: ", "passage": ""}, max_tokens={"query": 32, "passage": 16})
    library = load_library(colbert)
    library[0].document_length = 16
    expected = library.similarity(
        library.encode_query([QUERY], prompt="other: "),
        library.encode_document(PASSAGES, prompt=""),
        length_normalize=True,
    )
    np.testing.assert_allclose(own.score(QUERY, PASSAGES), expected[0].numpy(), atol=1e-5)
    assert np.abs(own.score(QUERY, PASSAGES) - scorer(colbert).score(QUERY, PASSAGES)).max() > 1e-3


def test_a_passage_is_encoded_once_within_bounded_memory(colbert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = scorer(colbert)
    encoded: list[str] = []
    encode = one.model.encode_document
    monkeypatch.setattr(
        one.model, "encode_document", lambda texts, **how: (encoded.extend(texts), encode(texts, **how))[1]
    )
    first = one.score(QUERY, PASSAGES)
    again = one.score("another question", PASSAGES[::-1])
    assert sorted(encoded) == sorted(set(PASSAGES))
    monkeypatch.setattr(maxsim, "KEPT_BYTES", 2000)
    small = scorer(colbert)
    assert np.array_equal(small.score(QUERY, PASSAGES), first)
    assert np.array_equal(small.score("another question", PASSAGES[::-1]), again)
    assert small.kept_bytes == sum(v.nbytes for v in small.kept.values()) <= 2000 + 64 * 16 * 4
    assert len(small.kept) < len(set(PASSAGES))


@pytest.mark.parametrize("settings", [{"method": "perc_pos"}, {"method": "margin_pos", "threshold": 0.02}])
def test_from_recipe_to_negatives_in_any_division(world: World, colbert: Path, settings: dict[str, Any]) -> None:
    recipe = mined_by(world, colbert, **settings)
    embeddings = world.embed(recipe)
    result = world.run(recipe, embeddings)
    library = load_library(colbert)
    score = library.similarity(
        library.encode_query([f"ask {q}" for q in world.query_ids]),
        library.encode_document(world.texts),
        length_normalize=True,
    ).numpy()
    base = world.table(world.run(world.recipe(), embeddings), "candidates").set_index("query_id")
    kept = 0
    for line in world.table(result).itertuples():
        own = dict(zip(world.docs, score[world.query_ids.index(line.query_id)], strict=True))
        positive = own[line.positive_id]
        ceiling = positive - abs(positive) * 0.05 if settings["method"] == "perc_pos" else positive - 0.02
        assert line.positive_score == pytest.approx(positive, abs=1e-5)
        assert line.ceiling == pytest.approx(ceiling, abs=1e-5)
        assert set(line.negative_ids) <= set(base.loc[line.query_id, "candidate_ids"][:12])
        np.testing.assert_allclose(line.negative_scores, [own[d] for d in line.negative_ids], atol=1e-5)
        assert all(s < line.ceiling for s in line.negative_scores)
        kept += len(line.negative_ids)
    assert kept, "nothing was mined: the test shows nothing"
    assert world.stats(result)["skipped"]["not_rescored"] > 0
    other = World(world.folder, root="another")
    divided = mined_by(other, colbert, {"mine_shards": 5}, **settings)
    uris = other.embed(divided)
    other.run(divided, uris, shard="3/5")
    assert other.digest(other.run(divided, uris)) == world.digest(result)


def test_what_names_its_candidates(world: World, colbert: Path) -> None:
    recipe = mined_by(world, colbert)
    identity = stage.plan(Context(recipe, world.store), {"dataset": [world.dataset]})["candidates"][1].config
    assert set(identity) == {"late_interaction", "depth"}
    assert set(identity["late_interaction"]) == {"model", "dtype", "prompts", "max_tokens", "scale"}
    tiny = {"type": "tiny", "architecture": "bert"}
    pinned = rescore_identity(LateInteractionTeacher(name="late", model=tiny), "dataset/d", "candidates/c")
    assert pinned.fingerprint == "2d9337628025796fc55304d5417943c9"
    other = rescore_identity(LateInteractionTeacher(name="late", model=tiny, scale="sum"), "dataset/d", "candidates/c")
    assert other.fingerprint != pinned.fingerprint
    cross = rescore_identity(CrossEncoder(name="ce", model=tiny), "dataset/d", "candidates/c")
    assert cross.fingerprint == "28ac7b809027409a254337b7fc436ecd"  # as before there were others


def test_models_in_the_wrong_place_are_told_where_they_belong(colbert: Path) -> None:
    with pytest.raises(NvrError, match=r"embed.teachers names dense, but .* name it under mine\.late_interaction"):
        load_teacher(Teacher(name="dense", model={"type": "path", "path": str(colbert)}), Runtime(device="cpu"))
    with pytest.raises(NvrError, match=r"is no late-interaction model .* under embed\.teachers"):
        scorer(folder_of("bert"))
    with pytest.raises(NvrError, match=r"reads at most 2048 tokens, but its max_tokens.passage is 4096: lower it"):
        scorer(colbert, max_tokens={"query": 32, "passage": 4096})
    with pytest.raises(NvrError, match=r"fills queries up to 24 tokens, but its max_tokens.query is 16: raise it"):
        scorer(colbert, max_tokens={"query": 16, "passage": 64})


def test_recipes_that_cannot_be_meant(world: World, colbert: Path) -> None:
    with pytest.raises(ValueError, match="late-interaction teacher late is to rescore 61 candidates"):
        mined_by(world, colbert, depth=61)
    with pytest.raises(ValueError, match="which a late-interaction teacher does not score"):
        mined_by(world, colbert, method="random")
