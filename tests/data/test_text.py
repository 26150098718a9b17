"""Normalisation and comparison of text."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvr_tasks.data.text import char_shingles, comparison_key, jaccard, normalise, word_shingles

ANY = st.text(st.characters(exclude_categories=()), max_size=40)


@given(ANY)
def test_normalised_text_is_clean_and_stays_so(text: str) -> None:
    clean = normalise(text)
    assert normalise(clean) == clean
    assert clean == clean.strip()
    assert "  " not in clean
    assert not any(unicodedata.category(c) == "Cs" for c in clean)
    assert not any(unicodedata.category(c) == "Cc" for c in clean)
    clean.encode()  # UTF-8 can hold it


@given(ANY)
def test_comparison_key_of_a_normalised_text_is_that_of_the_text(text: str) -> None:
    assert comparison_key(normalise(text)) == comparison_key(text)


@given(st.text("abc XYZ,.;!-", max_size=30))
def test_case_punctuation_and_spacing_do_not_matter(text: str) -> None:
    if comparison_key(text).strip(",.;!- "):
        assert comparison_key(f"  {text.upper()}?!\n") == comparison_key(text.lower())


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("Ｆｕｌｌ width", "full width"),
        ("ﬁne", "fine"),
        ("Straße", "STRASSE"),
        ("café", "cafe\u0301"),
        ("a\u00a0b", "a b"),
    ],
)
def test_equal_in_the_eye_of_a_reader(a: str, b: str) -> None:
    assert comparison_key(a) == comparison_key(b)


@pytest.mark.parametrize(("a", "b"), [("C", "C++"), ("का", "की"), ("< 5", "> 5"), ("?", "!"), ("naive", "naïve")])
def test_different_to_a_reader(a: str, b: str) -> None:
    assert comparison_key(a) != comparison_key(b)


def test_shingles() -> None:
    assert word_shingles("a b c d e f") == {"a b c d e", "b c d e f"}
    assert word_shingles("a b") == {"a b"}
    assert char_shingles("abcdef") == {"abcde", "bcdef"}
    assert char_shingles("abc") == {"abc"}
    assert jaccard({"a", "b"}, {"b", "c"}) == pytest.approx(1 / 3)


def test_scripts_without_spaces_have_words() -> None:
    assert len(word_shingles("東京都は日本の首都です")) == 7
