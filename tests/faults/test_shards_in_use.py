"""Shards that shrink, change, vanish or cannot be read while a run reads them: a typed error or the right tokens.

What a run holds open outlives its name. What it could not learn from is named, and after a resume it is prepared again
to the same tokens: the run ends as if nothing had been.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import DATA, DISK_OR_MEMORY
from data.config import DataConfig, cache_folder
from data.prepare import prepare
from tests.faults.forkserver import ForkServer
from tests.faults.harness import CORPUS, Reference
from tests.faults.hook import Hook
from tests.faults.strace import require_strace, under_strace
from tests.runs import ROOT, said

IN_A_SAVE = Hook(at=20, do="SIGSTOP")
"""Stops a run in the middle of one of its saves, so that something can be done to its data."""


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No other test reads what is damaged here."""
    monkeypatch.setenv("GLASSGPT_CACHE", str(tmp_path / "cache"))


def overwrite(content: Callable[[int], bytes]) -> Callable[[Path], None]:
    def harm(path: Path) -> None:
        with path.open("r+b") as file:
            file.seek(128)
            file.write(content(path.stat().st_size - 128))

    return harm


def replace(path: Path) -> None:
    other = path.with_suffix(".other")
    other.write_bytes(b"\xff" * path.stat().st_size)
    other.replace(path)


HARMS: dict[str, tuple[Callable[[Path], object], int]] = {
    "emptied": (lambda path: os.truncate(path, 0), DATA),
    "cut": (lambda path: os.truncate(path, 129), DATA),
    "grown": (lambda path: path.open("ab").write(b"more"), DATA),
    "zeroed": (overwrite(bytes), DATA),
    "beyond the vocabulary": (overwrite(lambda n: b"\xff" * n), DATA),
    "one token changed": (overwrite(lambda n: b"\1"), DATA),
    "touched": (os.utime, 0),
    "removed": (Path.unlink, 0),
    "replaced": (replace, 0),
    "its folder removed": (lambda path: shutil.rmtree(path.parent), 0),
}
"""What happens to a shard, and the exit code of a run that is reading it: what it holds open outlives its name."""


READER = """
import sys
from pathlib import Path
from data.manifest import load_shards
from common.errors import UserError
folder, stop = Path(sys.argv[1]), Path(sys.argv[3])
split = load_shards(folder, sys.argv[2]).splits["train"]
whole = split.read(0, len(split)).tolist()
print("reading", flush=True)
try:
    while not stop.exists():
        for start in range(0, len(whole), 7):
            assert split.read(start, start + 50).tolist() == whole[start : start + 50]
except UserError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize("harm", HARMS)
def test_a_shard_changes_under_a_loop_that_reads_it(harm: str, tmp_path: Path) -> None:
    """At any moment, perhaps in the middle of reading: the reader never sees another token, nor is it killed."""
    (tmp_path / "text.txt").write_text(CORPUS * 50)
    made = prepare(DataConfig(source=str(tmp_path / "text.txt"), tokenizer="byte"), progress=False)
    stop, path = tmp_path / "stop", made.folder / "train-00000.npy"
    command = [sys.executable, "-c", READER, str(made.folder), made.fingerprint, str(stop)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as reader:
        assert reader.stdout is not None and reader.stdout.readline() == "reading\n"
        change, code = HARMS[harm]
        change(path)
        if not code:
            time.sleep(0.1)
            stop.touch()
        out, err = reader.communicate(timeout=60)
    assert (reader.returncode, err) == (code, "") and bool(out) == bool(code)
    assert not code or (str(path) in out and f"remove the folder {made.folder.name}" in out)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("harm", HARMS)
def test_a_shard_changes_under_a_run(
    split: str, harm: str, server: ForkServer, reference: Reference, tmp_path: Path
) -> None:
    """The token that changes need not be one of the next batch: what was written to is looked through as a whole."""
    run = tmp_path / "run"
    child = server.start(*reference.argv, f"--run.dir={run}", hook=IN_A_SAVE)
    child.stopped()
    [shard] = cache_folder().glob(f"tokens-*/{split}-00000.npy")
    change, code = HARMS[harm]
    change(shard)
    child.send(signal.SIGCONT)
    done = child.wait()
    if code:
        line = said(done, code)
        assert str(shard) in line and f"remove the folder {shard.parent.name}" in line
        done = server.run(f"--run.resume={run}")
        assert f"{shard.parent} is damaged" in done.stderr
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    reference.check(run)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_disk_fails_under_a_run(split: str, server: ForkServer, reference: Reference, tmp_path: Path) -> None:
    """Every reading of a shard gives EIO, as the kernel would say it."""
    require_strace()
    run = tmp_path / "run"
    child = server.start(*reference.argv, f"--run.dir={run}", hook=IN_A_SAVE)
    child.stopped()
    [shard] = cache_folder().glob(f"tokens-*/{split}-00000.npy")
    fails = ["-P", str(shard), "-e", "trace=pread64", "-e", "inject=pread64:error=EIO"]
    done = under_strace(child, tmp_path / "log", fails)
    line = said(done, DISK_OR_MEMORY)
    assert str(shard) in line and os.strerror(5) in line
    done = server.run(f"--run.resume={run}")
    assert done.returncode == 0 and "damaged" not in done.stderr, done.stderr
    reference.check(run)
