"""The typed form that Airflow shows before a run, and what its answers mean to a recipe."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from airflow.sdk import Param

from nvr_tasks.mine_settings import Mine
from nvr_tasks.recipe_files import shipped_recipes
from nvr_tasks.suites import table

AS_IN_RECIPE = "as in the recipe"
METHODS: tuple[str, ...] = get_args(Mine.model_fields["method"].annotation)
SAMPLINGS: tuple[str, ...] = get_args(Mine.model_fields["sampling"].annotation)
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


def _of_recipe(default_recipe: str) -> dict[str, Param]:
    """The fields that every form has; Airflow refuses a value that does not fit (REST: 400)."""
    return {
        "recipe": Param(
            default_recipe,
            type="string",
            minLength=1,
            maxLength=1024,
            pattern=r"^\S(.*\S)?$",
            examples=shipped_recipes(),
            title="Recipe",
            description="A recipe that comes with NVR, or the path of a YAML file that the task environment can read.",
            section="Recipe",
        ),
        "overrides": Param(
            [],
            type="array",
            items={"type": "string", "pattern": r"^\s*[A-Za-z_][\w-]*(\.[\w-]+)*\s*="},
            maxItems=100,
            title="Overrides",
            description="Settings of the recipe to change, one `key=value` per line, e.g. `train.steps=100` "
            "(`nvr config --recipe …` lists the keys). They win over the fields below.",
            section="Recipe",
        ),
    }


def form(default_recipe: str) -> dict[str, Param]:
    """The form of the retraining DAG."""
    return {
        **_of_recipe(default_recipe),
        "teacher": Param(
            None,
            type=["null", "string"],
            pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
            title="Teacher",
            description="Name of the recipe's teacher whose scores decide what is a hard negative; empty: as in "
            "the recipe.",
            section="Mining",
        ),
        "mining_method": Param(
            AS_IN_RECIPE,
            type="string",
            enum=[AS_IN_RECIPE, *METHODS],
            title="Mining method",
            description="How the ceiling for hard negatives is set (arXiv:2407.15831 §3.1). Another method than the "
            "recipe's starts from its own default threshold.",
            section="Mining",
        ),
        "mining_threshold": Param(
            None,
            type=["null", "number"],
            minimum=-1,
            maximum=1,
            title="Threshold",
            description="Of the method (perc_pos 0.95, margin_pos 0.05, abs 0.7 in the paper); empty: the default.",
            section="Mining",
        ),
        "promote": Param(
            True,
            type="boolean",
            title="Promote",
            description="Off = dry run: the verdict is reached and recorded, but the champion stays where it is. "
            "On does not override a recipe that says `gate.promote: false`; an override `gate.promote=true` does.",
            section="Gate",
        ),
    }


def overrides(params: Mapping[str, Any]) -> list[str]:
    """The form's answers as `--set` overrides; free overrides come last, so they win."""
    found = []
    if params["teacher"]:
        found.append(f"mine.teacher={params['teacher']}")
    if params["mining_method"] != AS_IN_RECIPE:
        # The recipe's threshold belongs to the recipe's method.
        found += [f"mine.method={params['mining_method']}", "mine.threshold=null"]
    if params["mining_threshold"] is not None:
        found.append(f"mine.threshold={params['mining_threshold']}")
    if not params["promote"]:
        found.append("gate.promote=false")
    return [*found, *params["overrides"]]


def rollback_form(default_recipe: str) -> dict[str, Param]:
    """The form of the rollback DAG."""
    return {
        "recipe": _of_recipe(default_recipe)["recipe"],
        "to": Param(
            "previous",
            type="string",
            pattern=r"^(previous|[1-9][0-9]*)$",
            title="To",
            description="`previous`, or the number of a version that passed a gate.",
        ),
        "reason": Param(
            type="string",
            minLength=3,
            maxLength=2000,
            pattern=r"\S",
            title="Reason",
            description="What is wrong with the champion; goes on record.",
        ),
        "force": Param(False, type="boolean", title="Force", description="Also to a version that never passed a gate."),
    }


