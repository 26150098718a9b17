"""Compiled loops over a tile of approximate scores: what may be among the k best is scored exactly, there and then.

Scores are compared as integers, many in one instruction. Products of int8 vectors are integers; the bits of a float
above zero, read as one, order like the float, and below zero, where the order is reversed, flipping all bits but the
sign repairs it. So one loop serves all three.

Shapes: T queries of a tile, C its columns, D dimensions, R rows (a query with a ceiling), k depth.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit  # noqa: TID253 - this module owns the compiled loops

from nvr_tasks.mining import compiled

CHUNK = 64  # scores whose maximum is looked at before any of them

# What the integers of a tile are: bits of float32 (by how much to shift them: none), of bfloat16 (the upper 16), or numbers.
FLOAT32, BFLOAT16, INTEGER = 0, 16, 1


def _can_cache() -> bool:
    """Whether compiled code can be kept: beside this file, in NUMBA_CACHE_DIR or in the user's cache folder."""
    try:
        njit(cache=True)(_can_cache)
    except RuntimeError:  # a read-only image without a home: compiled anew by every process, which takes seconds
        return False
    return True


compiled.use()
_COMPILE: Any = {"nogil": True, "cache": _can_cache(), "error_model": "numpy"}


@njit(**_COMPILE)
def exact_dot(x: Any, y: Any, products: Any) -> float:
    """Dot product in float64, added as a fixed tree: see `exact`. `products` is scratch, float64 [D]."""
    width = len(x)
    for i in range(width):
        products[i] = np.float64(x[i]) * np.float64(y[i])
    while width > 1:
        half = (width + 1) // 2
        for i in range(width - half):
            products[i] += products[half + i]
        width = half
    return products[0]


@njit(fastmath={"reassoc", "contract"}, **_COMPILE)
def _single_dot(x: Any, y: Any) -> Any:
    """Dot product in float32, in whatever order is fastest: `exact.float32_error` bounds its error."""
    total = np.float32(0.0)
    for i in range(len(x)):
        total += x[i] * y[i]
    return total


@njit(**_COMPILE)
def exact_dots(x_QD: Any, y_CD: Any, x_index_S: Any, y_index_S: Any, scores_S: Any) -> None:
    """`exact_dot` of S pairs into `scores_S`."""
    products = np.empty(x_QD.shape[1], np.float64)
    for s in range(len(scores_S)):
        scores_S[s] = exact_dot(x_QD[x_index_S[s]], y_CD[y_index_S[s]], products)


@njit(**_COMPILE)
def _bits(single: Any) -> Any:
    return np.float32(single).view(np.int32)


@njit(**_COMPILE)
def _float(bits: Any) -> Any:
    return np.float64(np.int32(bits).view(np.float32))


@njit(**_COMPILE)
def _key(value: float) -> Any:
    """A float64 number as the ordered 32-bit integer of a float32 number at most as large."""
    single = np.float32(value)
    bits = _bits(single if np.float64(single) <= value else np.nextafter(single, np.float32(-np.inf)))
    return bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))


@njit(**_COMPILE)
def _value(key: Any, unit: float, coding: int) -> Any:
    """The score whose ordered integer is `key`."""
    if coding == INTEGER:
        return key * unit
    ordered = np.int32(key) << np.int32(coding)
    bits = ordered ^ ((ordered >> np.int32(31)) & ((np.int32(0x7FFFFFFF) >> np.int32(coding)) << np.int32(coding)))
    return _float(np.int32(bits))


@njit(**_COMPILE)
def _lowest_key(bound: float, relative: float, unit: float, coding: int) -> Any:
    """A key that no score is below which could be exactly `bound`, being wrong by up to `relative` of itself."""
    if coding == INTEGER:
        return np.int64(max(-(2.0**31) + 2.0, min(2.0**31 - 1.0, np.floor(bound / unit) - 1.0)))
    bound = bound / (1.0 + relative) if bound >= 0.0 else bound / (1.0 - relative)
    return np.int64(_key(bound)) >> coding


