"""Writing checkpoints: whole or absent, whatever happens in between.

`run.py` calls `CheckpointWriter.save` for each checkpoint; `checkpoint.py` reads what stands here. A checkpoint is written under
another name, each file is forced to the disk, then the manifest, which lists their sizes and sha256, then the folder,
and only then does the folder get its name. Reading it back, from the disk, is done behind the back of training, and
old checkpoints go only after that: at no moment is there less than there was.

    .writing-000400     being written; nobody reads it
    000400              whole
    .replaced-000400    the one that 000400 takes the place of, until 000400 is known to be on the disk
    .removing-000100    rotated out; half of it may be gone

Every operation on the file system announces itself just before it happens, as the audit event `glassgpt.disk` with
the operation ("mkdir", "write", "fsync", "rename" or "remove") and the path; see `rotation.announce`. The fault suite
listens (`sys.addaudithook`) and ends the process there; nobody else does.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from common.errors import DISK_OR_MEMORY, NON_FINITE, UserError, escape_control_chars
from common.safetensors_header import file_head
from data.tokenizer import Tokenizer
from training.checkpoint import FILES, FORMAT, MANIFEST, REPLACED, RunEnvironment, TrainState, verify_checkpoint
from training.config import RunConfig
from training.rotation import WRITING, announce, prune, remove, rename, settle, sweep, sync
from training.strangers import not_finite

SMALL, LARGE = 1 << 20, 1 << 24  # bytes: chunks below the one are written together, those above the other in pieces
WAITING = 64  # pieces that may wait for their hash: a gigabyte at most
Chunk = bytes | memoryview


class CheckpointWriter:
    """Writes the checkpoints of a run, verifies each in the background, and only then lets old ones go.

    Args:
        run: the run folder. What a killed process left half-done in its `checkpoints` is settled first; so the caller
            holds the run's lock.
        keep: newest checkpoints that stay, beside the best.
    """

    def __init__(self, run: Path, keep: int) -> None:
        self.root, self.keep = run / "checkpoints", keep
        self.verifying: threading.Thread | None = None
        self.fault: str | None = None  # of the newest checkpoint that was verified
        with suppress(OSError):  # leftovers that cannot be removed do no harm
            sweep(self.root)

    def save(
        self,
        config: RunConfig,
        state: TrainState,
        weights: Mapping[str, Tensor],
        moments: Mapping[str, Tensor],
        tokenizer: Tokenizer,
        vocab_size: int,
        origin: RunEnvironment,
    ) -> Path:
        """Write `checkpoints/<step>`, whole or not at all; one of that step that is byte for byte the same is left.

        Returns once it is on the disk under its name. It may be verified for some time after that.

        Raises:
            UserError: if a number is not finite: nothing is written (exit code 5); if the disk is full or cannot be
                written: earlier checkpoints are as they were (6).
        """
        check_finite({**weights, **{f"the moments {name}": value for name, value in moments.items()}}, state)
        self.wait()
        final = self.root / f"{state.step:06d}"
        temporary = self.root / f"{WRITING}{final.name}"
        try:
            make_folder(temporary)
            files = write_files(temporary, weights, moments, state_text(config, state, vocab_size, origin), tokenizer)
            write_manifest(temporary, files)
            sync(temporary)
            put_in_place(temporary, final)
        except OSError as error:
            with suppress(OSError):
                remove(temporary)
            raise UserError(
                f"cannot write the checkpoint {escape_control_chars(final)}: {error.strerror or error}; earlier ones are as they "
                "were: make room, then go on with --run.resume",
                DISK_OR_MEMORY,
            ) from error
        best = state.step if state.best_loss is None else state.best_step
        self.verifying = threading.Thread(target=self.verify, args=(final, state.step, best), daemon=True)
        self.verifying.start()
        return final

    def verify(self, folder: Path, step: int, best: int) -> None:
        """Read a new checkpoint back from the disk; if it is whole, let go what rotation lets go."""
        try:
            forget_cached(folder)
            self.fault = verify_checkpoint(folder)
            if self.fault is None:
                prune(self.root, step, best, self.keep)
            settle(folder)
        except OSError as error:
            self.say(f"cannot remove an old checkpoint from {self.root}: {error.strerror or error}")
        if self.fault is not None:
            self.say(f"the disk did not keep the checkpoint {folder}: {self.fault}; older ones stay, training goes on")

    def say(self, line: str) -> None:
        """A line on stderr."""
        print(escape_control_chars(line), file=sys.stderr, flush=True)

    def wait(self) -> None:
        """Return once nothing is being verified."""
        if self.verifying is not None:
            self.verifying.join()
            self.verifying = None

    def finish(self) -> None:
        """Wait until the last checkpoint is verified.

        Raises:
            UserError: if the disk did not keep it (exit code 6).
        """
        self.wait()
        if self.fault is not None:
            raise UserError(
                f"the disk did not keep the newest checkpoint in {escape_control_chars(self.root)}: {self.fault}; older ones are "
                "as they were: look after the disk, then go on with --run.resume",
                DISK_OR_MEMORY,
            )


def check_finite(tensors: Mapping[str, Tensor], state: TrainState | None = None) -> None:
    """Nothing is saved that could not be gone on from.

    Raises:
        UserError: naming the first tensor with a number that is not finite, or the best loss (exit code 5).
    """
    name = not_finite(tensors)
    if state is not None and not math.isfinite(state.best_loss or 0.0):
        name = "the best loss"
    if name is not None:
        raise UserError(
            f"a number in {escape_control_chars(name)} is not finite: nothing was saved, and earlier checkpoints are as they "
            "were; go on from them with --run.resume and a lower optim.lr",
            NON_FINITE,
        )


def state_text(config: RunConfig, state: TrainState, vocab_size: int, origin: RunEnvironment) -> bytes:
    """What `state.json` says."""
    saved = {
        "format": FORMAT,
        "vocab_size": vocab_size,
        "environment": dataclasses.asdict(origin),
        "state": dataclasses.asdict(state),
        "config": dataclasses.asdict(config),
    }
    return json.dumps(saved, indent=1).encode()


def make_folder(folder: Path) -> None:
    """An empty folder, and the one above it if need be."""
    if not folder.parent.is_dir():
        announce("mkdir", folder.parent)
        folder.parent.mkdir(parents=True)
        sync(folder.parent.parent)
    remove(folder)
    announce("mkdir", folder)
    folder.mkdir()


class Hashed:
    """A sha256 that a second thread computes, while the first one writes."""

    def __init__(self, thread: ThreadPoolExecutor) -> None:
        self.thread, self.digest = thread, hashlib.sha256()
        self.waiting: deque[Future[None]] = deque()

    def feed(self, piece: Chunk) -> None:
        """Have a piece hashed; it must not change until `hexdigest`. Waits when too many are waiting."""
        if len(self.waiting) == WAITING:
            self.waiting.popleft().result()
        self.waiting.append(self.thread.submit(self.take, piece))

    def take(self, piece: Chunk) -> None:
        """What the second thread does."""
        self.digest.update(piece)

    def hexdigest(self) -> str:
        """Of all that was fed."""
        while self.waiting:
            self.waiting.popleft().result()
        return self.digest.hexdigest()


def write_files(
    folder: Path, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], state: bytes, tokenizer: Tokenizer
) -> dict[str, dict[str, int | str]]:
    """Write the files and force each to the disk; size and sha256 of each."""
    contents: dict[str, Iterable[Chunk]] = {
        "optimizer.safetensors": tensor_file(moments),  # the largest first: its hash takes longest
        "model.safetensors": tensor_file(weights),
        "state.json": [state],
        "vocabulary.json": [tokenizer.to_json()],
    }
    with ExitStack() as stack:
        hashes, handles = {}, {}
        for name, chunks in contents.items():
            # Each file has a thread of its own to hash it, so that hashing takes no longer than the largest file needs.
            hashes[name] = Hashed(stack.enter_context(ThreadPoolExecutor(1)))
            handles[name] = stack.enter_context((folder / name).open("xb", buffering=0))
            write(handles[name], folder / name, chunks, hashes[name])
        for name, handle in handles.items():
            # Through the handle that wrote it: that one is told for sure if an earlier write came to nothing.
            announce("fsync", folder / name)
            os.fsync(handle.fileno())
        return {
            name: {"bytes": os.fstat(handles[name].fileno()).st_size, "sha256": hashes[name].hexdigest()}
            for name in sorted(contents)
        }


def tensor_file(tensors: Mapping[str, Tensor]) -> Iterator[Chunk]:
    """The bytes of a safetensors file, a chunk for each tensor; only one is brought from its device at a time."""
    assert all(value.dtype == torch.float32 for value in tensors.values()), "checkpoints hold fp32 alone"
    yield file_head((name, "F32", tuple(value.shape), 4 * value.numel()) for name, value in tensors.items())
    for value in tensors.values():
        yield value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def pieces(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """The same bytes in pieces of a sensible size."""
    small: list[Chunk] = []
    for chunk in chunks:
        if len(chunk) < SMALL:
            small.append(chunk)
        if small and (len(chunk) >= SMALL or sum(map(len, small)) >= SMALL):
            yield b"".join(small)
            small = []
        if len(chunk) >= SMALL:
            yield from (chunk[at : at + LARGE] for at in range(0, len(chunk), LARGE))
    if small:
        yield b"".join(small)


def write(file: FileIO, path: Path, chunks: Iterable[Chunk], hashed: Hashed | None = None) -> None:
    """Write to a new file, piece by piece; hash the pieces as they go."""
    for piece in pieces(chunks):
        if hashed is not None:
            hashed.feed(piece)
        announce("write", path)
        rest = memoryview(piece)
        while rest:
            rest = rest[file.write(rest) :]


def write_manifest(folder: Path, files: Mapping[str, Mapping[str, int | str]]) -> None:
    """List each file's size and sha256, once every file is on the disk; the manifest is the last one written."""
    path = folder / MANIFEST
    with path.open("xb", buffering=0) as file:
        write(file, path, [json.dumps({"format": FORMAT, "files": files}, indent=1).encode()])
        announce("fsync", path)
        os.fsync(file.fileno())


def put_in_place(temporary: Path, final: Path) -> None:
    """Give a finished folder its name, and make that last."""
    if final.is_symlink() or final.exists():
        if (final / MANIFEST).is_file() and same(temporary, final):
            remove(temporary)
            return
        settle(final)
        rename(final, final.with_name(f"{REPLACED}{final.name}"))
    rename(temporary, final)
    sync(final.parent)


def same(new: Path, old: Path) -> bool:
    """Whether a checkpoint is whole and byte for byte what was to take its place."""
    return (new / MANIFEST).read_bytes() == (old / MANIFEST).read_bytes() and verify_checkpoint(old) is None


def forget_cached(folder: Path) -> None:
    """Have the system read the files from the disk again, where it can be told so."""
    for name in FILES if hasattr(os, "posix_fadvise") else ():
        handle = os.open(folder / name, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
