"""From the rows of a table to a retrieval data set: pairs, labelled texts, scored pairs.

Labelled and scored texts are what the second stage of arXiv:2407.15831 §4 adds. A text with a label is a query; what
answers it are other texts of its label, and what does not are texts of other labels. So that judgements stay linear in
the texts, each label has a bounded number of passages, and its other texts are queries. Every passage of a query's own
label is judged relevant to it, so none of them is ever mined as its negative.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvr_tasks.data.bounds import Bound, Wanted
from nvr_tasks.data.media_files import Find, MediaFiles
from nvr_tasks.data.raw import RawData
from nvr_tasks.data.text import comparison_key, normalise
from nvr_tasks.data_settings import Columns
from nvr_tasks.errors import NvrError

RELATED = "related"  # split of judgements that only bar a passage from being mined

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Media:
    """Where the images and sounds of tables are kept, and, by split, what opens the paths that tables have of them."""

    files: MediaFiles
    finds: Callable[[str], Find]


def read_tables(
    tables: Mapping[str, Iterable[Row]],
    columns: Columns,
    data: RawData,
    media: Media | None = None,
    bound: Bound | None = None,
) -> None:
    """Read split → rows into `data`, in the layout that `columns` says. What is left out is counted in `data.merged`.

    Args:
        tables: iterated twice if there is a bound.
        bound: how much of a table of pairs is wanted, so that a large one need not be held.
    """
    kept = {split: _kept(rows, columns, data, split) for split, rows in sorted(tables.items())}
    if columns.layout == "pairs":
        wanted = None
        if bound is not None and not columns.media_columns:  # a file's name is known when it has been read
            wanted = bound.wanted(_ids(tables, columns, data.where))
        _pairs(kept, columns, data, media, wanted)
        if wanted is not None:
            wanted.count(data)
    else:
        {"labels": _labels, "scored_pairs": _scored_pairs}[columns.layout](kept, columns, data)


def read_file(path: Path, where: str) -> list[dict[str, Any]]:
    """Rows of a .parquet, .csv, .json (an array of objects) or .jsonl file."""
    if not path.is_file():
        raise NvrError(f"no table at {where}: there is no such file")
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            return list(pq.read_table(path).to_pylist())
        if path.suffix == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as file:  # a cell may have line breaks of any kind
                return list(csv.DictReader(file))
        text = path.read_text(encoding="utf-8-sig")
        rows = (
            json.loads(text)
            if text.lstrip().startswith("[")
            else [json.loads(line) for line in text.split("\n") if line.strip()]
        )
    except (ValueError, OSError) as error:
        kind = {".parquet": "parquet", ".csv": "CSV"}.get(path.suffix, "JSON")
        raise NvrError(f"{where} is not {kind}: {error}") from None
    if not all(isinstance(row, dict) for row in rows):
        raise NvrError(f"{where} is not a list of objects")
    return list(rows)


def _kept(rows: Iterable[Row], columns: Columns, data: RawData, split: str) -> Iterator[tuple[str, Row]]:
    """Where each row is, and the row; those that `keep` leaves out are counted."""
    for number, row in enumerate(rows):
        line = f"{data.where}, {split} row {number}"
        if any(not _has(cell(row, column, line), value) for column, value in columns.keep.items()):
            data.merged["row_not_kept"] += 1
            continue
        yield line, row


# ── layouts ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _pairs(
    tables: Mapping[str, Iterable[tuple[str, Row]]],
    columns: Columns,
    data: RawData,
    media: Media | None,
    wanted: Wanted | None,
) -> None:
    for split, rows in tables.items():
        for line, row in rows:
            file = _media(row, columns, split, line, media)
            query, title, passage = _pair(row, columns, line)
            if not query or not (passage or file):
                data.merged["row_without_text"] += 1
            elif wanted is None or wanted.document(_doc_id(title, passage)):
                _judge(data, split, query, title, passage, line, file)


def _pair(row: Row, columns: Columns, line: str) -> tuple[str, str, str]:
    """Query, title and passage of a row, each empty if it has none."""
    found = []
    for column in (columns.query_column, columns.title_column, columns.passage_column):
        value = (cell(row, column, line) if column else None) or ""
        _check_text(column, value, line)
        found.append(value)
    return found[0], found[1], found[2]


def _ids(tables: Mapping[str, Iterable[Row]], columns: Columns, where: str) -> Iterator[tuple[str, str, str, int]]:
    """Split, query and document of every row that has both, and that the one is relevant to the other."""
    for split, rows in sorted(tables.items()):
        for line, row in _kept(rows, columns, RawData(where), split):
            query, title, passage = _pair(row, columns, line)
            if comparison_key(query) and normalise(passage):
                yield split, _query_id(query), _doc_id(title, passage), 1


def _media(row: Row, columns: Columns, split: str, line: str, media: Media | None) -> str:
    """The image or sound of a row's passage, kept; empty if it has none."""
    if not columns.media_columns:
        return ""
    if media is None:
        raise NvrError(f"{line}: images and sounds are read for training only; use a data set of texts here")
    values = {kind: cell(row, column, line) for kind, column in columns.media_columns.items()}
    return media.files.keep(values, line, media.finds(split))


