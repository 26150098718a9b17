"""MLflow: one run per pipeline run, one registry, two aliases. The only module that talks to MLflow.

The tracking URI comes from MLFLOW_TRACKING_URI; without it, everything goes to a SQLite file in `.nvr/`.
"""

from __future__ import annotations

import logging
import os
import re
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit, urlunsplit

from nvr_tasks.artifacts import locked
from nvr_tasks.errors import NvrError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

log = logging.getLogger(__name__)

CHALLENGER, CHAMPION, PREVIOUS = "challenger", "champion", "previous"
RUN_TAG = "nvr.pipeline_run"
DIGEST_TAG = "nvr.model_digest"
KINDS = ("http://", "https://", "sqlite:///", "postgresql", "mysql", "mssql", "databricks")  # of registries
PASSED_TAG = "nvr.passed_gate"  # URI of a decision that let a version pass; what never passed is no goal of a rollback
MODEL_TAG = "nvr.model"  # URI of the model artefact a version was made from


def tracking_uri() -> str:
    """Where runs and models are kept."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('.nvr/mlflow.db').absolute()}"


def without_credentials(uri: str) -> str:
    """A URI as it may be shown: user and password left out."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if "@" in parts.netloc else uri


class Tracking:
    """Runs and registered models of one MLflow server (or SQLite file)."""

    def __init__(self, experiment: str, uri: str | None = None) -> None:
        self.uri = uri or tracking_uri()
        if not self.uri.startswith(KINDS):
            raise NvrError(
                f"MLFLOW_TRACKING_URI {without_credentials(self.uri)} is no place for a model registry: give http(s)://HOST, "
                "sqlite:///FILE or another database (postgresql, mysql, mssql); folders are none of them"
            )
        self.experiment = experiment
        self._client: MlflowClient | None = None

    @property
    def client(self) -> MlflowClient:
        """The MLflow client; connecting happens on the first use."""
        if self._client is None:
            database = Path(self.uri.removeprefix("sqlite:///")) if self.uri.startswith("sqlite:///") else None
            if database is not None:
                database.parent.mkdir(parents=True, exist_ok=True)
                logging.getLogger("alembic").setLevel(logging.WARNING)  # table creation is not the user's story
            os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # stdout belongs to the result
            import mlflow

            logging.getLogger("mlflow").setLevel(logging.WARNING)
            # uv makes environments without pip, and nobody misses it in a conda.yaml
            logging.getLogger("mlflow.utils.environment").setLevel(logging.ERROR)
            mlflow.set_tracking_uri(self.uri)
            mlflow.set_registry_uri(self.uri)
            # The first client makes a database's tables, and two processes at once would trip over each other's.
            with locked(database.with_name(f"{database.name}.lock")) if database is not None else nullcontext():
                self._client = mlflow.MlflowClient(self.uri, self.uri)
                if database is not None:
                    self._client.search_registered_models(max_results=1)
        return self._client

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn MLflow's connection errors into one that says what to mend."""
        from mlflow.exceptions import MlflowException
        from requests.exceptions import RequestException

        try:
            yield
        except (MlflowException, RequestException) as error:
            text = str(error)
            if (
                isinstance(error, RequestException)
                or "API request to" in text
                or "Connection" in text
                or "Max retries" in text
            ):
                where, why = without_credentials(self.uri), _why_unreachable(text.replace(self.uri, ""))
                raise NvrError(
                    f"cannot use MLflow at {where} ({why}): is it up, and are MLFLOW_TRACKING_URI and its credentials right?"
                ) from None  # the original names the URI, credentials included
            raise

    # ── runs ─────────────────────────────────────────────────────────────────────────────────────────────────

    def experiment_id(self) -> str:
        """Id of the experiment, which is created when missing."""
        from mlflow.exceptions import MlflowException

        with self.explained():
            found = self.client.get_experiment_by_name(self.experiment)
            if found is not None:
                return str(found.experiment_id)
            location = None
            if self.uri.startswith("sqlite:///"):  # beside the database, not in whatever the working directory is
                location = (Path(self.uri.removeprefix("sqlite:///")).parent / "mlartifacts").as_uri()
            try:
                return str(self.client.create_experiment(self.experiment, artifact_location=location))
            except MlflowException:  # another process was first
                found = self.client.get_experiment_by_name(self.experiment)
                if found is None:
                    raise
                return str(found.experiment_id)

    def run(self, pipeline_run: str, tags: Mapping[str, str] | None = None) -> Run:
        """The MLflow run of a pipeline run: found by its tag or created, so a retry never makes a second one."""
        experiment = self.experiment_id()
        with self.explained():
            found = self.client.search_runs(
                [experiment], f"tags.`{RUN_TAG}` = '{_quoted(pipeline_run)}'", max_results=1
            )
            if found:
                return found[0]
            return self.client.create_run(
                experiment, run_name=pipeline_run, tags={RUN_TAG: pipeline_run, **(tags or {})}
            )

    def run_url(self, run: Run) -> str:
        """Where a person looks at a run; empty for a database that no server is known of (NVR_MLFLOW_UI)."""
        # NVR_MLFLOW_UI wins: in a container's network the server has a name that people cannot use.
        base = os.environ.get("NVR_MLFLOW_UI") or (without_credentials(self.uri) if self.uri.startswith("http") else "")
        if not base:
            return ""
        return f"{base.rstrip('/')}/#/experiments/{run.info.experiment_id}/runs/{quote(run.info.run_id)}"

    def artifact_url(self, run: Run, path: str) -> str:
        """Where a person looks at a file of a run; empty like `run_url`."""
        url = self.run_url(run)
        return url and f"{url}/artifacts/{quote(path)}"

    def reopen(self, run: Run) -> None:
        """Set a closed run to running again: its tasks were cleared."""
        with self.explained():
            self.client.update_run(run.info.run_id, status="RUNNING")

    def log(
        self,
        run: Run,
        *,
        metrics: Mapping[str, float] | None = None,
        params: Mapping[str, Any] | None = None,
        step: int = 0,
    ) -> None:
        """Log a batch of metrics at a step, and of params."""
        import time

        from mlflow.entities import Metric, Param

        now = int(time.time() * 1000)
        with self.explained():
            self.client.log_batch(
                run.info.run_id,
                metrics=[Metric(_key(k), float(v), now, step) for k, v in (metrics or {}).items()],
                params=[Param(_key(k), str(v)[:6000]) for k, v in (params or {}).items()],
            )

    # ── registry ─────────────────────────────────────────────────────────────────────────────────────────────

    def version_with_digest(self, name: str, digest: str) -> ModelVersion | None:
        """The registered version of a model with these weights, the first one if a race made two."""
        with self.explained():
            found = self.client.search_model_versions(f"name = '{_quoted(name)}' and tags.`{DIGEST_TAG}` = '{digest}'")
        ready = [v for v in found if v.status == "READY"]
        return min(ready, key=lambda v: int(v.version)) if ready else None

    def alias(self, name: str, alias: str) -> ModelVersion | None:
        """The version an alias points to, or None."""
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, RESOURCE_DOES_NOT_EXIST, ErrorCode

        with self.explained():
            try:
                return self.client.get_model_version_by_alias(name, alias)
            except MlflowException as error:
                if error.error_code in (
                    ErrorCode.Name(RESOURCE_DOES_NOT_EXIST),
                    ErrorCode.Name(INVALID_PARAMETER_VALUE),
                ):
                    return None
                raise

    def created(self, name: str) -> int | None:
        """When a registered model was made, in ms since 1970: what tells it from one of that name elsewhere. None: not there."""
        from mlflow.exceptions import MlflowException

        with self.explained():
            try:
                return int(self.client.get_registered_model(name).creation_timestamp)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                return None

    def version(self, name: str, version: str) -> ModelVersion | None:
        """A version, or None."""
        from mlflow.exceptions import MlflowException

        with self.explained():
            try:
                return self.client.get_model_version(name, version)
            except MlflowException as error:
                if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    raise
                return None

    def exists(self, name: str, version: str) -> bool:
        """Whether there is such a version."""
        return self.version(name, version) is not None

    def require(self, name: str, version: str, digest: str) -> ModelVersion:
        """A version, which must hold the model with these weights.

        Raises:
            NvrError: there is no such version here, or it is another model: the record speaks of another registry.
        """
        found = self.version(name, version)
        if found is None or found.tags.get(DIGEST_TAG) != digest:
            raise NvrError(
                f"version {version} of {name} in MLflow at {without_credentials(self.uri)} is not the model that was scored: "
                "run `nvr register` against this MLflow, then `nvr evaluate` and `nvr gate` again"
            )
        return found

    def tag(self, name: str, version: str, tags: Mapping[str, str]) -> None:
        """Set tags of a version."""
        with self.explained():
            for key, value in tags.items():
                self.client.set_model_version_tag(name, version, key, value)

    def point(self, name: str, alias: str, version: str) -> None:
        """Move an alias and read it back."""
        with self.explained():
            self.client.set_registered_model_alias(name, alias, version)
        now = self.alias(name, alias)
        if now is None or str(now.version) != str(version):
            raise NvrError(
                f"alias {alias} of {name} did not move to version {version} (it is {now and now.version}): run the stage again"
            )

    def unpoint(self, name: str, alias: str) -> None:
        """Remove an alias; fine if there is none."""
        from mlflow.exceptions import MlflowException

        with self.explained():
            try:
                self.client.delete_registered_model_alias(name, alias)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise

    def download(self, version: ModelVersion, target: Path) -> Path:
        """Fetch a registered version and return its sentence-transformers folder."""
        import mlflow
        from mlflow.exceptions import MlflowException

        with self.explained():
            try:
                folder = Path(
                    mlflow.artifacts.download_artifacts(
                        f"models:/{version.name}/{version.version}", dst_path=str(target)
                    )
                )
            except (OSError, MlflowException) as error:
                if "API request to" in str(error):
                    raise
                raise _files_are_gone(version, _first_line(error)) from None
        if not any(path.is_file() for path in folder.rglob("*")):  # MLflow makes an empty folder of nothing
            raise _files_are_gone(version, "there are none")
        found = sorted(folder.rglob("modules.json"))
        if not found:
            raise NvrError(
                f"version {version.version} of {version.name} holds no sentence-transformers model: point the alias at one that does"
            )
        return found[0].parent


def _files_are_gone(version: ModelVersion, why: str) -> NvrError:
    return NvrError(
        f"the files of version {version.version} of {version.name} cannot be read from MLflow ({why}): restore them, or move "
        "the alias with `nvr rollback --to VERSION`"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def _why_unreachable(text: str) -> str:
    """The cause in a message of requests or MLflow, which wraps it in all that was tried."""
    for pattern in (
        r"\[Errno -?\d+\] ([\w ]+)",  # of the operating system: Connection refused, Name or service not known
        r"(Read timed out|[Cc]onnect(?:ion)?[^()']*? timed out)",
        r"(too many \d+ error responses)",
        r"(certificate verify failed: [\w -]+)",
        r"(failed with error code \d+)",
    ):
        found = re.search(pattern, text)
        if found is not None:
            return found[1].strip()
    return textwrap.shorten((text.strip() or "no reason given").splitlines()[0], 200, placeholder=" …")


def _quoted(text: str) -> str:
    return text.replace("'", "")


def _key(name: str) -> str:
    """MLflow allows letters, digits, _ - . / space and : in keys."""
    return "".join(c if c.isalnum() or c in "_-./ :" else "_" for c in name)
