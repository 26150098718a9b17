"""Training in several processes, one per GPU (or, without GPUs, over gloo): started with torchrun, joined at the end.

Every process composes the same batches and takes its part of each; negatives are gathered over all of them, so the
loss is that of one process with the whole batch. The first process leaves weights and log in the job's folder.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from nvr_tasks.artifacts import Store
from nvr_tasks.config import Recipe
from nvr_tasks.errors import NvrError
from nvr_tasks.training import weights
from nvr_tasks.training.fit import Job, Student, fit, student_of
from nvr_tasks.training.loop import Outcome

log = logging.getLogger(__name__)

SPEC, RESULT, PROGRESS, FAILURE = "job.json", "outcome.json", "progress.jsonl", "failure.txt"


def refuse_impossible(recipe: Recipe) -> None:
    """Raise NvrError when the machine, or a batch, cannot be divided over the processes that are asked for."""
    import torch

    runtime, count = recipe.runtime, recipe.runtime.processes
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    on_gpus = runtime.device == "cuda" or (runtime.device == "auto" and gpus > 0)
    if on_gpus and count > gpus:
        raise NvrError(
            f"runtime.processes is {count}, one GPU each, but torch sees {gpus}: "
            f"set runtime.processes={max(gpus, 1)}, or run on a node with more GPUs"
        )
    for stage in recipe.train.schedule:
        if stage.batch_size % count:
            raise NvrError(
                f"batch_size of stage {stage.name} is {stage.batch_size}, which {count} processes (runtime.processes) cannot "
                "divide evenly: change one of them"
            )


def fit_in_processes(job: Job, on_log: Callable[[int, Mapping[str, float]], None]) -> tuple[Student, Outcome]:
    """Train as `fit` does, in `runtime.processes` processes of this machine.

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
    count = job.recipe.runtime.processes
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    threads = job.recipe.runtime.threads or max(1, (os.cpu_count() or 1) // count)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    log.info("training in %d processes", count)
    ended = subprocess.run(
        [*command, "-m", "nvr_tasks.training.processes", str(job.folder)],
        env=environment,
        stdout=sys.stderr,
        check=False,
    )
    failure = job.folder / FAILURE
    if failure.is_file():
        raise NvrError(failure.read_text(encoding="utf-8"))
    if ended.returncode != 0:
        raise NvrError(f"a training process ended with status {ended.returncode}: see its messages above")
    for line in (job.folder / PROGRESS).read_text(encoding="utf-8").splitlines():
        step, values = json.loads(line)
        on_log(step, values)
    student = student_of(job.recipe)
    weights.load(student.model, job.folder)
    return student, Outcome(**json.loads((job.folder / RESULT).read_text(encoding="utf-8")))


def work(folder: Path) -> int:
    """One of the processes, as torchrun starts them."""
    import torch

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
        with (folder / PROGRESS).open("a", encoding="utf-8") as progress:

            def report(step: int, values: Mapping[str, float]) -> None:  # by the first process only
                progress.write(json.dumps([step, dict(values)]) + "\n")

            outcome = fit(job, student, report)
        if rank == 0:
            weights.save(student.model, folder)
            (folder / RESULT).write_text(json.dumps(asdict(outcome)), encoding="utf-8")
    except NvrError as error:
        if not (folder / FAILURE).is_file():
            (folder / FAILURE).write_text(str(error), encoding="utf-8")
        return 1
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(work(Path(sys.argv[1])))
