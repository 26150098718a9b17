"""nvr: the NV-Retriever workflow, stage by stage.

Calls and prints; no logic. The words of the command are in command_line.py. stdout is the result, stderr is the story.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from nvr_tasks.command_line import build_parser
from nvr_tasks.errors import EXIT_ERROR, EXIT_SKIPPED, EXIT_USAGE, NvrError, RecipeError, explain_failure
from nvr_tasks.stages import RESULT_MARK

if TYPE_CHECKING:
    from nvr_tasks.config import Recipe
    from nvr_tasks.pipeline import Context, StageResult

XCOM_FILE = "/airflow/xcom/return.json"  # where a Kubernetes pod leaves its result


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the `nvr` command; returns the exit status."""
    arguments = build_parser().parse_args(argv)
    _logging(arguments)
    _quiet_libraries()
    try:
        status: int = COMMANDS.get(arguments.command, _stage)(arguments)
        sys.stdout.flush()
    except RecipeError as error:
        print(f"nvr: {error}", file=sys.stderr)
        return EXIT_USAGE
    except BrokenPipeError:  # `nvr config | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR
    except Exception as error:
        explained = explain_failure(error, _written_folders(arguments))
        if explained is None and not isinstance(error, NvrError):
            raise
        print(f"nvr: {explained or error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("nvr: interrupted; finished artefacts are kept, run the same command to go on", file=sys.stderr)
        return 130
    return status


def _written_folders(arguments: argparse.Namespace) -> list[Path]:
    """Where a command writes on this machine."""
    root = getattr(arguments, "root", None)
    places = [root] if root is not None and not root.startswith("s3://") else []
    places.append(os.environ.get("NVR_SCRATCH") or tempfile.gettempdir())
    return [Path(unquote(p.removeprefix("file://")) if p.startswith("file://") else p).absolute() for p in places]


# ── commands ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _recipe(arguments: argparse.Namespace) -> Recipe:
    from nvr_tasks.recipe_files import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.set)
    if arguments.tiny:
        from nvr_tasks.tiny import tiny

        return tiny(recipe)
    return recipe


def _context(arguments: argparse.Namespace, **options: str | None) -> Context:
    from nvr_tasks.artifacts import Store
    from nvr_tasks.pipeline import Context, run_key

    recipe = _recipe(arguments)
    store = Store(arguments.root, verify=arguments.verify, scratch=os.environ.get("NVR_SCRATCH") or None)
    run = run_key(arguments.pipeline_run) if arguments.pipeline_run else None
    return Context(recipe, store, run, {k: v for k, v in options.items() if v})


def _stage(arguments: argparse.Namespace) -> int:
    from nvr_tasks.pipeline import execute
    from nvr_tasks.stages import stage

    given = _given(arguments)
    if getattr(arguments, "suggest", False):
        if arguments.result_line or arguments.pipeline_run or arguments.shard:
            raise RecipeError("--suggest makes no result: leave out --result-line, --pipeline-run and --shard")
        from nvr_tasks.audit import what_is_known
        from nvr_tasks.mine import suggestion
        from nvr_tasks.pipeline import complete_inputs

        ctx = _context(arguments)
        inputs = complete_inputs(stage("mine"), ctx, given)
        print("\n".join([suggestion(ctx, inputs), *what_is_known(ctx, inputs)]), flush=True)
        return 0
    ctx = _context(
        arguments,
        shard=getattr(arguments, "shard", None),
        node=getattr(arguments, "node", None),
        rendezvous=getattr(arguments, "rendezvous", None),
        model=getattr(arguments, "model", None),
        task=getattr(arguments, "task", None),
        cell=getattr(arguments, "cell", None),
        of=getattr(arguments, "of", None),
        recipe=arguments.recipe if arguments.stage in ("gate", "promote") else None,  # for the command that they print
        decide_only="1" if getattr(arguments, "decide_only", False) else None,
        approved_by=getattr(arguments, "approved_by", None),
        rejected_by=getattr(arguments, "rejected_by", None),
        reason=getattr(arguments, "reason", None),
    )
    result = execute(stage(arguments.stage), ctx, given)
    _print_result(result, arguments)
    return EXIT_SKIPPED if result.skipped and arguments.result_line else 0


def _given(arguments: argparse.Namespace) -> dict[str, list[str]]:
    """The artefacts named by --input, by role."""
    given: dict[str, list[str]] = {}
    for item in arguments.input:
        role, equals, uri = item.partition("=")
        if not equals:
            raise RecipeError(f"--input {item!r} is not of the form ROLE=URI")
        if uri:
            given.setdefault(role, []).append(uri)
        else:
            given.setdefault(role, [])
    return given


def _audit(arguments: argparse.Namespace) -> int:
    from nvr_tasks.audit import audit

    _print_result(audit(_context(arguments), _given(arguments)), arguments)
    return 0


def _print_result(result: StageResult, arguments: argparse.Namespace) -> None:
    line = result.to_json()
    if os.path.isdir(os.path.dirname(XCOM_FILE)):  # noqa: PTH112, PTH120
        with open(XCOM_FILE, "w", encoding="utf-8") as file:  # noqa: PTH123
            file.write(line)
    if arguments.result_line:
        print(f"{RESULT_MARK}{line}", flush=True)
        return
    from nvr_tasks.summary import stage_lines

    print("\n".join(stage_lines(result)), flush=True)