@njit(**_COMPILE)
def _surely_key(bound: float, relative: float, unit: float, coding: int) -> Any:
    """A key from which on a score is surely at least `bound`, though it be wrong by up to `relative` of itself."""
    if coding == INTEGER:
        return np.int64(max(-(2.0**31) + 2.0, min(2.0**31 - 1.0, np.floor(bound / unit) + 2.0)))
    bound = bound / (1.0 - relative) if bound >= 0.0 else bound / (1.0 + relative)
    return (np.int64(_key(bound)) >> coding) + 1


@njit(**_COMPILE)
def _insert(ids: Any, scores: Any, depth: int, new_id: int, new_score: float, groups: Any) -> None:
    """Put a passage with a higher id than all before it into a list by falling score, at most one per group."""
    last = depth - 1  # its place is free, or its passage is the one to lose
    if len(groups):
        for i in range(depth):
            if ids[i] < 0:
                break
            if groups[ids[i]] == groups[new_id]:
                if new_score <= scores[i]:
                    return
                last = i
                break
    while last > 0 and (ids[last - 1] < 0 or scores[last - 1] < new_score):
        ids[last] = ids[last - 1]
        scores[last] = scores[last - 1]
        last -= 1
    ids[last] = new_id
    scores[last] = new_score


class Tile(NamedTuple):
    """Approximate scores of some queries and columns, and what they were made from.

    Attributes:
        scores: integers, int16 for BFLOAT16, else int32; overwritten, [T, C].
        coding: what the integers are.
        unit: what INTEGER scores are multiples of, float64 [T].
        x, y: float32 vectors of the queries and the columns, [T, D] and [C, D].
        first_id: corpus row of column 0; tiles come by rising corpus row.
        offset, error: |score + offset − exact| ≤ error + relative · |score|, float64 [T].
        relative: see there.
        fine: |float32 product − exact| ≤ fine, float64 [T].
        blocked_start, blocked_column: columns to leave out of query t are column[start[t] : start[t + 1]], [T + 1] and [B].
        row_start: rows of query t are row_start[t] to row_start[t + 1], [T + 1].
    """

    scores: Any
    coding: int
    unit: Any
    x: Any
    y: Any
    first_id: int
    offset: Any
    error: Any
    relative: float
    fine: Any
    blocked_start: Any
    blocked_column: Any
    row_start: Any


class Best(NamedTuple):
    """The running result of all rows.

    Attributes:
        ceiling: float64 [R]; +inf: none.
        below: scores must be above this, float64 [R]; −inf: any.
        depth: of each row, int64 [R].
        groups: int64 [N], or empty.
        ids, scores: by falling score, at most one per group; −1 and −inf in free places, [R, K].
        above: passages not below the ceiling, int64 [R].
    """

    ceiling: Any
    below: Any
    depth: Any
    groups: Any
    ids: Any
    scores: Any
    above: Any


@njit(**_COMPILE)
def absorb(tile: Tile, best: Best) -> bool:
    """Let every row take from a tile what is among its k best strictly below its ceiling.

    Returns:
        False if a score was further from the exact one than its bound allows.
    """
    blocked = _blocked_score(tile.coding)
    most = 1  # rows of one query
    for t in range(len(tile.scores)):
        most = max(most, tile.row_start[t + 1] - tile.row_start[t])
    low_most, high_most = np.empty(most, tile.scores.dtype), np.empty(most, tile.scores.dtype)
    products = np.empty(tile.x.shape[1], np.float64)
    for t in range(len(tile.scores)):
        first, last = tile.row_start[t], tile.row_start[t + 1]
        if first == last:
            continue
        line, low, high = tile.scores[t], low_most[: last - first], high_most[: last - first]
        for i in range(tile.blocked_start[t], tile.blocked_start[t + 1]):
            line[tile.blocked_column[i]] = blocked
        for i in range(last - first):
            _set_keys(tile, best, t, first + i, low[i : i + 1], high[i : i + 1])
        least, never_below = _least(low), _most(high)
        if least <= 0 and tile.coding != INTEGER:  # scores below zero count, too
            _order(line, tile.coding)
        for begin in range(0, len(line), CHUNK):
            chunk = line[begin : begin + CHUNK]
            highest = chunk[0]
            for c in range(len(chunk)):
                highest = max(highest, chunk[c])
            if highest < least or not _is_near(chunk, highest, best, first, low, high):
                continue
            for c in range(len(chunk)):
                if least <= chunk[c] < never_below:
                    if not _take(tile, best, t, begin + c, chunk[c], low, high, products):
                        return False
                    least = _least(low)
    return True


