"""The words of the `nvr` command: its subcommands and their options; what they do is in cli.py."""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from nvr_tasks.stages import ON_DEMAND, RESULT_MARK, STAGES

DEFAULT_ROOT = ".nvr/artifacts"
DEFAULT_RECIPE = "demo"


def build_parser() -> argparse.ArgumentParser:
    """The command line, one subcommand per stage and a few about recipes and runs."""
    parser = argparse.ArgumentParser(
        prog="nvr", description="NV-Retriever (arXiv 2407.15831) as a production workflow."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)

    for row in (*STAGES, *ON_DEMAND):
        sub = _command(commands, row.name, row.summary)
        sub.set_defaults(stage=row.name)
        _recipe_options(sub)
        _run_options(sub)
        _input_option(sub)
        _own_options(sub, row.name)

    audit = _command(commands, "audit", "estimate what share of mined negatives is really relevant, by method")
    audit.set_defaults(stage="audit")
    _recipe_options(audit)
    _run_options(audit)
    _input_option(audit)

    _champion_commands(commands)

    run = _command(commands, "run", "every stage in order, without Airflow; ends with a table")
    _recipe_options(run)
    _run_options(run)

    ablate = _command(
        commands, "ablate", "an ablation: every variant of the recipe with every seed; ends with a table and a report"
    )
    _recipe_options(ablate)
    _run_options(ablate)
    ablate.add_argument(
        "--dry-run", action="store_true", help="list the cells and which of them are there already; run nothing"
    )

    begin = _command(commands, "begin", "validate the recipe and open a pipeline run (first task of the DAG)")
    _recipe_options(begin)
    _run_options(begin)
    begin.add_argument("--ablation", action="store_true", help="the run is an ablation: list its cells, too")
    begin.add_argument(
        "--train-gpus", type=int, metavar="N", help="GPUs that training will be given: refuse a recipe that wants more"
    )

    finish = _command(
        commands, "finish", "close a pipeline run: summary table, MLflow run ended (last task of the DAG)"
    )
    _run_options(finish)
    finish.add_argument(
        "--expect", metavar="STAGES", help="stages (comma-separated) that had to report; those of retraining by default"
    )

    show = _command(commands, "show", "an artefact, a pipeline run (runs/ID) or the newest run (runs/latest)")
    show.add_argument("uri", metavar="URI")
    show.add_argument("--rows", type=int, default=5, help="rows of each table to print (default 5)")
    _root_options(show)

    config = _command(commands, "config", "the resolved recipe as YAML, or the schema of recipes")
    _recipe_options(config)
    config.add_argument("--json-schema", action="store_true", help="print the JSON schema of recipes instead")

    _command(commands, "recipes", "names of the recipes that come with the package")
    return parser


def _own_options(sub: argparse.ArgumentParser, stage: str) -> None:
    """Options that one stage has and others have not."""
    if stage == "embed":
        sub.add_argument("--shard", metavar="[TEACHER:]I/N", help="only shard I (from 0) of N; all of them by default")
    if stage == "train":
        sub.add_argument("--node", metavar="I/N", help="this machine is I (from 0) of N (runtime.nodes); 0 publishes")
        sub.add_argument("--rendezvous", metavar="HOST:PORT", help="a free port of machine 0, where the machines meet")
    if stage == "mine":
        sub.add_argument(
            "--shard", metavar="I/N", help="only search candidates for block I (from 0) of N of the queries"
        )
        sub.add_argument(
            "--suggest", action="store_true", help="search, then say what each threshold would do; select nothing"
        )
    if stage in ("score", "evaluate"):
        sub.add_argument(
            "--model",
            help="this model only: challenger, base, champion, teacher, models:/NAME@ALIAS, models:/NAME/VERSION, "
            "or OWNER/NAME@COMMIT of the hub",
        )
    if stage == "score":
        sub.add_argument("--task", help="only this task of the benchmark")
    if stage == "cell":
        sub.add_argument("--cell", metavar="VARIANT:SEED", help="only this cell; all of them by default")
    if stage == "sources":
        sub.add_argument("--of", choices=("training", "benchmark"), default="training", help="which sources to ask")
    if stage == "gate":
        sub.add_argument(
            "--decide-only", action="store_true", help="record the verdict but leave promotion to `nvr promote`"
        )
    if stage == "promote":
        word = sub.add_mutually_exclusive_group()
        word.add_argument(
            "--approved-by", metavar="NAME", type=_name, help="who approved a decision that needs approval"
        )
        word.add_argument(
            "--rejected-by", metavar="NAME", type=_name, help="who rejected it: goes on record, nothing is moved"
        )
        sub.add_argument("--reason", default="", help="their reason, for the record")


def _champion_commands(commands: argparse._SubParsersAction[_Parser]) -> None:
    back = _command(commands, "rollback", "make an earlier version the champion again, with a reason, on record")
    _recipe_options(back)
    _run_options(back)
    back.add_argument("--to", default="previous", metavar="VERSION", help="version number (default: previous)")
    back.add_argument("--reason", required=True, help="what is wrong with the champion; goes on record")
    back.add_argument("--by", metavar="NAME", help="who wants it (default: you, or the pipeline run)")
    back.add_argument("--force", action="store_true", help="even to a version that never passed a gate")

    past = _command(commands, "history", "all moves of the champion, and rejections: who, when, from, to, why")
    _recipe_options(past)
    _root_options(past)
    past.set_defaults(pipeline_run=None)
    past.add_argument("--json", action="store_true", help="as JSON, one move per line, with all fields")


def _command(commands: argparse._SubParsersAction[_Parser], name: str, summary: str) -> _Parser:
    sub = commands.add_parser(
        name, help=summary, description=summary, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sub.set_defaults(command=name)
    return sub


class _Version(argparse.Action):
    """Looks the version up when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        import nvr_tasks

        sys.stdout.write(f"nvr {nvr_tasks.__version__}\n")
        parser.exit()


class _Parser(argparse.ArgumentParser):
    """Reads a stage module's docstring only when its help is printed: `nvr --help` imports no stage."""

    def format_help(self) -> str:
        name = self.get_default("stage")
        if name is not None:
            self.description = (importlib.import_module(f"nvr_tasks.{name}").__doc__ or "").strip()
        return super().format_help()


def _recipe_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--recipe",
        default=os.environ.get("NVR_RECIPE") or DEFAULT_RECIPE,
        help="name of a shipped recipe or path of a YAML file (default: %(default)s)",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting, e.g. train.steps=100"
    )
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="the recipe in miniature: tiny random models of the same architectures, a handful of texts, a few steps",
    )


def _name(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("a name is wanted, for the record")
    return text


def _input_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="ROLE=URI",
        help="an input artefact; located through the recipe when absent",
    )


def _root_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--root",
        default=os.environ.get("NVR_ROOT") or DEFAULT_ROOT,
        help="where artefacts live: folder, file:// or s3:// (default: %(default)s)",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        default=os.environ.get("NVR_VERIFY", "").lower() not in ("", "0", "false", "no"),
        help="check digests, not only sizes, of every artefact read",
    )


def _run_options(parser: argparse.ArgumentParser) -> None:
    _root_options(parser)
    parser.add_argument("--pipeline-run", metavar="ID", help="id that groups the stages of one run (Airflow's run_id)")
    parser.add_argument(
        "--result-line", action="store_true", help=f"print the result as one line of JSON after {RESULT_MARK!r}"
    )
