"""Several processes, as torchrun starts them: they agree, they exchange gradients once a step, what one number of them
saved another takes up, and nobody waits for ever for one that is lost."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import LOST_PROCESS
from tests.parallel.programs import SHAPE, kept, optimizer_of, plain, train
from tests.runs import ROOT
from training.device import DistContext

pytestmark = pytest.mark.slow

THREADS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TORCHINDUCTOR_COMPILE_THREADS": "1"}


def together(count: int, program: str, folder: Path) -> None:
    """Run a program in so many processes, to its good end."""
    agent = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}")
    command = [*agent, "-m", "tests.parallel.programs", program, str(folder)]
    ended = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **THREADS}, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr[-4000:]


def left(folder: Path, name: str) -> Any:
    """What a program found."""
    return json.loads((folder / f"{name}.json").read_text())


def test_what_two_processes_saved_one_and_four_take_up(tmp_path: Path) -> None:
    """DDP x2 and FSDP2 x2, to plain, to FSDP2 x4 and x1: the same bits of weights and moments; then the same step."""
    together(2, "write", tmp_path)
    for count in (4, 1):
        together(count, "read", tmp_path)
    ctx = DistContext(torch.device("cpu"), torch.float32)
    for name in ("none", "fsdp"):
        first = tmp_path / f"{name}.safetensors"
        model = plain()
        optimizer = optimizer_of(model)
        norms = train(model, ctx, optimizer, range(3))  # one process from the start
        assert left(tmp_path, name) == pytest.approx(norms, rel=1e-4)
        moments = kept(first, "moments")
        assert moments.keys() == optimizer.state_dict().keys()
        assert all(value.shape == optimizer.state_dict()[key].shape for key, value in moments.items())
        for count in (4, 1):
            again = tmp_path / f"{name}-{count}.safetensors"
            for kind in ("weights", "moments"):
                a, b = kept(first, kind), kept(again, kind)
                assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        resumed = plain(seed=5)
        resumed.load_state_dict(kept(first, "weights"), strict=False)
        optimizer = optimizer_of(resumed)
        optimizer.load_state_dict(moments)
        train(resumed, ctx, optimizer, range(3, 4))
        before = kept(first, "weights")
        for count in (4, 1):
            for key, value in kept(tmp_path / f"{name}-{count}-later.safetensors", "weights").items():
                step = resumed.get_parameter(key).detach() - before[key]
                assert (value - before[key] - step).norm() < 0.02 * step.norm()  # Muon works in bf16


def test_gradients_are_exchanged_on_the_last_piece_only(tmp_path: Path) -> None:
    together(2, "count", tmp_path)
    assert left(tmp_path, "counts") == {"none": [0, 0, 1], "fsdp": [0, 0, SHAPE.n_layers + 1]}


def test_the_same_holds_when_compiled(tmp_path: Path) -> None:
    """torch.compile wraps what DDP shares, and compiles the blocks of a split model in place."""
    together(2, "count_compiled", tmp_path)
    found = left(tmp_path, "compiled")
    for sharding, last in (("none", 1), ("fsdp", 2)):
        assert found[sharding]["counts"] == [0, 0, last]
        assert found[sharding]["far"] < 1e-5
    assert found["none"]["wrapped"] and not found["fsdp"]["wrapped"]


def test_processes_agree(tmp_path: Path) -> None:
    together(3, "agree", tmp_path)
    for rank in range(3):
        found = left(tmp_path, f"agree-{rank}")
        assert found["sum"] == 4.5 and found["largest"] == 10
        assert found["agree"] == "größer 0 \udc80" and found["empty"] == "" and found["last"] == "2"
        assert found["refused"].startswith("settings differs: 'b = False' on process 0, 'b = True' on process 2; ")


def test_one_process_without_a_compiler_keeps_all_from_compiling(tmp_path: Path) -> None:
    together(2, "fail_to_compile", tmp_path)
    assert [left(tmp_path, f"compiler-{rank}") for rank in range(2)] == [True, True]


@pytest.mark.parametrize(("how", "sharding"), [(signal.SIGKILL, "fsdp"), (signal.SIGSTOP, "none")])
def test_a_lost_process_ends_the_others_with_one_line(how: signal.Signals, sharding: str, tmp_path: Path) -> None:
    """Started one by one: torchrun's agent would end the others itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "tests.parallel.programs", f"{how.name}-{sharding}", str(tmp_path)]
    started = []
    try:
        for rank in range(2):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            environment = {**os.environ, **THREADS, **address, **place}
            started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True))
        deadline = time.monotonic() + 120
        while not (tmp_path / "lost.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        _, words = started[0].communicate(timeout=60)  # the five seconds, and what a busy machine takes to end Python
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait(30)
    assert started[0].returncode == LOST_PROCESS, words
    said = [line for line in words.splitlines() if line.startswith("error: ")]
    assert said == [
        "error: process 0 lost another one, which ended or did not answer for 5 s (run.dist_timeout); nothing saved is "
        "lost: go on with --run.resume"
    ]
    assert "Traceback" not in words
