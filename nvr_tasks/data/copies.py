"""Copies of a passage in other words, by rule: what crawls, mirrors, editors and typists make of one text.

For the audit of mining: a copy is as relevant as its original, and nobody has judged it. Deterministic: the same text, kind
and key give the same copy. The word list is English; on other languages `reworded` changes nothing, and such a copy is
left out.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable

BOILERPLATE = ("Skip to main content. Home. Search.", "Last updated recently. Terms of use. Contact us.")
ABRIDGED = 3  # every third sentence goes
TRIMMED = 0.3  # share of words cut off at the end
TYPOS = 12  # one word in so many

# Words that stand for one another in most sentences, both ways where that is so.
_WORD_PAIRS = """
also:additionally although:though and:as_well_as approximately:about because:since begin:start big:large
but:however buy:purchase cause:lead_to causes:leads_to caused:brought_about children:kids common:frequent
commonly:frequently contains:includes demonstrate:show demonstrated:showed doctor:physician doctors:physicians
during:throughout effect:impact effects:impacts enough:sufficient especially:particularly examine:study
example:instance examined:studied fast:quick find:discover found:observed give:provide gives:provides
has:possesses help:aid helps:aids however:nevertheless illness:disease disease:disorder important:significant
improve:enhance increase:rise increased:raised increases:raises indicate:suggest kids:children large:big
lower:reduce many:numerous may:might method:approach methods:approaches more_than:over need:require
needs:requires often:frequently people:individuals persons:people physician:doctor possible:feasible
problem:issue problems:issues purchase:buy rapid:fast reduce:lower reduced:lowered reduces:lowers
required:needed research:study results:findings risk:danger show:demonstrate showed:demonstrated
shown:demonstrated shows:demonstrates significant:considerable similar:comparable small:little start:begin
studies:investigations study:investigation such_as:like symptoms:signs take:ingest therapy:treatment
therefore:thus through:via treatment:therapy treatments:therapies type:kind types:kinds typically:usually
use:utilise used:utilised using:utilising usually:generally very:quite when:whenever whether:if women:females
men:males various:several
"""
SYNONYMS = dict(pair.split(":") for pair in _WORD_PAIRS.split())
_WORD = re.compile(r"[A-Za-z]+")
_SENTENCE_END = re.compile(r"(?<=[.!?;])\s+")


def copy(text: str, kind: str, key: str) -> str | None:
    """A copy of a text, or None where the rule changes nothing that matters.

    Args:
        text: the passage.
        kind: one of KINDS.
        key: what the draws hang on beside the text.
    """
    digest = hashlib.blake2b(f"{kind}\0{key}\0{text}".encode(), digest_size=8).digest()
    made = KINDS[kind](text, random.Random(int.from_bytes(digest, "big")))  # noqa: S311 - a fixed choice, no secret
    return None if made == text or not made.strip() else made


def _reformatted(text: str, _: random.Random) -> str:
    """Other case, no punctuation: what the comparison of texts sees through."""
    return re.sub(r"[^\w\s]", " ", text.lower())


def _typos(text: str, draw: random.Random) -> str:
    """Two inner letters swapped in one word of twelve."""
    words = text.split(" ")
    long = [i for i, word in enumerate(words) if len(word) >= 5 and word[1:-1].isalpha()]
    for i in sorted(draw.sample(long, min(len(long), max(1, len(words) // TYPOS)))):
        word = words[i]
        at = draw.randrange(1, len(word) - 2)
        words[i] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return " ".join(words)


def _reworded(text: str, _: random.Random) -> str:
    """Common words replaced by others of their meaning."""

    def other(match: re.Match[str]) -> str:
        word = match[0]
        found = SYNONYMS.get(word.lower())
        if found is None:
            return word
        found = found.replace("_", " ")
        return found.capitalize() if word[0].isupper() else found

    return _WORD.sub(other, text)


def _reordered(text: str, draw: random.Random) -> str:
    """Sentences in another order."""
    sentences = _sentences(text)
    if len(sentences) < 2:
        return text
    shuffled = sentences[:]
    while shuffled == sentences and len(set(sentences)) > 1:
        draw.shuffle(shuffled)
    return " ".join(shuffled)


def _abridged(text: str, _: random.Random) -> str:
    """Every third sentence left out."""
    sentences = _sentences(text)
    return " ".join(s for i, s in enumerate(sentences) if len(sentences) < ABRIDGED or i % ABRIDGED != ABRIDGED - 1)


def _trimmed(text: str, _: random.Random) -> str:
    """The end cut off, as crawlers and snippets do."""
    words = text.split()
    return " ".join(words[: max(1, len(words) - int(len(words) * TRIMMED))])


def _framed(text: str, _: random.Random) -> str:
    """Between the lines that a web page has around its text."""
    return f"{BOILERPLATE[0]} {text} {BOILERPLATE[1]}"


def _sentences(text: str) -> list[str]:
    return [s for s in _SENTENCE_END.split(text) if s]


KINDS: dict[str, Callable[[str, random.Random], str]] = {
    "reformatted": _reformatted,
    "typos": _typos,
    "reworded": _reworded,
    "reordered": _reordered,
    "abridged": _abridged,
    "trimmed": _trimmed,
    "framed": _framed,
}
