# What a stage runs in, for CPU and for NVIDIA GPUs: `make images`, `make image-gpu`, or by hand from the repository's root
#   DOCKER_BUILDKIT=1 docker build -f docker/tasks.Dockerfile --build-arg FLAVOUR=cpu -t nvr-tasks:dev .
# The GPU flavour needs no CUDA base image: torch's wheels bring all of CUDA but the driver, which the host's container
# toolkit lends.
ARG BASE=python:3.11-slim-bookworm

# What each extra asks for, as files: a change elsewhere in pyproject.toml then rebuilds no layer of packages.
FROM ${BASE} AS pins
WORKDIR /pins
COPY pyproject.toml ./
RUN python3 -c "import pathlib, tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; wanted = {'base': project['dependencies'], **project['optional-dependencies']}; [pathlib.Path(name + '.txt').write_text('\\n'.join(lines)) for name, lines in wanted.items()]" \
    && rm pyproject.toml

FROM ${BASE} AS packages
ARG UV_VERSION=0.13.9
# Package indexes of a closed network; names of this stage only, so nothing of them is left in the image.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG UV_DEFAULT_INDEX
ARG UV_INDEX
ARG UV_INDEX_STRATEGY=first-index
# uv trusts what the base image trusts; a venv that is copied holds files, not links; a read-only root cannot compile later.
ENV SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt \
    UV_LINK_MODE=copy \
    UV_COMPILE_BYTECODE=1 \
    UV_NO_PROGRESS=1 \
    UV_PYTHON_DOWNLOADS=never \
    VIRTUAL_ENV=/opt/nvr
RUN pip install --no-cache-dir --disable-pip-version-check "uv==${UV_VERSION}" \
    && uv venv --quiet --python "$(command -v python3)" "${VIRTUAL_ENV}"

# Dependencies first: this layer is rebuilt when a pin moves, not when code does.
ARG FLAVOUR=cpu
ARG EXTRAS="tasks demo"
WORKDIR /build
COPY constraints.txt ./
COPY --from=pins /pins /pins
# Wheels at hand (docker/wheels/FLAVOUR) win over the index. Without a torch among them, the CPU flavour asks
# pytorch.org for it, since the build on PyPI carries several GB of CUDA.
RUN --mount=type=cache,target=/root/.cache/uv --mount=type=bind,source=docker/wheels,target=/wheels \
    set -eu; \
    case "${FLAVOUR}" in cpu|gpu) ;; *) echo "FLAVOUR is ${FLAVOUR}: expected cpu or gpu" >&2; exit 2 ;; esac; \
    set -- --constraint constraints.txt --find-links "/wheels/${FLAVOUR}" --requirements /pins/base.txt --requirements "/pins/faiss-${FLAVOUR}.txt"; \
    for extra in ${EXTRAS}; do set -- "$@" --requirements "/pins/${extra}.txt"; done; \
    if [ "${FLAVOUR}" = cpu ] && ! ls /wheels/cpu/torch-*.whl >/dev/null 2>&1; then set -- "$@" --torch-backend cpu; fi; \
    uv pip install --quiet "$@"

# Our code in a folder of its own: in the image it is a layer of a megabyte on top of the packages.
FROM packages AS code
COPY pyproject.toml README.md LICENSE ./
COPY nvr_tasks nvr_tasks
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --quiet --no-deps --build-constraints constraints.txt --prefix /opt/code . \
    && kernels="$(find /opt/code -path '*/mining/kernels.py')" \
    && touch --date="@$(stat --format=%Y "${kernels}")" "${kernels}" # numba knows a file by its time; images keep whole seconds

FROM ${BASE}
# 10001: above the ids of distributions, so that it is nobody's on a host. No shell, no password, no home of its own.
RUN groupadd --gid 10001 nvr \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /scratch/home --shell /usr/sbin/nologin nvr \
    && install -d -o 10001 -g 10001 -m 0750 /scratch
COPY --from=packages /opt/nvr /opt/nvr
COPY --from=code /opt/code /opt/nvr
# The loops of mining, so that no container compiles them.
ENV NVR_COMPILED=/opt/nvr/compiled
RUN NUMBA_CACHE_DIR="${NVR_COMPILED}" HOME=/tmp PYTHONDONTWRITEBYTECODE=1 \
    /opt/nvr/bin/python -c 'from nvr_tasks.mining import compiled; compiled.compile_all()'
# All that is ever written goes to /scratch, so the root may be read-only; mount a volume there for work that is large.
ENV PATH=/opt/nvr/bin:${PATH} \
    HOME=/scratch/home \
    XDG_CACHE_HOME=/scratch/cache \
    NUMBA_CACHE_DIR=/scratch/cache/numba \
    HF_HOME=/scratch/huggingface \
    TMPDIR=/scratch \
    NVR_SCRATCH=/scratch \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    DO_NOT_TRACK=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    MLFLOW_DISABLE_TELEMETRY=true
WORKDIR /scratch
USER 10001:10001
# As process 1, Python is deaf to SIGTERM (no handler, and the kernel spares process 1); SIGINT it hears.
STOPSIGNAL SIGINT
ENTRYPOINT ["nvr"]
CMD ["--help"]
# Last, since they change with every commit.
ARG FLAVOUR=cpu
ARG VERSION=0
ARG COMMIT=unknown
LABEL org.opencontainers.image.title="nvr-tasks (${FLAVOUR})" \
      org.opencontainers.image.description="Stages of the NV-Retriever workflow" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${COMMIT}"
ENV NVR_CODE_COMMIT=${COMMIT}
