"""Ablations: what a grid stands for, what it refuses, and a real one: killed, taken up, reused, compared."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from nvr_tasks import cli
from nvr_tasks.ablation_report import ablation_report, text_table
from nvr_tasks.artifacts import Store
from nvr_tasks.cells import cells_of, distinct, shards_of, shared
from nvr_tasks.config import Recipe
from nvr_tasks.errors import RecipeError
from nvr_tasks.pipeline import Context, module_of
from nvr_tasks.recipe_files import load_recipe, parse_recipe, shipped_recipes
from nvr_tasks.stages import stage

Make = Callable[..., Recipe]
TWO_TEACHERS = "embed.teachers=[{name: a, model: {type: tiny, architecture: bert}}, {name: b, model: {type: tiny, architecture: llama}}]"


# ── what a grid stands for ───────────────────────────────────────────────────────────────────────────────────────


def test_a_grid_is_the_product_of_its_axes(tiny_recipe: Make) -> None:
    recipe = tiny_recipe(
        TWO_TEACHERS,
        "ablation={variants: [{name: in-batch, changes: {train.hard_negatives: 0}}], seeds: [1, 2], grid: {methods: "
        "[random, perc_pos], thresholds: {perc_pos: [0.9, 0.95]}, samplings: [top, sampled], teachers: [a, b]}}",
    )
    cells = cells_of(recipe)
    names = list(dict.fromkeys(c.variant for c in cells))
    assert names == [
        "in-batch", "random-a", "random-b",
        "perc_pos-0.9-top-a", "perc_pos-0.9-top-b", "perc_pos-0.9-sampled-a", "perc_pos-0.9-sampled-b",
        "perc_pos-0.95-top-a", "perc_pos-0.95-top-b", "perc_pos-0.95-sampled-a", "perc_pos-0.95-sampled-b",
    ]  # fmt: skip
    assert [c.name for c in cells[:2]] == ["in-batch:1", "random-a:1"]
    assert cells[len(names)].name == "in-batch:2"
    by_name = {c.name: c.recipe for c in cells}
    chosen = by_name["perc_pos-0.9-sampled-b:2"]
    assert (chosen.mine.method, chosen.mine.threshold, chosen.mine.sampling) == ("perc_pos", 0.9, "sampled")
    assert [t.name for t in chosen.mining_teachers] == ["b"]
    assert (chosen.seed, chosen.ablation) == (2, None)
    assert by_name["in-batch:1"].train.hard_negatives == 0
    assert recipe.ablation is not None
    assert recipe.ablation.compared_with == "in-batch"
    assert [t.name for t in shared(recipe).teachers] == ["a", "b"]
    assert shards_of(recipe) == ["a:0/2", "a:1/2", "b:0/2", "b:1/2"]
    again = parse_recipe(json.dumps(recipe.dump()), "dumped")
    assert [c.recipe for c in cells_of(again)] == [c.recipe for c in cells]


def test_another_method_starts_from_its_own_threshold(tiny_recipe: Make) -> None:
    recipe = tiny_recipe("mine.threshold=0.8", "ablation.grid={methods: [perc_pos, margin_pos, naive]}")
    assert [c.recipe.mine.resolved_threshold for c in cells_of(recipe)[:3]] == [0.95, 0.05, None]
    kept = tiny_recipe("mine.threshold=0.8", "ablation.variants=[{name: a, changes: {train.steps: 3}}]")
    assert cells_of(kept)[0].recipe.mine.threshold == 0.8


def test_thresholds_that_a_variant_sets_are_kept_however_they_are_written(tiny_recipe: Make) -> None:
    for written in ("mine.thresholds.a: 0.5", "mine.thresholds: {a: 0.5}"):
        recipe = tiny_recipe(
            TWO_TEACHERS,
            "mine.threshold=0.8",
            f"ablation.variants=[{{name: v, changes: {{mine.method: perc_pos, {written}}}}}]",
        )
        mine = cells_of(recipe)[0].recipe.mine
        assert (mine.thresholds, mine.threshold) == ({"a": 0.5}, None)


def test_teachers_of_a_grid_are_searched_together_whatever_training_leaves_out(tiny_recipe: Make) -> None:
    """Several teachers at once and a bound on one's scale are refused; each cell has a single teacher."""
    recipe = tiny_recipe(
        TWO_TEACHERS, "train.min_positive_score=0.3", "ablation.grid={methods: [perc_pos], teachers: [a, b]}"
    )
    assert [t.name for t in shared(recipe).teachers] == ["a", "b"]
    assert {c.recipe.train.min_positive_score for c in cells_of(recipe)} == {0.3}


