"""What a challenger must reach to become champion: the recipe's section `gate`. Light to import."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from nvr_tasks.settings import Closed, Name, Score, refuse_twice
from nvr_tasks.suites import members


class Quick(Closed):
    """A quick tier: tasks that are scored first. Whoever falls short on them is held, and the others are not scored.

    It can stop a challenger, never promote one.
    """

    tasks: tuple[Name, ...] = Field(
        min_length=1, description="Tasks of data.benchmark; a suite's name (nano-beir) stands for all of its tasks."
    )
    counts: bool = Field(
        True,
        description="False: these tasks say whether to go on and nothing else (NanoBEIR beside the sets that its queries "
        "are from); true: they are part of the full verdict, too.",
    )
    max_shortfall: float | None = Field(
        0.0,
        ge=0,
        le=1,
        description="Stop when the gain over the champion in the mean over these tasks is shown, at gate.alpha, to miss what "
        "gate.comparison asks of the whole by more than this; null: the champion is not looked at.",
    )
    min_mean: Score | None = Field(None, description="Stop when the mean nDCG@10 over these tasks is below this.")

    @field_validator("tasks", mode="before")
    @classmethod
    def _suites(cls, given: Any) -> Any:
        return members(given) if isinstance(given, list | tuple) else given

    @model_validator(mode="after")
    def _consistent(self) -> Quick:
        refuse_twice("gate.quick.tasks", list(self.tasks))
        if self.max_shortfall is None and self.min_mean is None:
            raise ValueError("a quick tier without max_shortfall and min_mean could stop nothing: give one of both")
        return self


class Gate(Closed):
    """What a challenger must reach to become champion; scores are nDCG@10 (0 to 1), the mean is over tasks."""

    min_mean: float = Field(0.0, ge=0, le=1, description="Floor of the mean over all benchmark tasks.")
    min_per_task: Mapping[Name, Score] = Field(default_factory=dict, description="Floors of single tasks.")
    min_gain_over_base: float = Field(
        0.0, ge=-1, le=1, description="Least gain in the mean over the untrained student."
    )
    comparison: Literal["superiority", "non_inferiority"] = Field(
        "superiority",
        description="superiority: the mean is shown to exceed the champion's by more than min_gain_over_champion; "
        "non_inferiority: it is shown not to fall below the champion's by non_inferiority_margin or more.",
    )
    min_gain_over_champion: float = Field(
        0.0, ge=-1, le=1, description="Superiority: the gain over the champion that must be exceeded."
    )
    non_inferiority_margin: float = Field(
        0.01, gt=0, le=1, description="Non-inferiority: the loss in the mean that must be ruled out."
    )
    alpha: float = Field(
        0.05, gt=0, lt=0.5, description="Chance of promoting a challenger that does not deserve it (one-sided test)."
    )
    power: float = Field(
        0.8, gt=0.5, lt=1, description="Chance of finding a gain as large as the reported detectable difference."
    )
    resamples: int = Field(10_000, ge=999, le=1_000_000, description="Sign flips of a test, resamples of an interval.")
    resample_seed: int = Field(2407, ge=0, le=2**31 - 1, description="Seed of all resampling; fixed, so are verdicts.")
    min_queries: int = Field(20, ge=2, description="Queries that each task must have for a verdict.")
    max_loss_per_task: float = Field(0.02, ge=0, le=1, description="Largest loss against the champion on any task.")
    task_loss: Literal["measured", "significant"] = Field(
        "measured",
        description="measured: no measured loss may exceed max_loss_per_task; significant: only a loss that is shown "
        "to exceed it holds (Holm over tasks), for benchmarks with many small tasks.",
    )
    max_recall_loss: Score | None = Field(
        None, description="Largest loss in mean Recall@100 against the champion; unset: not judged."
    )
    same_dimension: bool = Field(False, description="Refuse vectors of another dimension than the champion's.")
    max_dimension: int | None = Field(None, ge=1, description="Largest embedding dimension.")
    max_model_mb: float | None = Field(None, gt=0, description="Largest model, in MB (10^6 bytes) of its weights.")
    max_index_mb: float | None = Field(
        None, gt=0, description="Largest float32 index of the benchmark's corpora, in MB (10^6 bytes)."
    )
    max_latency_ratio: float | None = Field(
        None,
        gt=0,
        description="Largest p95 latency of encoding one query, as a multiple of the champion's; both are measured in "
        "turns in one process.",
    )
    approval: Literal["never", "always", "unless_superior"] = Field(
        "never",
        description="Who has the last word on a challenger that meets every criterion: nobody else (never), a person "
        "(always), or a person unless it is shown to be better than the champion (unless_superior).",
    )
    quick: Quick | None = Field(None, description="Tasks that are scored first, and may stop it; null: all at once.")
    promote: bool = Field(True, description="False: dry run; the verdict is reached and recorded, no alias moves.")

    @model_validator(mode="after")
    def _one_margin(self) -> Gate:
        if self.comparison == "non_inferiority" and self.min_gain_over_champion:
            raise ValueError(
                f"min_gain_over_champion is {self.min_gain_over_champion}, which comparison: non_inferiority does not look at: "
                "set non_inferiority_margin instead, or comparison: superiority"
            )
        return self

    def check_resamples(self, tasks: int) -> None:
        """Raise ValueError when too few are drawn for a test to show anything: p is at least 1 / (resamples + 1).

        Args:
            tasks: of the benchmark; Holm's correction multiplies the smallest p by their number.
        """
        tests = tasks if self.task_loss == "significant" else 1
        least = tests / (self.resamples + 1)
        if least > self.alpha:
            raise ValueError(
                f"gate.resamples {self.resamples} can show nothing at gate.alpha {self.alpha:g}: no p is below {least:.3g}; ask "
                f"for {math.ceil(tests / self.alpha)} or more"
            )

    def check_tasks(self, benchmark: Sequence[str]) -> None:
        """Raise ValueError when the policy does not fit a benchmark of these tasks."""
        if self.quick is not None:
            unknown = [task for task in self.quick.tasks if task not in benchmark]
            if unknown:
                near = difflib.get_close_matches(unknown[0], benchmark, n=3, cutoff=0.4)
                raise ValueError(
                    f"gate.quick.tasks names {', '.join(unknown)}, which data.benchmark lacks; "
                    + (f"nearest: {', '.join(near)}" if near else f"its tasks: {', '.join(benchmark)}")
                )
            if set(self.quick.tasks) == set(benchmark):
                raise ValueError(
                    "gate.quick.tasks names every task of data.benchmark, so nothing would be left to score: name fewer, or "
                    "add tasks to data.benchmark"
                )
        judged = self.judged(benchmark)
        self.check_resamples(len(judged))
        unknown = sorted(set(self.min_per_task) - set(judged))
        apart = [task for task in unknown if task in benchmark]
        if apart:
            raise ValueError(
                f"gate.min_per_task names {', '.join(apart)}, which gate.quick leaves out of the verdict (counts: false)"
            )
        if unknown:
            raise ValueError(
                f"gate.min_per_task names {', '.join(unknown)}, which data.benchmark lacks; its tasks: {', '.join(judged)}"
            )

    def judged(self, benchmark: Iterable[str]) -> list[str]:
        """The tasks of a benchmark that the full verdict is about."""
        apart = () if self.quick is None or self.quick.counts else self.quick.tasks
        return [task for task in benchmark if task not in apart]

    @property
    def margin(self) -> float:
        """The difference in the mean that the challenger must be shown to exceed."""
        return self.min_gain_over_champion if self.comparison == "superiority" else -self.non_inferiority_margin
