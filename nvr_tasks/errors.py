"""One error for everything a user can mend: the fact, the value and the next step in one message."""

import errno
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_SKIPPED = 99  # "nothing to do, and that is right" (a held promotion): Airflow shows the task as skipped


class NvrError(Exception):
    """A failure with a message written for the person who can mend it; the CLI prints it without a traceback."""


class RecipeError(NvrError):
    """The recipe, an override or a stage's arguments are wrong."""


def explain_os_error(error: OSError) -> str | None:
    """A message for the operating-system errors users meet in operation; None for those that are bugs."""
    where = error.filename or "the scratch folder"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no disk space left while writing {where}: free space there, or point NVR_ROOT / NVR_SCRATCH at a larger disk"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no access to {where} ({error.strerror}): check its owner and mode; where NVR writes is set by NVR_ROOT and NVR_SCRATCH"
    if error.errno == errno.ENOTDIR:
        return f"{where} cannot be written, since a part of it is a file and no folder: correct NVR_ROOT / NVR_SCRATCH"
    return None


# How libraries say that a disk is full: the system's words; sqlite's; torch's, which only notices that nothing arrived.
FULL_DISK = (
    "no space left on device",
    "disk quota exceeded",
    "disk is full",
    "pytorchstreamwriter failed",
    "unexpected pos ",
)
NEARLY_FULL = 64 << 10  # bytes


def explain_failure(error: BaseException, folders: Iterable[Path] = ()) -> str | None:
    """A message for a failure of the machine, wherever among the causes it is; None for bugs.

    Args:
        folders: where the process wrote. When the disk of one is full, that is taken for the cause.
    """
    for link in _causes(error):
        if isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT):
            return explain_os_error(link)
        if any(sign in str(link).lower() for sign in FULL_DISK):
            return f"no disk space left ({_first_line(link)}): free space, or point NVR_ROOT / NVR_SCRATCH at a larger disk"
    if not isinstance(error, NvrError):
        for folder in folders:
            if _free(folder) < NEARLY_FULL:
                return (
                    f"no disk space left at {folder} ({type(error).__name__}: {_first_line(error)}): "
                    "free space there, or point NVR_ROOT / NVR_SCRATCH at a larger disk"
                )
    return explain_os_error(error) if isinstance(error, OSError) else None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised from or while handling, and so on."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def _free(folder: Path) -> float:
    """Bytes left on the disk that a folder is, or would be, on."""
    for path in (folder, *folder.parents):
        try:
            usage = shutil.disk_usage(path)
            return usage.free if usage.total else float("inf")  # /proc and the like have no space at all
        except OSError:
            continue
    return float("inf")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
