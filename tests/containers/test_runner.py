"""The docker runner on a real engine: results, streams, stops, leftovers and faults. Airflow environment."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "dags"))
sys.path.insert(0, str(HERE.parents[1] / "tools"))

import containers  # noqa: E402
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowSkipException  # noqa: E402
from task_instance import TaskInstance  # noqa: E402

from nvr_airflow.docker import STAGE_LABEL, TASK_LABEL, DockerStageOperator  # noqa: E402
from nvr_airflow.settings import DockerSettings  # noqa: E402
from nvr_tasks.stages import Resources  # noqa: E402

IMAGE = "nvr-test-stage:dev"
SMALL = Resources(cpu=1, memory_gb=0.5)


def docker(*words: str) -> str:
    done = subprocess.run([*containers.docker(), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module", autouse=True)
def image() -> str:
    docker("build", "--quiet", "--file", str(HERE / "nvr.Dockerfile"), "--tag", IMAGE, str(HERE))
    return IMAGE


@pytest.fixture
def settings() -> DockerSettings:
    return DockerSettings.from_env({"NVR_IMAGE": IMAGE, "NVR_DOCKER_PULL": "never", **_host()})


def _host() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k == "DOCKER_HOST"}


@pytest.fixture
def run() -> str:
    return f"test__{uuid.uuid4().hex[:8]}"


def operator(settings: DockerSettings, wants: Resources = SMALL, **kwargs: Any) -> DockerStageOperator:
    return DockerStageOperator(
        task_id="download",
        command="download",
        root="/r",
        docker=settings,
        wants=wants,
        pass_env=["NVR_TEST_BODY"],
        **kwargs,
    )


def execute(task: DockerStageOperator, run: str, body: str, ti: TaskInstance | None = None) -> Any:
    os.environ["NVR_TEST_BODY"] = body
    context = {"run_id": run, "params": {}, "ti": ti or TaskInstance(), "outlet_events": {}}
    return type(task).execute.__wrapped__(task, context)  # type: ignore[attr-defined]


def running(run: str) -> list[str]:
    return docker("ps", "--all", "--quiet", "--filter", f"label=nvr.run={run}").split()


def until(condition: Callable[[], Any], timeout_s: float = 30) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)
    return found


@pytest.fixture(autouse=True)
def _nothing_is_left(run: str) -> Iterator[None]:
    yield
    assert running(run) == []


def test_result_and_log_come_apart_and_the_log_is_live(settings: DockerSettings, run: str, monkeypatch: Any) -> None:
    told: list[tuple[float, str]] = []

    class Log:
        def info(self, message: str, *args: object) -> None:
            told.append((time.monotonic(), message % args))

        warning = info

    monkeypatch.setattr(DockerStageOperator, "log", Log())
    body = "tell('[download] start'); print('noise', flush=True); time.sleep(2); sys.stderr.write('10%\\r20%'); result(figures={'n': 3})"
    result = execute(operator(settings), run, body)
    assert result["figures"] == {"n": 3}
    lines = [line for _, line in told]
    assert {"[download] start", "noise", "10%", "20%"} <= set(lines)
    assert not any("NVR_RESULT" in line for line in lines)
    when = {line: at for at, line in told}
    assert when["10%"] - when["[download] start"] > 1.5, "the log came only at the end"


def test_without_a_volume_scratch_goes_with_its_container(settings: DockerSettings, run: str) -> None:
    before = docker("volume", "ls", "--quiet")
    assert execute(operator(settings), run, "open('/scratch/fine', 'w').close(); result()")
    assert docker("volume", "ls", "--quiet") == before


def test_silence_longer_than_the_client_waits_is_no_failure(settings: DockerSettings, run: str) -> None:
    assert execute(operator(settings, timeout=3), run, "time.sleep(8); result()")["outputs"] == {"dataset": ["d"]}


def test_a_stage_has_no_privileges_and_only_its_environment(
    settings: DockerSettings, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIRFLOW__CORE__FERNET_KEY", "secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "for the stage")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/of/the/worker")
    body = """
