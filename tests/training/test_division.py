"""A training that cannot be divided over its processes is refused, by `nvr run` and a DAG's first task before all else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nvr_tasks import train, workflow
from nvr_tasks.artifacts import Identity, Store
from nvr_tasks.cli import main
from nvr_tasks.config import Recipe
from nvr_tasks.errors import NvrError
from nvr_tasks.pipeline import Context
from nvr_tasks.training.division import refuse_impossible

Make = Callable[..., Recipe]
EIGHT = ("runtime.processes=8", "runtime.device=cuda")
GRID = ("ablation.grid={methods: [perc_pos]}", "ablation.seeds=[17]")
FEW = r"runtime\.processes is 8, one GPU each, but torch sees 2: set runtime\.processes=2, or run on a node with more GPUs"


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)


@pytest.mark.parametrize(
    ("settings", "given", "message"),
    [
        (
            ["runtime.processes=3"],
            None,
            r"batch_size of stage train is 32, which 3 processes \(runtime\.processes\) cannot",
        ),
        (
            ["runtime.processes=4", "runtime.nodes=3"],
            None,
            r"processes is 4, which 3 machines \(runtime\.nodes\) cannot",
        ),
        (["runtime.shard_weights=true"], None, r"shard_weights divides .* but runtime\.processes is 1: raise it"),
        (EIGHT, None, FEW),
        (["runtime.processes=8", "runtime.device=auto"], None, FEW),
        (
            [*EIGHT, "runtime.nodes=2"],
            None,
            r"one GPU each, 4 on each of 2 machines, but torch sees 2: set .*processes=4,",
        ),
        (EIGHT, 4, r"its task is given 4: set runtime\.processes=4, or give it more \(NVR_RESOURCES;"),
        (EIGHT, 0, r"its task is given 0: set runtime\.device=cpu, or give it more"),
        (["runtime.device=cuda"], 0, r"runtime\.processes is 1, one GPU each, but its task is given 0"),
    ],
)
@pytest.mark.usefixtures("two_gpus")
def test_what_cannot_be_divided(settings: list[str], given: int | None, message: str, tiny_recipe: Make) -> None:
    with pytest.raises(NvrError, match=message):
        refuse_impossible(tiny_recipe(*settings), given)


@pytest.mark.parametrize(
    ("settings", "given"),
    [
        (EIGHT, 8),
        (["runtime.processes=2", "runtime.device=auto"], None),
        (["runtime.processes=4", "runtime.device=cuda", "runtime.nodes=2"], None),
        (["runtime.processes=8", "runtime.device=auto"], 0),  # over gloo
        (["runtime.processes=8"], None),
        ([], 0),
    ],
)
@pytest.mark.usefixtures("two_gpus")
def test_what_can_be(settings: list[str], given: int | None, tiny_recipe: Make) -> None:
    refuse_impossible(tiny_recipe(*settings), given)


@pytest.mark.parametrize("run", [workflow.run, workflow.ablate])
@pytest.mark.usefixtures("two_gpus")
def test_a_run_is_refused_before_its_first_stage(
    run: Callable[[Context], str], tiny_recipe: Make, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx = Context(tiny_recipe(*EIGHT, *GRID), store)
    with pytest.raises(NvrError, match=FEW):
        run(ctx)
    assert store.storage.list("") == [], "nothing was begun"

    def begun(*_: object, **__: object) -> None:
        raise RuntimeError("it goes on")

    monkeypatch.setattr(workflow, "begin", begun)
    several = tiny_recipe(*EIGHT, *GRID, "runtime.nodes=2")
    with pytest.raises(RuntimeError, match="it goes on"):  # `nvr train` on each of them makes what this run finds
        run(Context(several, store))
    with pytest.raises(RuntimeError, match="it goes on"):
        run(Context(tiny_recipe(*GRID), store, "named"))
    with pytest.raises(RuntimeError, match="it goes on"):  # with the recipe that it began with
        run(Context(tiny_recipe(*EIGHT, *GRID), store, "named"))


@pytest.mark.usefixtures("two_gpus")
def test_training_itself_asks_the_same(tiny_recipe: Make, store: Store) -> None:
    with pytest.raises(NvrError, match=FEW):
        train.build(Context(tiny_recipe(*EIGHT), store), {}, {"model": [Identity("model", 1, {}, {})]})


@pytest.mark.parametrize("ablation", [[], ["--ablation"]])
def test_a_dag_is_told_by_its_first_task(
    ablation: list[str], tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may run where there is no GPU: the DAG says how many the task that trains is given."""
    words = ["begin", f"--recipe={tiny_file}", f"--root={tmp_path / 'root'}", *ablation]
    words += [f"--set={s}" for s in (*EIGHT, *GRID)]
    assert main([*words, "--train-gpus=4"]) == 2, "no retry helps"
    assert "its task is given 4: set runtime.processes=4" in capsys.readouterr().err
    assert not (tmp_path / "root" / "runs").exists()
