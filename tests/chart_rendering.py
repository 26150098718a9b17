"""Helm without a cluster: the chart rendered, and what Kubernetes would say to its pods."""

from __future__ import annotations

import base64
import functools
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

CHART = Path(__file__).resolve().parents[1] / "helm" / "nvr"
EXAMPLES = sorted(path.stem for path in (CHART / "examples").glob("*.yaml"))
WORKLOADS = ("Deployment", "StatefulSet")
POD_TEMPLATES = ("pod.yaml", "gpu-pod.yaml")  # of stages, in Airflow's ConfigMap of files
# Volumes that the Pod Security Standard "restricted" allows.
VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}

Document = dict[str, Any]


class _Strict(yaml.CSafeLoader):
    """Refuses a key that comes twice, as Kubernetes' server-side apply does and YAML libraries do not."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        twice = {key for key in keys if keys.count(key) > 1}
        assert not twice, f"line {node.start_mark.line + 1} of what was rendered has {twice} twice"
        return super().construct_mapping(node, deep)


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run helm ($HELM, or the one on PATH); the test is skipped, aloud, where there is none."""
    found = os.environ.get("HELM") or shutil.which("helm")
    if not found:
        pytest.skip("helm is not installed, so the chart is not checked: install it, or set HELM to its binary")
    return subprocess.run([found, *arguments], capture_output=True, text=True, check=False)


def template(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`helm template` of a release `nvr` in a namespace `nvr`."""
    return helm("template", "nvr", str(CHART), "--namespace", "nvr", *arguments)


def example(name: str) -> tuple[str, ...]:
    """Arguments for an example; `defaults` for none."""
    return () if name == "defaults" else ("--values", str(CHART / "examples" / f"{name}.yaml"))


def settings(**values: str) -> list[str]:
    """Arguments for values, dots of their paths written as two underscores."""
    return [f"--set-string={path.replace('__', '.')}={value}" for path, value in values.items()]


@functools.cache
def _rendered(*arguments: str) -> str:
    done = template(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def render(*arguments: str) -> list[Document]:
    """The chart's documents."""
    return [document for document in yaml.load_all(_rendered(*arguments), Loader=_Strict) if document]


def named(documents: list[Document], kind: str, name: str = "") -> list[Document]:
    """Documents of a kind, or of a kind and name."""
    return [d for d in documents if d["kind"] == kind and (not name or d["metadata"]["name"] == name)]


def pods(documents: list[Document]) -> Iterator[tuple[str, Document]]:
    """Name, labels and spec of every pod that the chart makes itself."""
    for document in documents:
        if document["kind"] in WORKLOADS:
            yield document["metadata"]["name"], document["spec"]["template"]
        elif document["kind"] == "Pod":
            yield document["metadata"]["name"], document


def stage_pods(documents: list[Document]) -> Iterator[tuple[str, Document]]:
    """The templates of stages' pods."""
    [files] = named(documents, "ConfigMap", "nvr-airflow-files")
    for name in POD_TEMPLATES:
        yield name, yaml.load(files["data"][name], Loader=_Strict)  # noqa: S506


def containers(pod: Document) -> list[Document]:
    """All of a pod, those of its start too."""
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def environment(documents: list[Document], name: str) -> dict[str, str]:
    """Data of a ConfigMap."""
    [found] = named(documents, "ConfigMap", name)
    return dict(found["data"])


def images(documents: list[Document]) -> set[str]:
    """Every image that a release would run, those of stages too."""
    ours = {c["image"] for _, pod in [*pods(documents), *stage_pods(documents)] for c in containers(pod)}
    airflow = environment(documents, "nvr-airflow")
    return ours | {airflow[key] for key in ("NVR_IMAGE", "NVR_GPU_IMAGE") if airflow[key]}


def masked(documents: list[Document]) -> str:
    """Documents in a fixed order, without what is random: generated secrets."""
    for secret in named(documents, "Secret"):
        secret["data"] = dict.fromkeys(secret["data"], "(generated)")
    ordered = sorted(documents, key=lambda d: (d["kind"], d["metadata"].get("namespace", ""), d["metadata"]["name"]))
    return yaml.safe_dump_all(ordered, sort_keys=True, width=120, allow_unicode=True)


def secrets(documents: list[Document]) -> set[str]:
    """Values of Secrets, plain."""
    return {base64.b64decode(v).decode() for s in named(documents, "Secret") for v in s["data"].values()}


def unrestricted(pod: Document) -> list[str]:
    """What the Pod Security Standard "restricted" forbids in a pod, and a root file system that can be written.

    After https://kubernetes.io/docs/concepts/security/pod-security-standards/ (v1.33).
    """
    spec = pod["spec"]
    security = spec.get("securityContext", {})
    wrong = [key for key in ("hostNetwork", "hostPID", "hostIPC") if spec.get(key)]
    wrong += [f"sysctl {s['name']}" for s in security.get("sysctls", [])]
    for volume in spec.get("volumes", []):
        wrong += [f"volume {volume['name']} is {kind}" for kind in set(volume) - {"name"} - VOLUMES]
    wrong += [f"annotation {a}" for a in pod["metadata"].get("annotations", {}) if "apparmor" in a or "seccomp" in a]
    for container in containers(pod):
        own = container.get("securityContext", {})
        name = container["name"]
        for key, least in {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}.items():
            if own.get(key, security.get(key)) != least:
                wrong.append(f"{name} lacks {key}")
        if own.get("runAsUser", security.get("runAsUser", 1)) == 0:
            wrong.append(f"{name} runs as root")
        if own.get("privileged") or own.get("procMount", "Default") != "Default":
            wrong.append(f"{name} is privileged")
        if own.get("allowPrivilegeEscalation") is not False:
            wrong.append(f"{name} allows privilege escalation")
        if not own.get("readOnlyRootFilesystem"):
            wrong.append(f"{name} has a writable root")
        capabilities = own.get("capabilities", {})
        if capabilities.get("drop") != ["ALL"] or set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
            wrong.append(f"{name} has capabilities")
        if {"seLinuxOptions", "windowsOptions", "appArmorProfile"} & {*own, *security}:
            wrong.append(f"{name} changes its confinement")
        wrong += [f"{name} has host port {p['hostPort']}" for p in container.get("ports", []) if p.get("hostPort")]
    return wrong
