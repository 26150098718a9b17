"""The stage `download`: named by content, reused without reading, all or nothing."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent / "data"))

from data_helpers import Web, as_tar, as_zip, beir_recipe, recipe, web_server, write_beir

from nvr_tasks.artifacts import Artifact, Store
from nvr_tasks.config import Recipe
from nvr_tasks.data import sources
from nvr_tasks.data.beir import read_beir
from nvr_tasks.dataset import read_dataset
from nvr_tasks.errors import NvrError
from nvr_tasks.pipeline import Context, StageResult, execute, locate
from nvr_tasks.recipe_files import load_recipe
from nvr_tasks.stages import stage

REAL = os.environ.get("NVR_DATA")  # before the fixture below hides it


@pytest.fixture(autouse=True)
def no_mirrors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NVR_DATA", raising=False)


def context(recipe: Recipe, root: Path) -> Context:
    return Context(recipe, Store(str(root)))


def download(recipe: Recipe, root: Path) -> StageResult:
    return execute(stage("download"), context(recipe, root))


def artifacts(result: StageResult, root: Path) -> dict[str, Artifact]:
    return {kind: Store(str(root), verify=True).open(uris[0]) for kind, uris in result.outputs.items()}


def names(result: StageResult) -> dict[str, str]:
    return {kind: uris[0].rsplit("/", 1)[-1] for kind, uris in result.outputs.items()}


def test_both_artefacts(tmp_path: Path) -> None:
    source = write_beir(tmp_path / "set")
    made = artifacts(download(beir_recipe(source), tmp_path / "root"), tmp_path / "root")
    store = Store(str(tmp_path / "root"))
    data = read_dataset(store.fetch(made["dataset"]))
    assert list(data.corpus["doc_id"]) == sorted(f"a/d{i}" for i in range(12))
    assert data.corpus["group"].tolist() == list(range(12))
    assert sorted(data.queries["query_id"]) == [f"a/q{i}" for i in range(8)], "test queries are the benchmark's"
    assert (data.queries["split"] == "dev").sum() == 2
    assert set(data.qrels["query_id"]) <= set(data.queries["query_id"])
    folder = store.fetch(made["benchmark"])
    tasks = json.loads((folder / "tasks.json").read_text())
    assert tasks["Bench"]["counts"] == {"documents": 12, "queries": 4, "judgements": 4}
    assert tasks["Bench"]["official"] is False
    assert tasks["Bench"]["split"] == "test"
    assert len(tasks["Bench"]["revision"]) == 64
    mirror, original = read_beir(folder / "Bench", "mirror"), read_beir(source, "original")
    assert list(mirror.documents.items()) == list(original.documents.items()), "whole corpus, source order"
    assert mirror.queries == {q: original.queries[q] for q in ("q8", "q9", "q10", "q11")}
    assert mirror.qrels == {"test": original.qrels["test"]}
    assert list((tmp_path / "root" / "tmp").glob("work-*")) == []


def test_benchmark_text_is_not_normalised(tmp_path: Path) -> None:
    odd = "  two  spaces\tA\u030a\u00a0\u200b\n"
    source = write_beir(
        tmp_path / "set",
        corpus={"d": (odd, odd), "e": "other"},
        queries={"q": odd, "r": "x"},
        qrels={"train": [("r", "d", 1)], "test": [("q", "d", 1)]},
    )
    made = artifacts(download(beir_recipe(source, dev_queries=0), tmp_path / "root"), tmp_path / "root")
    store = Store(str(tmp_path / "root"))
    mirror = read_beir(store.fetch(made["benchmark"]) / "Bench", "mirror")
    assert mirror.documents["d"] == (odd, odd)
    assert mirror.queries == {"q": odd}
    assert read_dataset(store.fetch(made["dataset"])).corpus["text"][0] == "two spaces Å"


def test_same_input_same_bytes_under_another_root(tmp_path: Path) -> None:
    ours = beir_recipe(write_beir(tmp_path / "set"))
    one, two = (artifacts(download(ours, tmp_path / root), tmp_path / root) for root in ("one", "two"))
    for kind in ("dataset", "benchmark"):
        assert one[kind].manifest.fingerprint == two[kind].manifest.fingerprint
        assert one[kind].manifest.content_digest == two[kind].manifest.content_digest
        assert one[kind].manifest.stats == two[kind].manifest.stats


def test_second_run_reads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = beir_recipe(write_beir(tmp_path / "set"))
    first = download(ours, tmp_path / "root")
    assert not first.reused
    monkeypatch.setattr(sources, "read", lambda *_: pytest.fail("read"))
    second = download(ours, tmp_path / "root")
    assert second.reused
    assert second.outputs == first.outputs
    assert second.figures == first.figures


def test_a_changed_source_makes_new_artefacts_and_locate_follows(tmp_path: Path) -> None:
    ours, root = beir_recipe(write_beir(tmp_path / "set")), tmp_path / "root"
    first = download(ours, root)
    write_beir(tmp_path / "set", queries={f"q{i}": f"a new question number {i} on {i * 7}" for i in range(12)})
    assert locate(context(ours, root), "dataset")[0].uri == first.outputs["dataset"][0], "locating asks no source"
    second = download(ours, root)
    assert not second.reused
    assert names(second)["dataset"] != names(first)["dataset"]
    assert names(second)["benchmark"] != names(first)["benchmark"]
    for role in ("dataset", "benchmark"):
        assert locate(context(ours, root), role)[0].uri == second.outputs[role][0]


def test_a_touched_source_of_the_same_content_makes_nothing_new(tmp_path: Path) -> None:
    ours, root = beir_recipe(write_beir(tmp_path / "set")), tmp_path / "root"
    first = download(ours, root)
    with (tmp_path / "set" / "corpus.jsonl").open("a") as file:
        file.write("\n\n")
    assert download(ours, root).outputs == first.outputs
    assert len(list((root / "dataset").iterdir())) == 1


def test_the_same_content_at_another_place_is_the_same_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_beir(tmp_path / "set")
    zipped, tarred = tmp_path / "set.zip", tmp_path / "set.tar.gz"
    zipped.write_bytes(as_zip(folder))
    tarred.write_bytes(as_tar(folder))
    found = [
        names(download(beir_recipe(place), tmp_path / f"root{i}")) for i, place in enumerate((folder, zipped, tarred))
    ]
    monkeypatch.setenv("NVR_DATA", str(tmp_path))
    away = {"type": "beir", "uri": "/gone"}
    mirrored = recipe(
        [{"name": "a", "origin": away, "mirror": "set"}],
        [{"task": "Bench", "origin": away, "mirror": "set", "official": False}],
    )
    found.append(names(download(mirrored, tmp_path / "root")))
    assert found == [found[0]] * 4


def test_settings_that_shape_the_data_make_other_data(tmp_path: Path) -> None:
    source = write_beir(tmp_path / "set")
    usual, more = (names(download(beir_recipe(source, dev_queries=n), tmp_path / "root")) for n in (2, 3))
    assert usual["dataset"] != more["dataset"]
    assert usual["benchmark"] == more["benchmark"]


def test_an_artefact_that_was_deleted_is_made_again(tmp_path: Path) -> None:
    ours, root = beir_recipe(write_beir(tmp_path / "set")), tmp_path / "root"
    made = artifacts(download(ours, root), root)
    Store(str(root)).delete(made["dataset"])
    with pytest.raises(NvrError, match="run `nvr download`"):
        locate(context(ours, root), "dataset")
    again = download(ours, root)
    assert not again.reused
    assert artifacts(again, root)["dataset"].manifest.content_digest == made["dataset"].manifest.content_digest


def test_locating_before_the_first_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "probe", lambda *_: pytest.fail("asked"))
    with pytest.raises(
        NvrError, match=r"no dataset for recipe test at .*: run `nvr download` with the same recipe first"
    ):
        locate(context(beir_recipe("https://nowhere.invalid/a.zip"), tmp_path), "dataset")


def test_a_web_archive_is_asked_for_its_version_only(tmp_path: Path) -> None:
    with web_server(Web({"/set.zip": as_zip(write_beir(tmp_path / "set"))})) as web:
        ours = beir_recipe(f"{web.url}/set.zip")
        first = download(ours, tmp_path / "root")
        assert len(web.gets()) == 1, "source and benchmark are one file, fetched once"
        web.log.clear()
        assert download(ours, tmp_path / "root").reused
        assert [method for method, *_ in web.log] == ["HEAD"]
        web.tag = '"v2"'  # published again, same content
        again = download(ours, tmp_path / "root")
        assert len(web.gets()) == 1
        assert again.outputs == first.outputs


BAD = {
    "malformed line": lambda f: (f / "corpus.jsonl").write_text('{"_id": "1", "text": "a"}\n{"_id"\n'),
    "missing document": lambda f: (f / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq1\tnone\t1\n"),
    "empty corpus": lambda f: (f / "corpus.jsonl").write_text(""),
    "id twice": lambda f: (f / "corpus.jsonl").write_text('{"_id": "1", "text": "a"}\n{"_id": "1", "text": "b"}\n'),
    "no train split": lambda f: (f / "qrels" / "train.tsv").unlink(),
    "no test split": lambda f: (f / "qrels" / "test.tsv").unlink(),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_told_and_nothing_is_written(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from nvr_tasks.cli import main

    source = write_beir(tmp_path / "set")
    BAD[case](source)
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(beir_recipe(source).dump()))
    assert main(["download", "--recipe", str(path), "--root", str(tmp_path / "root")]) == 1
    shown = capsys.readouterr()
    assert shown.err.count("nvr: ") == 1
    assert "Traceback" not in shown.err
    assert str(source) in shown.err
    assert [p for p in (tmp_path / "root").rglob("*") if p.is_file()] == []


def test_a_failed_refresh_keeps_what_was_there(tmp_path: Path) -> None:
    ours, root = beir_recipe(write_beir(tmp_path / "set")), tmp_path / "root"
    first = download(ours, root)
    (tmp_path / "set" / "corpus.jsonl").write_text("{")
    with pytest.raises(NvrError, match="line 1"):
        download(ours, root)
    assert locate(context(ours, root), "dataset")[0].uri == first.outputs["dataset"][0]


def test_a_strict_recipe_removes_more_and_says_so(tmp_path: Path) -> None:
    qrels = {"train": [(f"q{i}", f"d{i}", 1) for i in range(8)], "test": [("q9", "d0", 1), ("q9", "d1", 1)]}
    source = write_beir(tmp_path / "set", qrels=qrels)
    made = {
        strict: artifacts(
            download(beir_recipe(source, decontamination={"strict": strict}), tmp_path / "root"), tmp_path / "root"
        )
        for strict in (False, True)
    }
    stats: dict[bool, dict[str, Any]] = {strict: a["dataset"].manifest.stats for strict, a in made.items()}
    assert stats[False]["removed"]["query_left_without_positive"] == 0
    assert stats[True]["removed"]["positive_relevant_in_benchmark_strict"] == 2
    assert stats[True]["removed"]["query_left_without_positive"] == 2
    assert stats[True]["figures"]["train_queries"] == stats[False]["figures"]["train_queries"] - 2
    assert stats[True]["sources"]["a"]["removed"] == {
        "positive_relevant_in_benchmark_strict": 2,
        "query_left_without_positive": 2,
    }


def test_package_docs_benchmark_is_decontaminated(tmp_path: Path) -> None:
    docs = {"type": "package_docs", "packages": ["networkx"], "test_percent": 15}
    ours = recipe([{"name": "docs", "origin": docs}], [{"task": "Docs", "origin": docs, "official": False}])
    root = tmp_path / "root"
    made = artifacts(download(ours, root), root)
    data = read_dataset(Store(str(root)).fetch(made["dataset"]))
    mirror = read_beir(Store(str(root)).fetch(made["benchmark"]) / "Docs", "mirror")
    assert len(data.queries) > 500
    assert len(mirror.queries) > 80
    assert not set(data.queries["text"]) & set(mirror.queries.values())
    assert len(data.corpus) == len(mirror.documents)


def test_the_module_is_light() -> None:
    import subprocess

    heavy = {"pandas", "numpy", "scipy", "pyarrow", "requests", "datasets", "torch"}
    code = f"import sys, nvr_tasks.download; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
@pytest.mark.skipif(REAL is None, reason="needs NVR_DATA: a folder with scifact, nfcorpus, feedbackqa, boolq, medquad")
def test_beir_small_on_the_real_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVR_DATA", REAL or "")
    made = artifacts(download(load_recipe("beir-small"), tmp_path / "root"), tmp_path / "root")
    tasks = made["benchmark"].manifest.stats["tasks"]
    assert tasks["SciFact"]["counts"] == {"documents": 5183, "queries": 300, "judgements": 339}
    assert tasks["NFCorpus"]["counts"] == {"documents": 3633, "queries": 323, "judgements": 12334}
    stats = made["dataset"].manifest.stats
    assert stats["counts"]["passages"] == 5183 + 3633 + 2364 + 12271 + 15809
    assert stats["removed"]["query_equals_benchmark"] == 6
    assert stats["counts"]["train_queries"] + stats["counts"]["dev_queries"] > 30_000


def test_a_benchmark_that_mteb_does_not_know_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    nowhere = {"type": "beir", "uri": str(tmp_path / "absent")}
    wrong = recipe([{"name": "s", "origin": nowhere}], [{"task": "SciFactt", "origin": nowhere}])
    with pytest.raises(NvrError, match=r"mteb has no task 'SciFactt'; nearest: .*SciFact"):
        execute(stage("download"), Context(wrong, Store(str(tmp_path / "store"))), {})
    assert not list((tmp_path / "store").glob("*/*/manifest.json"))
