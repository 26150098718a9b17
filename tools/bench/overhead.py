"""What a stage costs as a container instead of a process, on one machine: `make bench-docker`, a table for docs/containers.md.

Every stage of the demo (cut down) runs fresh, in turn, four ways: as a process or a container, on a folder or on a real S3
server; then once more with nothing to do, which leaves start-up, our imports and look-ups. The best of the rounds counts.
Then what the libraries of the stages take to import, the same two ways.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY / "tools"), str(REPOSITORY / "tests")]

import containers  # noqa: E402
from deployment import TINY, stand_in_image  # type: ignore[import-not-found]  # noqa: E402

IMAGE = os.environ.get("NVR_IMAGE", "nvr-tasks:dev")
STAGES = ("download", "embed", "mine", "train", "register", "score", "evaluate", "gate")
KEYS = {
    "AWS_ACCESS_KEY_ID": "nvr-bench",
    "AWS_SECRET_ACCESS_KEY": "nvr-bench-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
}
# What a stage with something to do imports beside our own modules.
LIBRARIES = {
    "nvr --help": None,
    "python": "pass",
    "torch": "torch",
    "sentence_transformers (embed, train, score)": "sentence_transformers",
    "numba, torch (mine)": "numba, torch",
    "mlflow (register, gate)": "mlflow",
    "mteb (score)": "mteb",
}
Run = Callable[[list[str]], list[str]]  # arguments of nvr → command line


def timed(command: list[str], environ: dict[str, str]) -> float:
    """Seconds of a command; its output only if it fails."""
    start = time.perf_counter()
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return time.perf_counter() - start


def as_process(folder: Path) -> tuple[Run, dict[str, str]]:
    """`nvr` of the task environment."""
    nvr = str(Path(sys.executable).with_name("nvr"))
    environ = {**os.environ, **KEYS, "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    return (lambda words: [sys.executable, *words[1:]] if words[0] == "python" else [nvr, *words]), environ


def as_container(folder: Path) -> tuple[Run, dict[str, str]]:
    """`nvr` of the image, as the docker runner starts it; the folder is where it is outside, too."""
    given = {
        **KEYS,
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "AWS_ENDPOINT_URL": os.environ["AWS_ENDPOINT_URL"],
    }
    options = [f"--env={name}={value}" for name, value in given.items()]
    options += [
        "--rm",
        "--read-only",
        "--tmpfs=/tmp",
        "--cap-drop=ALL",
        "--network=host",
        f"--user={os.getuid()}",
        "--env=HOME=/scratch",
    ]
    options += [
        f"--volume={folder}:{folder}",
        f"--volume={folder}/scratch:/scratch",
        "--security-opt=no-new-privileges",
    ]
    return (
        lambda arguments: [
            *containers.docker(),
            "run",
            *options,
            *entry(arguments),
            *arguments[arguments[:1] == ["python"] :],
        ]
    ), dict(os.environ)


def entry(arguments: list[str]) -> list[str]:
    """The image, and Python as its entrypoint if that is what is to be run."""
    return ["--entrypoint=python", IMAGE] if arguments[:1] == ["python"] else [IMAGE]


def imports(run: Run, environ: dict[str, str], folder: Path) -> dict[str, float]:
    """Seconds of `nvr --help`, of Python alone, and of Python that imports a library."""
    (folder / "scratch").mkdir(exist_ok=True)
    found = {}
    for name, modules in LIBRARIES.items():
        code = modules if modules == "pass" else f"import {modules}"
        command = run(["--help"]) if modules is None else run(["python", "-c", code])
        found[name] = min(timed(command, environ) for _ in range(5))
    return found


def stages(run: Run, environ: dict[str, str], root: str, folder: Path) -> dict[str, tuple[float, float]]:
    """Seconds of every stage: with everything to do, and with nothing."""
    (folder / "scratch").mkdir(exist_ok=True)
    common = [f"--root={root}", "--recipe=demo", *(f"--set={one}" for one in TINY), "--set=runtime.mine_shards=1"]
    found = {}
    for stage in STAGES:
        command = run([stage, *common])
        found[stage] = (timed(command, environ), timed(command, environ))
    return found


def server() -> str:
    """A real S3 server in a container; sets its address. Returns the container."""
    name = f"nvr-bench-{uuid.uuid4().hex[:6]}"
    environ = [f"--env={key}={value}" for key, value in KEYS.items()]
    weed = [
        "mini",
        "-dir=/data",
        "-ip=127.0.0.1",
        "-ip.bind=0.0.0.0",
        "-s3.port=8333",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
    ]
    weed += ["-bucket=nvr", "-webdav=false", "-admin.ui=false", "-master.telemetry=false"]
    options = ["--detach", "--rm", f"--name={name}", "--publish=127.0.0.1::8333", "--tmpfs=/data", *environ]
    docker = containers.docker()
    subprocess.run([*docker, "run", *options, stand_in_image("s3"), *weed], check=True, capture_output=True)
    port = subprocess.run([*docker, "port", name, "8333"], check=True, capture_output=True, text=True).stdout.strip()
    os.environ["AWS_ENDPOINT_URL"] = f"http://{port.splitlines()[0]}"
    time.sleep(15)
    return name


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    rounds = parser.parse_args().rounds
    ways = {
        "process, folder": (as_process, False),
        "container, folder": (as_container, False),
        "process, S3": (as_process, True),
    }
    ways["container, S3"] = (as_container, True)
    best: dict[str, dict[str, tuple[float, float]]] = {}
    s3 = server()
    try:
        for number in range(rounds):
            for way, (how, store) in ways.items():
                with tempfile.TemporaryDirectory() as made:
                    folder = Path(made)
                    run, environ = how(folder)
                    root = f"s3://nvr/{number}-{uuid.uuid4().hex[:6]}" if store else f"{folder}/artifacts"
                    found = stages(run, environ, root, folder)
                    print(json.dumps({way: found}), file=sys.stderr)
                    before = best.setdefault(way, found)
                    best[way] = {s: (min(before[s][0], found[s][0]), min(before[s][1], found[s][1])) for s in STAGES}
        with tempfile.TemporaryDirectory() as made:
            started = [imports(*how(Path(made)), Path(made)) for how in (as_process, as_container)]
    finally:
        subprocess.run([*containers.docker(), "rm", "--force", s3], check=False, capture_output=True)
    print(f"| stage | {' | '.join(ways)} | container over process |\n|---|{'---|' * (len(ways) + 1)}")
    for stage in STAGES:
        cells = [f"{best[way][stage][0]:.1f} / {best[way][stage][1]:.1f}" for way in ways]
        more = best["container, S3"][stage][0] - best["process, S3"][stage][0]
        print(f"| {stage} | {' | '.join(cells)} | {more:+.1f} s |")
    print("\n| start | process | container |\n|---|---|---|")
    for name in LIBRARIES:
        print(f"| {name} | {started[0][name]:.2f} | {started[1][name]:.2f} |")


if __name__ == "__main__":
    main()
