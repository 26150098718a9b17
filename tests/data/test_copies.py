"""Copies by rule: other texts of the same content, the same every time."""

from __future__ import annotations

import pytest

from nvr_tasks.data.copies import KINDS, SYNONYMS, copy
from nvr_tasks.data.text import comparison_key, jaccard, words

TEXT = (
    "Statins reduce the risk of heart disease in many people. They are often used when cholesterol is high; doctors usually "
    "start with a small amount. Studies have shown a significant effect during treatment. Muscle pain may occur."
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_keeps_most_words_and_is_the_same_every_time(kind: str) -> None:
    made = copy(TEXT, kind, "q1")
    assert made is not None
    assert made != TEXT
    assert made == copy(TEXT, kind, "q1")
    before, after = set(words(comparison_key(TEXT))), set(words(comparison_key(made)))
    assert jaccard(before, after) > (0.25 if kind == "reworded" else 0.55)


def test_each_kind_does_what_it_says() -> None:
    made = {kind: copy(TEXT, kind, "q1") or "" for kind in KINDS}
    assert comparison_key(made["reformatted"]) == comparison_key(TEXT)
    assert sorted(made["typos"]) == sorted(TEXT)
    assert made["reworded"].startswith("Statins lower the danger of heart disorder in numerous individuals.")
    assert sorted(made["reordered"].split()) == sorted(TEXT.split())
    assert "doctors" not in made["abridged"]
    assert "Muscle pain" in made["abridged"]
    assert TEXT.startswith(made["trimmed"])
    assert TEXT in made["framed"]


def test_the_draw_hangs_on_the_key() -> None:
    assert len({copy(TEXT, "reordered", str(i)) for i in range(20)}) > 3


def test_what_a_rule_cannot_change_makes_no_copy() -> None:
    assert copy("肝臓病の症状", "reworded", "q") is None
    assert copy("One sentence only", "reordered", "q") is None
    assert copy("a b", "typos", "q") is None
    assert copy("already plain", "reformatted", "q") is None


def test_no_word_stands_for_itself() -> None:
    assert not [a for a, b in SYNONYMS.items() if a == b]