def test_random_stands_in_a_grid_of_a_recipe_that_samples(tiny_recipe: Make) -> None:
    recipe = tiny_recipe(
        "mine.sampling=sampled", "mine.min_score=0.2", "ablation.grid={methods: [random, naive]}", "ablation.seeds=[1]"
    )
    assert [(c.recipe.mine.sampling, c.recipe.mine.min_score) for c in cells_of(recipe)] == [
        ("top", None),
        ("sampled", 0.2),
    ]


def test_equal_settings_are_one_task_and_every_task_is_scored(tiny_recipe: Make) -> None:
    """Two tasks that train one model would take each other's checkpoints; a quick tier would leave tasks out."""
    recipe = tiny_recipe(
        "ablation={variants: [{name: a}, {name: b, changes: {mine.method: perc_pos, mine.threshold: 0.95}}, "
        "{name: c, changes: {mine.method: naive}}], seeds: [1, 2], grid: {methods: [perc_pos]}}",
        "mine={method: perc_pos, threshold: 0.95}",
    )
    assert distinct(cells_of(recipe)) == ["a:1", "c:1", "a:2", "c:2"], "nor is a threshold by default another one"
    tiered = load_recipe("beir-small-ablation", ["gate.quick={tasks: [SciFact], min_mean: 0.1}"])
    assert tiered.gate.quick is not None
    assert {c.recipe.gate.quick for c in cells_of(tiered)} == {None}


def test_an_ablation_changes_no_other_identity(store: Store, tiny_recipe: Make) -> None:
    """A recipe that gains one keeps what it has made."""
    given = {"dataset": ["file:///r/dataset/d"], "negatives": ["file:///r/negatives/n"]}
    for name in ("embed", "mine", "train"):
        plans = [
            module_of(stage(name)).plan(Context(r, store), given)
            for r in (tiny_recipe(), tiny_recipe("ablation.grid={methods: [naive]}"))
        ]
        assert plans[0] == plans[1]


