"""A corpus for many processes: one of each machine prepares and verifies it, the others wait and find it made.

They wait at a file lock and not for a message, for preparing may take longer than any process would wait for another,
and a lock is let go when its owner dies.
"""

from __future__ import annotations

import fcntl

from common.errors import DISK_OR_MEMORY, UserError
from data.config import DataConfig, cache_folder
from data.prepare import TokenizedCorpus, prepare
from training.device import DistContext


def prepare_once(config: DataConfig, ctx: DistContext) -> TokenizedCorpus:
    """The tokens of a corpus, as `data.prepare.prepare` gives them; every process calls it at the same point.

    Raises:
        UserError: as `prepare` does.
    """
    if ctx.world_size == 1:
        return prepare(config)
    first = ctx.local_rank == 0
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "preparing.lock").open("a")
    except OSError as error:
        raise UserError(
            f"cannot write to the cache {folder} ({error.strerror}): let GLASSGPT_CACHE name another folder",
            DISK_OR_MEMORY,
        ) from error
    with lock:
        if first:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # another machine's first process, or another job, is at it
                first = False
        ctx.all_reduce_max(0)  # from here on the lock is taken by whoever goes first
        if not first:
            fcntl.flock(lock, fcntl.LOCK_EX if ctx.local_rank == 0 else fcntl.LOCK_SH)
        return prepare(config, progress=ctx.is_main_process, verify=ctx.local_rank == 0)
