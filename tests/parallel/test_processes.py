"""Several processes started by torchrun: they agree, they train the same model as one, and lost ones are reported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel.programs import SHAPE, load, tiny_model, tiny_optimizer, train
from tests.runs import ROOT
from training.device import DistContext

pytestmark = pytest.mark.slow

THREADS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TORCHINDUCTOR_COMPILE_THREADS": "1"}


def torchrun(count: int, program: str, folder: Path) -> None:
    agent = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}")
    command = [*agent, "-m", "tests.parallel.programs", program, str(folder)]
    env = {**os.environ, **THREADS}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


def result(folder: Path, name: str) -> Any:
    return json.loads((folder / f"{name}.json").read_text())


def test_ddp_and_fsdp_train_like_one_process(tmp_path: Path) -> None:
    """DDP and FSDP on 2 processes against one; then their checkpoints in FSDP on 4 and 1 processes, bit for bit."""
    torchrun(2, "write", tmp_path)
    for count in (4, 1):
        torchrun(count, "read", tmp_path)
    ctx = DistContext(torch.device("cpu"), torch.float32)
    for name in ("none", "fsdp"):
        saved, model = tmp_path / f"{name}.safetensors", tiny_model()
        optimizer = tiny_optimizer(model)
        assert result(tmp_path, name) == pytest.approx(train(model, ctx, optimizer, range(3)), rel=1e-4)
        for key, value in load(saved, "weights").items():  # Muon rounds to bf16
            change = model.get_parameter(key) - tiny_model().get_parameter(key)
            assert (value - model.get_parameter(key)).norm() <= 0.02 * change.norm()
        state = load(saved, "state")
        assert {key: value.shape for key, value in state.items()} == {
            key: value.shape for key, value in optimizer.state_dict().items()
        }
        for count in (4, 1):
            for kind in ("weights", "state"):
                a, b = load(saved, kind), load(tmp_path / f"{name}-{count}.safetensors", kind)
                assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        resumed, before = tiny_model(seed=5), load(saved, "weights")
        resumed.load_state_dict(before, strict=False)
        optimizer = tiny_optimizer(resumed)
        optimizer.load_state_dict(state)
        train(resumed, ctx, optimizer, range(3, 4))
        for count in (4, 1):
            for key, value in load(tmp_path / f"{name}-{count}-later.safetensors", "weights").items():
                change = resumed.get_parameter(key).detach() - before[key]
                assert (value - before[key] - change).norm() < 0.02 * change.norm()


def test_gradients_are_reduced_in_the_last_micro_batch_only(tmp_path: Path) -> None:
    torchrun(2, "reductions", tmp_path)
    assert result(tmp_path, "reductions") == {"none": [0, 0, 1], "fsdp": [0, 0, SHAPE.n_layers + 1]}


def test_compiled_models_reduce_and_train_the_same(tmp_path: Path) -> None:
    torchrun(2, "compiled", tmp_path)
    found = result(tmp_path, "compiled")
    for sharding, last in (("none", 1), ("fsdp", 2)):
        assert found[sharding]["counts"] == [0, 0, last]
        assert found[sharding]["error"] < 1e-5 and found[sharding]["compiled"]


def test_processes_agree(tmp_path: Path) -> None:
    torchrun(3, "agree", tmp_path)
    for rank in range(3):
        found = result(tmp_path, f"agree-{rank}")
        assert found["sum"] == 4.5 and found["max"] == 10
        assert found["text"] == "größer 0 \udc80" and found["empty"] == "" and found["last"] == "2"
        assert found["error"].startswith("settings differs: 'b = False' on process 0, 'b = True' on process 2; ")
