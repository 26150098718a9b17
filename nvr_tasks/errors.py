"""One error for everything a user can mend: the fact, the value and the next step in one message."""

import errno

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
        return f"not allowed to write {where} ({error.strerror}): check its owner, or point NVR_ROOT / NVR_SCRATCH elsewhere"
    if error.errno == errno.ENOTDIR:
        return f"{where} cannot be written, since a part of it is a file and no folder: correct NVR_ROOT / NVR_SCRATCH"
    return None
