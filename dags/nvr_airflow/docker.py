"""The `docker` runner: a stage is a container of its own on a Docker engine, beside Airflow's (a sibling, not a child).

DockerOperator gives connection, TLS and registry login. What it does not offer is done here: the two output streams
apart, a read-only root without privileges, removal of what a lost try has left running, and errors that say what to mend.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from airflow.providers.docker.operators.docker import DockerOperator
from airflow.sdk.exceptions import AirflowException, AirflowFailException
from docker.errors import APIError, DockerException, NotFound
from docker.types import DeviceRequest, Mount

from nvr_airflow.environment import container_environment
from nvr_airflow.operator import WITHIN_AIRFLOWS_S, StageOperator
from nvr_airflow.settings import DockerSettings
from nvr_airflow.story import Story
from nvr_tasks.stages import Resources

TASK_LABEL, STAGE_LABEL, RUN_LABEL = "nvr.task", "nvr.stage", "nvr.run"
SCRATCH = "/scratch"  # where the images write
GIB = 1 << 30
SIGNALLED = 128  # a status above it tells the signal that ended the process


class DockerStageOperator(StageOperator, DockerOperator):  # type: ignore[misc]  # `command` is ours: a stage
    """Runs `nvr` in a container; its stderr is the task's log, live.

    Args:
        docker: the deployment's settings.
        wants: of the stage. CPUs are shares, not a limit; memory is one.
        kill_grace_s: between the request to stop and SIGKILL; at most `WITHIN_AIRFLOWS_S`.
        pass_env: variables of the worker that stages get besides the usual ones (see `environment`).
    """

    template_fields: Sequence[str] = (*StageOperator.template_fields, "image")
    where_nvr_is_from = "NVR_IMAGE"

    def __init__(
        self,
        *,
        docker: DockerSettings,
        wants: Resources,
        kill_grace_s: float = 20,
        pass_env: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        on_gpu = bool(wants.gpu and docker.gpu_image)
        super().__init__(
            image=docker.gpu_image if on_gpu else docker.image,
            docker_url=docker.url,
            docker_conn_id=docker.connection or None,
            network_mode=docker.network,
            mounts=_mounts(docker.volumes),
            device_requests=[DeviceRequest(count=wants.gpu, capabilities=[["gpu"]])] if on_gpu else None,
            cpus=wants.cpu,
            mem_limit=f"{wants.memory_gb * 1024:.0f}m",
            shm_size=int(docker.shm_gb * GIB),
            mount_tmp_dir=False,
            auto_remove="force",
            retrieve_output=False,  # it would unpickle what a container wrote
            **kwargs,
        )
        self.wants = wants
        self.pull = docker.pull
        self.kill_grace_s = kill_grace_s
        self.pass_env = tuple(pass_env)

    def execute(self, context: Any) -> Any:
        """Run the command in a container to its end."""
        command = self.command_line(context)
        self._find_engine()
        self._provide_image()
        labels = self._labels(context)
        self._remove_lost(labels[TASK_LABEL])
        self.log.info("$ docker run %s %s", self.image, " ".join(command))
        story = Story(self.log.info)
        try:
            status = self._run(command, labels, story)
        finally:
            self._remove()  # a timeout or an interrupt leaves nobody behind
        return self.conclude(status, story.result, story.last_words, context)

    def on_kill(self) -> None:
        """Airflow's request to stop: SIGINT to the stage (as process 1 it would not hear SIGTERM), removal after the grace."""
        if self.container:
            with suppress(DockerException, OSError):  # it may have ended meanwhile, or not end within the grace
                self.cli.kill(self.container["Id"], signal="SIGINT")
                self.cli.wait(self.container["Id"], timeout=min(self.kill_grace_s, WITHIN_AIRFLOWS_S))
            self._remove()

    def _labels(self, context: Mapping[str, Any]) -> dict[str, str]:
        """Who a container works for. The task label is the same for all tries, and no other deployment's."""
        ti, run = context["ti"], context["run_id"]
        index = getattr(ti, "map_index", -1)
        task = f"{self.root} {self.dag_id} {run} {self.task_id} {index}"
        return {TASK_LABEL: task, STAGE_LABEL: self.command, RUN_LABEL: run}

    def _find_engine(self) -> None:
        """Raises AirflowException when there is no engine; it may come back."""
        try:
            self.cli.ping()
        except (AirflowException, DockerException, OSError) as error:
            raise AirflowException(
                f"cannot reach the Docker engine at {self.docker_url} ({error}): is it up, is its socket mounted, and may "
                "this user open it (DOCKER_GID in compose's .env)? Or set DOCKER_HOST"
            ) from None

    def _provide_image(self) -> None:
        """Find the image on the engine, or pull it if that is allowed."""
        try:
            self.cli.inspect_image(self.image)
            return
        except NotFound:
            pass
        if self.pull == "never":
            raise AirflowFailException(
                f"image {self.image} is not on the Docker engine at {self.docker_url}, and NVR_DOCKER_PULL is never: build "
                "it there (`make images`), `docker load` it, or set NVR_DOCKER_PULL=missing"
            )
        self.log.info("pulling %s", self.image)
        told = ""
        try:
            for line in self.cli.pull(self.image, stream=True, decode=True):
                told = str(line.get("error") or told)  # a failure half-way comes as a line, not as an exception
            self.cli.inspect_image(self.image)
        except APIError as error:
            told = told or _explanation(error)
        else:
            return
        raise AirflowException(
            f"cannot pull image {self.image}: {told}; check NVR_IMAGE, that the engine's host reaches the registry, and "
            "its login (NVR_DOCKER_CONNECTION)"
        )

    def _remove_lost(self, task: str) -> None:
        """Remove a container that an earlier try left running because its worker was killed."""
        for lost in self.cli.containers(all=True, filters={"label": f"{TASK_LABEL}={task}"}):
            self.log.warning("removing container %s, left by an earlier try", lost["Id"][:12])
            with suppress(APIError):
                self.cli.remove_container(lost["Id"], force=True, v=True)

    def _run(self, command: list[str], labels: dict[str, str], story: Story) -> int:
        """Exit status of the command; negative: the signal that ended it."""
        try:
            self.container = self.cli.create_container(
                image=self.image,
                command=command,
                name=f"nvr-{self.command}-{uuid.uuid4().hex[:8]}",
                environment=container_environment(os.environ, self.pass_env),
                labels=labels,
                host_config=self.cli.create_host_config(
                    network_mode=self.network_mode,
                    mounts=[m if isinstance(m, Mount) else Mount(**m) for m in self.mounts],
                    device_requests=self.device_requests,
                    cpu_shares=round(self.cpus * 1024),
                    mem_limit=self.mem_limit,
                    shm_size=self.shm_size,
                    read_only=True,
                    tmpfs={"/tmp": "mode=1777,size=256m"},  # noqa: S108  of the container, and small: work goes to /scratch
                    cap_drop=["ALL"],
                    security_opt=["no-new-privileges"],
                ),
            )
            container = self.container["Id"]  # kept here: a stop in between forgets it
            output = self.cli.attach(container, stdout=True, stderr=True, stream=True, demux=True)
            self.cli.start(container)
        except APIError as error:
            raise self._refused(error) from None
        for out, err in output:
            story.out(out or b"")
            story.err(err or b"")
        story.end()
        try:
            ended = self.cli.wait(container)["StatusCode"]
            state = self.cli.inspect_container(container)["State"]
        except NotFound:
            raise AirflowException(f"the container of nvr {self.command} was removed while it ran") from None
        if state.get("OOMKilled"):
            story.err(f"nvr: the stage went over its {self.wants.memory_gb:g} GiB of memory\n".encode())
        return SIGNALLED - ended if ended > SIGNALLED else int(ended)

    def _refused(self, error: APIError) -> AirflowException:
        """What the engine's refusal to start a container means. All but a busy engine is for people to mend."""
        why = _explanation(error)
        text = why.lower()
        if "could not select device driver" in text or "nvidia" in text:
            return AirflowFailException(
                f"{self.command} asks for a GPU (NVR_GPU_IMAGE is set), and the Docker engine at {self.docker_url} has none to "
                f"give: {why}. Install the NVIDIA container toolkit on its host, or unset NVR_GPU_IMAGE to run on the CPU"
            )
        if "network" in text and error.status_code == 404:
            return AirflowFailException(
                f"{why}: create the network, or correct NVR_DOCKER_NETWORK ({self.network_mode})"
            )
        if "mount" in text or "bind source" in text:
            return AirflowFailException(f"{why}: correct NVR_DOCKER_VOLUMES; folders are those of the engine's host")
        return AirflowException(f"the Docker engine would not run {self.image}: {why}")

    def _remove(self) -> None:
        if not self.container:
            return
        try:
            self.cli.remove_container(self.container["Id"], force=True, v=True)
        except NotFound:
            pass
        except (DockerException, OSError) as error:  # what became of the stage is the news
            self.log.warning("container %s was not removed: %s", self.container["Id"][:12], error)
        self.container = {}


def _mounts(volumes: Sequence[str]) -> list[Mount]:
    """Volumes of the deployment; without one for work in progress, a volume that goes with its container."""
    mounts = [_mount(volume) for volume in volumes]
    if not any(mount["Target"] == SCRATCH for mount in mounts):
        mounts.append(Mount(target=SCRATCH, source=None, type="volume"))
    return mounts


def _mount(volume: str) -> Mount:
    source, target, *mode = volume.split(":")
    kind = "bind" if source.startswith("/") else "volume"
    return Mount(target=target, source=source, type=kind, read_only=bool(mode))


def _explanation(error: APIError) -> str:
    return str(error.explanation or error).strip()
