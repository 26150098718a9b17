"""Settings of embedding and mining: the teachers, and what is a hard negative; and of the audit of what was mined."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator

from nvr_tasks.ablation_settings import Method, Sampling
from nvr_tasks.settings import Closed, CrossEncoder, LateInteractionTeacher, Name, Reranker, Teacher, refuse_twice


class Embed(Closed):
    """The teachers at hand; those that mining uses embed every distinct query and passage."""

    teachers: tuple[Teacher, ...] = Field(min_length=1, description="Teachers that mine.teacher(s) may name.")

    @model_validator(mode="after")
    def _unique(self) -> Embed:
        refuse_twice("embed.teachers.name", [t.name for t in self.teachers])
        return self


def _default_threshold(method: str) -> float | None:
    return {"perc_pos": 0.95, "margin_pos": 0.05, "abs": 0.7}.get(method)


class Mine(Closed):
    """arXiv:2407.15831 §3.1: a candidate is kept only below a ceiling that the positive's score sets."""

    teacher: Name | None = Field(None, description="Which of embed.teachers scores; the first by default.")
    teachers: tuple[Name, ...] = Field(
        (),
        description="Instead of `teacher`: names of embed.teachers, mine.cross_encoders and mine.late_interaction; several make "
        "an ensemble, in this order.",
    )
    ensemble: Literal["cross_sample", "intra_sample", "intra_sample_dedup"] = Field(
        "intra_sample",
        description="Several teachers (§3.2). cross_sample: one, drawn per (query, positive), gives all negatives; "
        "intra_sample: they take turns, each giving its best (a passage that two choose is there twice, and counts twice "
        "in the loss); intra_sample_dedup: each its best that is not there yet.",
    )
    cross_encoders: tuple[CrossEncoder, ...] = Field((), description="Rerankers that `teachers` may name.")
    late_interaction: tuple[LateInteractionTeacher, ...] = Field(
        (), description="Late-interaction (MaxSim) models that `teachers` may name; they rescore, as cross-encoders do."
    )
    method: Method = Field(
        "perc_pos",
        description="perc_pos: s < s⁺·threshold; margin_pos: s < s⁺ − threshold; abs: s < threshold; "
        "shifted: drop the `shift` best; naive: keep all; random: drawn from the whole corpus, whatever the score.",
    )
    threshold: float | None = Field(
        None,
        ge=-1,
        le=1,
        description="perc_pos 0.95, margin_pos 0.05, abs 0.7 by default; not for shifted, naive and random.",
    )
    thresholds: Mapping[Name, float] = Field(
        default_factory=dict,
        description="Thresholds of single teachers, by name; the others have `threshold`. Those of a reranker refer to "
        "its scale.",
    )
    min_score: float | None = Field(
        None, description="Candidates that the teacher scores lower are no negatives; null: no bound."
    )
    shift: int = Field(10, ge=0, le=10000, description="shifted: ranks dropped from the top.")
    num_negatives: int = Field(4, ge=1, le=64, description="Hard negatives kept per (query, positive).")
    sampling: Sampling = Field(
        "top",
        description="top: the best n; sampled: n drawn from the best `sample_from`; top1_sampled: the best + n−1 drawn.",
    )
    sample_from: int = Field(10, ge=1, le=1000, description="Candidates that sampling draws from.")
    temperature: float = Field(1.0, gt=0, le=100, description="Softmax temperature of the draw, over teacher scores.")
    positive_policy: Literal["min", "max", "each"] = Field(
        "each", description="Several positives: ceiling of the lowest, of the highest, or one row per positive."
    )
    depth: int = Field(100, ge=1, le=10000, description="Scored candidates stored per query for later re-selection.")
    search: Literal["exact", "faiss_ivf"] = Field(
        "exact",
        description="faiss_ivf: candidates are those that an index proposes; for corpora too large to scan. Not for random.",
    )
    ivf_lists: int | None = Field(None, ge=1, description="faiss_ivf: cells of the index; 4·√(passages) by default.")
    ivf_probes: int = Field(32, ge=1, description="faiss_ivf: cells looked into per query.")
    min_recall: float = Field(
        0.95,
        ge=0,
        le=1,
        description="faiss_ivf: share of the true candidates that must be found, measured; less is an error.",
    )
    duplicate_similarity: float | None = Field(
        0.98,
        gt=0,
        le=1,
        description="Passages whose teacher cosine with a relevant passage is at least this are never mined; null: off.",
    )
    query_similarity: float | None = Field(
        0.98,
        gt=0,
        le=1,
        description="Passages relevant to a query of any split whose teacher cosine is at least this are never mined; null: off.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Mine:
        given = {"threshold": self.threshold, **{f"thresholds.{name}": t for name, t in self.thresholds.items()}}
        for name, threshold in given.items():
            if threshold is None:
                continue
            if _default_threshold(self.method) is None:
                raise ValueError(f"{name} {threshold} has no meaning for method {self.method}; remove it")
            if self.method == "perc_pos" and not 0 < threshold <= 1:
                raise ValueError(f"{name} {threshold} is out of range for perc_pos: 0 < threshold ≤ 1")
            if self.method == "margin_pos" and threshold < 0:
                bound = " ≤ 1" if name == "threshold" else ""  # logits have no bounds
                raise ValueError(f"{name} {threshold} is out of range for margin_pos: 0 ≤ threshold{bound}")
        if self.method == "random" and (self.sampling != "top" or self.min_score is not None):
            raise ValueError("method random draws from all passages alike: leave sampling at top and min_score at null")
        self._check_teachers()
        if self.sampling != "top" and self.sample_from < self.num_negatives:
            raise ValueError(f"sample_from {self.sample_from} must be at least num_negatives {self.num_negatives}")
        return self

    def _check_teachers(self) -> None:
        if self.teacher is not None and self.teachers:
            raise ValueError(
                f"teacher is {self.teacher!r} and teachers are {', '.join(self.teachers)}: give one of both"
            )
        refuse_twice("mine.teachers", list(self.teachers))
        refuse_twice("names of mine.cross_encoders and mine.late_interaction", [r.name for r in self.rerankers])
        for reranker in self.rerankers:
            if reranker.depth > self.depth:
                raise ValueError(
                    f"{reranker.kind} {reranker.name} is to rescore {reranker.depth} candidates, but depth is only {self.depth}"
                )
        if len(self.teachers) > 1:
            if self.method == "random":
                raise ValueError("method random looks at no teacher's scores: name one teacher, not an ensemble")
            if self.ensemble != "cross_sample":
                if self.sampling != "top":
                    raise ValueError(f"{self.ensemble} takes the best of each teacher: sampling must be top")
                if self.num_negatives < len(self.teachers):
                    raise ValueError(
                        f"{self.ensemble} takes one negative from each of {len(self.teachers)} teachers: num_negatives "
                        f"{self.num_negatives} is too few; ask for at least {len(self.teachers)}, or use cross_sample"
                    )

    @property
    def rerankers(self) -> tuple[Reranker, ...]:
        """All that rescore what an embedding teacher found."""
        return (*self.cross_encoders, *self.late_interaction)

    @property
    def resolved_threshold(self) -> float | None:
        """The threshold in force: the recipe's, or the paper's best setting of the method."""
        return self.threshold if self.threshold is not None else _default_threshold(self.method)

    def threshold_of(self, teacher: str) -> float | None:
        """The threshold in force for a teacher's scores."""
        return self.thresholds.get(teacher, self.resolved_threshold)


class Audit(Closed):
    """`nvr audit`: what share of mined negatives is really relevant. None of it touches what is mined."""

    hidden_share: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="Part of each query's judgements that is hidden; queries with one positive take no part.",
    )
    queries: int = Field(5000, ge=1, description="Queries whose judgements are hidden, at most; chosen by hash.")
    copies: int = Field(1000, ge=0, description="Copies of positives in other words that are planted; 0: none.")
    judged_pairs: int = Field(
        200, ge=1, description="Pairs per method that a language model judges, if NVR_JUDGE_URL names one."
    )
    judge_calls: int = Field(2500, ge=0, description="Most requests to the judge, retries included.")
    judge_tokens: int = Field(2_500_000, ge=0, description="Most tokens of its prompts and answers.")
