"""Data sets of the Hugging Face Hub at a pinned commit. Code in a repository is never run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvr_tasks.data.beir import row_media, text_beside
from nvr_tasks.data.bounds import Bound
from nvr_tasks.data.media_files import Find, MediaFiles
from nvr_tasks.data.raw import RawData
from nvr_tasks.data.tables import Media, read_file, read_tables
from nvr_tasks.data.text import normalise
from nvr_tasks.data_settings import HubSource
from nvr_tasks.errors import NvrError
from nvr_tasks.media import KINDS

if TYPE_CHECKING:
    from datasets import Dataset

RETRIES = 3
_WHERE_TO_LOOK = (
    "check the network and HF_ENDPOINT (and HF_TOKEN for a private set), or set NVR_DATA to a folder with mirrors"
)


def read_hub(source: HubSource, media: MediaFiles | None = None, bound: Bound | None = None) -> RawData:
    """Read a data set. Rows of tables that are left out are counted in `merged`; `media` keeps images and sounds.

    Args:
        bound: how much of a corpus or of a table of pairs is wanted.
    """
    data = RawData(f"{source.repo}@{source.revision[:7]}")
    find = partial(_file, source.repo, source.revision)
    if source.layout == "beir":
        _read_beir(source, data, find, media, bound)
    else:
        tables: Mapping[str, Any]
        if source.files:
            tables = {split: load_file(source.repo, source.revision, path) for split, path in source.files.items()}
        else:
            tables = _rows(source, source.config)
        read_tables(tables, source, data, Media(media, lambda _: find) if media is not None else None, bound)
    return data.checked()


class _Rows:
    """Rows of a table, read a thousand at a time: by itself each would take as long as all that is done with it."""

    def __init__(self, table: Dataset) -> None:
        self.table = table

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.table.iter(batch_size=1000):
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(batch, values, strict=True))


# ── layout beir: configs corpus, queries and the judgements ──────────────────────────────────────────────────────


def _rows(source: HubSource, config: str | None) -> dict[str, _Rows]:
    return {split: _Rows(table) for split, table in load_tables(source.repo, source.revision, config).items()}


def _read_beir(
    source: HubSource, data: RawData, find: Find, media: MediaFiles | None, bound: Bound | None = None
) -> None:
    configs = list_configs(source.repo, source.revision)
    prefix = f"{source.config}-" if source.config and f"{source.config}-corpus" in configs else ""
    judged = (
        f"{prefix}qrels" if prefix else next((c for c in (source.config, "default", "qrels") if c in configs), None)
    )
    missing = [c for c in (f"{prefix}corpus", f"{prefix}queries", judged or "default") if c not in configs]
    if missing or judged is None:
        raise NvrError(
            f"{data.where} has no config {', '.join(missing)}; it has {', '.join(configs)}: is its layout beir?"
        )
    corpus, queries = _rows(source, f"{prefix}corpus"), _rows(source, f"{prefix}queries")
    judgements = _judgements(_rows(source, judged), f"{data.where}, {judged}")
    wanted, asked = None, None
    if bound is not None:
        judgements = list(judgements)
        passages, questions = (set(_with_text(t, data.where)) for t in (corpus, queries))
        rows = ((s, q, d, score) for s, q, d, score, _ in judgements if q in questions and d in passages)
        wanted = bound.wanted(rows, passages)
        judgements = [j for j in judgements if wanted.document(j[2])]
        asked = {query for _, query, *_ in judgements}
    for split, table in corpus.items():
        for number, row in enumerate(table):
            line = f"{data.where}, corpus/{split} row {number}"
            doc_id = _id(row, line, "_id", "id")
            if wanted is None or wanted.document(doc_id):
                file = row_media(row, line, find, media)
                data.add_document(doc_id, row.get("title") or "", text_beside(file, row, line), line, file)
    data.check_documents()
    for split, table in queries.items():
        for number, row in enumerate(table):
            line = f"{data.where}, queries/{split} row {number}"
            query_id = _id(row, line, "_id", "id")
            if asked is None or query_id in asked:
                file = row_media(row, line, find, media)
                data.add_query(query_id, text_beside(file, row, line), line, file)
    for split, query_id, doc_id, score, line in judgements:
        data.add_judgement(split, query_id, doc_id, score, line)
    if wanted is not None:
        wanted.count(data)


def _with_text(tables: Mapping[str, _Rows], where: str) -> Iterable[str]:
    """Ids of rows that are not empty."""
    for table in tables.values():
        for row in table:
            if any(row.get(kind) for kind in KINDS) or normalise(f"{row.get('title') or ''}{row.get('text') or ''}"):
                yield _id(row, where, "_id", "id")


def _judgements(tables: Mapping[str, _Rows], where: str) -> Iterable[tuple[str, str, str, int, str]]:
    """Split, query, document and score of every judgement, and where it is."""
    for split, table in tables.items():
        for number, row in enumerate(table):
            line = f"{where}/{split} row {number}"
            score = row.get("score", 1)
            if not isinstance(score, int | float) or score != int(score):
                raise NvrError(f"{line}: score {score!r} is not an integer")
            yield split, _id(row, line, "query-id"), _id(row, line, "corpus-id"), int(score), line


def _id(row: Mapping[str, Any], line: str, *names: str) -> str:
    for name in names:
        if row.get(name) is not None:
            return str(row[name])
    raise NvrError(f"{line}: no column {' or '.join(names)}; columns: {', '.join(row)}")


# ── the hub ──────────────────────────────────────────────────────────────────────────────────────────────────────


def list_configs(repo: str, revision: str) -> list[str]:
    """Configs of a data set."""
    import datasets

    with explained(repo, revision):
        names: list[str] = datasets.get_dataset_config_names(
            repo, revision=revision, download_config=_download_config()
        )
        return names


def load_tables(repo: str, revision: str, config: str | None) -> dict[str, Dataset]:
    """Every split of one config."""
    import datasets

    with explained(repo, revision):
        datasets.disable_progress_bars()
        tables = datasets.load_dataset(repo, config, revision=revision, download_config=_download_config())
        return {split: _undecoded(table) for split, table in tables.items()}


def _undecoded(table: Dataset) -> Dataset:
    """A table whose images and sounds are the bytes that they came as."""
    from datasets import Audio, Image

    for name, feature in (table.features or {}).items():
        if isinstance(feature, Image | Audio) and feature.decode:
            table = table.cast_column(name, type(feature)(decode=False))
    return table


def _file(repo: str, revision: str, path: str) -> Path:
    """A file of the repository, by a path that a table has."""
    from huggingface_hub import hf_hub_download

    with explained(repo, revision):
        return Path(hf_hub_download(repo, path, repo_type="dataset", revision=revision))


def load_file(repo: str, revision: str, path: str) -> list[dict[str, Any]]:
    """Rows of a file of the repository."""
    return read_file(_file(repo, revision, path), f"{repo}@{revision[:7]}/{path}")


def _download_config() -> Any:
    import datasets

    return datasets.DownloadConfig(max_retries=RETRIES)


@contextlib.contextmanager
def explained(repo: str, revision: str) -> Iterator[None]:
    """Whatever goes wrong on the way to the hub becomes one message that names the repository."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        yield
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, ConnectionError, TimeoutError) as error:
        raise NvrError(
            f"cannot reach the hub at {endpoint} for {repo}: {_first_line(error)}; {_WHERE_TO_LOOK}"
        ) from error
    except (DatasetsError, HfHubHTTPError, FileNotFoundError) as error:
        raise NvrError(
            f"the hub at {endpoint} has no usable {repo} at revision {revision}: {_first_line(error)}; {_WHERE_TO_LOOK}"
        ) from error
    except ValueError as error:  # what `datasets` says of a config or split that the set lacks
        raise NvrError(
            f"cannot read {repo} at revision {revision}: {_first_line(error)}; check config and split"
        ) from error
    except RuntimeError as error:
        if "script" not in str(error).lower():
            raise
        raise NvrError(
            f"{repo} asks to run its own code, which is never done: choose another source, or name its data files in `files`"
        ) from error
    except Exception as error:
        # Which HTTP library the hub's client uses changes between its versions, so its errors go by the module's name.
        if not any(
            c.__module__.partition(".")[0].startswith(("httpx", "httpcore", "requests")) for c in type(error).__mro__
        ):
            raise
        raise NvrError(
            f"cannot reach the hub at {endpoint} for {repo}: {_first_line(error)}; {_WHERE_TO_LOOK}"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
