"""The stage mine on a small made-up data set with made-up vectors, in a real store."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mine_world import PASSAGES, QUERIES, World

import nvr_tasks.mining
from nvr_tasks import mine as stage
from nvr_tasks.errors import NvrError
from nvr_tasks.mining import MiningSpec, mine
from nvr_tasks.pipeline import Context


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def no_search(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("a full search was run")


@pytest.mark.parametrize("policy", ["each", "min", "max"])
def test_negatives_are_those_of_a_search_over_everything(world: World, policy: str) -> None:
    recipe = world.recipe(positive_policy=policy, method="margin_pos")
    result = world.run(recipe, world.embed(recipe))
    table = world.table(result)

    queries = [q for q in range(QUERIES) if world.split[q] == "train"]
    judged = {q: [(d, s) for q2, d, r, s in world.qrels if q2 == q and r >= 1] for q in queries}
    positives = [sorted(d for d, s in judged[q] if s == "train") for q in queries]
    spec = MiningSpec("margin_pos", positive_policy=policy)
    exclude = [[d for d, s in judged[q] if s != "train"] for q in queries]
    (expected,) = mine(world.x[queries], world.y, positives, spec, groups=world.groups, exclude=exclude)
    pairs = [(i, p) for i, q in enumerate(queries) for p in positives[i]]
    row = {(i, p): n if policy == "each" else i for n, (i, p) in enumerate(pairs)}
    assert list(zip(table["query_id"], table["positive_id"], strict=True)) == [
        (world.query_ids[queries[i]], world.docs[p]) for i, p in pairs
    ]
    for (i, p), line in zip(pairs, table.itertuples(), strict=True):
        ids = [int(n) for n in expected.negative_ids[row[i, p]] if n >= 0]
        assert list(line.negative_ids) == [world.docs[n] for n in ids]
        assert list(line.negative_scores) == expected.negative_scores[row[i, p]][: len(ids)].tolist()
        assert line.ceiling == expected.ceilings[row[i, p]]
        assert line.positive_score == pytest.approx(float(world.x[queries[i]] @ world.y[p]), abs=1e-6)
    stats = world.stats(result)
    assert stats["skipped"] == expected.skipped
    assert stats["candidates"] == stats["kept"] + sum(stats["skipped"].values())
    assert result.figures["pairs"] == len(pairs)
    assert result.figures["queries"] == len(queries)


def test_nothing_relevant_is_ever_mined(world: World) -> None:
    recipe = world.recipe(method="naive", num_negatives=10)
    table = world.table(world.run(recipe, world.embed(recipe)))
    group_of = dict(zip(world.docs, world.groups, strict=True))
    relevant = {(world.query_ids[q], world.groups[d]) for q, d, r, _ in world.qrels if r >= 1}
    mined = [(line.query_id, group_of[n]) for line in table.itertuples() for n in line.negative_ids]
    assert not set(mined) & relevant
    assert len(mined) == len(table) * 10
    assert all(len({group_of[n] for n in ids}) == len(ids) for ids in table["negative_ids"])
    assert not set(table["query_id"]) & {q for q, s in zip(world.query_ids, world.split, strict=True) if s != "train"}
    # Without the rule there would be something to find: the naive best of a query are its relevant passages.
    scores = world.x @ world.y.T
    assert any((world.query_ids[q], world.groups[int(d)]) in relevant for q, d in enumerate(scores.argmax(axis=1)))


def test_another_threshold_selects_without_a_search(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = world.recipe(depth=PASSAGES, method="perc_pos")
    first = world.run(recipe, world.embed(recipe))
    other = world.recipe(depth=PASSAGES, method="margin_pos", threshold=0.1, num_negatives=6)
    fresh_world = World(world.folder, root="another")
    fresh = fresh_world.run(other, fresh_world.embed(other))

    monkeypatch.setattr(nvr_tasks.mining, "search_candidates", no_search)
    again = world.run(other, [])  # no embeddings either
    assert world.digest(again) == fresh_world.digest(fresh)
    assert again.outputs["candidates"] == first.outputs["candidates"]
    assert again.outputs["negatives"] != first.outputs["negatives"]


@pytest.mark.parametrize(
    "settings",
    [{"method": "margin_pos", "threshold": 0.6}, {"method": "shifted", "shift": 50}, {"sampling": "sampled"}],
)
def test_rows_that_the_depth_cannot_serve_are_searched_again(world: World, settings: dict[str, Any]) -> None:
    deep, shallow = world.recipe(depth=PASSAGES, **settings), world.recipe(depth=3, **settings)
    embeddings = world.embed(deep)
    from_deep, from_shallow = world.run(deep, embeddings), world.run(shallow, embeddings)
    assert world.stats(from_deep)["searched_again"] == 0
    assert world.stats(from_shallow)["searched_again"] > 0
    assert world.digest(from_deep) == world.digest(from_shallow)
    assert world.stats(from_deep)["skipped"] == world.stats(from_shallow)["skipped"]


def test_bytes_depend_on_neither_blocks_nor_shards_nor_threads(world: World) -> None:
    recipe = world.recipe(sampling="sampled", temperature=0.1)
    plain = world.run(recipe, world.embed(recipe))
    other = World(world.folder, root="another")
    runtime = {"search_block_rows": 17, "search_block_queries": 5, "threads": 1}
    odd = other.recipe(runtime, sampling="sampled", temperature=0.1)
    result = other.run(odd, other.embed(odd, shards=5))
    for role in ("candidates", "negatives"):
        assert world.digest(plain, role) == other.digest(result, role)
        assert Path(plain.outputs[role][0]).name == Path(result.outputs[role][0]).name


def test_what_identity_depends_on(world: World) -> None:
    def names(**settings: Any) -> tuple[str, str]:
        seed = settings.pop("seed", 17)
        recipe = world.recipe(settings.pop("runtime", None), **settings).model_copy(update={"seed": seed})
        plan = stage.plan(Context(recipe, world.store), {"dataset": [world.dataset], "embeddings": []})
        return plan["candidates"][0].fingerprint, plan["negatives"][0].fingerprint

    base = names()
    for same in (
        {"runtime": {"search_block_rows": 99, "embed_shards": 7}},
        {"seed": 3},  # nothing is drawn
        {"threshold": 0.95},  # the default, spelt out
        {"shift": 5},  # perc_pos does not look at it
        {"temperature": 2.0},
    ):
        assert names(**same) == base, same
    for other in ({"threshold": 0.9}, {"num_negatives": 3}, {"method": "naive"}, {"positive_policy": "min"}):
        assert names(**other)[0] == base[0], other
        assert names(**other)[1] != base[1], other
    assert names(depth=61)[0] != base[0]
    assert names(sampling="sampled", seed=3)[1] != names(sampling="sampled")[1]


def test_short_queries_are_reported_not_padded(world: World, caplog: pytest.LogCaptureFixture) -> None:
    recipe = world.recipe(method="abs", threshold=-0.75)
    with caplog.at_level(logging.WARNING):
        result = world.run(recipe, world.embed(recipe))
    table = world.table(result)
    sizes = table["negative_ids"].map(len)
    assert (sizes < 4).any()
    assert table["negative_scores"].map(len).equals(sizes)
    assert result.figures["short_queries"] == table[sizes < 4]["query_id"].nunique()
    assert world.stats(result)["rows_by_negatives"] == {str(n): int((sizes == n).sum()) for n in range(5)}
    assert "no further passage is eligible" in caplog.text


@pytest.mark.parametrize(("text", "named"), [("passage 33", "passage s/d033"), ("ask s/q03", "query s/q03")])
def test_a_vector_with_nan_is_named_and_nothing_is_written(world: World, text: str, named: str) -> None:
    recipe = world.recipe()
    embeddings = world.embed(recipe, spoil=text)
    with pytest.raises(NvrError, match=f"vector of {named} has NaN"):
        world.run(recipe, embeddings)
    assert not list((world.folder / "store").glob("candidates/*"))
    assert not list((world.folder / "store").glob("negatives/*"))
    assert not list((world.folder / "store" / "tmp").glob("work-*"))


def test_missing_and_foreign_vectors_are_refused(world: World) -> None:
    recipe = world.recipe()
    embeddings = world.embed(recipe)
    with pytest.raises(NvrError, match="run `nvr embed` for all shards"):
        world.run(recipe, embeddings[:1])
    foreign = world.embed(recipe, teacher={"model": {"digest": "other"}})
    with pytest.raises(NvrError, match="vectors of another teacher than t "):
        world.run(recipe, foreign)


def test_broken_negatives_are_never_published(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rule of `verify`, broken in turn behind the stage's back."""
    recipe = world.recipe(method="naive")
    embeddings = world.embed(recipe)
    select = nvr_tasks.mining.reselect

    def breaking(change: Any) -> Any:
        def broken(*args: Any, **kwargs: Any) -> Any:
            mined = select(*args, **kwargs)
            ids, scores = mined.result.negative_ids.copy(), mined.result.negative_scores.copy()
            changed = change(mined.result, ids, scores) or {}
            return replace(
                mined, result=replace(mined.result, **{"negative_ids": ids, "negative_scores": scores, **changed})
            )

        return broken

    def no_score(result: Any, ids: np.ndarray, scores: np.ndarray) -> None:
        scores[2, 0] = np.nan

    def no_negative(result: Any, ids: np.ndarray, scores: np.ndarray) -> None:
        ids[2, 1] = -1

    def unknown(result: Any, ids: np.ndarray, scores: np.ndarray) -> None:
        ids[2, 0] = PASSAGES

    def positive(result: Any, ids: np.ndarray, scores: np.ndarray) -> None:
        ids[2, 0] = result.positive_ids[2]

    def above(result: Any, ids: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
        return {"ceilings": np.where(np.arange(len(ids)) == 2, scores[:, 0], result.ceilings)}

    def swapped(result: Any, ids: np.ndarray, scores: np.ndarray) -> None:
        scores[2, :2] = scores[2, 1::-1]

    def twice(result: Any, ids: np.ndarray, scores: np.ndarray) -> None:
        ids[2, 1] = ids[2, 0]

    def lost(result: Any, ids: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
        return {"skipped_per_row": {**result.skipped_per_row, "shifted": result.skipped_per_row["shifted"] + 1}}

    for change, message in (
        (positive, "relevant to its query"),
        (above, "does not lie below its ceiling"),
        (swapped, "not sorted"),
        (twice, "two negatives of one group"),
        (lost, "lost count"),
        (no_score, "without a finite score"),
        (no_negative, "without a negative"),
        (unknown, "not in the corpus"),
    ):
        monkeypatch.setattr(nvr_tasks.mining, "reselect", breaking(change))
        with pytest.raises(NvrError, match=message):
            world.run(recipe, embeddings)
        assert not list((world.folder / "store").glob("negatives/*"))
    monkeypatch.setattr(nvr_tasks.mining, "reselect", select)
    world.run(recipe, embeddings)


def test_judgements_that_the_search_lost_are_still_obeyed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = world.recipe(method="naive", num_negatives=40)
    embeddings = world.embed(recipe)
    search = nvr_tasks.mining.search_candidates
    monkeypatch.setattr(
        nvr_tasks.mining, "search_candidates", lambda *given, **named: search(*given, **{**named, "exclude": None})
    )
    with pytest.raises(NvrError, match="has a negative that is relevant to its query"):
        world.run(recipe, embeddings)
    assert not world.store.storage.list("negatives")


def test_planning_is_light() -> None:
    code = "import sys, json, nvr_tasks.mine; print(json.dumps([m for m in ('torch', 'pandas', 'numpy', 'pyarrow') if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_what_is_nearly_relevant_is_never_mined(world: World) -> None:
    """Lower bounds that many pairs reach: near-duplicates of positives and positives of near-duplicate dev queries."""
    x, y = world.x.astype(np.float64), world.y.astype(np.float64)
    alike_passages, alike_queries = y @ y.T, x @ x.T
    bounds = {"duplicate_similarity": 0.6, "query_similarity": 0.4}
    recipe = world.recipe(method="naive", **bounds)
    embeddings = world.embed(recipe)
    table = world.table(world.run(recipe, embeddings))
    relevant = {(q, d) for q, d, r, _ in world.qrels if r >= 1}
    spared = 0
    for line in table.itertuples():
        q = world.query_ids.index(line.query_id)
        related = [other for other in range(QUERIES) if alike_queries[q, other] >= bounds["query_similarity"]]
        judged = [d for other in related for d in range(PASSAGES) if (other, d) in relevant]
        barred = {n for d in judged for n in range(PASSAGES) if alike_passages[d, n] >= bounds["duplicate_similarity"]}
        mined = [world.docs.index(n) for n in line.negative_ids]
        assert not barred & set(mined)
        spared += any(world.split[other] == "dev" for other in related)
    assert spared, "no training query resembles a dev query: the test shows nothing"
    off = world.recipe(method="naive", duplicate_similarity=None, query_similarity=None)
    plain = world.table(world.run(off, embeddings))
    assert any(list(a) != list(b) for a, b in zip(plain["negative_ids"], table["negative_ids"], strict=True))


def test_a_suggestion_names_a_threshold_per_method_and_selects_nothing(world: World) -> None:
    recipe = world.recipe()
    ctx = Context(recipe, world.store)
    said = stage.suggestion(ctx, {"dataset": [world.dataset], "embeddings": world.embed(recipe)})
    for method in ("perc_pos", "margin_pos", "abs"):
        assert f"\nmine.method={method} mine.threshold=" in said
    assert said.splitlines()[0].split() == [
        "method",
        "threshold",
        "kept",
        "short",
        "rows",
        "median",
        "margin",
        "hidden",
        "positives",
    ]
    assert world.store.storage.list("candidates")
    assert not world.store.storage.list("negatives")


def test_a_flipped_byte_in_stored_candidates_is_found_without_digests(world: World) -> None:
    recipe = world.recipe()
    result = world.run(recipe, world.embed(recipe))
    [uri] = result.outputs["candidates"]
    path = Path(uri.removeprefix("file://")) / "candidates.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 4] ^= 0x40
    path.chmod(0o644)
    path.write_bytes(data)
    with pytest.raises(NvrError, match=r"cannot read .*candidates\.parquet: .*; its bytes are damaged"):
        world.run(world.recipe(threshold=0.9), world.embed(recipe))