@njit(**_COMPILE)
def _least(low: Any) -> Any:
    """The minimum; numpy's own takes half a second to compile."""
    least = low[0]
    for i in range(1, len(low)):
        least = min(least, low[i])
    return least


@njit(**_COMPILE)
def _most(high: Any) -> Any:
    most = high[0]
    for i in range(1, len(high)):
        most = max(most, high[i])
    return most


@njit(**_COMPILE)
def _blocked_score(coding: int) -> Any:
    """What the score of a blocked pair is set to: the bits of −inf, or a number that no product comes to."""
    if coding == INTEGER:
        return -(1 << 31)
    return -(1 << 7) if coding == BFLOAT16 else -(1 << 23)


@njit(**_COMPILE)
def _set_keys(tile: Tile, best: Best, t: int, row: int, low: Any, high: Any) -> None:
    """Of one row: `low`, the key below which no score matters, and `high`, from which on scores are not below the ceiling."""
    kth, ceiling = max(best.scores[row, best.depth[row] - 1], best.below[row]), best.ceiling[row]
    offset, error, relative, unit = tile.offset[t], tile.error[t], tile.relative, tile.unit[t]
    lowest = _lowest_key(-3.4e38, 0.0, unit, tile.coding)
    never = np.int64(0x7FFF) if tile.coding == BFLOAT16 else np.int64(0x7FFFFFFF)
    low[0], high[0] = lowest, never
    if not np.isinf(kth):
        low[0] = max(lowest, _lowest_key(kth - offset - error, relative, unit, tile.coding))
    if not np.isinf(ceiling):
        high[0] = max(low[0], min(never, _surely_key(ceiling - offset + error, relative, unit, tile.coding)))


@njit(**_COMPILE)
def _order(line: Any, coding: int) -> None:
    """Turn bits of floats into integers that order like the floats."""
    if coding == BFLOAT16:
        for c in range(len(line)):
            line[c] ^= (line[c] >> 15) & 0x7FFF
    else:
        for c in range(len(line)):
            line[c] ^= (line[c] >> 31) & 0x7FFFFFFF


@njit(**_COMPILE)
def _is_near(chunk: Any, highest: Any, best: Best, first: int, low: Any, high: Any) -> bool:
    """Whether some score of a chunk must be looked at; those that are surely not below a ceiling are only counted."""
    near = False
    for i in range(len(low)):
        if highest >= low[i]:
            sure, maybe = 0, 0
            for c in range(len(chunk)):
                sure += chunk[c] >= high[i]
                maybe += chunk[c] >= low[i]
            best.above[first + i] += sure
            near |= maybe > sure
    return near


