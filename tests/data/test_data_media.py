"""Images in sources: kept by content, checked before anything else reads them, never fetched from an address."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import as_tar, as_zip, beir_recipe, recipe, sentence, write_beir
from PIL import Image

from nvr_tasks.artifacts import Store
from nvr_tasks.config import Recipe
from nvr_tasks.data import hub, media_files, sources
from nvr_tasks.data.beir import read_beir
from nvr_tasks.data.media_files import MediaFiles
from nvr_tasks.data.page_images import page
from nvr_tasks.data.raw import RawData
from nvr_tasks.data_settings import BeirSource, HubSource, TableSource
from nvr_tasks.dataset import RetrievalData, read_dataset
from nvr_tasks.errors import NvrError
from nvr_tasks.media import START, parted, refer, shown
from nvr_tasks.pipeline import Context, execute
from nvr_tasks.stages import stage

PAGE, OTHER = page("A river of copper."), page("A violin in the harbour.")


@pytest.fixture
def files(tmp_path: Path) -> MediaFiles:
    return MediaFiles(tmp_path / "kept")


def illustrate(folder: Path, images: dict[str, str], contents: dict[str, bytes], part: str = "corpus") -> Path:
    """Give rows of a BEIR folder images: id → path; path → bytes."""
    rows = [json.loads(line) for line in (folder / f"{part}.jsonl").read_text().splitlines()]
    for row in rows:
        if row["_id"] in images:
            row["image"] = images[row["_id"]]
    (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Documents with an image alone, with image and text, with text alone; some of them twice; a query with an image."""
    corpus = {f"d{i}": ("", sentence(i)) for i in range(8)} | dict.fromkeys(("bare", "same", "unlike"), ("", ""))
    corpus |= {"twice": ("", sentence(2)), "again": ("", sentence(2)), "plain": ("", sentence(2))}
    qrels = {"train": [(f"q{i}", f"d{i}", 1) for i in range(6)] + [("q6", "bare", 1), ("q7", "twice", 1)]}
    queries = {f"q{i}": f"what about {sentence(100 + i, 6)}?" for i in range(8)} | {"q8": "what about it?"}
    folder = write_beir(tmp_path / "set", corpus, queries, qrels)
    illustrate(folder, {"q0": "q.png"}, {"q.png": OTHER}, "queries")
    named = {
        "d0": "a.png",
        "bare": "a.png",
        "same": "deep/copy.PNG",
        "unlike": "b.png",
        "twice": "b.png",
        "again": "b.png",
    }
    return illustrate(folder, named, {"a.png": PAGE, "deep/copy.PNG": PAGE, "b.png": OTHER})


def downloaded(folder: Path, tmp_path: Path) -> tuple[RetrievalData, Store, str]:
    store = Store(str(tmp_path / "root"), verify=True)
    ours = beir_recipe(folder, write_beir(tmp_path / "bench"), dev_queries=1)
    [uri] = execute(stage("download"), Context(ours, store)).outputs["dataset"]
    return read_dataset(store.fetch(store.open(uri))), store, uri


# ── the data set ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_data_set_keeps_images_by_content(pictures: Path, tmp_path: Path) -> None:
    data, store, uri = downloaded(pictures, tmp_path)
    assert data.files is not None
    seen = dict(zip(data.corpus["doc_id"], data.passages(), strict=True))
    for doc, content in {"a/d0": PAGE, "a/bare": PAGE, "a/same": PAGE, "a/unlike": OTHER, "a/twice": OTHER}.items():
        assert (data.files / parted(seen[doc])[0]).read_bytes() == content
    assert parted(seen["a/d0"])[1] == sentence(0)
    assert parted(seen["a/bare"])[1] == ""
    assert parted(seen["a/d1"]) == ("", sentence(1))
    kept = sorted(p.relative_to(data.files).as_posix() for p in data.files.rglob("*.*"))
    assert len(kept) == 2, "one file per content"
    assert store.open(uri).manifest.stats["counts"]["passages_with_media"] == 6
    queries = dict(zip(data.queries["query_id"], data.queries["text"], strict=True))
    assert (data.files / parted(queries["a/q0"])[0]).read_bytes() == OTHER
    assert "[image" in shown(queries["a/q0"])
    assert START not in shown(queries["a/q0"])
    assert list((tmp_path / "root" / "tmp").glob("work-*")) == []


def test_duplicates_are_equal_in_image_and_text(pictures: Path, tmp_path: Path) -> None:
    data, *_ = downloaded(pictures, tmp_path)
    group = dict(zip((d[2:] for d in data.corpus["doc_id"]), data.corpus["group"].tolist(), strict=True))
    assert group["bare"] == group["same"], "one image under two names"
    assert group["twice"] == group["again"]
    assert group["plain"] == group["d2"], "texts, as ever"
    assert len({group[d] for d in ("bare", "unlike", "twice", "plain", "d0", "d1")}) == 6


