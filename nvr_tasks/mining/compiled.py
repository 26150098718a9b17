"""The loops of mining, compiled ahead of time: an image brings them, since a fresh container would compile them anew.

Compiled code is kept for one kind of CPU, so an image's is for one that nearly all machines have (`BASELINE`); on
another, and outside of images, numba compiles for the very CPU.

Example  NVR_COMPILED=/opt/nvr/compiled NUMBA_CACHE_DIR=$NVR_COMPILED python -c \\
             'from nvr_tasks.mining import compiled; compiled.compile_all()'      and from then on NVR_COMPILED alone
"""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

import torch  # noqa: TID253 - this package owns the search; nothing light imports it

BASELINE = "x86-64-v3"  # AVX2 and FMA: amd64 processors since 2013

log = logging.getLogger(__name__)


def use() -> None:
    """Let numba find what the image brings, if this CPU can run it. To be called before the first `njit`."""
    brought, cache = os.environ.get("NVR_COMPILED"), os.environ.get("NUMBA_CACHE_DIR")
    if not brought or not cache or not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return
    os.environ.update(NUMBA_CPU_NAME=BASELINE, NUMBA_CPU_FEATURES="")
    from numba.core import config

    config.reload_config()  # type: ignore[no-untyped-call] # somebody may have imported numba before
    if brought != cache:
        try:
            _copy(Path(brought), Path(cache))  # numba wants to write where it reads; about a megabyte
        except OSError as error:  # a full disk is told by whatever needs it
            log.warning("the loops of mining are compiled anew: %s", error)


def _copy(brought: Path, cache: Path) -> None:
    """Copy what is not there yet, each file in one move: others may read the same cache. Code before the indexes of it."""
    for source in sorted(brought.rglob("*.nb?"), key=lambda path: path.suffix):
        target = cache / source.relative_to(brought)
        if target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as temporary:
            try:
                temporary.write(source.read_bytes())
                temporary.close()
                Path(temporary.name).replace(target)
            except OSError:
                Path(temporary.name).unlink(missing_ok=True)
                raise


def compile_all() -> None:
    """Compile all loops into NUMBA_CACHE_DIR, by mining a few vectors with every kind of first pass."""
    import numpy as np

    from nvr_tasks.errors import NvrError
    from nvr_tasks.mining import MiningSpec, mine

    vectors = np.eye(64, 40, dtype=np.float32) + np.float32(0.5)
    for screen in ("float32", "bfloat16", "int8"):
        try:
            mine(vectors[:8], vectors, [[i] for i in range(8)], [MiningSpec(method="naive")], screen=screen)
        except NvrError as error:  # int8 without instructions for it
            log.warning("%s", error)