def evaluation_form(default_recipe: str) -> dict[str, Param]:
    """The form of the evaluation DAG."""
    return {
        **_of_recipe(default_recipe),
        "model": Param(
            "champion",
            type="string",
            pattern=r"^(champion|base|teacher|models:/[^/@\s]+(@[^/@\s]+|/\d+)|[\w.-]+/[\w.-]+@[0-9a-f]{40})$",
            title="Model",
            description="`champion`, `base` or `teacher` of the recipe; `models:/NAME@ALIAS` or `models:/NAME/VERSION` of the "
            "registry; or `OWNER/NAME@COMMIT` of the Hugging Face Hub (the full commit hash: branches move).",
            section="What",
        ),
        "suite": Param(
            None,
            type=["null", "string"],
            enum=[None, *table()["suites"]],
            title="Suite",
            description="All Retrieval tasks of this mteb benchmark; empty: those of the recipe, or the tasks below.",
            section="What",
        ),
        "tasks": Param(
            [],
            type="array",
            items={"type": "string", "pattern": r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"},
            maxItems=200,
            title="Tasks",
            description="Names of mteb Retrieval tasks, one per line, e.g. `SciFact`.",
            section="What",
        ),
    }


def evaluation_overrides(params: Mapping[str, Any]) -> list[str]:
    """Suite and tasks take the place of the recipe's benchmark; its gate, which may name the old one's tasks, goes with it."""
    entries = [f"{{suite: {params['suite']}}}"] if params["suite"] else []
    entries += [f"{{task: {task}}}" for task in params["tasks"]]
    found = [f"data.benchmark=[{', '.join(entries)}]", "gate={}"] if entries else []
    return [*found, *params["overrides"]]


def ablation_form(default_recipe: str) -> dict[str, Param]:
    """The form of the ablation DAG."""

    def several(title: str, description: str, items: dict[str, Any], section: str = "Grid") -> Param:
        return Param(
            [],
            type="array",
            items=items,
            uniqueItems=True,
            maxItems=50,
            title=title,
            description=description,
            section=section,
        )

    return {
        **_of_recipe(default_recipe),
        "methods": several(
            "Methods",
            "Mining methods (arXiv:2407.15831 §3.1), each a variant. Empty: the variants of the recipe (`ablation`).",
            {"type": "string", "enum": list(METHODS)},
        ),
        "thresholds": several(
            "Thresholds",
            "`METHOD=VALUE`, one per line, e.g. `perc_pos=0.9`; a method without has the paper's best setting.",
            {"type": "string", "pattern": r"^(perc_pos|margin_pos|abs)\s*=\s*-?\d+(\.\d+)?$"},
        ),
        "samplings": several(
            "Samplings",
            "Which of the eligible passages are taken; empty: as in the recipe.",
            {"type": "string", "enum": list(SAMPLINGS)},
        ),
        "teachers": several(
            "Teachers",
            "Names of the recipe's teachers, each by itself; empty: as in the recipe.",
            {"type": "string", "pattern": NAME},
        ),
        "seeds": several(
            "Seeds",
            "Each variant is trained with each of them; empty: those of the recipe, or 17, 18 and 19.",
            {"type": "integer", "minimum": 0, "maximum": 2**31 - 1},
            section="Comparison",
        ),
        "baseline": Param(
            None,
            type=["null", "string"],
            pattern=NAME,
            title="Baseline",
            description="Variant that the others are compared with; empty: as in the recipe, or the first one.",
            section="Comparison",
        ),
    }


def ablation_overrides(params: Mapping[str, Any]) -> list[str]:
    """A grid takes the place of the recipe's variants."""
    found = []
    if any(params[name] for name in ("methods", "thresholds", "samplings", "teachers")):
        thresholds: dict[str, list[float]] = {}
        for entry in params["thresholds"]:
            method, _, value = entry.partition("=")
            thresholds.setdefault(method.strip(), []).append(float(value))
        grid = {"methods": params["methods"], "thresholds": thresholds}
        grid |= {name: params[name] for name in ("samplings", "teachers")}
        found += ["ablation.variants=[]", "ablation.baseline=null", f"ablation.grid={json.dumps(grid)}"]
    if params["seeds"]:
        found.append(f"ablation.seeds={json.dumps(params['seeds'])}")
    if params["baseline"]:
        found.append(f"ablation.baseline={params['baseline']}")
    return [*found, *params["overrides"]]


@dataclass(frozen=True)
class Form:
    """A DAG's form, and what its answers mean to the recipe (`--set` overrides)."""

    fields: Callable[[str], dict[str, Param]]
    overrides: Callable[[Mapping[str, Any]], list[str]]

    @property
    def names(self) -> list[str]:
        """The questions."""
        return sorted(self.fields(""))

    def unknown(self, params: Mapping[str, Any]) -> list[str]:
        """Answers to questions that the form does not ask; Airflow takes them from REST and the command line as they are."""
        return sorted(set(params) - set(self.fields("")))


FORMS: Mapping[str, Form] = {
    "retrain": Form(form, overrides),
    "evaluate": Form(evaluation_form, evaluation_overrides),
    "ablation": Form(ablation_form, ablation_overrides),
    "rollback": Form(rollback_form, lambda _: []),
    "sources": Form(lambda default_recipe: {"recipe": _of_recipe(default_recipe)["recipe"]}, lambda _: []),
    "recipe": Form(_of_recipe, lambda params: list(params["overrides"])),
}
