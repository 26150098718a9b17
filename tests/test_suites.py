"""The table of suites is mteb's own, and a recipe that names one has its tasks."""

import json
import os
from pathlib import Path
from typing import Any

import mteb  # noqa: TID253 - the reference
import pytest

from nvr_tasks import suites
from nvr_tasks.config import Recipe
from nvr_tasks.errors import RecipeError

SUITES = {"mteb-eng-v1": "MTEB(eng, v1)", "mteb-eng-v2": "MTEB(eng, v2)", "nano-beir": "NanoBEIR"}
TABLE = Path(suites.__file__).with_name("mteb.json")


def table_of_mteb() -> dict[str, Any]:
    found: dict[str, Any] = {"suites": {}, "aggregates": {}, "tasks": {}}

    def add(task: Any) -> None:
        if task.metadata.is_aggregate if hasattr(task.metadata, "is_aggregate") else task.is_aggregate:
            found["aggregates"][task.metadata.name] = [t.metadata.name for t in task.metadata.tasks]
            for part in task.metadata.tasks:
                add(part)
            return
        [split] = task.metadata.eval_splits
        data = task.metadata.dataset
        found["tasks"][task.metadata.name] = {"repo": data["path"], "revision": data["revision"], "split": split}

    for name, official in SUITES.items():
        tasks = [t for t in mteb.get_benchmark(official).tasks if t.metadata.type == "Retrieval"]
        found["suites"][name] = sorted(t.metadata.name for t in tasks)
        for task in tasks:
            add(task)
    found["tasks"] = dict(sorted(found["tasks"].items()))
    return found


def test_the_table_is_mteb_s() -> None:
    """To write it anew: NVR_WRITE_DOCS=1 pytest tests/test_suites.py"""
    text = json.dumps(table_of_mteb(), indent=1) + "\n"
    if os.environ.get("NVR_WRITE_DOCS"):
        TABLE.write_text(text, encoding="utf-8")
    assert TABLE.read_text(encoding="utf-8") == text, "run NVR_WRITE_DOCS=1 pytest tests/test_suites.py"


def benchmark(recipe: Recipe) -> dict[str, Any]:
    return {t.task: t for t in recipe.data.benchmark}


def test_the_fifteen_sets_of_the_paper(tiny_recipe: Any) -> None:
    tasks = benchmark(tiny_recipe("data.benchmark=[{suite: mteb-eng-v1}]"))
    assert len(tasks) == 14 + 12
    assert {t.part_of for t in tasks.values()} == {None, "CQADupstackRetrieval"}
    assert sum(t.part_of is not None for t in tasks.values()) == 12
    assert (tasks["MSMARCO"].split, tasks["MSMARCO"].origin.repo) == ("dev", "mteb/msmarco")
    assert tasks["SciFact"].origin.revision == mteb.get_task("SciFact").metadata.dataset["revision"]


def test_a_task_needs_only_its_name(tiny_recipe: Any) -> None:
    tasks = benchmark(tiny_recipe("data.benchmark=[{task: NFCorpus}, {task: AILACasedocs}]"))
    assert tasks["NFCorpus"].origin.repo == "mteb/nfcorpus"
    assert (tasks["AILACasedocs"].origin.type, tasks["AILACasedocs"].origin.task) == ("mteb", "AILACasedocs")


@pytest.mark.parametrize(
    ("benchmark", "told"),
    [
        ("[{suite: mteb-v1}]", "no suite 'mteb-v1'; there are mteb-eng-v1, mteb-eng-v2, nano-beir"),
        ("[{suite: nano-beir, split: test}]", "an entry with `suite` has nothing else, but this one has split"),
        ("[{suite: nano-beir}, {task: NanoNQRetrieval}]", "NanoNQRetrieval appears twice"),
        ("[{task: Mine, official: false}]", "data.benchmark.0.origin: required, but missing"),
    ],
)
def test_what_is_no_benchmark_is_refused(tiny_recipe: Any, benchmark: str, told: str) -> None:
    with pytest.raises(RecipeError) as refusal:
        tiny_recipe(f"data.benchmark={benchmark}")
    assert told in str(refusal.value)


def test_a_suite_is_a_quick_tier_of_another(tiny_recipe: Any) -> None:
    both = "data.benchmark=[{suite: mteb-eng-v1}, {suite: nano-beir}]"
    recipe = tiny_recipe(both, "gate.quick={tasks: [nano-beir], counts: false}", "gate.resamples=999")
    nano = suites.table()["suites"]["nano-beir"]
    assert list(recipe.gate.quick.tasks) == nano
    judged = recipe.gate.judged([t.task for t in recipe.data.benchmark])
    assert len(judged) == 14 + 12
    assert not set(nano) & set(judged)
    forums = tiny_recipe(both, "gate.quick={tasks: [CQADupstackRetrieval]}").gate.quick.tasks
    assert len(forums) == 12
    for task in ("NanoSciFactRetrieval", "SciFakt"):
        with pytest.raises(RecipeError, match="gate.min_per_task names " + task):
            tiny_recipe(both, "gate.quick={tasks: [nano-beir], counts: false}", f"gate.min_per_task={{{task}: 0.1}}")
