"""`nvr audit` on the small world of the stage mine: artefact, reuse, page, judge; and candidates from an index."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_judge import SECRET, Server
from test_mine import World
from test_mining_report import Balanced

import nvr_tasks.audit
from nvr_tasks.artifacts import Store
from nvr_tasks.audit import audit, read_estimates, what_is_known
from nvr_tasks.config import Recipe
from nvr_tasks.mining.audit import ALL, ARMS
from nvr_tasks.pipeline import Context


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    for name in ("NVR_JUDGE_URL", "NVR_JUDGE_MODEL", "NVR_JUDGE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return World(tmp_path)


@pytest.fixture
def server() -> Iterator[Server]:
    it = Server()
    yield it
    it.http.shutdown()
    it.http.server_close()
    it.thread.join()


def recipe(world: World, **settings: object) -> Recipe:
    """No copies: the teacher of this world is a table of vectors and cannot embed a text."""
    plain = world.recipe(positive_policy="min")
    return plain.model_copy(update={"audit": plain.audit.model_copy(update={"copies": 0, **settings})})


def inputs(world: World, of: Recipe) -> dict[str, list[str]]:
    return {"dataset": [world.dataset], "embeddings": world.embed(of)}


def test_an_audit_is_an_artefact_that_is_made_once(world: World) -> None:
    ctx = Context(recipe(world), world.store)
    given = inputs(world, ctx.recipe)
    assert "none yet" in "\n".join(what_is_known(ctx, given))
    first = audit(ctx, given)
    again = audit(ctx, given)
    assert (first.reused, again.reused, again.outputs) == (False, True, first.outputs)
    folder = world.store.fetch(world.store.open(first.outputs["audit"][0]))
    found = read_estimates(folder / "audit.json")
    assert {e.experiment for e in found} == {"held out"}
    [own] = [
        e.share
        for e in found
        if (e.method, e.guards, e.part, e.measure) == ("perc_pos 0.95", ARMS[-1].name, ALL, "negatives")
    ]
    assert own.trials > 0
    assert first.figures["held_out_percent"] == round(100 * own.value, 3)
    told = what_is_known(ctx, given)
    assert any("perc_pos 0.95" in line and f"{own.value:.2%}" in line for line in told)
    page = (folder / "report.html").read_text()
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert str(own) in page
    # What is mined with decides the audit; how does not.
    assert (
        audit(
            Context(world.recipe(positive_policy="max").model_copy(update={"audit": ctx.recipe.audit}), world.store),
            given,
        ).outputs
        != first.outputs
    )
    faster = ctx.recipe.model_copy(update={"runtime": ctx.recipe.runtime.model_copy(update={"judge_requests": 9})})
    assert audit(Context(faster, world.store), given).reused


def test_a_judge_grades_a_sample_of_each_method_within_its_budget(
    world: World, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"URL": server.url, "MODEL": "m", "API_KEY": SECRET}.items():
        monkeypatch.setenv(f"NVR_JUDGE_{name}", value)
    ctx = Context(recipe(world, judged_pairs=6, judge_calls=30), world.store)
    result = audit(ctx, inputs(world, ctx.recipe))
    assert len(server.seen) <= 30
    folder = world.store.fetch(world.store.open(result.outputs["audit"][0]))
    judged = [e for e in read_estimates(folder / "audit.json") if e.experiment == "judged"]
    assert len(judged) == 8, "seven methods, and the known positives"
    assert all(3 <= e.share.trials <= 6 for e in judged), "a budget that runs out leaves each as much as the others"
    spent = json.loads((folder / "audit.json").read_text())["judge"]
    assert spent["calls"] == len(server.seen)
    assert 0 < sum(e.share.hits for e in judged) < sum(e.share.trials for e in judged)
    for file in Path(world.folder).rglob("*"):
        assert file.is_dir() or SECRET.encode() not in file.read_bytes()


def test_with_a_pipeline_run_figures_and_page_go_to_mlflow(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nvr_tasks.tracking import Tracking

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    ctx = Context(recipe(world), world.store, "run-1")
    result = audit(ctx, inputs(world, ctx.recipe))
    tracking = Tracking(ctx.recipe.register_.experiment)
    run = tracking.run("run-1")
    assert run.data.metrics["audit.held_out_percent"] == result.figures["held_out_percent"]
    assert [f.path for f in tracking.client.list_artifacts(run.info.run_id, "mining/audit")] == [
        "mining/audit/report.html"
    ]


def test_candidates_from_an_index_say_their_recall(world: World) -> None:
    exact = world.recipe()
    embeddings = world.embed(exact)
    plain = world.table(world.run(exact, embeddings))
    approximate = world.recipe(search="faiss_ivf", ivf_lists=3, ivf_probes=3)
    result = world.run(approximate, embeddings)
    stats = Store(world.store.root).open(result.outputs["candidates"][0]).manifest.stats
    assert stats["recall"] == {"value": 1.0, "low": pytest.approx(1.0, abs=0.3), "high": 1.0}
    table = world.table(result)
    assert [list(a) for a in table["negative_ids"]] == [list(a) for a in plain["negative_ids"]]
    assert "recall" not in world.store.open(world.run(exact, embeddings).outputs["candidates"][0]).manifest.stats
    stricter = world.recipe(search="faiss_ivf", ivf_lists=3, ivf_probes=3, min_recall=0.99)
    assert not world.run(stricter, embeddings).reused, "what was searched under a lower bound kept no higher one"


def test_help_is_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    from nvr_tasks.cli import main

    with pytest.raises(SystemExit):
        main(["audit", "--help"])
    assert (nvr_tasks.audit.__doc__ or "").splitlines()[0] in capsys.readouterr().out
