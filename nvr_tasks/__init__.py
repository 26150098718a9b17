"""NVR: NV-Retriever (arXiv 2407.15831) as a production workflow. Everything a task container runs lives here."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("nvr-tasks")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"
