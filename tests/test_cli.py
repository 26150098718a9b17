"""The command line: quick help, results on stdout, the story on stderr, one message and a status for every failure."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from nvr_tasks import cli, command_line
from nvr_tasks.artifacts import Store
from nvr_tasks.errors import NvrError
from nvr_tasks.pipeline import StageResult
from nvr_tasks.recipe_files import shipped_recipes
from nvr_tasks.stages import STAGES

Run = Callable[..., subprocess.CompletedProcess]
HEAVY = ("torch", "transformers", "sentence_transformers", "mlflow", "pandas", "numpy", "boto3", "datasets", "mteb")
REPORT_IMPORTS = """
import sys
from nvr_tasks.cli import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    assert not stop.code, stop.code
print("IMPORTED", sorted(set({heavy!r}) & set(sys.modules)))
"""


def assert_one_message(result: subprocess.CompletedProcess, status: int, *said: str) -> None:
    """A failure for people: status, nothing on stdout, one message, no traceback."""
    assert result.returncode == status, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert [line for line in result.stderr.splitlines() if line.startswith("nvr: ")] != []
    assert result.stderr.count("nvr: ") == 1
    for text in said:
        assert text in result.stderr


# ── help ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_help_lists_every_stage_and_imports_nothing_heavy(python: Run) -> None:
    result = python("-c", REPORT_IMPORTS.format(heavy=HEAVY), "--help")
    assert result.returncode == 0, result.stderr
    text = " ".join(result.stdout.split())
    for row in STAGES:
        assert f"{row.name} {row.summary}" in text
    assert result.stdout.splitlines()[-1] == "IMPORTED []"


@pytest.mark.parametrize("arguments", [["config"], ["config", "--json-schema"], ["recipes"], ["embed", "--help"]])
def test_light_commands_import_nothing_heavy(python: Run, arguments: list[str]) -> None:
    result = python("-c", REPORT_IMPORTS.format(heavy=HEAVY), *arguments)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "IMPORTED []"


@pytest.mark.parametrize("row", STAGES, ids=lambda row: row.name)
def test_the_help_of_a_stage_is_its_contract(row, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([row.name, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    document = importlib.import_module(row.module).__doc__
    assert document
    assert document.strip() in shown
    assert "--recipe" in shown


def test_no_arguments_is_a_usage_error(nvr: Run) -> None:
    result = nvr()
    assert result.returncode == 2
    assert "usage: nvr" in result.stderr


# ── failures ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["embed", "--recipe", "demoo"], 2, "Did you mean demo?"),
        (["embed", "--recipe", "absent.yaml"], 2, "cannot read recipe absent.yaml"),
        (["embed", "--set", "mine.treshold=1"], 2, "mine.treshold: unknown key (value 1). Did you mean threshold?"),
        (["embed", "--set", "mine.threshold=2"], 2, "mine.threshold: 2 is not allowed"),
        (["embed", "--set", "seed"], 2, "override 'seed' is not of the form"),
        (["embed", "--input", "dataset"], 2, "--input 'dataset' is not of the form ROLE=URI"),
        (["embed", "--input", "modle=x"], 1, "stage embed has no input modle; it reads: dataset"),
        (["embed"], 1, "no dataset for recipe demo at file://"),
        (["embed", "--recipe", "s3://r.yaml"], 2, "s3://r.yaml names no recipe: expected s3://bucket/"),
        (["embed", "--root", "gs://bucket"], 1, "cannot store artefacts at 'gs://bucket'"),
        (["show", "runs/latest"], 1, "no pipeline run below file://"),
        (["show", "runs/absent"], 1, "no pipeline run 'absent' below"),
        (["show", "words/1f"], 1, "no artefact at file://"),
        (["show", "file:///elsewhere/words/1f"], 1, "no artefact at file:///elsewhere/words/1f"),
        (["finish"], 2, "finish needs --pipeline-run ID"),
        (["finish", "--pipeline-run", "absent"], 1, "no pipeline run 'absent' below"),
    ],
)
def test_a_failure_is_one_message(nvr: Run, arguments: list[str], status: int, said: str) -> None:
    assert_one_message(nvr(*arguments), status, said)


def test_nothing_is_made_by_a_failure(nvr: Run, tmp_path: Path) -> None:
    nvr("embed")
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_no_disk_space(
    nvr: Run, small_disk: Callable[[str], Path], tiny_file: Path, publish_dataset: Callable, store
) -> None:
    """The root is on a disk with 8 KiB; the stage fails when it writes its first file."""
    from nvr_tasks.artifacts import Store

    root = small_disk("32k") / "artifacts"
    dataset = publish_dataset(Store(str(root)), ["a passage"], ["a query"])
    (root / "ballast").write_bytes(b"")
    with (root / "ballast").open("ab", buffering=0) as ballast, pytest.raises(OSError, match="No space left"):
        while True:
            ballast.write(bytes(4096))
    result = nvr("embed", f"--recipe={tiny_file}", f"--root={root}", f"--input=dataset={dataset.uri}")
    assert_one_message(result, 1, "no disk space left while writing", "point NVR_ROOT / NVR_SCRATCH at a larger disk")
    assert not (root / "embeddings").exists()


def save_with_torch(path: Path) -> None:
    import torch

    torch.save(torch.zeros(100_000), path)


def save_with_safetensors(path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(100_000)}, path)


def save_with_pyarrow(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"x": [str(i) for i in range(100_000)]}), path)


def save_with_sqlite(path: Path) -> None:
    import sqlite3

    with sqlite3.connect(path) as connection:
        connection.execute("create table t (x)")
        connection.execute("insert into t values (?)", (bytes(300_000),))


def wrapped(path: Path) -> None:
    try:
        path.write_bytes(bytes(300_000))
    except OSError as error:
        path.unlink()
        raise NvrError("cannot save the model") from error


@pytest.mark.parametrize("save", [save_with_torch, save_with_safetensors, save_with_pyarrow, save_with_sqlite, wrapped])
@pytest.mark.parametrize("tidy", [False, True])
def test_no_disk_space_in_the_words_of_libraries(
    save: Callable[[Path], None],
    tidy: bool,
    small_disk: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = small_disk("128k") / "file"

    def stage(_: object) -> int:
        try:
            save(path)
        finally:
            if tidy:  # as a work folder does: the disk has room again when the failure is explained
                path.unlink(missing_ok=True)
        return 0

    monkeypatch.setitem(cli.COMMANDS, "recipes", stage)
    assert cli.main(["recipes"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("nvr: no disk space left")
    assert "point NVR_ROOT / NVR_SCRATCH at a larger disk" in said
    assert len(said.splitlines()) == 1


def test_a_failure_beside_a_full_disk(
    small_disk: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever a library says, a scratch folder without a byte left is the likeliest cause."""
    folder = small_disk("64k")

    def fail(_: object) -> int:
        raise RuntimeError("strange")

    monkeypatch.setitem(cli.COMMANDS, "recipes", fail)
    monkeypatch.setenv("NVR_SCRATCH", str(folder / "not" / "yet"))
    with (folder / "ballast").open("wb", buffering=0) as ballast, pytest.raises(OSError, match="No space left"):
        while True:
            ballast.write(bytes(4096))
    assert cli.main(["recipes"]) == 1
    assert f"nvr: no disk space left at {folder}/not/yet (RuntimeError: strange): free space" in capsys.readouterr().err


