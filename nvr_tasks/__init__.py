"""NVR: NV-Retriever (arXiv 2407.15831) as a production workflow. Everything a task container runs lives here."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    __version__: str


def __getattr__(name: str) -> str:
    """The version, when somebody asks: reading an installation's metadata is a third of what `nvr --help` costs."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("nvr-tasks")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "0+unknown"
