"""The Helm chart without a cluster: rendered, validated against Kubernetes' schemas, and held to what it promises.

After a change on purpose: UPDATE_GOLDEN=1 … pytest tests/test_chart.py -k on_record
"""

from __future__ import annotations

import itertools
import json
import os
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from chart_rendering import (
    CHART,
    EXAMPLES,
    WORKLOADS,
    Document,
    containers,
    environment,
    example,
    helm,
    images,
    masked,
    named,
    pods,
    render,
    secrets,
    settings,
    stage_pods,
    template,
    unrestricted,
)

from nvr_tasks.recipe_files import parse_recipe
from nvr_tasks.stages import ON_DEMAND, STAGES

REPOSITORY = CHART.parents[1]
GOLDEN = Path(__file__).with_name("golden") / "chart"
ALL = ["defaults", *EXAMPLES]
IMAGES = ["airflow", "mlflow", "tasks", "tasks.gpu", "postgresql", "s3"]
DIGEST = "sha256:" + "ab" * 32
# What a release takes with every service, and with secrets of its user's.
GIVEN = settings(
    postgresql__existingSecret="pg",
    airflow__existingSecret="af",
    mlflow__existingSecret="ml",
    s3__existingSecret="store",
)


@pytest.mark.parametrize("name", ALL)
def test_helm_finds_nothing_to_say(name: str) -> None:
    done = helm("lint", "--strict", str(CHART), *example(name))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[WARNING]" not in done.stdout


@pytest.mark.parametrize("version", ["1.30.0", "1.33.0", kubernetes_validate.latest_version()])
@pytest.mark.parametrize("name", ALL)
def test_manifests_are_what_kubernetes_expects(name: str, version: str) -> None:
    documents = render("--kube-version", version, *example(name))
    assert {d["kind"] for d in documents} >= {"Deployment", "Service", "ConfigMap", "Role", "RoleBinding", "Pod"}
    for document in documents:
        kubernetes_validate.validate(document, version, strict=True)
    for _, pod in stage_pods(documents):
        kubernetes_validate.validate(pod, version, strict=True)


def test_parts_can_be_left_out() -> None:
    documents = render(
        *(
            "--set=mlflow.enabled=false",
            "--set=airflow.simpleAuth.enabled=false",
            "--set=airflow.database.migrate=false",
        ),
        *settings(tasks__mlflowTrackingUri="https://mlflow.example.com"),
    )
    for document in documents:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    assert not [d for d in documents if d["metadata"]["name"] == "nvr-mlflow"]
    assert environment(documents, "nvr-tasks")["MLFLOW_TRACKING_URI"] == "https://mlflow.example.com"
    assert "db migrate" not in yaml.safe_dump_all(documents)
    assert "name: AIRFLOW_ADMIN_PASSWORD" not in yaml.safe_dump_all(documents)


def test_the_oldest_kubernetes_gets_only_what_it_knows() -> None:
    done = template("--kube-version", "1.19.0")
    assert done.returncode != 0
    assert "kubeVersion" in done.stderr
    assert {d["apiVersion"] for d in render("--kube-version", "1.20.15", *example("trial"))} == {
        "v1", "apps/v1", "networking.k8s.io/v1", "rbac.authorization.k8s.io/v1",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["trial", "eks"])
def test_manifests_are_those_on_record(name: str) -> None:
    text = masked(render(*example(name)))
    golden = GOLDEN / f"{name}.yaml"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()


@pytest.mark.parametrize("name", ALL)
def test_pods_meet_the_restricted_standard(name: str) -> None:
    made = dict(pods(render(*example(name))))
    assert len(made) >= 6  # four services of Airflow, MLflow, the test
    assert {pod: wrong for pod, spec in made.items() if (wrong := unrestricted(spec))} == {}


@pytest.mark.parametrize("name", ALL)
def test_templates_of_stages_leave_security_to_the_runner(name: str) -> None:
    for template_name, pod in stage_pods(render(*example(name))):
        assert "securityContext" not in pod["spec"], template_name
        assert "serviceAccountName" not in pod["spec"], template_name
        [base] = pod["spec"]["containers"]
        assert base["name"] == "base"
        assert set(base) <= {"name", "image", "volumeMounts"}, template_name
        # As the runner completes them.
        pod["spec"]["securityContext"] = {
            "runAsNonRoot": True, "runAsUser": 10001, "seccompProfile": {"type": "RuntimeDefault"},
        }  # fmt: skip
        base["securityContext"] = {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
        }  # fmt: skip
        assert unrestricted(pod) == []