def _scored_pairs(tables: Mapping[str, Iterable[tuple[str, Row]]], columns: Columns, data: RawData) -> None:
    """Two texts and how alike they are, which holds in both directions."""
    positive, related = columns.positive_score or 0.0, columns.related_score or 0.0
    for split, rows in tables.items():
        for line, row in rows:
            one, other = cell(row, columns.query_column, line), cell(row, columns.passage_column or "", line)
            if not one or not other:
                data.merged["row_without_text"] += 1
                continue
            _check_text(columns.query_column, one, line)
            _check_text(columns.passage_column, other, line)
            score = _number(cell(row, columns.score_column or "", line), columns.score_column, line)
            for query, passage in ((one, other), (other, one)):
                if comparison_key(query) == comparison_key(passage):
                    data.merged["pair_of_equal_texts"] += 1
                elif score >= positive:
                    _judge(data, split, query, "", passage, line)
                elif score >= related:
                    _judge(data, RELATED, query, "", passage, line)
                else:
                    data.documents.setdefault(_digest(f"\n{passage}"), ("", passage))  # may be mined


def _labels(tables: Mapping[str, Iterable[tuple[str, Row]]], columns: Columns, data: RawData) -> None:
    passages: dict[str, dict[str, list[str]]] = {}  # split → label → texts that are its passages
    queries: dict[str, list[tuple[str, str]]] = {}
    for split, by_label in _by_label(tables, columns, data).items():
        passages[split], queries[split] = {}, []
        for label, members in sorted(by_label.items()):
            if len(members) < 2:
                data.merged["label_with_one_text"] += 1
                continue
            members.sort(key=_digest)
            count = min(columns.passages_per_label, len(members) // 2)
            passages[split][label] = members[:count]
            queries[split] += [(text, label) for text in members[count:]]
    if not any(queries.values()):
        raise NvrError(
            f"{data.where} has no label with two texts: check text_column ({columns.text_column}) and "
            f"label_column ({columns.label_column})"
        )
    for split, wanted in queries.items():
        for text, label in wanted:
            for other, of_label in passages.items():
                for passage in of_label.get(label, []):
                    _judge(data, split if other == split else RELATED, text, "", passage, f"{data.where}, {split}")


def _by_label(
    tables: Mapping[str, Iterable[tuple[str, Row]]], columns: Columns, data: RawData
) -> dict[str, dict[str, list[str]]]:
    """Split → label → its texts; texts that have several labels, in whichever splits, are left out."""
    labels: dict[str, dict[str, str]] = {}
    seen: dict[str, set[str]] = defaultdict(set)
    for split, rows in tables.items():
        labels[split] = {}
        for line, row in rows:
            for text, label in _labelled(row, columns, line):
                if not text or label is None:
                    data.merged["row_without_text"] += 1
                    continue
                _check_text(columns.text_column, text, line)
                labels[split][text] = str(label)
                seen[comparison_key(text)].add(str(label))
    found: dict[str, dict[str, list[str]]] = {split: defaultdict(list) for split in labels}
    for split, texts in labels.items():
        for text, label in texts.items():
            if len(seen[comparison_key(text)]) > 1:
                data.merged["text_with_several_labels"] += 1
            else:
                found[split][label].append(text)
    return found


def _labelled(row: Row, columns: Columns, line: str) -> Iterator[tuple[Any, Any]]:
    """Text and label of a row, or, where both columns hold lists (as clustering sets do), all of them."""
    text, label = cell(row, columns.text_column, line), cell(row, columns.label_column or "", line)
    if isinstance(text, list) and isinstance(label, list):
        if len(text) != len(label):
            raise NvrError(f"{line}: {len(text)} texts, but {len(label)} labels")
        yield from zip(text, label, strict=True)
    else:
        yield text, label


# ── rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _judge(data: RawData, split: str, query: str, title: str, passage: str, line: str, media: str = "") -> None:
    """Rows have no ids: a text's digest is one that any order of the rows agrees on."""
    query_id, doc_id = _query_id(query), _doc_id(title, passage, media)
    data.documents.setdefault(doc_id, (title, passage))
    if media:
        data.media.setdefault(doc_id, media)
    data.queries.setdefault(query_id, query)
    data.add_judgement(split, query_id, doc_id, 1, line)


def _query_id(query: str) -> str:
    return _digest(comparison_key(query))


def _doc_id(title: str, passage: str, media: str = "") -> str:
    # With a file in a way that no title and text can spell.
    return _digest(json.dumps([title, passage, media]) if media else f"{title}\n{passage}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def cell(row: Row, column: str, line: str) -> Any:
    """The value of a column; `a.b` is field b of column a. None where a parent is null."""
    value: Any = row
    for part in [column] if column in row else column.split("."):
        if value is None:
            return None
        if not isinstance(value, Mapping) or part not in value:
            raise NvrError(f"{line}: no column {column!r}; columns: {', '.join(row)}")
        value = value[part]
    return value


def _check_text(column: str | None, value: Any, line: str) -> None:
    if not isinstance(value, str):
        raise NvrError(f"{line}: column {column} has {type(value).__name__} {value!r}, expected a text")


def _number(value: Any, column: str | None, line: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise NvrError(f"{line}: column {column} has {value!r}, expected a number") from None


def _has(found: Any, value: str) -> bool:
    return value in found if isinstance(found, list) else str(found) == value
