"""BEIR layout on disk: corpus.jsonl[.gz], queries.jsonl[.gz], qrels/<split>.tsv[.gz].

A document or query may have a field `image` or `audio`: the path of a file below the data set's folder.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nvr_tasks.data.media_files import Find, MediaFiles, below, is_media
from nvr_tasks.data.raw import Qrels, RawData
from nvr_tasks.errors import NvrError
from nvr_tasks.media import KINDS

SUFFIXES = ("", ".gz")
QRELS_HEADER = ("query-id", "corpus-id", "score")
_INTEGER = re.compile(r"-?\d{1,9}")


def is_part(name: str) -> bool:
    """Whether a path relative to the data set's folder is one of its files."""
    parts = name.split("/")
    stem = name.removesuffix(".gz")
    return stem in ("corpus.jsonl", "queries.jsonl") or _is_qrels(parts) or is_media(name)


def _is_qrels(parts: Sequence[str]) -> bool:
    return len(parts) == 2 and parts[0] == "qrels" and parts[1].removesuffix(".gz").endswith(".tsv")


def files_of(folder: Path) -> list[Path]:
    """The data set's files, sorted by path."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and is_part(p.relative_to(folder).as_posix()))


def read_beir(folder: Path, where: str, media: MediaFiles | None = None) -> RawData:
    """Read a data set and check every line.

    Args:
        media: keeps the images and sounds; without it a row that names one is refused.

    Raises:
        NvrError: a file is missing, a line is malformed (file and line number), an id is used twice for different
            texts, a judgement names a document or query that is not there, the corpus is empty, an image or sound cannot be
            read (`MediaFiles.keep`).
    """
    if not folder.is_dir():
        raise NvrError(f"no data set at {where}: there is no such folder")
    data = RawData(where)
    corpus, queries, qrels = (
        _one(folder, "corpus.jsonl", where),
        _one(folder, "queries.jsonl", where),
        _qrels(folder, where),
    )
    find = below(folder)
    for row, line in _json_lines(corpus, where):
        title = row.get("title")
        doc_id, file = _id(row, line), row_media(row, line, find, media)
        data.add_document(
            doc_id,
            "" if title is None else _text({"title": title}, "title", line),
            text_beside(file, row, line),
            line,
            file,
        )
    data.check_documents()
    for row, line in _json_lines(queries, where):
        query_id, file = _id(row, line), row_media(row, line, find, media)
        data.add_query(query_id, text_beside(file, row, line), line, file)
    for split, path in qrels.items():
        for query_id, doc_id, score, line in _judgements(path, f"{where}/qrels/{path.name}"):
            data.add_judgement(split, query_id, doc_id, score, line)
    return data.checked()


def row_media(row: Mapping[str, Any], line: str, find: Find, media: MediaFiles | None) -> str:
    """The image or sound that a row names, kept; empty if it names none."""
    named = {kind: row[kind] for kind in KINDS if row.get(kind) not in (None, "")}
    if not named:
        return ""
    where = f"{line} ({row.get('_id', row.get('id', 'without id'))!r})"
    if media is None:
        raise NvrError(
            f"{where} has {' and '.join(named)}: images and sounds are read for training only; use a data set of texts here"
        )
    return media.keep(named, where, find)


def text_beside(file: str, row: Mapping[str, Any], line: str) -> str:
    """A row's text, which may be missing beside an image or sound."""
    return "" if file and row.get("text") is None else _text(row, "text", line)


def _one(folder: Path, name: str, where: str) -> Path:
    found = [folder / f"{name}{suffix}" for suffix in SUFFIXES if (folder / f"{name}{suffix}").is_file()]
    if len(found) == 1:
        return found[0]
    if found:
        raise NvrError(f"{where} has both {found[0].name} and {found[1].name}: remove one")
    raise NvrError(
        f"{where} has no {name} or {name}.gz: expected BEIR layout (corpus.jsonl, queries.jsonl, qrels/<split>.tsv)"
    )


