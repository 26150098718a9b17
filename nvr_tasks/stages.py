"""The one table of stages. The CLI, the DAG, the README and the tests are loops over it. Light to import."""

from __future__ import annotations

from dataclasses import dataclass

RESULT_MARK = "NVR_RESULT "  # starts the one stdout line that carries a stage's result to an orchestrator


@dataclass(frozen=True)
class Resources:
    """What one task of a stage asks of the machine that runs it."""

    cpu: float = 1
    memory_gb: float = 4
    gpu: int = 0


@dataclass(frozen=True)
class Stage:
    """One step of the workflow = one module `nvr_tasks.<name>` = one Airflow task."""

    name: str
    summary: str
    needs: tuple[str, ...]  # roles of the artefacts it reads
    makes: tuple[str, ...]  # roles of the artefacts it writes
    resources: Resources
    timeout_s: int  # of one try
    cached: bool = True  # False: acts on the registry or decides, so it always runs

    @property
    def module(self) -> str:
        """Import path of the module whose `build` does the work."""
        return f"nvr_tasks.{self.name}"


HOUR = 3600

STAGES: tuple[Stage, ...] = (
    Stage(
        "download",
        "fetch, validate, de-duplicate and decontaminate the training data; mirror the benchmark",
        needs=(),
        makes=("dataset", "benchmark"),
        resources=Resources(cpu=2, memory_gb=8),
        timeout_s=6 * HOUR,
    ),
    Stage(
        "embed",
        "embed every distinct query and passage with each teacher, shard by shard",
        needs=("dataset",),
        makes=("embeddings",),
        resources=Resources(cpu=4, memory_gb=16, gpu=1),
        timeout_s=24 * HOUR,
    ),
    Stage(
        "mine",
        "search candidates exactly and keep the positive-aware hard negatives",
        needs=("dataset", "embeddings"),
        makes=("candidates", "negatives"),
        resources=Resources(cpu=8, memory_gb=32, gpu=1),
        timeout_s=12 * HOUR,
    ),
    Stage(
        "train",
        "fine-tune the student with InfoNCE over in-batch and mined negatives",
        needs=("dataset", "negatives"),
        makes=("model",),
        resources=Resources(cpu=8, memory_gb=32, gpu=1),
        timeout_s=96 * HOUR,
    ),
    Stage(
        "register",
        "register the model in MLflow with its lineage, as `challenger`",
        needs=("model",),
        makes=("registration",),
        resources=Resources(cpu=1, memory_gb=8),
        timeout_s=HOUR,
        cached=False,
    ),
    Stage(
        "screen",
        "score the quick tier of the benchmark, if there is one, and say whether the rest is worth scoring",
        needs=("benchmark", "model", "registration"),
        makes=("screening",),
        resources=Resources(cpu=8, memory_gb=32, gpu=1),
        timeout_s=24 * HOUR,
        cached=False,
    ),
    Stage(
        "score",
        "score challenger, untrained base and champion with mteb on the mirrored benchmark, task by task",
        needs=("benchmark", "model", "registration", "screening"),
        makes=("scores",),
        resources=Resources(cpu=8, memory_gb=32, gpu=1),
        timeout_s=24 * HOUR,
    ),
    Stage(
        "evaluate",
        "put the scores of all tasks together, per model",
        needs=("benchmark", "model", "registration", "screening", "scores"),
        makes=("evaluation", "evaluation_base", "evaluation_champion"),
        resources=Resources(cpu=1, memory_gb=8),
        timeout_s=24 * HOUR,
    ),
    Stage(
        "gate",
        "decide from the scores whether the challenger has earned promotion",
        needs=("registration", "screening", "evaluation", "evaluation_base", "evaluation_champion"),
        makes=("decision",),
        resources=Resources(cpu=1, memory_gb=4),
        timeout_s=HOUR,
        cached=False,
    ),
    Stage(
        "promote",
        "move the alias `champion` if the verdict is promote and the champion is still the one compared",
        needs=("decision",),
        makes=("promotion",),
        resources=Resources(cpu=1, memory_gb=4),
        timeout_s=HOUR,
        cached=False,
    ),
)

# Stages of other workflows than retraining.
ON_DEMAND: tuple[Stage, ...] = (
    Stage(
        "sources",
        "say whether the sources of the training data or of the benchmark have changed",
        needs=(),
        makes=(),
        resources=Resources(cpu=1, memory_gb=2),
        timeout_s=HOUR,
        cached=False,
    ),
    Stage(
        "mirror",
        "mirror the benchmark alone",
        needs=(),
        makes=("benchmark",),
        resources=Resources(cpu=1, memory_gb=8),
        timeout_s=6 * HOUR,
    ),
    Stage(
        "index",
        "embed the serving corpus with the champion into a faiss index and check its recall",
        needs=("dataset",),
        makes=("index",),
        resources=Resources(cpu=8, memory_gb=32, gpu=1),
        timeout_s=24 * HOUR,
    ),
    Stage(
        "swap",
        "point serving at the index, unless the champion has moved meanwhile",
        needs=("index",),
        makes=("pointer",),
        resources=Resources(cpu=1, memory_gb=2),
        timeout_s=HOUR,
        cached=False,
    ),
    Stage(
        "search",
        "search the candidates that all cells of an ablation select from, by every teacher of its variants",
        needs=("dataset", "embeddings"),
        makes=("candidates",),
        resources=Resources(cpu=8, memory_gb=32, gpu=1),
        timeout_s=12 * HOUR,
    ),
    Stage(
        "cell",
        "mine, train and score one cell of an ablation: a variant with a seed",
        needs=("dataset", "candidates", "benchmark"),
        makes=("cell",),
        resources=Resources(cpu=8, memory_gb=32, gpu=1),
        timeout_s=96 * HOUR,
    ),
    Stage(
        "ablation",
        "compare the variants of an ablation: scores with intervals, speed of training, report",
        needs=("cell",),
        makes=("ablation",),
        resources=Resources(cpu=2, memory_gb=8),
        timeout_s=HOUR,
    ),
)

# The first run has no champion to compare with, and not every recipe has a quick tier.
OPTIONAL_ROLES = frozenset({"evaluation_champion", "screening"})


def stage(name: str) -> Stage:
    """The row with this name. Raises KeyError."""
    return next(s for s in (*STAGES, *ON_DEMAND) if s.name == name)


def maker(role: str) -> Stage:
    """The stage that makes artefacts of this role. Raises KeyError."""
    for row in (*STAGES, *ON_DEMAND):
        if role in row.makes:
            return row
    raise KeyError(role)


def kind_of(role: str) -> str:
    """The kind of artefact that plays a role: evaluation_base → evaluation."""
    return role.partition("_")[0]