@pytest.mark.parametrize("name", ALL)
def test_only_services_that_start_pods_hold_a_token(name: str) -> None:
    with_token = {n for n, pod in pods(render(*example(name))) if pod["spec"]["automountServiceAccountToken"]}
    assert with_token == {"nvr-airflow-scheduler", "nvr-airflow-triggerer"}
    assert not any(a["automountServiceAccountToken"] for a in named(render(*example(name)), "ServiceAccount"))


@pytest.mark.parametrize("name", ALL)
def test_airflow_manages_pods_in_one_namespace_and_nothing_else(name: str) -> None:
    documents = render(*example(name))
    namespace = "nvr-stages" if name in ("eks", "gke") else "nvr"
    [role], [binding] = named(documents, "Role"), named(documents, "RoleBinding")
    granted = {
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert granted == {
        *(("", "pods", verb) for verb in ("get", "list", "watch", "create", "delete", "patch")),
        ("", "pods/log", "get"),
        *(("", "pods/exec", verb) for verb in ("get", "create")),
        *((group, "events", verb) for group in ("", "events.k8s.io") for verb in ("list", "watch")),
    }
    assert not any("resourceNames" in rule or "nonResourceURLs" in rule for rule in role["rules"])
    assert role["metadata"]["namespace"] == binding["metadata"]["namespace"] == namespace
    assert binding["roleRef"]["kind"] == "Role"
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "nvr-airflow", "namespace": "nvr"}]
    assert not [d for d in documents if d["kind"].startswith("Cluster")]
    assert environment(documents, "nvr-airflow")["NVR_K8S_NAMESPACE"] == namespace


@pytest.mark.parametrize("name", ALL)
def test_images_have_a_version_and_ours_follow_the_chart(name: str) -> None:
    with (REPOSITORY / "pyproject.toml").open("rb") as file:
        version = tomllib.load(file)["project"]["version"]
    about = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (about["version"], about["appVersion"]) == (version, version)
    assert "dependencies" not in about
    for image in images(render(*example(name))):
        tag = image.rpartition("/")[2].partition(":")[2]
        assert tag not in ("", "latest"), image
        assert "nvr-" not in image.rpartition("/")[2] or "@sha256:" in image or tag == version, image


def test_a_registry_and_a_digest_reach_every_image() -> None:
    on = [*settings(image__registry="registry.example.com/mirror/"), "--set=tasks.gpu.enabled=true"]
    ours = images(render(*on))
    assert {image for image in ours if not image.startswith("registry.example.com/")} == {
        image for image in ours if image.startswith(("docker.io/postgres:", "docker.io/chrislusf/seaweedfs:"))
    }, "what is published elsewhere is fetched from there, unless it is said otherwise"
    on += [f"--set={bundled}.image.registry=" for bundled in ("postgresql", "s3")]
    everywhere = images(render(*on))
    assert len(everywhere) == len(IMAGES)
    assert all(image.startswith("registry.example.com/mirror/") and "//" not in image for image in everywhere)
    digests = images(render(*on, *(f"--set={path}.image.digest={DIGEST}" for path in IMAGES)))
    assert {image.partition("@")[2] for image in digests} == {DIGEST}
    for path in IMAGES:
        own = images(render(*on, f"--set={path}.image.registry=own.example.com"))
        assert len([image for image in own if image.startswith("own.example.com/")]) == 1, path


@pytest.mark.parametrize("given", [[*GIVEN], [*example("eks")], [*example("gke")]], ids=["given", "eks", "gke"])
def test_given_secrets_leave_none_to_the_chart(given: list[str]) -> None:
    documents = render(*given)
    assert named(documents, "Secret") == []
    for _, pod in pods(documents):
        for variable in itertools.chain.from_iterable(c.get("env", []) for c in containers(pod)):
            secretive = any(word in variable["name"] for word in ("PASSWORD", "KEY", "SECRET", "CONN", "STORE_URI"))
            assert "value" not in variable or not secretive, variable["name"]