def _qrels(folder: Path, where: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in files_of(folder):
        if not _is_qrels(path.relative_to(folder).parts):
            continue
        split = path.name.removesuffix(".gz").removesuffix(".tsv")
        if split in found:
            raise NvrError(f"{where} has both {found[split].name} and {path.name}: remove one")
        found[split] = path
    if not found:
        raise NvrError(
            f"{where} has no qrels/<split>.tsv: expected BEIR layout (corpus.jsonl, queries.jsonl, qrels/<split>.tsv)"
        )
    return found


def _lines(path: Path, where: str) -> Iterator[tuple[str, int]]:
    """Lines with their numbers from 1; damage to the file becomes a message with the last good line."""
    number = 0
    try:
        with path.open("rb") as stored, gzip.GzipFile(fileobj=stored) if path.suffix == ".gz" else stored as file:
            for raw in file:
                number += 1
                yield raw.decode("utf-8-sig" if number == 1 else "utf-8"), number
    except UnicodeDecodeError as error:
        raise NvrError(
            f"{where}, line {number}: not UTF-8 ({error.reason} at byte {error.start} of the line): correct the source"
        ) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise NvrError(f"{where} is damaged or cut off after line {number} ({error}): fetch it again") from None


def _json_lines(path: Path, where: str) -> Iterator[tuple[dict[str, Any], str]]:
    where = f"{where}/{path.name}"
    for text, number in _lines(path, where):
        if not text.strip():
            continue
        line = f"{where}, line {number}"
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise NvrError(f"{line}: malformed JSON ({error}), correct this line: {_short(text)}") from None
        if not isinstance(row, dict):
            raise NvrError(f"{line}: expected a JSON object, correct this line: {_short(text)}")
        yield row, line


def _id(row: dict[str, Any], line: str) -> str:
    value = row.get("_id")
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value:
        raise NvrError(
            f'{line}: "_id" is {_absent(row, "_id")}, expected a text, correct this line: {_short(json.dumps(row))}'
        )
    if not _is_unicode(value):
        raise NvrError(f'{line}: "_id" {value!r} is not valid Unicode, correct this line: {_short(json.dumps(row))}')
    return value


def _is_unicode(text: str) -> bool:
    """Whether a text can be stored: JSON may escape half of a surrogate pair."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def _absent(row: Mapping[str, Any], key: str) -> str:
    return repr(row[key]) if key in row else "missing"


def _text(row: Mapping[str, Any], key: str, line: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        shown = json.dumps(dict(row), default=repr)  # of a table of the hub, a row may hold bytes
        raise NvrError(f'{line}: "{key}" is {_absent(row, key)}, expected a text, correct this line: {_short(shown)}')
    return value


def _short(text: str) -> str:
    text = text.strip()
    return text if len(text) <= 80 else f"{text[:77]}…"


def _judgements(path: Path, where: str) -> Iterator[tuple[str, str, int, str]]:
    lines = _lines(path, where)
    header = next(lines, ("", 0))[0].rstrip("\r\n").split("\t")
    missing = [name for name in QRELS_HEADER if name not in header]
    if missing:
        raise NvrError(
            f"{where}, line 1: no column {', '.join(missing)} in the header {header}; expected {' ⇥ '.join(QRELS_HEADER)} (tabs)"
        )
    query, document, score = (header.index(name) for name in QRELS_HEADER)
    for text, number in lines:
        if not text.strip():
            continue
        cells = text.rstrip("\r\n").split("\t")
        line = f"{where}, line {number}"
        if len(cells) != len(header):
            raise NvrError(
                f"{line}: {len(cells)} columns, the header has {len(header)}, correct this line: {_short(text)}"
            )
        if not _INTEGER.fullmatch(cells[score].strip()):
            raise NvrError(f"{line}: score {cells[score]!r} is not a whole number, correct this line: {_short(text)}")
        yield cells[query], cells[document], int(cells[score]), line


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────


def write_beir(
    folder: Path,
    documents: Iterable[tuple[str, str, str]],
    queries: Iterable[tuple[str, str]],
    split: str,
    qrels: Qrels,
) -> None:
    """Write a data set with one split; the same rows give the same bytes.

    Args:
        documents: (id, title, text).
        queries: (id, text).
    """
    (folder / "qrels").mkdir(parents=True)
    _write_json_lines(
        folder / "corpus.jsonl.gz", ({"_id": i, "title": title, "text": text} for i, title, text in documents)
    )
    _write_json_lines(folder / "queries.jsonl.gz", ({"_id": i, "text": text} for i, text in queries))
    with (folder / "qrels" / f"{split}.tsv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_NONE, quotechar=None)
        writer.writerow(QRELS_HEADER)
        writer.writerows((query_id, doc_id, score) for (query_id, doc_id), score in qrels.items())


def _write_json_lines(path: Path, rows: Iterable[dict[str, str]]) -> None:
    # mtime 0 and no file name in the header: the bytes depend on the rows only. ASCII: lone surrogates survive.
    with (
        path.open("wb") as raw,
        gzip.GzipFile("", "wb", 6, raw, mtime=0) as zipped,
        io.TextIOWrapper(zipped, "ascii", newline="\n") as file,
    ):
        for row in rows:
            file.write(json.dumps(row) + "\n")


def digest_rows(data: RawData, split: str) -> str:
    """Content hash over every row and one split's judgements, in order."""
    digest = hashlib.sha256()
    for kind, rows in (
        ("corpus", ([i, title, text] for i, (title, text) in data.documents.items())),
        ("queries", ([i, text] for i, text in data.queries.items())),
        (f"qrels/{split}", ([q, d, str(score)] for (q, d), score in data.qrels[split].items())),
    ):
        digest.update(f"{kind}\n".encode())
        for row in rows:
            digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()
