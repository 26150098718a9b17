"""Mining divided over tasks: the same bytes, and nothing searched twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mine_world import World

import nvr_tasks.mining
from nvr_tasks.errors import NvrError, RecipeError
from nvr_tasks.pipeline import Context, execute
from nvr_tasks.stages import stage as row

SETTINGS: dict[str, Any] = {
    "sampling": "sampled",
    "temperature": 0.1,
    "query_similarity": 0.4,
    "duplicate_similarity": 0.6,
}


class Searches:
    """Counts searches, and fails at the one asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail_at: int = -1) -> None:
        self.queries: list[int] = []
        self.search, self.fail_at = nvr_tasks.mining.search_candidates, fail_at
        monkeypatch.setattr(nvr_tasks.mining, "search_candidates", self)

    def __call__(self, queries: Any, *args: Any, **kwargs: Any) -> Any:
        if len(self.queries) == self.fail_at:
            raise KeyboardInterrupt
        self.queries.append(len(queries))
        return self.search(queries, *args, **kwargs)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def divided(world: World, blocks: int, **settings: Any) -> Any:
    return world.recipe({"mine_shards": blocks}, **{**SETTINGS, **settings})


@pytest.mark.parametrize("blocks", [2, 5, 40])  # 40: more than there are queries
def test_any_number_of_workers_gives_the_same_bytes(world: World, blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = world.recipe(**SETTINGS)
    expected = world.run(whole, world.embed(whole))
    other = World(world.folder, root="another")
    recipe = divided(other, blocks)
    embeddings = other.embed(recipe, shards=3)
    searches = Searches(monkeypatch)
    for index in reversed(range(blocks)):  # tasks end in any order
        done = other.run(recipe, embeddings, shard=f"{index}/{blocks}")
        assert done.outputs == {}
    assert sum(searches.queries) == len(set(world.table(expected)["query_id"]))
    assert len(searches.queries) == min(blocks, sum(searches.queries))
    searches.queries.clear()
    result = other.run(recipe, embeddings)
    assert searches.queries == []  # joined, not searched
    for role in ("candidates", "negatives"):
        assert other.digest(result, role) == world.digest(expected, role)
        assert Path(result.outputs[role][0]).name == Path(expected.outputs[role][0]).name
    assert other.stats(result) == world.stats(expected)
    assert other.store.storage.list("parts") == []


def test_a_killed_task_goes_on_behind_the_last_finished_block(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = divided(world, 4)
    embeddings = world.embed(recipe)
    killed = Searches(monkeypatch, fail_at=2)
    with pytest.raises(KeyboardInterrupt):
        world.run(recipe, embeddings)
    assert len(killed.queries) == 2
    monkeypatch.undo()
    again = Searches(monkeypatch)
    world.run(recipe, embeddings, shard="0/4")  # finished: nothing to do
    assert again.queries == []
    world.run(recipe, embeddings)
    assert len(again.queries) == 2


def test_a_damaged_block_is_searched_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = divided(world, 3)
    embeddings = world.embed(recipe)
    for index in range(3):
        world.run(recipe, embeddings, shard=f"{index}/3")
    keys = world.store.storage.list("parts")
    assert len(keys) == 3
    world.store.storage.put_bytes(keys[1], b"PAR1 and no more")
    searches = Searches(monkeypatch)
    result = world.run(recipe, embeddings)
    assert len(searches.queries) == 1
    fresh = World(world.folder, root="another")
    plain = fresh.recipe(**SETTINGS)
    assert fresh.digest(fresh.run(plain, fresh.embed(plain))) == world.digest(result)


def test_a_nan_in_any_block_names_the_right_query(world: World) -> None:
    recipe = divided(world, 3)
    spoilt = world.embed(recipe, spoil="ask s/q20")
    with pytest.raises(NvrError, match="vector of query s/q20 has NaN"):
        world.run(recipe, spoilt, shard="2/3")


@pytest.mark.parametrize("shard", ["3/3", "0/2", "x", "t:0/3"])
def test_a_bad_block(world: World, shard: str) -> None:
    with pytest.raises(
        RecipeError, match=r"is not allowed: this recipe has 3 shards, 0/3 to 2/3 \(runtime.mine_shards\)"
    ):
        world.run(divided(world, 3), [], shard=shard)


def test_a_block_is_a_result_of_its_own_in_a_run(world: World) -> None:
    recipe = divided(world, 2)
    given = {"dataset": [world.dataset], "embeddings": world.embed(recipe)}
    done = execute(row("mine"), Context(recipe, world.store, options={"shard": "1/2"}), given)
    assert (done.part, done.outputs, done.reused) == ("1of2", {}, False)
    again = execute(row("mine"), Context(recipe, world.store, options={"shard": "1/2"}), given)
    assert again.reused


def test_a_block_finds_the_embeddings_of_all_shards(world: World) -> None:
    """`--shard` of mine says nothing about the shards of embed, which it looks for by itself."""
    recipe = world.recipe({"mine_shards": 3, "embed_shards": 2}, **SETTINGS)
    ctx = Context(recipe, world.store, options={"shard": "2/3"})
    with pytest.raises(NvrError, match=r"no embeddings for recipe small at .*: run `nvr embed`"):
        execute(row("mine"), ctx, {"dataset": [world.dataset]})
    world.embed(recipe)
    done = execute(row("mine"), ctx, {"dataset": [world.dataset]})
    assert done.figures["searches"] == 1