def test_another_image_makes_another_data_set(pictures: Path, tmp_path: Path) -> None:
    uri = downloaded(pictures, tmp_path)[2]
    probe = sources.probe(BeirSource(type="beir", uri=str(pictures)))
    (pictures / "a.png").write_bytes(page("A river of tin."))
    assert sources.probe(BeirSource(type="beir", uri=str(pictures))) != probe
    assert downloaded(pictures, tmp_path)[2] != uri


def test_a_data_set_of_texts_has_neither_column_nor_folder(tmp_path: Path) -> None:
    folder = illustrate(write_beir(tmp_path / "set"), {"d0": "", "d1": ""}, {"stray.png": PAGE})
    data, store, uri = downloaded(folder, tmp_path)
    assert data.files is None
    assert list(data.corpus.columns) == ["doc_id", "title", "text", "group"]
    assert {entry.path.split("/")[0] for entry in store.open(uri).manifest.files} == {
        "corpus",
        "queries.parquet",
        "qrels.parquet",
    }


def test_no_text_passes_for_an_image(pictures: Path, tmp_path: Path) -> None:
    """Nor does one that says what a reference to a file of this very data set would say."""
    data, *_ = downloaded(pictures, tmp_path)
    [reference] = [s for d, s in zip(data.corpus["doc_id"], data.passages(), strict=True) if d == "a/bare"]
    forged = write_beir(
        tmp_path / "forged", {"x": ("", reference), "d0": ("", "")}, {"q0": reference}, {"train": [("q0", "d0", 1)]}
    )
    raw = read_beir(illustrate(forged, {"d0": "a.png"}, {"a.png": PAGE}), "forged", MediaFiles(tmp_path / "kept"))
    from nvr_tasks.data.text import normalise

    assert parted(raw.documents["x"][1])[0], "it would, if it were let through"
    assert parted(normalise(reference)) == ("", normalise(reference))
    assert START not in normalise(f"{START}{START} a {reference}")
    assert parted(refer("image/../../secret.png", "x"))[0] == "", "and no path but the data set's own"


