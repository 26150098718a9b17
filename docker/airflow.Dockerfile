# Airflow with the DAGs in it: every service of Airflow runs from this image, and no stage does (it holds no torch).
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
    VIRTUAL_ENV=/opt/nvr
RUN pip install --no-cache-dir --disable-pip-version-check "uv==${UV_VERSION}" \
    && uv venv --quiet --python "$(command -v python3)" "${VIRTUAL_ENV}"
WORKDIR /build
COPY constraints.txt ./
COPY --from=pins /pins /pins
RUN --mount=type=cache,target=/root/.cache/uv --mount=type=bind,source=docker/wheels,target=/wheels \
    uv pip install --quiet --constraint constraints.txt --find-links /wheels/cpu \
        --requirements /pins/base.txt --requirements /pins/airflow.txt --requirements /pins/airflow-postgres.txt
# Our code in a folder of its own: in the image it is a layer of a megabyte on top of the packages.
FROM packages AS code
COPY pyproject.toml README.md LICENSE ./
COPY nvr_tasks nvr_tasks
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --quiet --no-deps --build-constraints constraints.txt --prefix /opt/code .

FROM ${BASE}
RUN groupadd --gid 10001 nvr \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /opt/airflow --shell /usr/sbin/nologin nvr \
    && install -d -o 10001 -g 10001 -m 0750 /opt/airflow /opt/airflow/logs /opt/airflow/state
COPY --from=packages /opt/nvr /opt/nvr
COPY --from=code /opt/code /opt/nvr
COPY dags /opt/nvr-dags
ENV PATH=/opt/nvr/bin:${PATH} \
    HOME=/opt/airflow \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    DO_NOT_TRACK=1 \
    SCARF_ANALYTICS=false \
    AIRFLOW_HOME=/opt/airflow \
    AIRFLOW__CORE__DAGS_FOLDER=/opt/nvr-dags \
    AIRFLOW__CORE__LOAD_EXAMPLES=False \
    AIRFLOW__LOGGING__BASE_LOG_FOLDER=/opt/airflow/logs \
    AIRFLOW__LOGGING__COLORED_CONSOLE_LOG=False \
    AIRFLOW__WORKERS__EXECUTION_API_TIMEOUT=30 \
    AIRFLOW__USAGE_DATA_COLLECTION__ENABLED=False
WORKDIR /opt/airflow
USER 10001:10001
EXPOSE 8080
# The api-server's own answer; other services of Airflow run from this image with a check of their own (compose.yaml).
HEALTHCHECK --interval=15s --timeout=10s --start-period=90s --retries=5 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8080/api/v2/version', timeout=8)"]
ENTRYPOINT ["airflow"]
CMD ["api-server"]
ARG VERSION=0
ARG COMMIT=unknown
LABEL org.opencontainers.image.title="nvr-airflow" \
      org.opencontainers.image.description="Airflow with the DAGs of the NV-Retriever workflow" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${COMMIT}"
