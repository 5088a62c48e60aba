"""Out of memory: one line that says which micro-batch to try. The batch of a step is never changed for the user."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from runtime.errors import DISK_OR_MEMORY, UserError

WORDS = ("can't allocate memory", "out of memory", "not enough memory", "Cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: torch has a class for a GPU, and only words for a processor."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in WORDS)


@contextlib.contextmanager
def bounded_memory(rows: int, batch_size: int) -> Iterator[None]:
    """Turn running out of memory in the body into a line of advice.

    Args:
        rows: windows that a process holds at once.
        batch_size: windows of a whole step, over all processes.

    Raises:
        UserError: naming the micro-batch to try (exit code 6).
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        if rows > 1:
            advice = f"try --train.micro_batch {rows // 2}, which leaves the step's batch of {batch_size} as it is"
        else:
            advice = "lower model.context or the model's size, or split it among processes by --train.sharding full"
        raise UserError(f"out of memory with {rows} windows at once: {advice}", DISK_OR_MEMORY) from error
