"""The mining report: self-contained, escaped, and saying what the result says."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from nvr_tasks.html import lines
from nvr_tasks.mining import REASONS, MiningSpec, reselect, search_candidates
from nvr_tasks.mining.advisor import curves
from nvr_tasks.mining_report import mining_report


def report(spec: MiningSpec) -> tuple[str, object]:
    rng = np.random.default_rng(0)
    corpus = rng.standard_normal((60, 8)).astype(np.float32)
    queries = (corpus[:9] + 0.4 * rng.standard_normal((9, 8))).astype(np.float32)
    stored = search_candidates(queries, corpus, [[i, i + 20] for i in range(9)], 60)
    result = reselect(stored, spec).result
    html = mining_report(
        result,
        stored,
        curves(stored, spec),
        dict(REASONS),
        lambda q: f"query {q} <script>alert(1)</script>",
        lambda n: f"passage {n} & more " + "long " * 100,
    )
    return html, result


class Balanced(HTMLParser):
    """Fails on a tag that is closed in the wrong order."""

    VOID = frozenset({"meta", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, _: list) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, _: list) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("spec", [MiningSpec("perc_pos", num_negatives=3), MiningSpec("naive", num_negatives=3)])
def test_the_page_stands_alone_and_says_what_was_mined(spec: MiningSpec) -> None:
    html, result = report(spec)
    parser = Balanced()
    parser.feed(html)
    assert parser.open == []
    assert "<script" not in html and "<b>x</b>" not in html
    assert not re.search(r"(src|href)=|url\(|@import", html), "something would be loaded from elsewhere"
    assert "prefers-color-scheme: dark" in html
    for reason, count in result.skipped.items():
        assert f"<td>{reason}</td><td class=n>{count:,}</td>" in html
    assert html.count("<svg") == 4  # scores, and a curve per method
    assert f"{result.kept:,} negatives" in html


def test_the_page_is_the_same_every_time() -> None:
    spec = MiningSpec("margin_pos", 0.2, num_negatives=3)
    assert report(spec)[0] == report(spec)[0]


def test_a_plot_leaves_out_what_is_not_a_number() -> None:
    drawn = lines({"a": [(0.0, 1.0), (1.0, float("nan")), (2.0, 3.0)], "b": [(0.0, float("inf"))]}, "x", "y", 1.0)
    assert len(re.findall(r"<polyline", drawn)) == 1
    assert "nan" not in drawn and "inf" not in drawn.replace("info", "")
    assert lines({"a": []}, "x", "y") == ""
