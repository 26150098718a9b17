"""How sure a share is that was counted on a sample: Wilson's interval, and the same for trials that come in clusters.

Negatives of one query are no independent trials (a query with many unlabelled positives has many of them at once), so
counting them as such gives intervals that are too narrow. The sample is shrunk to the number of independent trials that
would vary as much (L. Kish's design effect), and that goes into Wilson's interval, which of the common choices keeps its
promise best in clustered samples (C. Franco, R. Little, T. Louis, E. Slud 2019: Comparative study of confidence intervals
for proportions in complex sample surveys).

Shapes: C clusters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nvr_tasks.mining.arrays import Ints

Z95 = 1.959963984540054  # of a two-sided 95 % interval


@dataclass(frozen=True)
class Share:
    """A counted share and its 95 % interval; (0, 1) without trials."""

    hits: int
    trials: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """hits / trials; NaN without trials."""
        return self.hits / self.trials if self.trials else float("nan")

    def __str__(self) -> str:
        return f"{self.value:.2%} ({self.low:.2%} to {self.high:.2%})" if self.trials else "–"


def wilson(successes: float, trials: float, z: float = Z95) -> tuple[float, float]:
    """Wilson's interval of a proportion (95 % by default); (0, 1) without trials.

    E. B. Wilson (1927): Probable inference, the law of succession, and statistical inference.
    """
    if trials <= 0:
        return 0.0, 1.0
    share = successes / trials
    middle = share + z * z / (2 * trials)
    reach = z * np.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return float(max(0.0, (middle - reach) / scale)), float(min(1.0, (middle + reach) / scale))


def clustered(hits_C: Ints, trials_C: Ints, z: float = Z95) -> Share:
    """The share of all hits in all trials, with an interval that knows which trials belong together.

    Args:
        hits_C, trials_C: of each cluster; those without trials say nothing.
        z: of the interval.
    """
    used = trials_C > 0
    hits, trials = hits_C[used].astype(np.float64), trials_C[used].astype(np.float64)
    total, count = trials.sum(), len(trials)
    if not count:
        return Share(0, 0, 0.0, 1.0)
    share = float(hits.sum() / total)
    effective = total
    if share in (0.0, 1.0):
        effective = float(count)  # no variance to see: at worst all trials of a cluster are one
    elif count > 1:
        # Variance of a ratio of sums over clusters, linearised.
        variance = count / (count - 1) * float(((hits - share * trials) ** 2).sum()) / total**2
        effective = float(np.clip(share * (1 - share) / variance, 1.0, total)) if variance > 0 else total
    else:
        effective = 1.0
    low, high = wilson(share * effective, effective, z)
    return Share(int(hits.sum()), int(total), low, high)
