"""The typed form that Airflow shows before a run, and what its answers mean to a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from airflow.sdk import Param

from nvr_tasks.config import Mine, shipped_recipes

AS_IN_RECIPE = "as in the recipe"
METHODS: tuple[str, ...] = get_args(Mine.model_fields["method"].annotation)


def form(default_recipe: str) -> dict[str, Param]:
    """The fields of the form; Airflow refuses a value that does not fit (REST: 400)."""
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


def unknown(params: Mapping[str, Any]) -> list[str]:
    """Answers to questions that the form does not ask; Airflow takes them from REST and the command line as they are."""
    return sorted(set(params) - set(form("")))


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