def test_a_root_that_cannot_be_written(nvr: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = nvr("download", "--recipe=demo", f"--root={tmp_path / 'file'}")
    assert_one_message(result, 1, "file")


@pytest.mark.parametrize("uri", ["foo://me:hunter2@host/x", "mlruns"])
def test_a_tracking_uri_without_a_registry(nvr: Run, tmp_path: Path, uri: str) -> None:
    result = nvr("begin", "--recipe=demo", "--pipeline-run=1", f"--root={tmp_path / 'root'}", MLFLOW_TRACKING_URI=uri)
    assert_one_message(result, 1, "MLFLOW_TRACKING_URI", "is no place for a model registry")
    assert "hunter2" not in result.stderr


def test_an_error_of_ours_is_not_dressed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setitem(cli.COMMANDS, "recipes", fail)
    with pytest.raises(OSError, match="Input/output error"):
        cli.main(["recipes"])


def test_an_interrupt_says_that_work_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "recipes", interrupted)
    assert cli.main(["recipes"]) == 130
    assert "finished artefacts are kept" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_failure(environment: Callable[..., dict[str, str]]) -> None:
    """`nvr config --json-schema | head -1`"""
    command = [sys.executable, "-m", "nvr_tasks", "config", "--json-schema"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""


# ── results ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def skipping(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Arguments of a stage that finds nothing to do."""
    result = StageResult("promote", {"promotion": []}, {"champion": 3, "note": "größe"}, skipped="the verdict is hold")
    monkeypatch.setattr("nvr_tasks.pipeline.execute", lambda *_: result)
    return ["promote", "--root", str(tmp_path)]


def test_the_result_line_is_one_marked_line_of_json(skipping: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*skipping, "--result-line"]) == 99
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith(cli.RESULT_MARK)
    assert json.loads(line.removeprefix(cli.RESULT_MARK)) == {
        "stage": "promote",
        "outputs": {"promotion": []},
        "figures": {"champion": 3, "note": "größe"},
        "reused": False,
        "skipped": "the verdict is hold",
        "seconds": 0.0,
        "started_at": "",
        "part": "",
    }


