"""How far an approximate score can be from the exact one: the proof behind a cheap first pass.

A first pass multiplies rounded vectors: x̂ ≈ x, and ŷ ≈ y − μ for a fixed vector μ near the corpus mean, since many
encoders put all texts into one narrow cone and x·y = x·(y − μ) + x·μ, where the last term is one number per query.
With everything but the product itself measured in float64,

    |x·(y − μ) − fl(x̂·ŷ)| ≤ ‖x‖ ‖(y − μ) − ŷ‖ + ‖x − x̂‖ ‖ŷ‖ + γ ‖x̂‖ ‖ŷ‖ + (underflow)

by Cauchy-Schwarz. γ bounds the rounding of the sum, in any order (Higham, Accuracy and Stability of Numerical
Algorithms, §3.1); products of int8 vectors are exact integers and have none. A result that is rounded to bfloat16 is
off by a further `relative` part of itself.

Shapes: Q queries, C columns (corpus rows of a block), D dimensions.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch  # noqa: TID253 - this package owns the search; nothing light imports it

from nvr_tasks.errors import NvrError
from nvr_tasks.mining.arrays import Floats, Ints, Vectors
from nvr_tasks.mining.corpus import NotFiniteError
from nvr_tasks.mining.exact import float32_error, underflow_error

Screen = Literal["auto", "float32", "bfloat16", "int8"]
LARGEST_PRODUCT = 1e37  # of norms: beyond it, float32 products may overflow
WORTH_IT = 1.3  # a coarser type must be this much faster than float32 to be taken by itself
LOOK_AGAIN = 20.0  # what a second look at a score costs, measured in scores of a float32 product
BLUR = 0.6  # largest error of a first pass, in standard deviations of the scores
SMALLEST_INT8_DIM = 32  # shorter vectors are padded: torch 2.13 multiplies those of one dimension wrongly
LARGEST_INT8_DIM = 2**31 // 127**2 - 1  # products of longer vectors may not fit 32 bits
SLACK = 1.0 + 2.0**-30  # what measuring norms in float64 may lose


@dataclass(frozen=True)
class Coding:
    """A type of number that the first pass multiplies.

    Attributes:
        vectors, products: torch types of the rounded vectors and of their products.
        relative: how much of a product its own rounding may be; that of float32 γ has counted.
        exact: the products of rounded vectors have no error.
    """

    name: str
    vectors: torch.dtype
    products: torch.dtype
    relative: float = 0.0
    exact: bool = False


BFLOAT16_UNIT = 2.0**-8  # it keeps 8 bits
FLOAT32 = Coding("float32", torch.float32, torch.float32)
BFLOAT16 = Coding("bfloat16", torch.bfloat16, torch.bfloat16, relative=BFLOAT16_UNIT / (1.0 - BFLOAT16_UNIT))
INT8 = Coding("int8", torch.int8, torch.int32, exact=True)
CODINGS = {c.name: c for c in (FLOAT32, BFLOAT16, INT8)}


@dataclass(frozen=True)
class Rounded:
    """Vectors in the type of the first pass, and what the rounding cost, float64.

    Attributes:
        vectors: v̂, in units of `unit`, [n, D].
        unit: [n]; 1 for floats.
        full: ‖v‖ before centring and rounding, [n].
        norm: ‖v̂‖, [n].
        lost: ‖v − v̂‖ (of the centred vector), [n].
    """

    vectors: torch.Tensor
    unit: torch.Tensor
    full: torch.Tensor
    norm: torch.Tensor
    lost: torch.Tensor


def score_error(x: Rounded, y: Rounded, centre_norm: float) -> torch.Tensor:
    """Bound of |fl(x̂·ŷ) + x·μ − x·y| for each query and any column, before the result is rounded; float64 [Q]."""
    dim = x.vectors.shape[1]
    y_norm, y_lost = y.norm.max(), y.lost.max()
    bound = x.full * y_lost + x.lost * y_norm + dim * 2.0**-51 * x.full * centre_norm  # x·μ is itself a float64 sum
    if x.vectors.dtype == torch.int8:
        bound = bound + 2.0**-50 * x.norm * y_norm  # turning integers into scores
    else:
        terms = 2 * dim  # a product may be rounded before it is added
        bound = bound + float32_error(terms) * x.norm * y_norm
        bound = bound + underflow_error(terms) + dim * 2.0**-126 * (x.norm + y_norm)  # of results, of inputs
    return bound * SLACK


def single_error(x: Rounded, y: Rounded) -> torch.Tensor:
    """Bound of |fl32(x·y) − x·y| of the vectors as they were, for each query and any column; float64 [Q]."""
    terms = 2 * x.vectors.shape[1]  # a product may be rounded before it is added
    x_norm, y_norm = x.full, y.full.max()
    return (
        float32_error(terms) * x_norm * y_norm + underflow_error(terms) + terms * 2.0**-127 * (x_norm + y_norm)
    ) * SLACK


def check_block(x: Rounded, y: Rounded, start: int) -> None:
    """Raise NvrError if a vector of a block, whose first is corpus row `start`, is not finite or too long to multiply."""
    wrong = (~torch.isfinite(y.full)).nonzero()
    if len(wrong):
        raise NotFiniteError("corpus_vectors", start + int(wrong[0]))
    x_norm, y_norm = float(x.full.max()), float(y.full.max())
    if max(x_norm, y_norm, x_norm * y_norm) > LARGEST_PRODUCT:
        raise NvrError(
            f"vectors with norms of {x_norm:.3g} (query) and {y_norm:.3g} (corpus) overflow float32 products: normalise them"
        )


def preferred(screen: Screen, device: torch.device, dim: int) -> dict[Coding, float]:
    """The codings to try and how many times faster than float32 they are: the one asked for, or the fastest first.

    Raises:
        NvrError: `screen` is unknown, or int8 was asked for where it cannot be had.
    """
    if screen not in get_args(Screen):
        raise NvrError(f"screen {screen!r} is unknown: one of {', '.join(get_args(Screen))}")
    if screen == "int8" and (device.type != "cpu" or dim > LARGEST_INT8_DIM or not _multiplies_int8()):
        raise NvrError(
            f"screen 'int8' was asked for, but {device} multiplies no int8 vectors of {dim} dimensions: use 'auto'"
        )
    if screen != "auto":
        return {CODINGS[screen]: 1.0}
    rates = speeds(device, min(dim, 1024))
    worth = [
        c for c in (INT8, BFLOAT16) if rates.get(c.name, 0.0) >= WORTH_IT and not (c.exact and dim > LARGEST_INT8_DIM)
    ]
    return {c: rates[c.name] for c in sorted(worth, key=lambda c: -rates[c.name])} | {FLOAT32: 1.0}


@dataclass(frozen=True)
class Trial:
    """What the exact scores of some queries with some columns look like.

    Attributes:
        scores: float32, of r rows (a query with a ceiling) with c columns, [r, c].
        ceiling, query: of those rows, [r]; +inf: no ceiling.
    """

    scores: Vectors
    ceiling: Floats
    query: Ints

    def pays(self, coding: Coding, error_Q: torch.Tensor, rate: float) -> bool:
        """Whether a first pass of `rate` times float32's speed leaves few enough scores to look at again.

        Near the best of many scores their density grows by e every quarter of a standard deviation or so (a normal tail at
        four), and what must be looked at again lies within one or two errors of it. A ceiling amid the mass of the scores, as
        of a positive that the teacher finds no better than chance, has too many within an error of it for coarse scores.
        """
        if not len(self.query):
            return True
        if float(error_Q.median()) > BLUR * float(np.median(self.scores.std(axis=1))):
            return False
        error = error_Q.numpy(force=True)[self.query][:, None] + coding.relative * np.abs(self.scores)
        again = float((np.abs(self.scores - self.ceiling[:, None]) <= error).mean())
        return 1.0 / rate + LOOK_AGAIN * again <= 1.0


@functools.cache
def speeds(device: torch.device, dim: int) -> dict[str, float]:
    """How many times faster than float32 this machine multiplies each coarser type, tried on a small tile."""
    if device.type == "cuda":
        return {BFLOAT16.name: 2.0} if torch.cuda.is_bf16_supported(including_emulation=False) else {}
    codings = [FLOAT32, BFLOAT16, *([INT8] if _multiplies_int8() else [])]
    seconds = {}
    for coding in codings:
        a, b = (torch.ones(n, dim, dtype=torch.float32).to(coding.vectors) for n in (256, 1024))
        out = torch.empty(256, 1024, dtype=coding.products)
        multiply(a, b, out)  # the first product pays for set-up
        seconds[coding.name] = min(_seconds(a, b, out) for _ in range(5))
    return {name: seconds[FLOAT32.name] / s for name, s in seconds.items()}


@functools.cache
def _multiplies_int8() -> bool:
    """Whether torch has a product of int8 matrices here that is right for the largest numbers, too.

    Instruction sets before VNNI add pairs of products in 16 bits, which saturate.
    """
    if not hasattr(torch, "_int_mm"):
        return False
    draws = torch.Generator().manual_seed(0)
    for rows, dim, columns in ((1, SMALLEST_INT8_DIM, 1), (3, 33, 5), (64, 100, 64), (256, 384, 1024)):
        x, y = (torch.randint(-1, 2, (n, dim), dtype=torch.int8, generator=draws) * 127 for n in (rows, columns))
        out = torch.empty(rows, columns, dtype=torch.int32)
        try:
            multiply(x, y, out)
        except RuntimeError:
            return False
        if not torch.equal(out, (x.double() @ y.double().T).int()):
            return False
    return True


def multiply(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> None:
    """All products x·y of two matrices of rows."""
    if x.dtype == torch.int8:
        torch._int_mm(x, y.T, out=out)
    else:
        torch.mm(x, y.T, out=out)


def _seconds(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> float:
    start = time.perf_counter()
    multiply(a, b, out)
    return time.perf_counter() - start
