"""Positive-aware hard-negative mining (arXiv:2407.15831 §3), exact: arrays in, arrays out.

`mine` searches and selects in one call. `search_candidates` stores the best passages of every query without a
ceiling, and `reselect` picks negatives from them under any spec, with the very result that `mine` would give.
`combine` makes one result of several teachers', `select_together` does so from their stored candidates.
"""

from nvr_tasks.mining.api import mine
from nvr_tasks.mining.approximate import Approximate
from nvr_tasks.mining.candidates import Candidates, reselect, search_candidates
from nvr_tasks.mining.ensemble import EnsembleResult, combine, select_together
from nvr_tasks.mining.result import REASONS, MiningResult
from nvr_tasks.mining.spec import MiningSpec

__all__ = [
    "REASONS",
    "Approximate",
    "Candidates",
    "EnsembleResult",
    "MiningResult",
    "MiningSpec",
    "combine",
    "mine",
    "reselect",
    "search_candidates",
    "select_together",
]