def fails(path):
    try:
        open(path, "w").close()
    except OSError as error:
        return error.strerror
open("/scratch/fine", "w").close()
open("/tmp/fine", "w").close()
status = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())
memory = open("/sys/fs/cgroup/memory.max" if os.path.exists("/sys/fs/cgroup/memory.max") else "/sys/fs/cgroup/memory/memory.limit_in_bytes").read()
shm = os.statvfs("/dev/shm")
result(figures={"uid": os.getuid(), "root": fails("/etc/x"), "caps": status["CapBnd"].strip(), "nnp": status["NoNewPrivs"].strip(),
    "env": dict(os.environ), "memory": int(memory), "shm": shm.f_frsize * shm.f_blocks, "pid": os.getpid()})
"""
    volume = f"{run}-scratch"
    try:
        figures = execute(operator(replace(settings, volumes=(f"{volume}:/scratch",), shm_gb=0.25)), run, body)[
            "figures"
        ]
    finally:
        docker("volume", "rm", volume)
    assert figures["uid"] == 10001
    assert figures["root"] == "Read-only file system"
    assert int(figures["caps"], 16) == 0
    assert figures["nnp"] == "1"
    assert figures["memory"] == 512 << 20
    assert figures["shm"] == 256 << 20
    assert figures["env"]["AWS_SECRET_ACCESS_KEY"] == "for the stage"
    assert "LD_LIBRARY_PATH" not in figures["env"]
    assert not [name for name in figures["env"] if name.startswith("AIRFLOW")]


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ("tell('nvr: unknown key'); sys.exit(2)", AirflowFailException, "refused .*: nvr: unknown key"),
        ("tell('x'); tell('nvr: no route'); sys.exit(1)", AirflowException, "exit status 1: nvr: no route"),
        ("print('fine')", AirflowException, "printed no line starting .* is NVR_IMAGE of this"),
        (
            "os.kill(os.getpid(), 9) or time.sleep(60) if os.getpid() != 1 else sys.exit(137)",
            AirflowException,
            "SIGKILL",
        ),
        ("x = bytearray(2 << 30)", AirflowException, "(?s)SIGKILL.* went over its 0.5 GiB of memory"),
    ],
)
def test_a_failure_says_what_happened(settings: DockerSettings, run: str, body: str, error: type, message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        execute(operator(settings), run, body)
    assert isinstance(caught.value, AirflowFailException) == (error is AirflowFailException)


def test_a_hold_is_a_skip(settings: DockerSettings, run: str) -> None:
    ti = TaskInstance()
    with pytest.raises(AirflowSkipException, match="verdict: hold"):
        execute(operator(settings), run, "result(skipped='verdict: hold'); sys.exit(99)", ti)
    assert ti.pushed["return_value"]["skipped"] == "verdict: hold"


@pytest.mark.parametrize("stubborn", [False, True])
def test_a_stop_reaches_the_stage_and_is_final(settings: DockerSettings, run: str, stubborn: bool) -> None:
    ignore = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" if stubborn else ""
    body = f"{ignore}tell('up')\ntry:\n    time.sleep(600)\nexcept KeyboardInterrupt:\n    tell('nvr: interrupted'); sys.exit(130)"
    task = operator(settings, kill_grace_s=2)
    ended: list[BaseException] = []

    def work() -> None:
        with contextlib.suppress(BaseException):
            try:
                execute(task, run, body)
            except BaseException as error:
                ended.append(error)
                raise

    thread = threading.Thread(target=work)
    thread.start()
    until(
        lambda: (
            running(run)
            and "up"
            in subprocess.run(
                [*containers.docker(), "logs", running(run)[0]], capture_output=True, text=True, check=False
            ).stderr
        )
    )
    start = time.monotonic()
    task.on_kill()
    thread.join(20)
    assert not thread.is_alive()
    assert time.monotonic() - start < (12 if stubborn else 2)
    assert ended


def test_a_stop_leaves_no_container_within_airflow_s_patience(settings: DockerSettings, run: str) -> None:
    """Airflow asks a task to stop and kills it 5 s later; a stage that hears nothing by then must not outlive it."""
    code = f"""
