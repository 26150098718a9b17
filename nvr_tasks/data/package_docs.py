"""Documentation that installed packages ship, as a retrieval data set: summary line → the rest of the docstring.

Real sentences written by people, at hand wherever the package is installed. Source files are parsed, never imported.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import re
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from nvr_tasks.data.media_files import MediaFiles, below
from nvr_tasks.data.page_images import page
from nvr_tasks.data.raw import RawData
from nvr_tasks.data.text import comparison_key, normalise
from nvr_tasks.data_settings import PackageDocsSource
from nvr_tasks.errors import NvrError

EXTRACTOR = 1  # part of the source's identity: raise it when the same files give other rows
MIN_QUERY_WORDS = 4

# numpydoc sections that hold code, signatures or pointers rather than prose about the thing itself.
_DROPPED = {
    "examples", "example", "references", "reference", "see also", "doctest", "tests", "bibliography", "links",
    "code", "sources", "signature", "usage", "methods", "attributes", "todo", "history",
}  # fmt: skip
_UNDERLINE = re.compile(r"^[=\-~^*]{3,}$")
_RULE = re.compile(r"^[=\-~^*+| ]{3,}$")
_DIRECTIVE = re.compile(r"^\s*\.\. ")
_ROLE = re.compile(r":[\w:+-]+:`~?([^`<]*?)\s*(?:<[^`]*>)?`")
_MARKUP = re.compile(r"``([^`]*)``|`([^`]*)`_{0,2}|\*\*([^*]+)\*\*")
_CITATION = re.compile(r"\[\w+\]_|\|[\w ]+\|_?")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_TEST_PARTS = {
    "tests",
    "test",
    "testing",
    "conftest.py",
    "setup.py",
    "_build_utils",
    "externals",
    "vendored",
    "_vendor",
    "extern",
}


def probe(source: PackageDocsSource) -> dict[str, str]:
    """Versions that decide what will be read."""
    drawn_by = {"pillow": _distribution("pillow").version} if source.pages else {}
    return {name: _distribution(name).version for name in source.packages} | {"extractor": str(EXTRACTOR)} | drawn_by


def read_package_docs(source: PackageDocsSource, media: MediaFiles | None = None) -> RawData:
    """Read the docstrings of the packages. Splits `train` and `test`, by hash of the query; `media` keeps pages."""
    where = f"documentation of {', '.join(source.packages)}"
    found: dict[str, tuple[str, str]] = {}  # comparison key of the query → (document id, query)
    passages: dict[str, tuple[str, str]] = {}  # document id → (query, passage)
    seen: set[str] = set()
    twice: set[str] = set()
    for name in source.packages:
        package = _distribution(name)
        documented = _documented(name, package.version, str(package.locate_file("")))
        for doc_id, docstring in documented:
            if source.part is not None and not _in_part(doc_id, source.part):
                continue
            query, passage = split_docstring(docstring, source.max_words)
            query_key, passage_key = comparison_key(query), comparison_key(passage)
            if len(query_key.split()) < MIN_QUERY_WORDS or len(passage.split()) < source.min_words:
                continue
            if passage_key in seen or doc_id in passages:
                continue
            if query_key in found:
                twice.add(query_key)  # the same summary over different bodies: nobody could tell which is meant
                continue
            seen.add(passage_key)
            found[query_key] = (doc_id, query)
            passages[doc_id] = (query, passage)
    data = RawData(where)
    for doc_id, (_, passage) in sorted(passages.items()):
        if source.pages:
            if media is None:
                raise NvrError(f"{where}: pages are read for training only; use texts here (pages: false)")
            drawn = media.keep({"image": page(passage)}, doc_id, below(Path()))
            data.add_document(doc_id, "", "", doc_id, drawn)
        else:
            data.add_document(doc_id, "", passage, doc_id)
    for key, (doc_id, query) in sorted(found.items(), key=lambda item: item[1]):
        if key in twice:
            continue
        query_id = hashlib.sha256(key.encode()).hexdigest()[:16]
        split = "test" if int(query_id[:8], 16) % 100 < source.test_percent else "train"
        data.add_query(query_id, query, doc_id)
        data.add_judgement(split, query_id, doc_id, 1, doc_id)
    return data.checked()


@functools.lru_cache(maxsize=4)
def _documented(name: str, version: str, place: str) -> tuple[tuple[str, str], ...]:
    """All docstrings of a package; kept, for recipes that read several parts of one. The place tells copies apart."""
    del version, place
    return tuple(_docstrings(_distribution(name)))


def _in_part(doc_id: str, part: str) -> bool:
    index, count = (int(n) for n in part.split("/"))
    return int(hashlib.sha256(doc_id.encode()).hexdigest()[:8], 16) % count == index


def _distribution(name: str) -> Distribution:
    try:
        return distribution(name)
    except PackageNotFoundError:
        raise NvrError(
            f"the package {name!r}, whose documentation is a source, is not installed: pip install {name}"
        ) from None


def _docstrings(package: Distribution) -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of public modules, classes and functions, in order of the files' names."""
    for file in sorted(package.files or [], key=str):
        parts = Path(str(file)).parts
        if (
            file.suffix != ".py"
            or ".." in parts
            or any(p.lower() in _TEST_PARTS or p.startswith("test_") for p in parts)
        ):
            continue
        path = Path(str(package.locate_file(file)))
        try:
            tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue  # listed but not there, or a template: no documentation to take
        module = ".".join(parts).removesuffix(".py").removesuffix(".__init__")
        yield from _of_node(tree, module)