def _run(arguments: argparse.Namespace) -> int:
    from nvr_tasks.workflow import run

    print(run(_context(arguments)), flush=True)
    return 0


def _ablate(arguments: argparse.Namespace) -> int:
    from nvr_tasks.workflow import ablate, ablation_plan

    ctx = _context(arguments)
    print(ablation_plan(ctx) if arguments.dry_run else ablate(ctx), flush=True)
    return 0


def _begin(arguments: argparse.Namespace) -> int:
    from nvr_tasks.workflow import begin

    opened = begin(_context(arguments), ablation=arguments.ablation, train_gpus=arguments.train_gpus)
    _print_result(opened, arguments)
    return 0


def _finish(arguments: argparse.Namespace) -> int:
    from nvr_tasks.artifacts import Store
    from nvr_tasks.pipeline import run_key
    from nvr_tasks.workflow import finish

    if not arguments.pipeline_run:
        raise RecipeError("finish needs --pipeline-run ID")
    expected = arguments.expect.split(",") if arguments.expect else None
    print(finish(Store(arguments.root), run_key(arguments.pipeline_run), expected), flush=True)
    return 0


def _rollback(arguments: argparse.Namespace) -> int:
    from nvr_tasks.pipeline import StageResult
    from nvr_tasks.rollback import notes, rollback

    words = ["--recipe", arguments.recipe, *(word for item in arguments.set for word in ("--set", item))]
    words += ["--tiny"] * arguments.tiny
    ctx = _context(arguments, recipe_words=shlex.join(words))  # for the command that it prints
    entry = rollback(ctx, arguments.to, arguments.reason, by=arguments.by or None, force=arguments.force)
    figures: dict[str, Any] = {"champion": entry.champion, "from": entry.source, "move": entry.number}
    try:
        figures["notes"] = notes(ctx, entry, arguments.reason)
    except NvrError as error:  # the champion has moved: that is what counts
        logging.getLogger("nvr_tasks").warning("%s", error)
    _print_result(StageResult("rollback", {}, figures), arguments)
    return 0


def _history(arguments: argparse.Namespace) -> int:
    from nvr_tasks.registry import Registry
    from nvr_tasks.rejections import rejections
    from nvr_tasks.summary import history_json, history_table
    from nvr_tasks.tracking import Tracking

    ctx = _context(arguments)
    registry = Registry(ctx.store, Tracking(ctx.recipe.register_.experiment), ctx.recipe.register_.model_name)
    moves, rejected = registry.history(), rejections(registry)
    print(
        history_json(moves, rejected) if arguments.json else history_table(registry.name, moves, rejected), flush=True
    )
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from nvr_tasks.artifacts import MANIFEST, Store
    from nvr_tasks.summary import show

    root, uri = arguments.root, arguments.uri
    if Path(uri, MANIFEST).is_file():
        uri = Path(uri).resolve().as_uri()
    if "://" in uri:  # a whole URI carries its own root: <root>/<kind>/<fingerprint>
        root = uri.rstrip("/").rsplit("/", 2)[0]
    store = Store(root, verify=arguments.verify, scratch=os.environ.get("NVR_SCRATCH") or None)
    print(show(store, uri, arguments.rows), flush=True)
    return 0


def _config(arguments: argparse.Namespace) -> int:
    from nvr_tasks.recipe_files import json_schema

    if arguments.json_schema:
        print(json_schema())
        return 0
    import yaml

    recipe = _recipe(arguments)
    print(yaml.safe_dump(recipe.dump(), sort_keys=False, allow_unicode=True, width=110), end="")
    return 0


def _recipes(_: argparse.Namespace) -> int:
    from nvr_tasks.recipe_files import shipped_recipes

    print("\n".join(shipped_recipes()))
    return 0


COMMANDS = {
    "audit": _audit,
    "rollback": _rollback,
    "history": _history,
    "run": _run,
    "ablate": _ablate,
    "begin": _begin,
    "finish": _finish,
    "show": _show,
    "config": _config,
    "recipes": _recipes,
}  # every other one is a stage


# ── process-wide settings ────────────────────────────────────────────────────────────────────────────────────────


def _logging(arguments: argparse.Namespace) -> None:
    name = getattr(arguments, "stage", None) or "nvr"
    logging.basicConfig(
        level=logging.WARNING, stream=sys.stderr, format=f"%(asctime)s [{name}] %(message)s", datefmt="%H:%M:%S"
    )
    logging.getLogger("nvr_tasks").setLevel(logging.INFO)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # its retries; when they end, the error says so once


def _quiet_libraries() -> None:
    """Telemetry off, libraries quiet, before any of them is imported. A user's own setting wins."""
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "false",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "5",  # about a minute: long enough for a server that restarts
        "DO_NOT_TRACK": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "GIT_PYTHON_REFRESH": "quiet",
    }.items():
        os.environ.setdefault(name, value)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # a log wants lines, not bars
    warnings.filterwarnings("ignore", category=FutureWarning, module="mteb")


if __name__ == "__main__":
    sys.exit(main())
