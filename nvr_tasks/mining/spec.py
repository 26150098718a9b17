"""What to mine: one method of the paper, its setting, and how negatives are drawn from what passes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from nvr_tasks.errors import NvrError

Method = Literal["perc_pos", "margin_pos", "abs", "shifted", "naive", "random"]
Sampling = Literal["top", "sampled", "top1_sampled"]
PositivePolicy = Literal["min", "max", "each"]

# Best settings of arXiv:2407.15831 §4.2 (Table 3).
DEFAULT_THRESHOLDS = {"perc_pos": 0.95, "margin_pos": 0.05, "abs": 0.7}


@dataclass(frozen=True)
class MiningSpec:
    """How the negatives of a row are chosen. A row is a query, or a (query, positive) pair under policy `each`.

    Attributes:
        method: the rule that a candidate's score s must meet, s⁺ being the positive's score.
            perc_pos: s < s⁺ − |s⁺|·(1 − threshold); margin_pos: s < s⁺ − threshold; abs: s < threshold;
            shifted: not among the `shift` best; naive: any; random: any, drawn uniformly without regard to the score.
        threshold: of perc_pos (0 < t ≤ 1), margin_pos (t ≥ 0) or abs; None: the paper's best.
        shift: ranks that `shifted` drops; the other methods ignore it.
        num_negatives: negatives per row, K.
        sampling: top: the K best; sampled: K drawn from the `sample_from` best without replacement, with softmax of
            score / temperature; top1_sampled: the best one, and K − 1 drawn from the other `sample_from` − 1.
        sample_from: candidates that are drawn from; `top` ignores it.
        temperature: of the softmax. At 1.0 and cosine scores the draw is nearly uniform.
        min_score: candidates below it are dropped from the best ones (the gap is not filled: what follows is lower).
        positive_policy: several positives of a query: one row with the ceiling of the lowest (min) or of the highest
            (max) of their scores, or one row per positive (each).
    """

    method: Method = "perc_pos"
    threshold: float | None = None
    shift: int = 10
    num_negatives: int = 4
    sampling: Sampling = "top"
    sample_from: int = 10
    temperature: float = 1.0
    min_score: float | None = None
    positive_policy: PositivePolicy = "min"

    def __post_init__(self) -> None:
        """Refuse what cannot be meant. Raises NvrError with the value and what is allowed."""
        _one_of("method", self.method, get_args(Method))
        _one_of("sampling", self.sampling, get_args(Sampling))
        _one_of("positive_policy", self.positive_policy, get_args(PositivePolicy))
        _at_least("num_negatives", self.num_negatives, 1)
        _at_least("shift", self.shift, 0)
        _at_least("sample_from", self.sample_from, 1)
        if self.sampling != "top" and self.sample_from < self.num_negatives:
            raise NvrError(f"sample_from {self.sample_from} is less than num_negatives {self.num_negatives}: raise it")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise NvrError(f"temperature {self.temperature} is not allowed: give a finite number > 0")
        if self.min_score is not None and not math.isfinite(self.min_score):
            raise NvrError(f"min_score {self.min_score} is not allowed: give a finite number, or None for no bound")
        self._check_threshold()
        if self.method == "random" and (self.sampling != "top" or self.min_score is not None):
            raise NvrError("method random draws from all passages alike: leave sampling at 'top' and min_score at None")

    def _check_threshold(self) -> None:
        t = self.threshold
        if t is None:
            return
        if self.method not in DEFAULT_THRESHOLDS:
            raise NvrError(f"threshold {t} has no meaning for method {self.method}: leave it at None")
        allowed = {
            "perc_pos": (0 < t <= 1, "0 < threshold ≤ 1"),
            "margin_pos": (0 <= t < math.inf, "0 ≤ threshold"),
            "abs": (math.isfinite(t), "a finite number"),
        }
        fine, rule = allowed[self.method]
        if not fine:
            raise NvrError(f"threshold {t} is out of range for {self.method}: {rule}")

    @property
    def resolved_threshold(self) -> float:
        """The threshold in force; NaN for methods without one."""
        return self.threshold if self.threshold is not None else DEFAULT_THRESHOLDS.get(self.method, math.nan)

    @property
    def pool(self) -> int:
        """Best candidates below the ceiling that negatives are taken from, P."""
        return self.num_negatives if self.sampling == "top" else self.sample_from

    @property
    def dropped_ranks(self) -> int:
        """Best ranks that are dropped whatever their score."""
        return self.shift if self.method == "shifted" else 0

    @property
    def depth(self) -> int:
        """Best candidates below the ceiling that a search must find per row."""
        return self.pool + self.dropped_ranks


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise NvrError(f"{name} {value!r} is unknown: one of {', '.join(allowed)}")


def _at_least(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise NvrError(f"{name} {value!r} is not allowed: give a whole number ≥ {least}")
