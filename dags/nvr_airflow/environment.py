"""What a stage's process inherits: what it needs to work, and nothing that belongs to Airflow.

An allow-list, since the scheduler's environment holds the fernet key, the database connection and the JWT secret.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

NAMES = frozenset(
    {
        "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TMPDIR", "TEMP", "TMP",
        "XDG_CACHE_HOME", "LD_LIBRARY_PATH", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY",
        "http_proxy", "https_proxy", "no_proxy", "all_proxy", "SSL_CERT_FILE", "SSL_CERT_DIR",
        "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "DO_NOT_TRACK", "SOURCE_DATE_EPOCH",
    }
)  # fmt: skip
PREFIXES = (
    "NVR_", "LC_", "MLFLOW_", "AWS_", "HF_", "TRANSFORMERS_", "TOKENIZERS_", "SENTENCE_TRANSFORMERS_", "MTEB_",
    "TORCH", "PYTORCH_", "CUDA_", "NVIDIA_", "NCCL_", "OMP_", "MKL_", "OPENBLAS_", "NUMBA_",
)  # fmt: skip


# What describes the worker's file system, interpreter or devices, or the deployment: wrong or useless in a container.
OF_THE_WORKER = frozenset(
    {
        "PATH", "HOME", "USER", "LOGNAME", "SHELL", "TMPDIR", "TEMP", "TMP", "XDG_CACHE_HOME", "LD_LIBRARY_PATH",
        "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "AWS_CA_BUNDLE",
        "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_PROFILE", "AWS_WEB_IDENTITY_TOKEN_FILE",
        "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_TOKEN_PATH", "TRANSFORMERS_CACHE",
        "SENTENCE_TRANSFORMERS_HOME", "TORCH_HOME", "NUMBA_CACHE_DIR", "CUDA_VISIBLE_DEVICES", "CUDA_HOME",
        "NVIDIA_VISIBLE_DEVICES", "MLFLOW_BACKEND_STORE_URI", "MLFLOW_REGISTRY_STORE_URI", "MLFLOW_TRACKING_SERVER_CERT_PATH",
        "MLFLOW_TRACKING_CLIENT_CERT_PATH", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
    }
)  # fmt: skip
# What `nvr` itself reads, but for what is an argument (NVR_ROOT) or of the image (NVR_SCRATCH).
OF_NVR = frozenset(
    {
        "NVR_DATA", "NVR_VERIFY", "NVR_MLFLOW_UI", "NVR_PROMOTION_LEASE_S",
        "NVR_JUDGE_URL", "NVR_JUDGE_MODEL", "NVR_JUDGE_API_KEY",
    }
)  # fmt: skip


def container_environment(environ: Mapping[str, str], also: Iterable[str] = ()) -> dict[str, str]:
    """The part of `environ` that a stage in a container is given; `also` (NVR_PASS_ENV) names further variables."""
    named = set(also)
    return {
        name: value
        for name, value in task_environment(environ, named).items()
        if name in named or (name not in OF_THE_WORKER and (name in OF_NVR or not name.startswith("NVR_")))
    }


def task_environment(environ: Mapping[str, str], also: Iterable[str] = ()) -> dict[str, str]:
    """The part of `environ` that a stage may see; `also` names further variables (NVR_PASS_ENV).

    Airflow's own variables never pass, not even when they are named. PYTHONPATH and the like do not either: they
    describe the Airflow environment's Python and would break the task environment's.
    """
    wanted = NAMES | set(also)
    env = {
        name: value
        for name, value in environ.items()
        if (name in wanted or name.startswith(PREFIXES)) and not name.startswith("AIRFLOW")
    }
    return env | {"PYTHONUNBUFFERED": "1"}
