"""What people read: a stage's result, a run's table, an artefact's content. Text in, text out."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from nvr_tasks.artifacts import Artifact, Store
from nvr_tasks.errors import NvrError
from nvr_tasks.html import mark
from nvr_tasks.pipeline import StageResult, stage_results
from nvr_tasks.registry import Entry
from nvr_tasks.rejections import Rejection

CELL = 48  # characters of a table cell that `nvr show` prints
SHARD = re.compile(r"(?<=\d)of(?=\d+$)")  # in the name of a part
NOT_IN_TABLE = frozenset({"criteria", "report_url"})


def stage_lines(result: StageResult) -> list[str]:
    """The result of one stage, for a terminal."""
    lines = [f"{result.stage}: {outcome(result)} in {result.seconds:.1f} s · {_figures(result.figures)}".rstrip(" ·")]
    lines += [f"  {role}: {uri}" for role, uris in result.outputs.items() for uri in uris]
    lines += [f"  {mark(c)} {c['name']}: {c['reason']}" for c in result.figures.get("criteria", [])]
    lines += [f"  {note}" for note in result.figures.get("notes", [])]
    return lines


def outcome(result: StageResult) -> str:
    """ran, reused or skipped."""
    return "skipped" if result.skipped else "reused" if result.reused else "ran"


def run_table(store: Store, pipeline_run: str) -> str:
    """Stages of a pipeline run (seconds, ran or reused, key figures), registered version, verdict, where to look."""
    results = stage_results(store, pipeline_run)
    opened = store.read_record(f"runs/{pipeline_run}/begin.json")
    if opened is None and not results:
        raise NvrError(f"no pipeline run {pipeline_run!r} below {store.root}/runs: check the id and --root")
    rows = [("stage", "seconds", "result", "key figures")]
    rows += [
        (
            r.stage + (f" {SHARD.sub('/', r.part)}" if r.part else ""),
            f"{r.seconds:.1f}",
            outcome(r),
            _figures(r.figures),
        )
        for r in results
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [f"pipeline run {pipeline_run} · recipe {opened['figures']['recipe'] if opened else '?'}", ""]
    for number, (name, seconds, result, figures) in enumerate(rows):
        lines.append(f"{name:<{widths[0]}}  {seconds:>{widths[1]}}  {result:<{widths[2]}}  {figures}".rstrip())
        if number == 0:
            lines.append("─" * max(60, sum(widths) + 30))
    by_stage = {r.stage: r for r in results}
    if "ablation" in by_stage:
        lines += ["", *_ablation_lines(store, by_stage["ablation"])]
    elif "cell" not in by_stage:
        lines += ["", *_version_lines(by_stage), *_verdict_lines(by_stage)]
    lines += ["", *_where_lines(store, opened, by_stage)]
    return "\n".join(lines)


def history_table(model: str, moves: Sequence[Entry], rejected: Sequence[Rejection] = ()) -> str:
    """The moves of a champion and the rejections in between, oldest first, for a terminal."""
    if not moves and not rejected:
        return f"{model}: the champion was never moved"
    lines = []
    for entry in _by_time(moves, rejected):
        number, arrow, state, note = "–", "↛", "", ""  # a rejection
        if isinstance(entry, Entry):
            number, arrow, note = str(entry.number), "→", entry.note
            state = "" if entry.closed else "  (open: the next run finishes it)"
        lines.append(
            f"{number:>4}  {entry.when[:19]}Z  {entry.action:<8}  {entry.source or '–':>3} {arrow} {entry.target or '–':<3}  "
            f"{entry.who}{state}"
        )
        said = "; ".join(part for part in (entry.why, note) if part)
        lines += [f"      {line}" for line in (said, entry.decision) if line]
    return "\n".join(lines)


def history_json(moves: Sequence[Entry], rejected: Sequence[Rejection] = ()) -> str:
    """The moves of a champion and the rejections in between as JSON, one per line; `champion` is who was it afterwards."""
    rows = [
        asdict(entry) | ({} if isinstance(entry, Entry) else {"number": None, "champion": entry.source})
        for entry in _by_time(moves, rejected)
    ]
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


def _by_time(moves: Sequence[Entry], rejected: Sequence[Rejection]) -> list[Entry | Rejection]:
    """All in the order of their times, but moves in that of their numbers: the clocks of two machines may differ."""
    left, merged = list(rejected), list[Entry | Rejection]()
    for move in moves:
        while left and left[0].when < move.when:
            merged.append(left.pop(0))
        merged.append(move)
    return merged + left


def _ablation_lines(store: Store, result: StageResult) -> list[str]:
    from nvr_tasks.ablation_report import text_table

    [uri] = result.outputs["ablation"]
    return text_table(store.read_json(store.open(uri), "ablation.json")).splitlines()


def _version_lines(results: dict[str, StageResult]) -> list[str]:
    register = results.get("register")
    if register is None:
        return ["no model was registered: the run did not get that far"]
    figures = register.figures
    news = "registered now" if figures.get("new") else "registered before; nothing new was registered"
    return [f"model    {figures['model']} version {figures['version']} ({news})"]


def _verdict_lines(results: dict[str, StageResult]) -> list[str]:
    gate, promote = results.get("gate"), results.get("promote")
    if gate is None:
        return []
    standing = promote is not None and str(promote.figures.get("champion")) == gate.figures["version"]
    known = " (nothing to do: it is the champion already)" if standing and gate.figures["verdict"] == "hold" else ""
    lines = [f"verdict  {gate.figures['verdict']}{known}"]
    lines += [f"  {mark(c)} {c['name']}: {c['reason']}" for c in gate.figures["criteria"]]
    if promote is not None:
        champion = promote.figures.get("champion")
        lines.append(f"champion version {champion}" if champion else "champion none")
        if promote.skipped and gate.figures["verdict"] != "hold":
            lines.append(f"  not promoted: {promote.skipped}")
    return lines


def _where_lines(store: Store, opened: dict[str, Any] | None, results: dict[str, StageResult]) -> list[str]:
    lines = ["where to look", f"  artefacts  {store.root}   (nvr show URI)"]
    if opened is not None:
        figures = opened["figures"]
        kept = figures["mlflow_tracking_uri"]
        url = figures["mlflow_run_url"]
        if kept.startswith("sqlite:") and not url:
            lines.append(f"  MLflow     mlflow ui --backend-store-uri {kept}")
        else:
            hint = f"   (make up starts the server; kept in {kept})" if kept.startswith("sqlite:") else ""
            lines.append(f"  MLflow     {url}{hint}")
    for name, role in (("gate", "decision"), ("ablation", "ablation")):
        if name in results:
            [uri] = results[name].outputs[role]
            made = store.recorded(uri)
            lines.append(f"  report     {made.uri}/{made.manifest.prefix}report.html")
    if "register" in results:
        figures, promote = results["register"].figures, results.get("promote")
        champion = promote is not None and promote.figures.get("champion")
        model = f"{figures['model']}@champion" if champion else f"{figures['model']}/{figures['version']}"
        lines.append(f'  load it    mlflow.sentence_transformers.load_model("models:/{model}")')
        if opened is not None:
            lines.append(f'             after mlflow.set_tracking_uri("{opened["figures"]["mlflow_tracking_uri"]}")')
    return lines


def _figures(figures: dict[str, Any]) -> str:
    return " · ".join(
        f"{k} {_value(v)}" for k, v in figures.items() if k not in NOT_IN_TABLE and not isinstance(v, list | dict)
    )


def _value(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


# ── nvr show ─────────────────────────────────────────────────────────────────────────────────────────────────────


def show(store: Store, uri: str, rows: int) -> str:
    """A pipeline run (`runs/ID`, `runs/latest`) or an artefact: manifest, files and the first rows of its tables."""
    relative = uri.rstrip("/").removeprefix(store.root).strip("/")
    if relative.startswith("runs/"):
        run = relative.removeprefix("runs/")
        if run == "latest":
            latest = store.read_record("runs/latest.json")
            if latest is None:
                raise NvrError(f"no pipeline run below {store.root}/runs yet: `nvr run --recipe demo` makes one")
            run = latest["pipeline_run"]
        return run_table(store, run)
    full = uri if uri.startswith(store.root) else f"{store.root}/{relative}"
    return _artifact(store, store.open(full), rows)


def _artifact(store: Store, artifact: Artifact, rows: int) -> str:
    manifest = artifact.manifest
    folder = store.fetch(artifact)
    lines = [
        f"{manifest.kind} {manifest.fingerprint}",
        f"  uri      {artifact.uri}",
        f"  made     {manifest.created_at} by stage version {manifest.stage_version}, nvr {manifest.code_version}",
        f"  digest   {manifest.content_digest[:32]} over {len(manifest.files)} files, {sum(f.size for f in manifest.files):,} bytes",
        *(f"  input    {role}: {input_uri}" for role, input_uri in manifest.inputs.items()),
        "  stats    " + json.dumps(manifest.stats, ensure_ascii=False),
        "  config   " + json.dumps(manifest.config, ensure_ascii=False),
        "  files",
        *(f"    {f.size:>12,}  {f.path}" for f in manifest.files),
    ]
    for entry in manifest.files:
        path = folder / entry.path
        if path.suffix == ".parquet":
            lines += ["", f"{entry.path}", *_head(path, rows)]
        elif path.suffix == ".json" and manifest.kind in ("registration", "decision", "promotion", "benchmark", "cell"):
            lines += ["", f"{entry.path}", path.read_text(encoding="utf-8")]
    return "\n".join(lines)


def _head(path: Any, rows: int) -> list[str]:
    import pandas as pd
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    head = next(file.iter_batches(batch_size=max(rows, 1)), None)
    if head is None:
        return ["  (no rows)"]
    short = head.to_pandas().head(rows).map(lambda v: text[:CELL] + "…" if len(text := str(v)) > CELL else text)
    with pd.option_context("display.max_columns", None, "display.width", None):
        table = short.to_string(index=False)
    return [*(f"  {line}" for line in table.splitlines()), f"  … {file.metadata.num_rows:,} rows"]