def test_generated_secrets_are_in_secrets_alone() -> None:
    documents = render(*example("trial"))
    values = secrets(documents)
    assert len(values) == 11
    assert all(len(value) >= 20 for value in values)
    rest = yaml.safe_dump_all([d for d in documents if d["kind"] != "Secret"])
    assert not [value for value in values if value in rest]


@pytest.mark.parametrize("name", ALL)
def test_airflow_never_sees_what_stages_know(name: str) -> None:
    documents = render(*example(name))
    airflow = {n: pod for n, pod in pods(documents) if n.startswith("nvr-airflow")}
    for pod in airflow.values():
        for container in containers(pod):
            assert not [v["name"] for v in container["env"] if v["name"].startswith(("AWS_", "HF_", "MLFLOW_"))]
            assert [s["configMapRef"]["name"] for s in container["envFrom"]] == ["nvr-airflow"]
    assert not [key for key in environment(documents, "nvr-airflow") if key.startswith(("AWS_", "HF_", "MLFLOW_"))]
    with_password = {
        (n, c["name"])
        for n, pod in airflow.items()
        for c in containers(pod)
        if "AIRFLOW_ADMIN_PASSWORD" in {v["name"] for v in c["env"]}
    }
    assert with_password == {("nvr-airflow-api-server", "prepare")}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set=postgresql.enabled=false"], "airflow.existingSecret must name"),
        (["--set=postgresql.enabled=false", *settings(airflow__existingSecret="a")], "mlflow.existingSecret must name"),
        (settings(airflow__existingSecret="a"), "give all of them, or none"),
        (["--set=mlflow.enabled=false"], "tasks.mlflowTrackingUri must name"),
        (["--set=airflow.ingress.enabled=true"], "airflow.ingress.host must name"),
        (settings(objectStore__endpoint="http://x"), "set s3.enabled to false"),
        (["--set=networkPolicy.egress.enabled=true"], "there would be no policy at all"),
        (["--set=tasks.env.AWS_SECRET_ACCESS_KEY=x"], "put it into the Secret that tasks.existingSecret names"),
        (["--set=tasks.env.hf_token=x"], "put it into the Secret that tasks.existingSecret names"),
        (["--set=tasks.env.MLFLOW_TRACKING_URI=http://u:p@h"], "put it into the Secret"),
        (["--set=airflow.config.AIRFLOW_CONN_X=http://u:p@h"], "everyone to read, with its password"),
        (["--set=airflow.config.AIRFLOW__CORE__FERNET_KEY=x"], "the Secret that airflow.existingSecret names"),
        (["--set=tasks.resources.train.gpu=8"], "tasks.gpu.enabled is false"),
        (["--set=tasks.resources.trian.gpu=8"], "trian"),
    ],
)
def test_values_that_miss_one_another_are_refused(arguments: list[str], said: str) -> None:
    done = template(*arguments)
    assert done.returncode != 0
    assert said in done.stderr


def test_resources_are_those_of_stages() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    known = schema["properties"]["tasks"]["properties"]["resources"]["propertyNames"]["enum"]
    assert known == ["default", "begin", "finish", "rollback", *(stage.name for stage in (*STAGES, *ON_DEMAND))]