@njit(**_COMPILE)
def _take(tile: Tile, best: Best, t: int, column: int, key: Any, low: Any, high: Any, products: Any) -> bool:
    """Score one pair better, exactly if need be, and put it where it belongs.

    Returns:
        False if its approximate score breaks the bound.
    """
    near, fine = np.float64(_single_dot(tile.x[t], tile.y[column])), tile.fine[t]
    score = _value(key, tile.unit[t], tile.coding)
    if not abs(score + tile.offset[t] - near) <= tile.error[t] + tile.relative * abs(score) + fine:
        return False
    exact, known = 0.0, False
    for i in range(len(low)):
        if key < low[i] or key >= high[i]:
            continue
        row = tile.row_start[t] + i
        depth, ceiling = best.depth[row], best.ceiling[row]
        if near - fine >= ceiling:
            best.above[row] += 1
            continue
        least = max(best.scores[row, depth - 1], best.below[row])
        if near + fine < least:
            continue
        if not known:
            exact, known = exact_dot(tile.x[t], tile.y[column], products), True
        if exact >= ceiling:
            best.above[row] += 1
        elif exact > least:  # an equal one has the higher id: it loses
            _insert(best.ids[row], best.scores[row], depth, tile.first_id + column, exact, best.groups)
            _set_keys(tile, best, t, row, low[i : i + 1], high[i : i + 1])
    return True


@njit(fastmath={"reassoc", "contract"}, **_COMPILE)
def round_floats(y_CD: Any, centre_D: Any, rounded_CD: Any, full_C: Any, norm_C: Any, lost_C: Any) -> None:
    """Round y − centre to float32 or bfloat16, row by row, measuring in float64.

    Args:
        y_CD, centre_D: float32 and float64.
        rounded_CD: gets the bits of the rounded numbers, int16 for bfloat16, else int32.
        full_C, norm_C, lost_C: get the norms of y (not finite where y is not), of what was rounded to, of what was lost.
    """
    to_bfloat16 = rounded_CD.itemsize == 2
    for c in range(len(y_CD)):
        full, norm, lost = 0.0, 0.0, 0.0
        for d in range(y_CD.shape[1]):
            exact = np.float64(y_CD[c, d]) - centre_D[d]
            bits = _bits(np.float32(exact))
            if to_bfloat16:  # to the nearest, ties to even
                bits = (bits + np.int32(0x7FFF) + ((bits >> np.int32(16)) & np.int32(1))) & np.int32(-65536)
                rounded_CD[c, d] = bits >> np.int32(16)
            else:
                rounded_CD[c, d] = bits
            rounded = _float(np.int32(bits))
            full += np.float64(y_CD[c, d]) * np.float64(y_CD[c, d])
            norm += rounded * rounded
            lost += (exact - rounded) * (exact - rounded)
        full_C[c], norm_C[c], lost_C[c] = np.sqrt(full), np.sqrt(norm), np.sqrt(lost)


@njit(fastmath={"nnan", "nsz", "reassoc"}, **_COMPILE)
def largest(y_CD: Any, centre_D: Any, largest_C: Any) -> None:
    """Largest |number| of y − centre, row by row."""
    for c in range(len(y_CD)):
        most = 0.0
        for d in range(y_CD.shape[1]):
            most = max(most, abs(np.float64(y_CD[c, d]) - centre_D[d]))
        largest_C[c] = most


@njit(fastmath={"reassoc", "contract"}, **_COMPILE)
def round_integers(
    y_CD: Any, centre_D: Any, unit_C: Any, rounded_CD: Any, full_C: Any, norm_C: Any, lost_C: Any
) -> None:
    """Round y − centre to int8 multiples of `unit`, else as `round_floats`."""
    for c in range(len(y_CD)):
        full, norm, lost = 0.0, 0.0, 0.0
        unit = unit_C[c]
        for d in range(y_CD.shape[1]):
            exact = np.float64(y_CD[c, d]) - centre_D[d]
            steps = max(-127.0, min(127.0, np.rint(exact / unit)))
            rounded_CD[c, d] = np.int8(steps)
            rounded = steps * unit
            full += np.float64(y_CD[c, d]) * np.float64(y_CD[c, d])
            norm += rounded * rounded
            lost += (exact - rounded) * (exact - rounded)
        full_C[c], norm_C[c], lost_C[c] = np.sqrt(full), np.sqrt(norm), np.sqrt(lost)
