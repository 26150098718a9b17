"""Docstrings of installed packages as a data set."""

import sys
from pathlib import Path

import pytest

from nvr_tasks.data.package_docs import probe, read_package_docs, split_docstring
from nvr_tasks.data_settings import PackageDocsSource
from nvr_tasks.errors import NvrError

BODY = " ".join(f"word{i}" for i in range(40))
MODULE = f'''
"""Tools that measure the width of a river.

{BODY} module.
"""
raise RuntimeError("imported!")

def wide(x):
    """Return whether the river is wide enough.

    {BODY} function.
    """

class Bridge:
    """A bridge over troubled water somewhere.

    {BODY} bridge.
    """
    def cross(self):
        """Walk to the other side of it.

        {BODY} crossing.
        """
        def inner():
            """Never seen by anybody at all.

            {BODY} inner.
            """
    def _hidden(self):
        """Hidden from the eyes of all.

        {BODY} hidden.
        """

def short():
    """Return whether the river is narrow enough.

    Too few words.
    """

def terse():
    """Too terse.

    {BODY} terse.
    """

def ambiguous_a():
    """See the same summary in two places.

    {BODY} a.
    """

def ambiguous_b():
    """See the same summary in two places.

    {BODY} b.
    """
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A distribution `rivers` that cannot be imported."""
    files = {
        "rivers/__init__.py": MODULE,
        "rivers/tests/test_rivers.py": MODULE.replace("river", "test"),
        "rivers/template.py": "def {{name}}(:",
        "rivers-1.5.dist-info/METADATA": "Metadata-Version: 2.1\nName: rivers\nVersion: 1.5\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    record = "".join(f"{name},,\n" for name in [*files, "rivers/gone.py", "../../../bin/rivers.py"])
    (tmp_path / "rivers-1.5.dist-info" / "RECORD").write_text(record)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return tmp_path


def source(**more: object) -> PackageDocsSource:
    return PackageDocsSource.model_validate({"type": "package_docs", "packages": ["rivers"], "min_words": 10, **more})


def test_what_is_taken(package: Path) -> None:
    data = read_package_docs(source(test_percent=0))
    assert set(data.documents) == {
        "rivers",
        "rivers.wide",
        "rivers.Bridge",
        "rivers.Bridge.cross",
        "rivers.ambiguous_a",
    }
    assert data.documents["rivers.wide"] == ("", f"{BODY} function.")
    queries = {data.queries[q]: d for q, d in data.qrels["train"]}
    assert queries == {
        "Tools that measure the width of a river": "rivers",
        "Return whether the river is wide enough": "rivers.wide",
        "A bridge over troubled water somewhere": "rivers.Bridge",
        "Walk to the other side of it": "rivers.Bridge.cross",
    }, "no query whose summary fits several passages"
    assert "rivers" not in sys.modules


def test_splits_are_a_matter_of_the_query(package: Path) -> None:
    all_test = read_package_docs(source(test_percent=90))
    half = read_package_docs(source(test_percent=50))
    assert set(half.qrels.get("test", {})) <= set(all_test.qrels["test"])
    assert sum(len(q) for q in half.qrels.values()) == 4


def test_passages_are_cut(package: Path) -> None:
    data = read_package_docs(source(max_words=12))
    assert {len(text.split()) for _, text in data.documents.values()} == {12}


def test_identity_is_the_version(package: Path) -> None:
    assert probe(source())["rivers"] == "1.5"


def test_a_package_that_is_not_installed(package: Path) -> None:
    with pytest.raises(NvrError, match="'lakes', whose documentation is a source, is not installed: pip install lakes"):
        read_package_docs(source(packages=["lakes"]))


@pytest.mark.parametrize(
    ("docstring", "summary", "body"),
    [
        ("Do this.\n\nThen that.", "Do this", "Then that."),
        ("Do this. Then that.", "Do this", "Then that."),
        ("Do this\nover two lines.\n\nBody.", "Do this over two lines", "Body."),
        ("Sum.\n\nBody.\n\n>>> code()\n42\n\nAfter.", "Sum", "Body. After."),
        ("Sum.\n\nBody::\n\n    code()\n\n    more()\n\nAfter.", "Sum", "Body: After."),
        ("Sum.\n\n.. note:: old\n   text\n\nAfter.", "Sum", "After."),
        ("Sum.\n\nExamples\n--------\ncode\n\nmore\n\nNotes\n-----\nProse.", "Sum", "Prose."),
        ("Sum.\n\nReferences\n==========\n.. [1] Book", "Sum", ""),
        ("Sum.\n\nUse :func:`~a.b.c`, ``x`` and `y <z>`_ [1]_ **now**.", "Sum", "Use a.b.c, x and y <z> now."),
        ("Sum.\n\n===== =====\na     b\n===== =====", "Sum", "a b"),
        ("Sum of e.g. numbers in a row.", "Sum of e.g. numbers in a row", ""),
        ("", "", ""),
    ],
)
def test_split_docstring(docstring: str, summary: str, body: str) -> None:
    assert split_docstring(docstring, 100) == (summary, body)