def test_all_cells_select_from_the_same_candidates(store: Store, tiny_recipe: Make) -> None:
    recipe = tiny_recipe(
        "ablation.grid={methods: [naive, shifted, abs, random, perc_pos], samplings: [top, sampled, top1_sampled]}"
    )
    given = {"dataset": ["file:///r/dataset/d"]}
    wanted = module_of(stage("search")).plan(Context(recipe, store), given)["candidates"]
    assert len(wanted) == 1
    mine = module_of(stage("mine"))
    for cell in cells_of(recipe):
        assert mine.plan(Context(cell.recipe, store), given)["candidates"] == wanted


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["ablation={}"], "ablation: an ablation needs variants, or a grid of methods"),
        (["ablation.grid={methods: [nave]}"], r"ablation\.grid\.methods\.0: 'nave' is not allowed"),
        (["ablation.grid={samplings: [top]}"], "a grid needs methods to cross with"),
        (["ablation.grid={methods: [naive], thresholds: {abs: [0.7]}}"], "thresholds are given for abs, which grid.methods lacks"),
        (["ablation.grid={methods: [naive], thresholds: {naive: [0.3]}}"], "variant naive-0.3: mine: threshold 0.3 has no meaning"),
        (["ablation.grid={methods: [naive], teachers: [x]}"], "variant naive: mine.teachers names 'x'"),
        (["ablation.grid={methods: [naive, naive]}"], "grid.methods must be unique; naive appears twice"),
        (["ablation.grid={methods: [naive]}", "ablation.baseline=x"], "baseline is 'x', but the variants are naive"),
        (["ablation.grid={methods: [naive]}", "ablation.seeds=[]"], r"ablation\.seeds: \[\] is not allowed"),
        (["ablation.grid={methods: [naive]}", "ablation.seeds=[1, 1]"], "ablation.seeds must be unique; 1 appears twice"),
        (["ablation.grid={methods: [naive]}", "ablation.seeds=[-1]"], "seed -1 is out of range"),
        (["ablation.varants=[]"], r"ablation\.varants: unknown key .* Did you mean variants\?"),
        (["ablation.variants=[{name: a, changes: {data.dev_queries: 3}}]"], "not 'data.dev_queries': data, teachers and benchmark"),
        (["ablation.variants=[{name: a, changes: {mine.depth: 3}}]"], "cannot change mine.depth, which candidates depend on"),
        (["ablation.variants=[{name: a, changes: {mine.methd: x}}]"], "variant a: mine.methd: Extra inputs are not permitted"),
        (["ablation.variants=[{name: a, changes: {train.hard_negatives: 9}}]"], "variant a: train.hard_negatives is 9 but"),
        (["ablation.variants=[{name: a, changes: {train.stages.3.steps: 9}}]"], "variant a: train.stages.3.steps: '3' is not an index"),
        (["ablation.variants=[{name: a}, {name: a}]"], "names of the ablation's variants must be unique; a appears twice"),
    ],
)  # fmt: skip
def test_a_wrong_grid_is_refused_by_the_fact(tiny_recipe: Make, overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        tiny_recipe(*overrides)


def test_what_is_asked_of_no_ablation_says_how_to_make_one(
    tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = f"--root={tmp_path}/a"
    for command in (["ablate"], ["begin", "--ablation"], ["ablate", "--dry-run"]):
        assert cli.main([*command, f"--recipe={tiny_file}", root]) == 2
        assert "recipe tiny has no ablation: add a section `ablation`" in capsys.readouterr().err
    assert not (tmp_path / "a").exists() or not list((tmp_path / "a").rglob("*.json"))


def test_shipped_ablations_have_equal_budgets_and_dev_scores_to_the_end() -> None:
    for name in shipped_recipes():
        recipe = load_recipe(name)
        if recipe.ablation is None:
            continue
        budgets = {(s.steps, s.batch_size) for c in cells_of(recipe) for s in c.recipe.train.schedule}
        assert len(budgets) == 1
        [(steps, _)] = budgets
        assert steps is not None
        assert steps % recipe.train.eval_every_steps == 0, "the last point of the dev curve must be the last step"


# ── the page ─────────────────────────────────────────────────────────────────────────────────────────────────────


def record(**more: Any) -> dict[str, Any]:
    score = {"mean": 0.4, "low": 0.3, "high": 0.5, "by_seed": [0.39, 0.41]}
    gain = {"mean": 0.1, "low": 0.05, "high": 0.15}
    variants = [
        {"name": "naive", "tasks": {"T": score}, "mean": score, "difference": None, "changes": {"mine.method": "naive"},
         "mining": {"pairs": 10, "of_pairs": 40, "negatives": 3.9, "short": 0.1, "own_source": 0.25, "mean_margin": 0.2},
         "relevant": [{"experiment": "held out", "value": 0.02, "low": 0.01, "high": 0.03}],
         "steps": 20},
        {"name": "x<y", "tasks": {"T": {**score, "mean": 0.5}}, "mean": {**score, "mean": 0.5},
         "difference": {**gain, "p": 0.001, "p_holm": 0.002, "seeds_to_queries": 2.5, "tasks": {"T": gain}}, "changes": {}, "mining": None,
         "relevant": None, "steps": 20},
    ]  # fmt: skip
    curve = {"steps": 12.5, "seconds": 6.25, "seconds_per_step": 0.5, "by_seed": [12.0, None], "final": 0.4,
             "curve": [[10, 0.3, 0.2, 0.4], [20, 0.4, 0.3, 0.5]]}  # fmt: skip
    speed = {
        "best_final": 0.4,
        "best": "naive",
        "target": 0.38,
        "machines": ["a CPU"],
        "variants": {"naive": curve, "x<y": {**curve, "steps": None}},
    }
    return {
        "recipe": "r", "metric": "ndcg_at_10", "baseline": "naive", "seeds": [1, 2], "alpha": 0.05, "resamples": 1000,
        "queries": {"T": 300}, "weights": {"T": 1.0}, "variants": variants, "reach": 0.95, "speed": speed,
        "shared": {"dataset": "file:///d"}, "models": {"naive:1": "file:///m"}, **more,
    }  # fmt: skip


def test_the_page_stands_alone_and_says_it_all() -> None:
    page = ablation_report(record())
    for external in ("http://", "https://", "<script", "src=", "@import"):
        assert external not in page
    assert "prefers-color-scheme: dark" in page
    for told in (
        "x&lt;y",
        "0.4000",
        "+0.1000",
        "+0.0500 … +0.1500",
        "0.0020",
        "never",
        "12, –",
        "10 of 40",
        "25.0%",
        "Machine: a CPU.",
        "<polygon",
        "10.00%",
        "2.00%",
        "x&lt;y (2.5×)",
    ):
        assert told in page, told
    assert "x<y" not in page
    assert "no dev nDCG@10" in ablation_report(record(speed={"variants": {}}))
    early = record()
    early["speed"] |= {"machines": ["a CPU", "a GPU"]}
    early["speed"]["variants"]["naive"] |= {"steps": 10.0}
    for told in ("≤ 10", "seconds are left out: a CPU; a GPU."):
        assert told in ablation_report(early)
    table = text_table(record()).splitlines()
    assert table[2].split() == ["naive", "0.4000", "0.4000", "baseline", "12"]
    assert table[3].endswith("–")


# ── a real one ───────────────────────────────────────────────────────────────────────────────────────────────────

SMALL = [
    "--recipe=demo", "--set=data.sources.0.origin={type: package_docs, packages: [networkx], min_words: 20, part: 0/4}",
    "--set=data.benchmark.0.origin={type: package_docs, packages: [networkx], min_words: 20, part: 0/4}", "--set=data.dev_queries=8",
    "--set=embed.teachers.0.max_tokens={query: 8, passage: 16}", "--set=train.student.layers=1", "--set=train.student.max_tokens=16",
    "--set=train.max_tokens=16", "--set=train.batch_size=4", "--set=train.steps=4", "--set=train.warmup_steps=1",
    "--set=train.eval_every_steps=2", "--set=runtime.checkpoint_every_steps=1", "--set=runtime.device=cpu",
    "--set=ablation={variants: [{name: naive, changes: {mine.method: naive}}, {name: perc}], seeds: [1, 2], resamples: 999}",
]  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    for name in [n for n in os.environ if n.startswith(("NVR_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    yield tmp_path


def test_a_grid_is_killed_taken_up_compared_and_reused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = place / ".nvr" / "artifacts"
    command = [sys.executable, "-m", "nvr_tasks", "ablate", *SMALL]
    with subprocess.Popen(command, cwd=place, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as first:
        deadline = time.monotonic() + 400
        while not list((root / "checkpoints").glob("*/*/done.json")):
            assert first.poll() is None, "it ended before it was killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        first.send_signal(signal.SIGKILL)
    [run] = [p.name for p in (root / "runs").iterdir() if p.is_dir()]
    assert not list((root / "ablation").glob("*/manifest.json"))

    assert cli.main(["ablate", *SMALL]) == 0
    table = capsys.readouterr().out
    assert f"pipeline run {run}" in table, "the killed run is taken up"
    assert "search" in table
    for row in ("naive ", "perc "):
        assert row in table
    store = Store(str(root))
    cells = [store.open(f"{store.root}/cell/{p.name}") for p in (root / "cell").iterdir()]
    told = [store.read_json(a, "cell.json") for a in cells]
    assert len(told) == 4
    assert sum(t["training"]["resumed_from"] > 0 for t in told) == 1
    assert len(list((root / "candidates").iterdir())) == 1
    assert [len(t["curve"]) for t in told] == [2] * 4
    for t in told:
        rows = pd.read_parquet(store.fetch(store.open(t["negatives"])) / "negatives.parquet")
        margins = rows["positive_score"] - rows["negative_scores"].map(lambda s: s[0])
        assert (t["mining"]["pairs"], t["mining"]["own_source"]) == (len(rows), 1)
        assert t["mining"]["mean_margin"] == pytest.approx(margins.mean())
    [made] = (root / "ablation").iterdir()
    result = json.loads((made / "ablation.json").read_text())
    _check_against_the_cells(result, cells, store)

    client = __import__("mlflow").MlflowClient()
    assert client.search_registered_models() == [], "nothing is registered"
    [mlflow_run] = client.search_runs(["1"])
    assert mlflow_run.info.status == "FINISHED"
    assert {f.path for f in client.list_artifacts(mlflow_run.info.run_id, "ablation")} == {
        "ablation/ablation.json", "ablation/report.html",
    }  # fmt: skip
    assert len(client.get_metric_history(mlflow_run.info.run_id, "perc/seed 2/dev_ndcg_at_10")) == 2

    assert cli.main(["ablate", *SMALL, "--pipeline-run=again"]) == 0
    records = [json.loads(p.read_text()) for p in (root / "runs" / "again").glob("*.json")]
    reused = sorted((r["stage"], r["reused"]) for r in records if r["stage"] != "begin")
    assert reused == [(name, True) for name in ("ablation", *["cell"] * 4, "download", "embed", "search")]
    assert cli.main(["ablate", *SMALL, "--dry-run", "--set=ablation.seeds=[2, 3]"]) == 0
    assert capsys.readouterr().out.splitlines()[-5:] == [
        "naive:2  there", "perc:2   there", "naive:3  to do", "perc:3   to do", "2 of 4 cells are there",
    ]  # fmt: skip
    assert cli.main(["cell", *SMALL, "--cell=nave:1"]) == 2
    assert (
        "--cell 'nave:1' is not in the ablation; its cells: naive:1, perc:1, naive:2, perc:2" in capsys.readouterr().err
    )
    assert cli.main(["ablation", *SMALL, "--set=ablation.seeds=[2, 3]"]) == 1
    assert "run `nvr cell` with the same recipe first" in capsys.readouterr().err


def _check_against_the_cells(result: dict[str, Any], cells: list[Any], store: Store) -> None:
    """The table's means are the means of mteb's own scores."""
    by_model = {a.manifest.inputs["model"]: a for a in cells}
    assert [row["name"] for row in result["variants"]] == ["naive", "perc"]
    for row in result["variants"]:
        own = [by_model[result["models"][f"{row['name']}:{seed}"]] for seed in (1, 2)]
        scores = [store.read_json(a, "cell.json")["scores"]["PackageDocs"]["ndcg_at_10"] for a in own]
        assert row["tasks"]["PackageDocs"]["by_seed"] == pytest.approx(scores, abs=1e-5)
        frames = [pd.read_parquet(store.fetch(a) / "per_query.parquet") for a in own]
        values = [f[f.metric == "ndcg_at_10"]["value"].mean() for f in frames]
        assert row["mean"]["mean"] == pytest.approx(sum(values) / 2)
    assert result["speed"]["variants"]["perc"]["seconds_per_step"] > 0