@pytest.mark.parametrize("name", ALL)
def test_all_that_is_named_is_there(name: str) -> None:
    """Services find pods; pods find ConfigMaps, accounts and claims; Secrets are the chart's or the user's."""
    documents = render(*example(name))
    there = {(d["kind"], d["metadata"]["namespace"], d["metadata"]["name"]) for d in documents}
    assert len(there) == len(documents), "two documents with one name"
    values = yaml.safe_load((CHART / "examples" / f"{name}.yaml").read_text()) if name != "defaults" else {}
    users = {
        values.get(part, {}).get(key)
        for part in ("airflow", "mlflow", "tasks")
        for key in ("existingSecret", "objectStoreSecret")
    }
    templates = [d["spec"]["template"]["metadata"]["labels"] for d in documents if d["kind"] in WORKLOADS]
    for service in named(documents, "Service"):
        selector = service["spec"]["selector"].items()
        assert len([labels for labels in templates if selector <= labels.items()]) == 1, service["metadata"]["name"]
    for workload in [d for d in documents if d["kind"] in WORKLOADS]:
        labels = workload["spec"]["template"]["metadata"]["labels"].items()
        assert workload["spec"]["selector"]["matchLabels"].items() <= labels
    for _, pod in pods(documents):
        account = pod["spec"].get("serviceAccountName")
        assert account is None or ("ServiceAccount", "nvr", account) in there
        for volume in pod["spec"].get("volumes", []):
            if "configMap" in volume:
                assert ("ConfigMap", "nvr", volume["configMap"]["name"]) in there
            if "persistentVolumeClaim" in volume:
                assert ("PersistentVolumeClaim", "nvr", volume["persistentVolumeClaim"]["claimName"]) in there
        for container in containers(pod):
            for variable in container.get("env", []):
                secret = variable.get("valueFrom", {}).get("secretKeyRef", {}).get("name")
                assert secret is None or secret in users or ("Secret", "nvr", secret) in there
    airflow = environment(documents, "nvr-airflow")
    assert ("ServiceAccount", airflow["NVR_K8S_NAMESPACE"], airflow["NVR_K8S_SERVICE_ACCOUNT"]) in there
    for source in airflow["NVR_K8S_ENV_FROM"].split(","):
        kind, _, of = source.partition("/")
        written = "ConfigMap" if kind == "configmap" else "Secret"
        assert of in users or (written, airflow["NVR_K8S_NAMESPACE"], of) in there


@pytest.mark.parametrize("name", ALL)
def test_every_service_is_probed_without_an_interpreter_full_of_airflow(name: str) -> None:
    for pod, spec in pods(render(*example(name))):
        for container in spec["spec"]["containers"]:
            if pod == "nvr-test":
                continue
            for probe in ("readinessProbe", "livenessProbe"):
                command = container[probe].get("exec", {}).get("command", [])
                assert "airflow" not in command, f"{pod}: {probe}"
                if command[:2] == ["python", "-c"]:
                    compile(command[2], pod, "exec")
            assert container["resources"]["limits"]["memory"], pod


def test_doors_are_those_that_are_needed() -> None:
    documents = named(render(*example("trial")), "NetworkPolicy")
    everyone = {"app.kubernetes.io/name": "nvr", "app.kubernetes.io/instance": "nvr"}
    closed = [d["spec"] for d in documents if d["spec"].get("ingress") == []]
    assert {"matchLabels": everyone} in [spec["podSelector"] for spec in closed]
    for name, pod in pods(render(*example("trial"))):
        assert everyone.items() <= pod["metadata"]["labels"].items(), f"{name} is not closed"
    doors: dict[tuple[str, int], set[str]] = {}
    for policy in documents:
        for rule in policy["spec"]["ingress"]:
            [port] = rule["ports"]
            component = policy["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/component"]
            for peer in rule["from"]:
                assert "namespaceSelector" not in peer
                [expression] = peer["podSelector"].get("matchExpressions") or [{"values": ["stages"]}]
                doors.setdefault((component, port["port"]), set()).update(expression["values"])
    airflow = {f"airflow-{service}" for service in ("api-server", "scheduler", "dag-processor", "triggerer")}
    assert doors == {
        ("airflow-api-server", 8080): airflow - {"airflow-api-server"} | {"tests"},
        ("airflow-scheduler", 8793): {"airflow-api-server"},
        ("airflow-triggerer", 8794): {"airflow-api-server"},
        ("mlflow", 5000): {"stages", "tests"},
        ("postgresql", 5432): airflow | {"mlflow"},
        ("s3", 8333): {"stages", "mlflow"},
    }