def test_by_hand_a_skipped_stage_is_no_failure(skipping: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(skipping) == 0
    assert capsys.readouterr().out.startswith("promote: skipped in 0.0 s · champion 3")


def test_a_pod_leaves_its_result_for_airflow(
    skipping: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "xcom").mkdir()
    monkeypatch.setattr(cli, "XCOM_FILE", str(tmp_path / "xcom" / "return.json"))
    cli.main([*skipping, "--result-line"])
    assert json.loads((tmp_path / "xcom" / "return.json").read_text())["stage"] == "promote"


def test_options_reach_the_stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []
    monkeypatch.setattr("nvr_tasks.pipeline.execute", lambda *call: calls.append(call) or StageResult("embed", {}))
    cli.main(["embed", "--root", str(tmp_path), "--shard=1/2", "--input=dataset=a=b", "--pipeline-run=x/y", "--verify"])
    cli.main(["gate", "--root", str(tmp_path), "--decide-only", "--input=evaluation_champion="])
    (row, ctx, given), (_, gate, gate_given) = calls
    assert (row.name, dict(ctx.options), given, ctx.pipeline_run) == (
        "embed",
        {"shard": "1/2"},
        {"dataset": ["a=b"]},
        "x-y",
    )
    assert ctx.store.verify
    assert (dict(gate.options), gate_given) == ({"decide_only": "1", "recipe": "demo"}, {"evaluation_champion": []})


@pytest.mark.parametrize(("value", "verify"), [("1", True), ("true", True), ("0", False), ("", False), (None, False)])
def test_verify_can_be_set_in_the_environment(
    value: str | None, verify: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = []
    monkeypatch.setattr("nvr_tasks.pipeline.execute", lambda *call: calls.append(call) or StageResult("embed", {}))
    if value is None:
        monkeypatch.delenv("NVR_VERIFY", raising=False)
    else:
        monkeypatch.setenv("NVR_VERIFY", value)
    cli.main(["embed", "--root", str(tmp_path)])
    assert calls[0][1].store.verify is verify


@pytest.mark.parametrize("value", ["", "set"])
def test_an_empty_setting_is_no_setting(nvr: Run, tmp_path: Path, value: str) -> None:
    root = str(tmp_path / value) if value else ""
    result = nvr("show", "runs/latest", NVR_ROOT=root, NVR_RECIPE="", NVR_SCRATCH="")
    expected = (tmp_path / (value or command_line.DEFAULT_ROOT)).as_uri()
    assert f"no pipeline run below {expected}/runs yet" in result.stderr


# ── recipes ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_resolved_recipe_can_be_used_as_one(nvr: Run, tmp_path: Path) -> None:
    resolved = nvr("config", "--set", "seed=3").stdout
    (tmp_path / "resolved.yaml").write_text(resolved)
    assert "seed: 3\n" in resolved
    assert nvr("config", "--recipe", "resolved.yaml").stdout == resolved


@pytest.mark.parametrize(("method", "threshold"), [("abs", "0.7"), ("margin_pos", "0.05"), ("naive", "null")])
def test_the_resolved_recipe_has_the_threshold_in_force(nvr: Run, method: str, threshold: str) -> None:
    assert f"\n  threshold: {threshold}\n" in nvr("config", "--set", f"mine.method={method}").stdout


def test_an_artefact_can_be_shown_by_its_folder(nvr: Run, store: Store, publish_dataset: Any) -> None:
    artifact = publish_dataset(store, ["passage"], ["query"])
    shown = nvr("show", unquote(urlsplit(artifact.uri).path))
    assert shown.stdout.startswith(f"dataset {artifact.manifest.fingerprint}\n"), shown.stderr


def test_the_schema_is_printed_as_json(nvr: Run) -> None:
    assert json.loads(nvr("config", "--json-schema").stdout)["title"] == "Recipe"


def test_the_names_of_the_recipes(nvr: Run) -> None:
    assert nvr("recipes").stdout.split() == shipped_recipes()


def test_only_the_command_line_prints() -> None:
    package = Path(cli.__file__).parent
    for path in package.rglob("*.py"):
        if path.name == "cli.py":
            continue
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        printed = [c.lineno for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]
        assert not printed, f"{path.relative_to(package)} prints in lines {printed}"