def _of_node(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str
) -> Iterator[tuple[str, str]]:
    text = ast.get_docstring(node)
    if text:
        yield name, text
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
            yield from _of_node(child, f"{name}.{child.name}")


def split_docstring(docstring: str, max_words: int) -> tuple[str, str]:
    """Summary sentence and body of a docstring as plain prose; either may be empty."""
    paragraphs = [p for p in (_plain(p) for p in _prose(docstring)) if p]
    if not paragraphs:
        return "", ""
    summary, *rest = _SENTENCE_END.split(paragraphs[0], maxsplit=1)
    body = " ".join([*rest, *paragraphs[1:]]).split()
    return summary.rstrip(". "), " ".join(body[:max_words])


def _prose(docstring: str) -> list[str]:
    """Paragraphs outside code, doctests, directives and the sections that are not prose."""
    lines = docstring.expandtabs().split("\n")
    kept: list[str] = []
    dropping = False
    indent_dropped: int | None = None  # inside a directive or a literal block: everything indented deeper goes
    i = 0
    while i < len(lines):
        line = lines[i]
        following = lines[i + 1].strip() if i + 1 < len(lines) else ""
        indent = len(line) - len(line.lstrip())
        if line.strip() and len(following) >= 3 and _UNDERLINE.match(following) and not line.lstrip().startswith(">>>"):
            dropping = line.strip().lower().rstrip(":") in _DROPPED
            kept.append("")
            i += 2
            continue
        i += 1
        if indent_dropped is not None and (not line.strip() or indent > indent_dropped):
            continue
        indent_dropped = None
        if dropping:
            continue
        if _DIRECTIVE.match(line):
            indent_dropped = indent
            continue
        if line.lstrip().startswith((">>>", "...")):
            # A doctest runs to the next empty line; what it prints is not prose either.
            while i < len(lines) and lines[i].strip():
                i += 1
            continue
        if line.rstrip().endswith("::"):
            kept.append(line.rstrip()[:-1])
            indent_dropped = indent
            continue
        kept.append(line)
    return "\n".join(kept).split("\n\n")


def _plain(paragraph: str) -> str:
    """One paragraph without markup, on one line."""
    # Rules of tables and grids hold no words.
    text = "\n".join(line for line in paragraph.split("\n") if not _RULE.match(line.strip()))
    text = _ROLE.sub(r"\1", text)
    text = _MARKUP.sub(lambda m: m.group(1) or m.group(2) or m.group(3) or "", text)
    return normalise(_CITATION.sub("", text))