import signal, sys
sys.path[:0] = {[str(HERE), str(HERE.parent), *sys.path[:2]]!r}
import test_runner as t
task = t.operator(t.DockerSettings.from_env({{"NVR_IMAGE": t.IMAGE, "NVR_DOCKER_PULL": "never"}}))
signal.signal(signal.SIGTERM, lambda *_: task.on_kill())
t.execute(task, {run!r}, "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)")
"""
    worker = subprocess.Popen([sys.executable, "-c", code])
    until(lambda: docker("ps", "--quiet", "--filter", f"label=nvr.run={run}"), 60)
    time.sleep(2)  # the stage ignores the signal from here on
    worker.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        worker.wait(5)
    worker.kill()
    worker.wait()
    until(lambda: not running(run), 60)


def test_a_timeout_leaves_no_container(settings: DockerSettings, run: str) -> None:
    from airflow.sdk.exceptions import AirflowTaskTimeout
    from airflow.sdk.execution_time.timeout import timeout

    with pytest.raises(AirflowTaskTimeout), timeout(4):
        execute(operator(settings), run, "time.sleep(600)")


def test_the_next_try_removes_what_a_killed_worker_left(settings: DockerSettings, run: str) -> None:
    code = f"""
import os, sys
sys.path[:0] = {[str(HERE), str(HERE.parent), *sys.path[:2]]!r}
import test_runner as t
t.execute(t.operator(t.DockerSettings.from_env({{"NVR_IMAGE": t.IMAGE, "NVR_DOCKER_PULL": "never"}})), {run!r}, "time.sleep(600)")
"""
    worker = subprocess.Popen([sys.executable, "-c", code])
    lost = until(lambda: running(run), 60)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    assert running(run) == lost
    assert execute(operator(settings), run, "result()")


# ── faults ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_missing_image(settings: DockerSettings, run: str) -> None:
    with pytest.raises(AirflowFailException, match=r"image nvr-none:1 is not on the Docker engine .*`make images`"):
        execute(operator(replace(settings, image="nvr-none:1")), run, "")


def test_a_registry_that_refuses(settings: DockerSettings, run: str) -> None:
    absent = replace(settings, image="127.0.0.1:9/nvr-tasks:1", pull="missing")
    with pytest.raises(
        AirflowException, match=r"(?s)cannot pull image 127.0.0.1:9/nvr-tasks:1: .*refused.*NVR_DOCKER_CONNECTION"
    ):
        execute(operator(absent), run, "")


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is a GPU here")
def test_a_gpu_where_there_is_none(settings: DockerSettings, run: str) -> None:
    wants = Resources(cpu=1, memory_gb=0.5, gpu=1)
    assert execute(operator(settings, wants), run, "result()"), "without NVR_GPU_IMAGE a stage runs on the CPU"
    with pytest.raises(AirflowFailException, match=r"download asks for a GPU .*has none to give.*unset NVR_GPU_IMAGE"):
        execute(operator(replace(settings, gpu_image=IMAGE), wants), run, "result()")


def test_an_engine_that_is_not_there(settings: DockerSettings, run: str) -> None:
    with pytest.raises(AirflowException, match=r"cannot reach the Docker engine at unix:///absent.sock .*DOCKER_GID"):
        execute(operator(replace(settings, url="unix:///absent.sock")), run, "")


def test_a_network_and_a_folder_that_are_not_there(settings: DockerSettings, run: str) -> None:
    with pytest.raises(AirflowFailException, match="NVR_DOCKER_NETWORK"):
        execute(operator(replace(settings, network="nvr-none")), run, "")
    with pytest.raises(AirflowFailException, match="NVR_DOCKER_VOLUMES"):
        execute(operator(replace(settings, volumes=("/absent/folder:/data:ro",))), run, "")


def test_labels_tell_whose_a_container_is(settings: DockerSettings, run: str) -> None:
    made = operator(settings)._labels({"ti": TaskInstance(), "run_id": run})
    assert made[STAGE_LABEL] == "download"
    assert run in made[TASK_LABEL]
