# A stand-in for the task image whose `nvr` does what a test tells it to.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}
COPY nvr.py /usr/local/bin/nvr
RUN chmod 0755 /usr/local/bin/nvr && install -d -o 10001 -g 10001 /scratch
USER 10001:10001
STOPSIGNAL SIGINT
ENTRYPOINT ["nvr"]