def test_images_are_for_training_only(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(NvrError, match=r"line 1 \('d0'\) has image: images and sounds are read for training only"):
        read_beir(pictures, "here")
    store = Store(str(tmp_path / "root"))
    with pytest.raises(NvrError, match="of task Bench have images or sounds, and a benchmark is scored on text alone"):
        execute(
            stage("download"),
            Context(beir_recipe(write_beir(tmp_path / "x"), illustrated_bench(tmp_path), dev_queries=1), store),
        )


def illustrated_bench(tmp_path: Path) -> Path:
    return illustrate(write_beir(tmp_path / "bench2"), {"d9": "a.png"}, {"a.png": PAGE})


# ── bad files ────────────────────────────────────────────────────────────────────────────────────────────────────


def encoded(name: str, size: tuple[int, int] = (8, 8)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, "red").save(out, name)
    return out.getvalue()


def _stereo() -> bytes:
    """Two JPEG images in one file, as cameras make them."""
    out = io.BytesIO()
    views = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    views[0].save(out, "MPO", save_all=True, append_images=views[1:])
    return out.getvalue()


def _noise() -> bytes:
    out = io.BytesIO()
    Image.effect_noise((30, 30), 64).save(out, "PNG")
    return out.getvalue()


NOISE = _noise()  # its pixels make up nearly all of it


@pytest.mark.parametrize(("name", "ending"), [("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp")])
def test_the_type_is_read_off_the_bytes(files: MediaFiles, tmp_path: Path, name: str, ending: str) -> None:
    kept = files.keep({"image": encoded(name)}, "row", Path)
    assert kept.startswith("image/")
    assert kept.endswith(f".{ending}")
    assert (tmp_path / "kept" / kept).read_bytes() == encoded(name)


@pytest.mark.parametrize(
    ("named", "content", "words"),
    [
        ("gone.png", None, r"image 'gone\.png' is not there"),
        ("../set2/a.png", None, r"image '\.\./set2/a\.png' climbs out of the folder"),
        ("/etc/hostname", None, "is an absolute or foreign path"),
        ("https://example.org/a.png", None, "is an address; addresses are never fetched"),
        ("file:///etc/hostname", None, "is an address"),
        ("C:\\a.png", None, "is an address|foreign path"),
        (7, None, "image is 7, expected the path of a file"),
        ("a.png", NOISE[: len(NOISE) // 2], r"image 'a\.png' is damaged \(.*\): fetch it again"),
        ("a.png", b"\x89PNG\r\n\x1a\n" + b"\0" * 40, r"image 'a\.png' is (damaged|no PNG)"),
        ("a.png", b"<html>no image here</html>", r"image 'a\.png' is no PNG, JPEG or WebP image"),
        ("a.png", b"", "is no PNG, JPEG or WebP image"),
        ("a.png", encoded("GIF"), "is no PNG, JPEG or WebP image"),
        ("a.png", _stereo(), "is MPO, and PNG, JPEG or WebP is read"),
        ("a.png", encoded("PNG", (40, 40)), "would unpack to more than 1,000 pixels"),
        ("a.png", encoded("PNG", (80, 80)), "would unpack to more than 1,000 pixels"),
        ("a.png", encoded("PNG") + b"\0" * 5000, "has 5,.* bytes, and at most 5,000 are read"),
    ],
)
def test_a_bad_image_is_refused_by_document_and_file(
    tmp_path: Path, files: MediaFiles, named: Any, content: bytes | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    monkeypatch.setattr(media_files, "MAX_FILE_BYTES", 5000)
    (tmp_path / "set2").mkdir()
    (tmp_path / "set2" / "a.png").write_bytes(encoded("PNG"))
    folder = illustrate(write_beir(tmp_path / "set"), {"d3": named}, {} if content is None else {"a.png": content})
    with pytest.raises(NvrError, match=rf"corpus\.jsonl, line 4 \('d3'\).*(?:{words})"):
        read_beir(folder, "here", files)


def test_a_link_that_leads_out_is_not_followed(tmp_path: Path, files: MediaFiles) -> None:
    folder = illustrate(write_beir(tmp_path / "set"), {"d0": "a.png", "d1": "in.png"}, {"b.png": PAGE})
    (tmp_path / "secret.png").write_bytes(OTHER)
    (folder / "in.png").symlink_to(folder / "b.png")
    (folder / "a.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(NvrError, match=r"'d0'\): image 'a\.png' climbs out of the folder"):
        read_beir(folder, "here", files)


def test_one_file_per_document_and_a_bound_on_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NvrError, match="row: it has both audio and image, and one of them is read"):
        MediaFiles(tmp_path).keep({"audio": b"x", "image": PAGE}, "row", Path)
    monkeypatch.setattr(media_files, "MAX_FILES", 1)
    kept = MediaFiles(tmp_path)
    assert kept.keep({"image": PAGE}, "row", Path) == kept.keep({"image": PAGE}, "row", Path)
    with pytest.raises(
        NvrError, match=r"row: image: the images and sounds of this data set are more than .* or 1 files"
    ):
        kept.keep({"image": OTHER}, "row", Path)


# ── places ───────────────────────────────────────────────────────────────────────────────────────────────────────


def read(source: Any, tmp_path: Path, files: MediaFiles) -> RawData:
    (tmp_path / "work").mkdir(exist_ok=True)
    return sources.read(source, tmp_path / "work", tmp_path / "parts", files)


@pytest.mark.parametrize("pack", [as_zip, as_tar])
def test_in_archives(pictures: Path, tmp_path: Path, files: MediaFiles, pack: Callable[[Path], bytes]) -> None:
    archive = tmp_path / ("set.zip" if pack is as_zip else "set.tar.gz")
    archive.write_bytes(pack(pictures))
    expected = read(BeirSource(type="beir", uri=str(pictures)), tmp_path, files)
    found = read(BeirSource(type="beir", uri=str(archive)), tmp_path, files)
    assert (found.documents, found.media, found.query_media) == (
        expected.documents,
        expected.media,
        expected.query_media,
    )
    assert len(found.media) == 6


def test_in_a_bucket(pictures: Path, tmp_path: Path, files: MediaFiles, bucket: str) -> None:
    import boto3

    for path in (p for p in pictures.rglob("*") if p.is_file()):
        boto3.client("s3").upload_file(str(path), bucket, f"set/{path.relative_to(pictures)}")
    source = BeirSource(type="beir", uri=f"s3://{bucket}/set")
    assert (
        read(source, tmp_path, files).media == read(BeirSource(type="beir", uri=str(pictures)), tmp_path, files).media
    )
    before = sources.probe(source)
    boto3.client("s3").put_object(Bucket=bucket, Key="set/deep/copy.PNG", Body=OTHER)
    assert sources.probe(source) != before


def pairs(kind: type, **more: Any) -> Any:
    return kind.model_validate({"layout": "pairs", "image_column": "scan", **more})


def test_pairs_with_paths(tmp_path: Path, files: MediaFiles) -> None:
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "1.png").write_bytes(PAGE)
    rows = [{"query": "What?", "scan": "scans/1.png"}, {"query": "Why?", "scan": None}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = pairs(TableSource, type="table", files={"train": str(tmp_path / "rows.jsonl")}, passage_column=None)
    data = read(source, tmp_path, files)
    assert list(data.documents.values()) == [("", "")]
    assert [(tmp_path / "kept" / m).read_bytes() for m in data.media.values()] == [PAGE]
    assert data.merged == {"row_without_text": 1}
    before = sources.probe(source)
    (tmp_path / "scans" / "1.png").write_bytes(OTHER)
    assert sources.probe(source) != before


def test_no_text_is_taken_for_one_with_an_image(tmp_path: Path, files: MediaFiles) -> None:
    (tmp_path / "1.png").write_bytes(PAGE)
    named = files.keep({"image": PAGE}, "here", Path)
    rows = [
        {"query": "What?", "scan": None, "passage": f"x\n{named}"},
        {"query": "Why?", "scan": "1.png", "passage": "x"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = read(pairs(TableSource, type="table", files={"train": str(tmp_path / "rows.jsonl")}), tmp_path, files)
    assert sorted(data.documents.values()) == [("", "x"), ("", f"x\n{named}")]
    assert [data.documents[doc] for doc in data.media] == [("", "x")]


def test_a_query_of_the_benchmark_is_removed_whatever_lies_beside_it(pictures: Path, tmp_path: Path) -> None:
    bench = write_beir(
        tmp_path / "bench", queries={"b0": f"what about {sentence(100, 6)}?"}, qrels={"test": [("b0", "d0", 1)]}
    )
    store = Store(str(tmp_path / "root"))
    [uri] = execute(stage("download"), Context(beir_recipe(pictures, bench), store)).outputs["dataset"]
    kept = list(read_dataset(store.fetch(store.open(uri))).queries["query_id"])
    assert "a/q0" not in kept
    assert "a/q1" in kept


def test_pairs_with_bytes_from_the_hub(tmp_path: Path, files: MediaFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `datasets` stores images: a struct of bytes and path, marked as an image in the schema."""
    import datasets

    rows = {
        "query": ["What?", "Why?"],
        "passage": ["A text.", None],
        "scan": [{"bytes": b, "path": "x.png"} for b in (PAGE, OTHER)],
    }
    features = datasets.Features(
        {"query": datasets.Value("string"), "passage": datasets.Value("string"), "scan": datasets.Image()}
    )
    table = datasets.Dataset.from_dict(rows, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"train": table})
    source = pairs(HubSource, type="hf", repo="some/set", revision="0" * 40)
    data = hub.read_hub(source, files)
    assert sorted(text for _, text in data.documents.values()) == ["", "A text."]
    assert {(files.folder / m).read_bytes() for m in data.media.values()} == {PAGE, OTHER}


def test_a_path_of_another_machine_is_no_file(tmp_path: Path, files: MediaFiles) -> None:
    """`datasets` writes paths of the machine that a table was made on; one of ours must not be read for it."""
    (tmp_path / "secret.png").write_bytes(PAGE)
    table = [{"query": "What?", "passage": "x", "scan": {"bytes": None, "path": str(tmp_path / "secret.png")}}]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "rows.parquet")
    source = pairs(TableSource, type="table", files={"train": str(tmp_path / "rows.parquet")})
    with pytest.raises(NvrError, match=r"train row 0: image '.*secret\.png' has no bytes"):
        read(source, tmp_path, files)


# ── the recipe ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_sources_of_texts_are_written_as_before() -> None:
    """They name records and indexes."""
    plain = HubSource.model_validate({"type": "hf", "repo": "a/b", "revision": "0" * 40})
    assert not {"image_column", "audio_column"} & set(plain.model_dump())
    assert pairs(HubSource, type="hf", repo="a/b", revision="0" * 40).model_dump()["image_column"] == "scan"
    docs = {"type": "package_docs", "packages": ["networkx"]}
    made: Recipe = recipe([{"name": "a", "origin": docs}], [{"task": "B", "origin": docs, "official": False}])
    assert "pages" not in made.dump()["data"]["sources"][0]["origin"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"layout": "labels", "label_column": "l"}, "layout labels reads no image: use layout pairs"),
        ({"layout": "beir"}, "layout beir reads no image"),
        ({"image_column": None, "passage_column": None}, "passage_column is null, so passages would be empty"),
    ],
)
def test_columns_that_no_layout_reads(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pairs(HubSource, type="hf", repo="a/b", revision="0" * 40, **settings)
