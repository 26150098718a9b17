"""Text as it is stored (`normalise`) and as it is compared (`comparison_key`, shingles).

Training rows are stored normalised. Benchmark rows never are: MTEB scores are exact only on the bytes MTEB feeds.
"""

from __future__ import annotations

import functools
import re
import sys
import unicodedata
from collections.abc import Iterator


def _ranges(first_letters: str) -> str:
    """A regular-expression class of every code point whose Unicode category starts with one of the letters."""
    inside = [unicodedata.category(chr(c))[0] in first_letters for c in range(sys.maxunicode + 1)]
    parts, start = [], None
    for code in range(sys.maxunicode + 2):
        member = code <= sys.maxunicode and inside[code]
        if member and start is None:
            start = code
        elif not member and start is not None:
            parts.append(f"\\U{start:08x}-\\U{code - 1:08x}")
            start = None
    return "".join(parts)


# Cc minus white space, lone surrogates (JSON can smuggle them in; UTF-8 cannot hold them), byte-order mark, zero-width space.
_CONTROL = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff\ufeff\u200b]+")
# Scripts written without spaces between words: every character counts as a word of its own.
_UNSPACED = re.compile(
    "([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])"
)


@functools.cache
def _separators() -> re.Pattern[str]:
    """Made on first use: it takes 0.3 s, which `nvr --help` and cache hits need not pay."""
    # Punctuation, separators and controls go; symbols stay ("C++", "< 5"), and so do combining marks (Indic vowels).
    return re.compile(f"[{_ranges('PZC')}]+")


def normalise(text: str) -> str:
    """Unicode NFC, control characters out, white space collapsed to single spaces, ends trimmed."""
    return " ".join(unicodedata.normalize("NFC", _CONTROL.sub("", text)).split())


def comparison_key(text: str) -> str:
    """Equal for texts that differ only in case, width, punctuation or spacing (NFKC, casefold)."""
    plain = normalise(text)
    # Twice: folding can leave a string that NFKC changes again (the Unicode standard's own recipe).
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", plain).casefold())
    key = _separators().sub(" ", folded).strip()
    return key or plain  # a text of nothing but punctuation is still itself


def words(key: str) -> list[str]:
    """Words of a comparison key."""
    return _UNSPACED.sub(r" \1 ", key).split()


def word_shingles(key: str, width: int = 5) -> set[str]:
    """Every run of `width` words of a comparison key; a shorter text is one shingle."""
    parts = words(key)
    return {" ".join(parts[i : i + width]) for i in range(max(1, len(parts) - width + 1))}


def char_shingles(key: str, width: int = 5) -> set[str]:
    """Every run of `width` characters of a comparison key; a shorter text is one shingle."""
    return {key[i : i + width] for i in range(max(1, len(key) - width + 1))}


def jaccard(a: set[str], b: set[str]) -> float:
    """|a ∩ b| / |a ∪ b|."""
    both = len(a & b)
    union = len(a) + len(b) - both
    return both / union if union else 1.0


def blocks(total: int, size: int) -> Iterator[range]:
    """`range(total)` in consecutive pieces of at most `size`."""
    for start in range(0, total, size):
        yield range(start, min(start + size, total))
