"""Airflow and MLflow on one machine: `init`, `demo`, `up`, `down`, `env`. Standard library only; `make` calls it.

Everything it makes lies under one folder (`.nvr`), every port is on loopback, every secret is generated there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from local_place import REPOSITORY, LocalError, Place, airflow_environment, complain, init, say, short, tail, tell
from local_services import DAG_ID, down, up
from process_tree import ProcessError

# What a stage says, without what Airflow writes before it (its own time) and after it (the logger's name).
STORY = re.compile(r"\d\d:\d\d:\d\d \[[a-z]+\] .*?(?=\s+\[airflow\.task\.|$)")


def demo(place: Place, recipe: str, overrides: list[str]) -> int:
    """One run of the DAG in this terminal, without services; the full log goes to a file."""
    env = init(place)
    env["PYTHONUNBUFFERED"] = "1"  # lines as they come, not by the page
    check = [str(place.task_bin / "nvr"), "config", f"--recipe={recipe}", *(f"--set={o}" for o in overrides)]
    checked = subprocess.run(check, env=env, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if checked.returncode:
        complain(checked.stderr.strip())
        return 1
    env.setdefault("NVR_RETRIES", "0")  # a person is watching: show the first failure, don't wait and try again
    conf = json.dumps({"recipe": recipe, "overrides": overrides})
    log = place.home / "demo.log"
    say(f"running the DAG {DAG_ID} with recipe {recipe} {' '.join(overrides)}".rstrip() + f" (full log: {short(log)})")
    command = [str(place.airflow_bin / "airflow"), "dags", "test", DAG_ID, "--conf", conf]
    with (
        log.open("w", encoding="utf-8", buffering=1) as file,
        subprocess.Popen(
            command,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as process,
    ):
        assert process.stdout is not None  # noqa: S101  asked for as a pipe
        try:
            for line in process.stdout:
                file.write(line)
                if told := STORY.search(line):
                    tell(told.group())
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGTERM)
            complain(f"interrupted; finished artefacts are kept, run it again to go on (log: {short(log)})")
            return 130
    if process.returncode:
        wrong = _mistakes(log.read_text(encoding="utf-8")) or [tail(log)]
        complain("\n".join(["", "the DAG run failed:", *wrong, f"full log: {log}"]))
        return 1
    return subprocess.run(
        [str(place.task_bin / "nvr"), "show", "runs/latest", "--root", env["NVR_ROOT"]],
        env=env,
        cwd=REPOSITORY,
        check=False,
    ).returncode


def _mistakes(log: str) -> list[str]:
    """The last error messages in a log, each once: what `nvr` said, and exceptions by name."""
    found = re.findall(r"nvr: .*?(?=\s+\[airflow\.task\.|$)|^[\w.]+(?:Error|Exception): .*", log, re.MULTILINE)
    return list(dict.fromkeys(found))[-8:]


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=REPOSITORY / ".nvr", help="folder of all state")
    parser.add_argument("--airflow-bin", type=Path, default=REPOSITORY / ".venv-airflow" / "bin")
    parser.add_argument("--task-bin", type=Path, default=REPOSITORY / ".venv" / "bin")
    parser.add_argument("--airflow-port", type=int, default=8080)
    parser.add_argument("--mlflow-port", type=int, default=5000)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("init", help="secrets, database, pool")
    commands.add_parser("env", help="print the configuration as `export NAME=value` lines (contains secrets)")
    sub = commands.add_parser("demo", help="one run of the DAG in the terminal")
    sub.add_argument("--recipe", default="demo")
    sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    sub = commands.add_parser("up", help="start the services")
    sub.add_argument("--timeout-s", type=float, default=600, help="how long to wait for the services to be healthy")
    commands.add_parser("down", help="stop the services")
    given = parser.parse_args(argv)
    place = Place(
        given.home.absolute(),
        given.airflow_bin.absolute(),
        given.task_bin.absolute(),
        given.airflow_port,
        given.mlflow_port,
    )
    try:
        if given.command == "init":
            init(place)
        elif given.command == "env":
            for name, value in sorted(airflow_environment(place).items()):
                if name.startswith(("AIRFLOW", "NVR_", "MLFLOW_")):
                    tell(f"export {name}={shlex.quote(value)}")
        elif given.command == "demo":
            return demo(place, given.recipe, given.set)
        elif given.command == "up":
            up(place, given.timeout_s)
        elif given.command == "down":
            down(place)
    except KeyboardInterrupt:
        complain("interrupted; run it again to go on")
        return 130
    except (LocalError, ProcessError) as failure:
        complain(f"error: {failure}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
