"""The docker runner without an engine: settings, what a DAG's tasks ask for, what a stage is told. The rest: tests/containers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from test_integrity import DAG_ID, attribute, violations

from nvr_airflow.environment import container_environment
from nvr_airflow.settings import DockerSettings, SettingsError
from nvr_tasks.stages import STAGES

DOCKER = {"NVR_RUNNER": "docker", "NVR_IMAGE": "nvr-tasks:1", "NVR_RETRIES": "2"}


def test_the_same_dag_file_runs_its_stages_in_containers(dags: Callable[..., Any]) -> None:
    bag = dags(**DOCKER, NVR_DOCKER_NETWORK="nvr", NVR_DOCKER_VOLUMES="scratch:/scratch,/srv/data:/data:ro")
    assert bag.import_errors == {}
    dag = bag.dags[DAG_ID]
    assert not violations(dag)
    for task in dag.tasks:
        if task.task_type in ("PartsOperator", "ApproveOperator"):  # those run no command
            continue
        assert task.task_type == "DockerStageOperator"
        settings = attribute(task, "docker") if task.is_mapped else None
        assert settings is None or settings.volumes == ("scratch:/scratch", "/srv/data:/data:ro")
        if not task.is_mapped:
            assert (task.image, task.network_mode, task.auto_remove) == ("nvr-tasks:1", "nvr", "force")
            assert task.device_requests is None, "no GPU image, no GPU"
            assert [(m["Source"], m["Type"], m["ReadOnly"]) for m in task.mounts] == [
                ("scratch", "volume", False),
                ("/srv/data", "bind", True),
            ]
    assert bag.dags["nv_retriever_ablation"].task_dict["begin"].options == {"ablation": "True", "train-gpus": "0"}
    assert not bag.dags["nv_retriever_evaluate"].task_dict["begin"].options, "it trains nothing"
    plain = dags(**DOCKER).dags[DAG_ID].task_dict["train"]
    assert [(m["Target"], m["Type"]) for m in plain.mounts] == [("/scratch", "volume")]


def test_resources_come_from_the_table(dags: Callable[..., Any]) -> None:
    dag = dags(**DOCKER, NVR_GPU_IMAGE="nvr-tasks-gpu:1", NVR_DOCKER_SHM_GB="3").dags[DAG_ID]
    for stage in STAGES:
        task = dag.task_dict[stage.name]
        if task.is_mapped:
            assert attribute(task, "wants") == stage.resources
            continue
        assert task.mem_limit == f"{stage.resources.memory_gb * 1024:.0f}m"
        assert task.cpus == stage.resources.cpu
        assert task.shm_size == 3 << 30
        if stage.resources.gpu:
            [request] = task.device_requests
            assert (request["Count"], request["Capabilities"]) == (stage.resources.gpu, [["gpu"]])
            assert task.image == "nvr-tasks-gpu:1"
        else:
            assert task.device_requests is None
            assert task.image == "nvr-tasks:1"


def test_no_secret_is_part_of_a_serialized_dag(dags: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from airflow.serialization.serialized_objects import DagSerialization

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "do-not-store-me")
    assert "do-not-store-me" not in str(DagSerialization.to_dict(dags(**DOCKER).dags[DAG_ID]))


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"NVR_IMAGE": ""}, "NVR_IMAGE is not set"),
        ({"NVR_DOCKER_PULL": "always"}, "NVR_DOCKER_PULL is 'always': expected missing or never"),
        ({"NVR_DOCKER_VOLUMES": "/data"}, "NVR_DOCKER_VOLUMES has '/data': expected SOURCE:/TARGET"),
        ({"NVR_DOCKER_VOLUMES": "a:/b:rw"}, "NVR_DOCKER_VOLUMES has 'a:/b:rw'"),
        ({"NVR_DOCKER_SHM_GB": "much"}, "NVR_DOCKER_SHM_GB is 'much': expected a number"),
    ],
)
def test_a_wrong_setting_is_named(environ: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        DockerSettings.from_env({**DOCKER, **environ})


def test_a_container_is_told_what_a_stage_needs_and_nothing_of_its_worker() -> None:
    worker = {
        "PATH": "/bin", "HOME": "/root", "TMPDIR": "/t", "SSL_CERT_FILE": "/etc/x", "HF_HOME": "/cache", "CUDA_VISIBLE_DEVICES": "0",
        "AIRFLOW__CORE__FERNET_KEY": "k", "NVR_IMAGE": "i", "NVR_SCRATCH": "/s", "NVR_CODE_COMMIT": "c", "DOCKER_HOST": "h", "OTHER": "o",
        "AWS_SECRET_ACCESS_KEY": "s", "AWS_ENDPOINT_URL": "u", "MLFLOW_TRACKING_URI": "m", "HF_TOKEN": "t", "NVR_DATA": "s3://d",
        "HTTPS_PROXY": "p", "EXTRA": "e",
    }  # fmt: skip
    assert container_environment(worker, ["EXTRA", "AIRFLOW__CORE__FERNET_KEY"]) == {
        "AWS_SECRET_ACCESS_KEY": "s", "AWS_ENDPOINT_URL": "u", "MLFLOW_TRACKING_URI": "m", "HF_TOKEN": "t", "NVR_DATA": "s3://d",
        "HTTPS_PROXY": "p", "EXTRA": "e", "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