def test_stages_in_a_namespace_of_their_own_have_there_what_they_need() -> None:
    documents = render(*settings(tasks__namespace="apart"), "--set=networkPolicy.enabled=true")
    apart = {(d["kind"], d["metadata"]["name"]) for d in documents if d["metadata"]["namespace"] == "apart"}
    assert apart == {
        ("ConfigMap", "nvr-tasks"), ("NetworkPolicy", "nvr-stages"), ("Role", "nvr-stages"), ("RoleBinding", "nvr-stages"),
        ("Secret", "nvr-s3"), ("ServiceAccount", "nvr-stages"),
    }  # fmt: skip
    stages = environment(documents, "nvr-tasks")
    assert stages["MLFLOW_TRACKING_URI"] == "http://nvr-mlflow.nvr:5000"
    assert stages["AWS_ENDPOINT_URL"] == "http://nvr-s3.nvr:8333"
    [here], [there] = (
        [s["data"] for s in named(documents, "Secret", "nvr-s3") if s["metadata"]["namespace"] == n]
        for n in ("nvr", "apart")
    )
    assert here == there
    [mlflow] = [pod for name, pod in pods(documents) if name == "nvr-mlflow"]
    [hosts] = [a for a in mlflow["spec"]["containers"][0]["args"] if a.startswith("--allowed-hosts=")]
    assert "nvr-mlflow.nvr:5000" in hosts


def test_a_recipe_of_the_map_reaches_stages_as_it_was_written(tmp_path: Path) -> None:
    text = "name: mine # comments, too\nseed: 20000000000000\ntrain: {learning_rate: 1.0e-5}\n"
    (tmp_path / "mine.yaml").write_text(text)
    documents = render(f"--set-file=recipes.mine={tmp_path / 'mine.yaml'}", *settings(dags__recipe="mine"))
    assert environment(documents, "nvr-recipes") == {"mine.yaml": text}
    assert environment(documents, "nvr-airflow")["NVR_RECIPE"] == "/opt/nvr-recipes/mine.yaml"
    for _, pod in stage_pods(documents):
        mounts = pod["spec"]["containers"][0]["volumeMounts"]
        assert {"name": "recipes", "mountPath": "/opt/nvr-recipes", "readOnly": True} in mounts
        assert {"name": "recipes", "configMap": {"name": "nvr-recipes"}} in pod["spec"]["volumes"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_recipes_of_examples_are_valid(name: str) -> None:
    recipes: dict[str, Any] = yaml.safe_load((CHART / "examples" / f"{name}.yaml").read_text()).get("recipes", {})
    for recipe, text in recipes.items():
        assert parse_recipe(text, recipe).name == recipe


def test_stages_on_gpus_go_where_gpus_are() -> None:
    documents = render(*example("eks"))
    cpu, gpu = (pod["spec"] for _, pod in stage_pods(documents))
    assert cpu["nodeSelector"] == {"node.kubernetes.io/purpose": "stages"}
    assert gpu["nodeSelector"] == {"node.kubernetes.io/purpose": "gpu"}
    assert "tolerations" not in cpu
    assert gpu["tolerations"][0]["key"] == "nvidia.com/gpu"
    airflow = environment(documents, "nvr-airflow")
    assert airflow["NVR_GPU_IMAGE"] == gpu["containers"][0]["image"] != airflow["NVR_IMAGE"]
    assert airflow["NVR_RESOURCES"] == '{"train":{"cpu":32,"gpu":8,"memory_gb":256}}'
    pools = yaml.safe_load(environment(documents, "nvr-airflow-files")["pools.json"])
    assert pools["nvr_gpu"]["slots"] == 4
    assert pools["nvr_promotion"]["slots"] == 1
    assert all(pool["include_deferred"] for pool in pools.values()), "stages are deferred while their pods run"


def test_names_without_dns_reach_every_pod() -> None:
    alias = ["--set=hostAliases[0].ip=10.0.0.9", "--set=hostAliases[0].hostnames[0]=nvr-mlflow"]
    fixed = settings(
        airflow__apiServer__service__clusterIP="10.0.0.8", mlflow__service__clusterIP="10.0.0.9",
        postgresql__service__clusterIP="10.0.0.10", s3__service__clusterIP="10.0.0.11",
    )  # fmt: skip
    documents = render(*alias, *fixed)
    assert {s["spec"]["clusterIP"] for s in named(documents, "Service")} == {f"10.0.0.{n}" for n in (8, 9, 10, 11)}
    everyone: list[tuple[str, Document]] = [*pods(documents), *stage_pods(documents)]
    assert all(pod["spec"]["hostAliases"] == [{"ip": "10.0.0.9", "hostnames": ["nvr-mlflow"]}] for _, pod in everyone)
    assert all(pod["spec"]["enableServiceLinks"] is False for _, pod in everyone)
