"""Text to ids in several processes, in order and in constant memory.

Where this stands: `prepare.py` hands in jobs (stretches of files, a few megabytes each) and writes what comes
back.

Worker processes are spawned, not forked: a fork beside torch's threads can lock up. They import no torch. A
corpus of a few megabytes is encoded sooner than workers start, so it stays in this process.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np

from common.errors import DISK_OR_MEMORY, UserError
from data.documents import Span, read_documents
from data.token_dataset import token_dtype
from data.tokenizer import Tokenizer
from data.tokenizer import load_tokenizer as load

Job = Sequence[Span]
"""Stretches of text that one process encodes in one go."""

JOB_BYTES = 4 * 1024 * 1024
"""Text of one job: long enough to make its way between processes cheap, short enough to bound memory."""
ALONE_BELOW = 4 * JOB_BYTES
"""Bytes of text up to which one process is quicker than starting others."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """What became of one job: ids with end-of-text after each document, and the bytes of text they stand for."""

    tokens: np.ndarray
    n_bytes: int


def size_of(job: Job) -> int:
    """Bytes of a job."""
    return sum(span.end - span.start for span in job)


def encode(tokenizer: Tokenizer, job: Job) -> Encoded:
    """Encode the documents of a job. Raises `UserError` (3) at bytes that are not text."""
    dtype = token_dtype(tokenizer.vocab_size)
    end = np.array([tokenizer.end_of_text], dtype)
    parts, n_bytes = [end[:0]], 0
    for span in job:
        for piece in read_documents(span):
            ids = np.asarray(tokenizer.encode(piece.text))
            if len(ids):
                assert ids.min() >= 0 and ids.max() < tokenizer.vocab_size, "an id beyond the vocabulary"
                parts.append(ids.astype(dtype))
            if piece.ends_document:
                parts.append(end)
            n_bytes += len(piece.text.encode())
    return Encoded(np.concatenate(parts), n_bytes)


def encode_all(jobs: Sequence[Job], tokenizer: Tokenizer, saved: Path, workers: int) -> Generator[Encoded, None, None]:
    """Encode every job, in order, with `workers` processes (0: one for each core); `saved` is the tokenizer's
    file.

    Raises `UserError` from a worker as it was raised there, and with exit code 6 when the system kills a
    worker. Close the generator (`contextlib.closing`) to be sure that no worker outlives it.
    """
    workers = min(workers or available_cores(), len(jobs))
    if workers <= 1 or sum(map(size_of, jobs)) < ALONE_BELOW:
        return (encode(tokenizer, job) for job in jobs)
    return _encode_in_workers(jobs, saved, workers)


def _encode_in_workers(jobs: Sequence[Job], saved: Path, workers: int) -> Generator[Encoded, None, None]:
    """Deal the jobs out in turn and collect in the same turn, which keeps the order.

    Each worker has a pipe of its own. One that is ahead waits until its result is wanted, which bounds
    memory; one that dies closes its pipe, which is noticed, whereas a pool with a shared queue can wait for
    it forever.
    """
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        pipes: list[Connection] = []
        for first in range(workers):
            pipe, theirs = context.Pipe(duplex=False)
            stack.enter_context(pipe)
            arguments = (theirs, saved, jobs[first::workers])
            worker = context.Process(target=_work, args=arguments, daemon=True)
            worker.start()
            stack.callback(_end, worker)
            theirs.close()
            pipes.append(pipe)
        for number in range(len(jobs)):
            yield _receive(pipes[number % workers])


def _receive(pipe: Connection) -> Encoded:
    try:
        result = pipe.recv()
    except (EOFError, OSError) as error:
        raise UserError(
            "a process that encodes text was killed, most likely for want of memory: try --data.workers 1",
            DISK_OR_MEMORY,
        ) from error
    if isinstance(result, Exception):
        raise result
    assert isinstance(result, Encoded)
    return result


def _end(worker: BaseProcess) -> None:
    worker.kill()
    worker.join()


def _work(pipe: Connection, saved: Path, jobs: Sequence[Job]) -> None:
    """What a worker does. It ends when nobody reads its results any more."""
    # Ctrl-C reaches every process of a terminal. The parent hears it and ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(BrokenPipeError):
        try:
            tokenizer = load(saved)
            for job in jobs:
                pipe.send(encode(tokenizer, job))
        except BrokenPipeError:
            raise
        except Exception as error:
            pipe.send(error)


def available_cores() -> int:
    """Cores that this process may use, which on a shared machine can be fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
