"""Training in several processes, one per GPU (or, without GPUs, over gloo): started with torchrun, ended with the stage.

On several machines, the stage runs on each and starts the processes there; the first machine's has the result.

Every process composes the same batches and takes its part of each; negatives are gathered over all of them, so the
loss is that of one process with the whole batch. The first process leaves weights and log in the job's folder.

The processes read a pipe whose other end the stage alone holds, and end when it closes: torchrun gives each of them a
session of its own, which no signal to the stage or to its process group reaches.
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from nvr_tasks.artifacts import Store
from nvr_tasks.config import Recipe
from nvr_tasks.errors import NvrError, RecipeError
from nvr_tasks.models import pick_device
from nvr_tasks.training import weights
from nvr_tasks.training.fit import Job, Student, fit, student_of
from nvr_tasks.training.loop import Outcome

log = logging.getLogger(__name__)

HIGHEST_PORT = 65535
SPEC, RESULT, PROGRESS, FAILURE = "job.json", "outcome.json", "progress.jsonl", "failure.txt"
LOOK_EVERY_S = 0.5  # at what the first process has logged


@dataclass(frozen=True)
class Node:
    """One of the machines that train together.

    Attributes:
        index: from 0; the first one publishes.
        count: how many there are.
        host: name or address of the first one.
        port: a free port there.
    """

    index: int
    count: int
    host: str
    port: int

    @property
    def arguments(self) -> list[str]:
        """For torchrun."""
        where = [f"--master-addr={self.host}", f"--master-port={self.port}"]
        return [f"--nnodes={self.count}", f"--node-rank={self.index}", *where]


def node_of(options: Mapping[str, str], nodes: int) -> Node | None:
    """Which machine this is, by the options `node` and `rendezvous`; None where one trains alone.

    Raises:
        RecipeError: they are missing or malformed, or the recipe has another number of nodes.
    """
    given, meet = options.get("node"), options.get("rendezvous")
    if nodes == 1 and given is None and meet is None:
        return None
    index = re.fullmatch(r"(\d+)/(\d+)", given or "")
    if index is None or int(index[2]) != nodes or int(index[1]) >= nodes:
        raise RecipeError(
            f"this recipe trains on {nodes} machines (runtime.nodes): start each with --node I/{nodes}, I from 0, not {given!r}"
        )
    host, _, port = (meet or "").rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) <= HIGHEST_PORT:
        raise RecipeError(f"--rendezvous {meet!r} is not HOST:PORT: name the first machine and a free port there")
    return Node(int(index[1]), nodes, host, int(port))


def fit_in_processes(
    job: Job, on_log: Callable[[int, Mapping[str, float]], None], node: Node | None = None
) -> tuple[Student, Outcome] | None:
    """Train as `fit` does, in `runtime.processes` processes of this machine, or of all machines.

    Returns:
        None on all machines but the first: it has the result.

    Args:
        node: which machine this is, if there are several. They share a store and have equal recipes.
        on_log: called as in `fit`, while the processes train; when it raises, they end.

    Raises:
        NvrError: with the message of the process that failed first.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    spec = {
        "recipe": job.recipe.dump(),
        "root": job.store.root,
        "verify": job.store.verify,
        "scratch": str(job.store.scratch),
        "inputs": {role: list(uris) for role, uris in job.inputs.items()},
        "fingerprint": job.fingerprint,
        "folder": str(job.folder),
    }
    (job.folder / SPEC).write_text(json.dumps(spec), encoding="utf-8")
    count = job.recipe.runtime.processes // job.recipe.runtime.nodes
    where = ["--standalone"] if node is None else node.arguments
    command = [sys.executable, "-m", "torch.distributed.run", *where, f"--nproc-per-node={count}"]
    threads = job.recipe.runtime.threads or max(1, (os.cpu_count() or 1) // count)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    on = "the CPU" if pick_device(job.recipe.runtime) == "cpu" else "GPUs"
    log.info("training in %d processes on %s%s", count, on, f", machine {node.index} of {node.count}" if node else "")
    progress = job.folder / PROGRESS
    progress.touch()
    command += ["-m", "nvr_tasks.training.processes", str(job.folder)]
    with (
        progress.open(encoding="utf-8") as told,
        subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=sys.stderr) as torchrun,
    ):  # leaving it, by an error, too, closes the pipe
        while not _ended(torchrun):
            _tell(told, on_log)
        _tell(told, on_log)
    failure = job.folder / FAILURE
    if failure.is_file():
        raise NvrError(failure.read_text(encoding="utf-8"))
    if torchrun.returncode != 0:
        raise NvrError(f"a training process ended with status {torchrun.returncode}: see its messages above")
    if node is not None and node.index > 0:
        return None
    student = student_of(job.recipe)
    weights.load(student.model, job.folder)
    return student, Outcome(**json.loads((job.folder / RESULT).read_text(encoding="utf-8")))


