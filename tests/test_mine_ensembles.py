"""The stage mine with several teachers: each with its own vectors, ceilings and candidates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from mine_world import QUERIES, World

import nvr_tasks.mining
from nvr_tasks import embed
from nvr_tasks import mine as stage
from nvr_tasks.config import Recipe
from nvr_tasks.errors import NvrError, RecipeError
from nvr_tasks.mining import MiningSpec, mine
from nvr_tasks.pipeline import Context
from nvr_tasks.workflow import _mapped

GUARDS_OFF: dict[str, Any] = {"duplicate_similarity": None, "query_similarity": None}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def negatives(world: World, result: Any) -> pd.DataFrame:
    return world.table(result)


def alone(world: World, name: str, **settings: Any) -> dict[tuple[str, str], list[str]]:
    """What one teacher mines by itself with vectors in arrays, per (query, positive)."""
    x, y = world.vectors[name]
    queries = [q for q in range(QUERIES) if world.split[q] == "train"]
    judged = [[(d, s) for q2, d, r, s in world.qrels if q2 == q and r >= 1] for q in queries]
    positives = [sorted(d for d, s in j if s == "train") for j in judged]
    exclude = [[d for d, s in j if s != "train"] for j in judged]
    spec = MiningSpec(positive_policy="each", **settings)
    (found,) = mine(x[queries], y, positives, spec, groups=world.groups, exclude=exclude)
    return {
        (world.query_ids[queries[q]], world.docs[p]): [world.docs[n] for n in ids if n >= 0]
        for q, p, ids in zip(found.query_rows, found.positive_ids, found.negative_ids, strict=True)
    }


def test_intra_sample_takes_the_best_of_each_teacher(world: World) -> None:
    recipe = world.recipe(teachers=["t", "u", "v"], num_negatives=3, **GUARDS_OFF)
    result = world.run(recipe, world.embed(recipe))
    table = negatives(world, result)
    best = {name: alone(world, name, num_negatives=1) for name in ("t", "u", "v")}
    repeated = 0
    for line in table.itertuples():
        key = (line.query_id, line.positive_id)
        ready = [name for name in ("t", "u", "v") if best[name][key]]  # the others have nothing below their ceiling
        assert list(line.negative_ids)[: len(ready)] == [best[name][key][0] for name in ready]
        assert list(line.negative_teachers)[: len(ready)] == ready
        assert (line.negative_scores < line.negative_ceilings).all()
        assert (line.negative_ceilings < line.negative_positive_scores).all()
        repeated += len(line.negative_ids) - len(set(line.negative_ids))
    assert repeated > 0, "no two teachers agree: the test shows nothing"
    assert table["positive_score"].isna().all()
    assert table["ceiling"].isna().all()
    stats = world.stats(result)
    assert stats["repeated"] == repeated
    for told in stats["teachers"].values():
        assert told["candidates"] == told["kept"] + sum(told["skipped"].values())
    assert result.figures["from_u"] == sum(list(names).count("u") for names in table["negative_teachers"])
    page = (world.store.fetch(world.store.open(result.outputs["negatives"][0])) / "report.html").read_text()
    assert all(f"Teacher {name}" in page for name in ("t", "u", "v"))


def test_dedup_goes_on_to_the_next_best(world: World) -> None:
    recipe = world.recipe(teachers=["t", "u", "v"], ensemble="intra_sample_dedup", num_negatives=3, **GUARDS_OFF)
    table = negatives(world, world.run(recipe, world.embed(recipe)))
    lists = {name: alone(world, name, num_negatives=3) for name in ("t", "u", "v")}
    group = dict(zip(world.docs, world.groups, strict=True))
    for line in table.itertuples():
        taken: list[str] = []
        for name in ("t", "u", "v"):
            left = [
                n for n in lists[name][line.query_id, line.positive_id] if group[n] not in {group[m] for m in taken}
            ]
            taken += left[:1]
        assert list(line.negative_ids)[: len(taken)] == taken
        assert len({group[n] for n in line.negative_ids}) == len(line.negative_ids)


def test_cross_sample_gives_each_example_to_one_teacher(world: World) -> None:
    recipe = world.recipe(teachers=["t", "u"], ensemble="cross_sample", **GUARDS_OFF)
    embeddings = world.embed(recipe)
    table = negatives(world, world.run(recipe, embeddings))
    lists = {name: alone(world, name) for name in ("t", "u")}
    for line in table.itertuples():
        (name,) = set(line.negative_teachers)
        assert list(line.negative_ids) == lists[name][line.query_id, line.positive_id]
        assert list(line.negative_scores) == sorted(line.negative_scores, reverse=True)
        assert line.negative_scores[0] < line.ceiling < line.positive_score
        assert (line.negative_ceilings == line.ceiling).all()
        x, y = world.vectors[name]
        score = x[world.query_ids.index(line.query_id)] @ y[world.docs.index(line.positive_id)]
        assert line.positive_score == pytest.approx(float(score), abs=1e-6)
    shares = table["negative_teachers"].map(lambda names: names[0]).value_counts(normalize=True)
    assert 0.2 < shares["t"] < 0.8
    other_seed = recipe.model_copy(update={"seed": 5})
    again = negatives(world, world.run(other_seed, embeddings))
    assert [list(n) for n in again["negative_teachers"]] != [list(n) for n in table["negative_teachers"]]


def test_what_one_teacher_sees_as_a_near_duplicate_no_teacher_gives(world: World) -> None:
    settings = {"method": "naive", "num_negatives": 10, "query_similarity": None}
    recipe = world.recipe(teachers=["t", "u"], duplicate_similarity=0.6, **settings)
    table = negatives(world, world.run(recipe, world.embed(recipe)))
    alike = {name: y.astype(np.float64) @ y.T.astype(np.float64) for name, (_, y) in world.vectors.items()}
    relevant = {q: [d for q2, d, r, _ in world.qrels if q2 == q and r >= 1] for q in range(QUERIES)}
    spared = 0
    for line in table.itertuples():
        judged = relevant[world.query_ids.index(line.query_id)]
        for doc, name in zip(line.negative_ids, line.negative_teachers, strict=True):
            n = world.docs.index(doc)
            assert all(alike[eyes][judged, n].max() < 0.6 for eyes in ("t", "u"))
            spared += name == "t"
    assert spared
    plain = world.recipe(teachers=["t", "u"], duplicate_similarity=None, **settings)
    free = negatives(world, world.run(plain, world.embed(plain)))
    seen = [
        (name, alike["t"][relevant[world.query_ids.index(line.query_id)], world.docs.index(doc)].max() >= 0.6)
        for line in free.itertuples()
        for doc, name in zip(line.negative_ids, line.negative_teachers, strict=True)
    ]
    assert ("u", True) in seen, "teacher u gives nothing that t would spare: the test shows nothing"


def test_another_teacher_searches_only_with_that_one(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = {"depth": 150}  # enough for every row, so that nothing is searched again
    one = world.recipe(**deep)
    first = world.run(one, world.embed(one))
    searched: list[int] = []
    search = nvr_tasks.mining.search_candidates
    monkeypatch.setattr(
        nvr_tasks.mining,
        "search_candidates",
        lambda x, *given, **named: searched.append(x.shape[1]) or search(x, *given, **named),
    )
    two = world.recipe(teachers=["t", "u"], **deep)
    result = world.run(two, world.embed(two))
    assert searched == [world.vectors["u"][0].shape[1]]
    assert first.outputs["candidates"][0] in result.outputs["candidates"]
    third = world.recipe(teachers=["u", "t"], ensemble="cross_sample", method="margin_pos", **deep)
    world.run(third, [])  # nor embeddings
    assert len(searched) == 1


def test_blocks_of_an_ensemble_give_the_same_bytes(world: World) -> None:
    settings = {"teachers": ["t", "u"], "ensemble": "cross_sample", "depth": 5, "shift": 3, "method": "shifted"}
    whole = world.recipe(**settings)
    expected = world.run(whole, world.embed(whole))
    assert world.stats(expected)["searched_again"] > 0
    other = World(world.folder, root="another")
    recipe = other.recipe({"mine_shards": 3}, **settings)
    embeddings = other.embed(recipe)
    for shard in ("1/3", "0/3", "2/3"):
        other.run(recipe, embeddings, shard=shard)
    assert other.digest(other.run(recipe, embeddings)) == world.digest(expected)


def test_what_the_identity_of_an_ensemble_depends_on(world: World) -> None:
    def name(**settings: Any) -> str:
        seed = settings.pop("seed", 17)
        recipe = world.recipe(**{"teachers": ["t", "u"], **settings}).model_copy(update={"seed": seed})
        return stage.plan(Context(recipe, world.store), {"dataset": [world.dataset]})["negatives"][0].fingerprint

    base = name()
    assert name(seed=3) == base  # nothing is drawn
    assert name(thresholds={"t": 0.95}) == base  # the default, spelt out
    others = [
        name(teachers=["u", "t"]),
        name(teachers=["t", "u", "v"]),
        name(ensemble="cross_sample"),
        name(ensemble="cross_sample", seed=3),
        name(ensemble="intra_sample_dedup"),
        name(thresholds={"u": 0.9}),
        name(min_score=0.1),
        name(teachers=["t"]),
    ]
    assert len({base, *others}) == len(others) + 1
    assert name(teachers=["t"]) == name(teachers=[])  # one teacher is no ensemble


def test_a_random_negative_needs_no_ceiling(world: World) -> None:
    recipe = world.recipe(method="random", **GUARDS_OFF)
    embeddings = world.embed(recipe)
    table = negatives(world, world.run(recipe, embeddings))
    lists = alone(world, "t", method="random")
    assert set(lists) == set(zip(table["query_id"], table["positive_id"], strict=True))
    assert table["negative_ids"].map(len).eq(4).all()
    other = recipe.model_copy(update={"seed": 3})
    assert not negatives(world, world.run(other, embeddings))["negative_ids"].equals(table["negative_ids"])


def test_a_suggestion_for_each_teacher(world: World) -> None:
    recipe = world.recipe(teachers=["t", "u"])
    said = stage.suggestion(
        Context(recipe, world.store), {"dataset": [world.dataset], "embeddings": world.embed(recipe)}
    )
    assert "teacher t\n" in said
    assert "mine.method=perc_pos mine.thresholds.u=" in said


# ── embedding with several teachers ──────────────────────────────────────────────────────────────────────────────


def test_embed_is_mapped_over_teachers_and_shards(world: World) -> None:
    recipe = world.recipe({"embed_shards": 2, "mine_shards": 3}, teachers=["u", "t"])
    assert _mapped(recipe)["shards"] == ["u:0/2", "u:1/2", "t:0/2", "t:1/2"]
    assert _mapped(recipe)["blocks"] == ["0/3", "1/3", "2/3"]
    assert (_mapped(world.recipe())["shards"], _mapped(world.recipe())["blocks"]) == (["0/2", "1/2"], [])

    def planned(recipe: Recipe, **options: str) -> list[str]:
        made = embed.plan(Context(recipe, world.store, options=options), {"dataset": [world.dataset]})["embeddings"]
        return [identity.fingerprint for identity in made]

    parts = [planned(recipe, shard=s) for s in _mapped(recipe)["shards"]]
    assert [p for part in parts for p in part] == planned(recipe)
    assert len(set(planned(recipe))) == 4
    assert planned(recipe, shard="1/2") == [*planned(recipe, shard="u:1/2"), *planned(recipe, shard="t:1/2")]
    with pytest.raises(RecipeError, match="v is no teacher at work in this recipe, which are u, t"):
        planned(recipe, shard="v:0/2")


def test_vectors_of_a_teacher_that_is_not_at_work_are_refused(world: World) -> None:
    both = world.recipe(teachers=["t", "u"])
    embeddings = world.embed(both)
    with pytest.raises(NvrError, match="vectors of another teacher than t "):
        world.run(world.recipe(), embeddings)


def test_recipes_that_cannot_be_meant(world: World) -> None:
    for settings, message in (
        (
            {"teachers": ["t", "x"]},
            "mine.teachers names 'x', but embed.teachers, mine.cross_encoders and mine.late_interaction have t, u, v",
        ),
        ({"teachers": ["t", "t"]}, "t appears twice"),
        ({"teachers": ["t", "u"], "teacher": "t"}, "give one of both"),
        ({"teachers": ["t", "u"], "num_negatives": 1}, "num_negatives 1 is too few"),
        ({"teachers": ["t", "u"], "sampling": "sampled"}, "sampling must be top"),
        ({"teachers": ["t", "u"], "method": "random"}, "looks at no teacher's scores"),
        ({"thresholds": {"u": 0.9}}, "mine.thresholds names u, but the teachers are t"),
        ({"thresholds": {"t": 1.2}}, "thresholds.t 1.2 is out of range for perc_pos"),
        ({"method": "random", "min_score": 0.1}, "leave sampling at top and min_score at null"),
    ):
        with pytest.raises(ValueError, match=message):
            world.recipe(**settings)
