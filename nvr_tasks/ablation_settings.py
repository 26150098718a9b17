"""Settings of an ablation: named variants of a recipe, or a grid of them, crossed with seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from nvr_tasks.settings import Closed, Name, refuse_twice

Method = Literal["perc_pos", "margin_pos", "abs", "shifted", "naive", "random"]
Sampling = Literal["top", "sampled", "top1_sampled"]

CHANGEABLE = ("mine", "train")  # sections; what comes before mining is the same for all cells
# What names candidates: every cell selects from the same ones.
SHARED = frozenset(
    {
        "depth", "duplicate_similarity", "query_similarity", "search", "ivf_lists", "ivf_probes", "min_recall",
        "cross_encoders", "late_interaction",
    }
)  # fmt: skip


class Variant(Closed):
    """One row of the table: what it changes in the recipe."""

    name: Name = Field(description="Name of the row.")
    changes: Mapping[str, Any] = Field(
        default_factory=dict,
        description="Setting → value, as with --set: `mine.method: naive`, `train.hard_negatives: 0`. Only settings of mine "
        "and train; none that candidates depend on, which all variants share.",
    )

    @field_validator("changes")
    @classmethod
    def _of_mining_and_training(cls, changes: Mapping[str, Any]) -> Mapping[str, Any]:
        for key in changes:
            section, _, rest = key.partition(".")
            if section not in CHANGEABLE or not rest:
                raise ValueError(
                    f"a variant changes settings of {' and '.join(CHANGEABLE)} (mine.method, train.steps, …), not {key!r}: "
                    "data, teachers and benchmark are the same for all"
                )
            if section == "mine" and rest.partition(".")[0] in SHARED:
                raise ValueError(
                    f"a variant cannot change {key}, which candidates depend on: set it for the whole recipe"
                )
        return changes


class Grid(Closed):
    """Every method, at every threshold, with every sampling, by every teacher."""

    methods: tuple[Method, ...] = Field((), description="Methods of mine.method.")
    thresholds: Mapping[Method, tuple[float, ...]] = Field(
        default_factory=dict, description="Method → its thresholds; a method without has its own default."
    )
    samplings: tuple[Sampling, ...] = Field((), description="Values of mine.sampling; `random` has none.")
    teachers: tuple[Name, ...] = Field((), description="Names of embed.teachers (or of rerankers), each by itself.")

    @model_validator(mode="after")
    def _consistent(self) -> Grid:
        for name in ("methods", "samplings", "teachers"):
            refuse_twice(f"grid.{name}", list(getattr(self, name)))
        if (self.thresholds or self.samplings or self.teachers) and not self.methods:
            raise ValueError("a grid needs methods to cross with thresholds, samplings and teachers")
        strange = sorted(set(self.thresholds) - set(self.methods))
        if strange:
            raise ValueError(f"grid.thresholds are given for {', '.join(strange)}, which grid.methods lacks")
        return self

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The product, named by what differs: `perc_pos-0.95-sampled-minilm`."""
        found = []
        for method in self.methods:
            samplings = self.samplings if method != "random" else ()
            for threshold in self.thresholds.get(method, (None,)):
                for sampling in samplings or (None,):
                    for teacher in self.teachers or (None,):
                        found.append(_of_grid(method, threshold, sampling, teacher, self))
        return tuple(found)


def _of_grid(method: str, threshold: float | None, sampling: str | None, teacher: str | None, grid: Grid) -> Variant:
    name = [method]
    changes: dict[str, Any] = {"mine.method": method}
    if threshold is not None:
        changes["mine.threshold"] = threshold
        name.append(f"{threshold:g}")
    if method == "random":  # it draws from all passages alike
        changes |= {"mine.sampling": "top", "mine.min_score": None}
    elif sampling is not None:
        changes["mine.sampling"] = sampling
    if sampling is not None and len(grid.samplings) > 1:
        name.append(sampling)
    if teacher is not None:
        changes |= {"mine.teacher": None, "mine.teachers": [teacher], "mine.thresholds": {}}
        name += [teacher] if len(grid.teachers) > 1 else []
    return Variant(name="-".join(name), changes=changes)


class Ablation(Closed):
    """`nvr ablate`: which variants are trained and scored, each with every seed, and how they are compared."""

    variants: tuple[Variant, ...] = Field((), description="Rows of the table, in this order; those of `grid` follow.")
    grid: Grid = Grid()
    seeds: tuple[int, ...] = Field(
        (17, 18, 19), min_length=1, description="Seeds of training and of all draws; each variant has a model per seed."
    )
    baseline: Name | None = Field(None, description="Variant that the others are compared with; the first by default.")
    reach: float = Field(
        0.95,
        gt=0,
        le=1,
        description="Faster training: steps until the dev nDCG@10 is at least this share of the best final one.",
    )
    alpha: float = Field(0.05, gt=0, lt=0.5, description="Intervals cover 1 − alpha; level of the tests (Holm).")
    resamples: int = Field(10_000, ge=999, le=1_000_000, description="Resamples of queries and seeds.")
    resample_seed: int = Field(2407, ge=0, le=2**31 - 1, description="Seed of the resampling.")

    @model_validator(mode="after")
    def _consistent(self) -> Ablation:
        names = [v.name for v in self.rows]
        if not names:
            raise ValueError("an ablation needs variants, or a grid of methods")
        refuse_twice("names of the ablation's variants", names)
        refuse_twice("ablation.seeds", [str(s) for s in self.seeds])
        wrong = [s for s in self.seeds if not 0 <= s < 2**31]
        if wrong:
            raise ValueError(f"seed {wrong[0]} is out of range: 0 to {2**31 - 1}")
        if self.baseline is not None and self.baseline not in names:
            raise ValueError(f"baseline is {self.baseline!r}, but the variants are {', '.join(names)}")
        tests = len(names) - 1
        if tests and tests * 2 / (self.resamples + 1) > self.alpha:
            raise ValueError(
                f"resamples {self.resamples} are too few for {tests} comparisons at alpha {self.alpha:g}: ask for "
                f"{int(2 * tests / self.alpha)} or more"
            )
        return self

    @property
    def rows(self) -> tuple[Variant, ...]:
        """All variants, in the order of the table."""
        return (*self.variants, *self.grid.variants)

    @property
    def compared_with(self) -> str:
        """Name of the baseline."""
        return self.baseline or self.rows[0].name


def changed(tree: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's tree with the changes of a variant; a method that comes without a threshold has its own default.

    Raises:
        ValueError: a key leads nowhere.
    """
    if "mine.method" in changes:
        for key in ("threshold", "thresholds"):
            tree["mine"].pop(key, None)
    for key, value in changes.items():
        *parents, last = key.split(".")
        node: Any = tree
        for part in parents:
            node = node[_index(node, part, key)] if isinstance(node, list) else _inner(node, part, key)
        if isinstance(node, list):
            node[_index(node, last, key)] = value
        elif isinstance(node, dict):
            node[last] = value
        else:
            raise ValueError(f"{key} lies below a value, not below a group of settings")
    return tree


def _inner(node: Any, part: str, key: str) -> Any:
    if not isinstance(node, dict):
        raise ValueError(f"{key} lies below a value, not below a group of settings")
    found = node.get(part)
    if found is None:
        found = node[part] = {}
    return found


def _index(node: Sequence[Any], part: str, key: str) -> int:
    if not part.isdecimal() or not part.isascii() or int(part) >= len(node):
        raise ValueError(f"{key}: {part!r} is not an index of a list of {len(node)} (0 to {len(node) - 1})")
    return int(part)
