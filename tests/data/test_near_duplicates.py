"""Candidates by MinHash, decisions by exact Jaccard."""

import itertools
import random

import pytest
from data_helpers import sentence
from hypothesis import given, settings
from hypothesis import strategies as st

from nvr_tasks.data.near_duplicates import _bands, groups, matches, similar_pairs
from nvr_tasks.data.text import char_shingles, jaccard, word_shingles


def family(seed: int, size: int) -> list[str]:
    """A text of 80 words and variants of it with one to `size` words changed."""
    draw = random.Random(seed)
    base = sentence(seed, 80).split()
    texts = [" ".join(base)]
    for changes in range(1, size):
        words = list(base)
        for place in draw.sample(range(len(words)), changes):
            words[place] = f"changed{place}"
        texts.append(" ".join(words))
    return texts


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9, 1.0])
def test_pairs_are_those_of_brute_force(threshold: float) -> None:
    texts = sorted({t for seed in range(30) for t in family(seed, 5)})
    exact = {
        (i, j)
        for i, j in itertools.combinations(range(len(texts)), 2)
        if jaccard(word_shingles(texts[i]), word_shingles(texts[j])) >= threshold
    }
    found = similar_pairs(texts, threshold)
    assert found == sorted(found)
    assert set(found) <= exact, "no false positive"
    assert len(found) >= 0.99 * len(exact)


@pytest.mark.parametrize("threshold", [0.01, 0.1, 0.3, 0.5, 0.8, 0.9, 0.95, 0.99, 1.0])
def test_bands_reach_the_promised_recall(threshold: float) -> None:
    bands = _bands(threshold)
    rows = 128 // bands
    assert bands * rows == 128
    assert bands == 128 or 1 - (1 - threshold**rows) ** bands >= 0.999


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.text("abcd ", min_size=1, max_size=20), max_size=12),
    st.lists(st.text("abcd ", min_size=1, max_size=20), max_size=5),
    st.floats(0.05, 1),
)
def test_matches_are_exact(queries: list[str], others: list[str], threshold: float) -> None:
    expected = [
        (i, j)
        for i, q in enumerate(queries)
        for j, o in enumerate(others)
        if jaccard(char_shingles(q), char_shingles(o)) >= threshold
    ]
    assert [(i, j) for i, j, _ in matches(queries, others, threshold)] == expected


def test_a_group_is_named_by_its_first_row_and_closes_over_links() -> None:
    keys = ["x", "a", "b", "a", "c", "y"]
    assert groups(keys, [("a", "b"), ("b", "c"), ("c", "elsewhere")]).tolist() == [0, 1, 1, 1, 1, 5]


def test_no_pairs_no_links() -> None:
    assert groups(["a", "b"], []).tolist() == [0, 1]
