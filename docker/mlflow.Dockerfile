# The MLflow server with drivers of PostgreSQL and S3 and nothing of torch.
ARG BASE=python:3.11-slim-bookworm

# What each extra asks for, as files: a change elsewhere in pyproject.toml then rebuilds no layer of packages.
FROM ${BASE} AS pins
WORKDIR /pins
COPY pyproject.toml ./
RUN python3 -c "import pathlib, tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; wanted = {'base': project['dependencies'], **project['optional-dependencies']}; [pathlib.Path(name + '.txt').write_text('\\n'.join(lines)) for name, lines in wanted.items()]" \
    && rm pyproject.toml

FROM ${BASE} AS packages
ARG UV_VERSION=0.13.9
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG UV_DEFAULT_INDEX
ARG UV_INDEX
ARG UV_INDEX_STRATEGY=first-index
ENV SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt \
    UV_LINK_MODE=copy \
    UV_COMPILE_BYTECODE=1 \
    UV_NO_PROGRESS=1 \
    UV_PYTHON_DOWNLOADS=never \
    VIRTUAL_ENV=/opt/mlflow
RUN pip install --no-cache-dir --disable-pip-version-check "uv==${UV_VERSION}" \
    && uv venv --quiet --python "$(command -v python3)" "${VIRTUAL_ENV}"
WORKDIR /build
COPY constraints.txt ./
COPY --from=pins /pins /pins
RUN --mount=type=cache,target=/root/.cache/uv --mount=type=bind,source=docker/wheels,target=/wheels \
    uv pip install --quiet --constraint constraints.txt --find-links /wheels/cpu \
        --requirements /pins/mlflow-server.txt

FROM ${BASE}
RUN groupadd --gid 10001 nvr \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin nvr
COPY --from=packages /opt/mlflow /opt/mlflow
ENV PATH=/opt/mlflow/bin:${PATH} \
    HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    DO_NOT_TRACK=1 \
    MLFLOW_DISABLE_TELEMETRY=true \
    MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
WORKDIR /tmp
USER 10001:10001
EXPOSE 5000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=6 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:5000/health', timeout=4)"]
ENTRYPOINT ["mlflow"]
CMD ["server", "--host", "0.0.0.0", "--port", "5000", "--workers", "1"]
ARG VERSION=0
ARG COMMIT=unknown
LABEL org.opencontainers.image.title="nvr-mlflow" \
      org.opencontainers.image.description="MLflow server for the NV-Retriever workflow" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${COMMIT}"