def _ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether it has ended; waits a little for that."""
    try:
        process.wait(LOOK_EVERY_S)
    except subprocess.TimeoutExpired:
        return False
    return True


def _tell(told: IO[str], on_log: Callable[[int, Mapping[str, float]], None]) -> None:
    """Report what was logged since the last time; a line that is still being written waits for the next."""
    while True:
        place = told.tell()
        line = told.readline()
        if not line.endswith("\n"):
            told.seek(place)
            return
        step, values = json.loads(line)
        on_log(step, values)


def _end_with_stage() -> None:
    """End this process as soon as the stage has ended, however it did: then the pipe on stdin has no writer any more."""

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 1):
            pass
        os._exit(1)  # at once: a retry of the stage may be training already

    threading.Thread(target=watch, name="end-with-stage", daemon=True).start()


def work(folder: Path) -> int:
    """One of the processes, as torchrun starts them."""
    _end_with_stage()
    import torch

    from nvr_tasks.training.sharding import shard

    spec = json.loads((folder / SPEC).read_text(encoding="utf-8"))
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available() and spec["recipe"]["runtime"]["device"] != "cpu":
        torch.cuda.set_device(local)
    logging.basicConfig(
        level=logging.WARNING, stream=sys.stderr, format="%(asctime)s [train] %(message)s", datefmt="%H:%M:%S"
    )
    logging.getLogger("nvr_tasks").setLevel(logging.INFO if rank == 0 else logging.ERROR)
    recipe = Recipe.model_validate(spec["recipe"])
    store = Store(spec["root"], verify=spec["verify"], scratch=spec["scratch"])
    own = folder / f"process-{rank}"
    own.mkdir(exist_ok=True)
    job = Job(recipe, store, spec["inputs"], spec["fingerprint"], own)
    try:
        student = student_of(recipe)
        if recipe.runtime.shard_weights:
            shard(student.model, torch.cuda.is_available() and recipe.runtime.device != "cpu")
        with (folder / PROGRESS).open("a", encoding="utf-8", buffering=1) as progress:  # a line at a time

            def report(step: int, values: Mapping[str, float]) -> None:  # by the first process only
                progress.write(json.dumps([step, dict(values)]) + "\n")

            outcome = fit(job, student, report)
        if rank == 0 or recipe.runtime.shard_weights:
            weights.save(student.model, folder if rank == 0 else None)
        if rank == 0:
            (folder / RESULT).write_text(json.dumps(asdict(outcome)), encoding="utf-8")
    except NvrError as error:
        if not (folder / FAILURE).is_file():
            (folder / FAILURE).write_text(str(error), encoding="utf-8")
        return 1
    return 0


if __name__ == "__main__":
    status = work(Path(sys.argv[1]))
    logging.shutdown()
    sys.stdout.flush()
    # At once: all is written, and taking gloo's threads down in order ends now and then in std::terminate, on a loaded machine.
    os._exit(status)
