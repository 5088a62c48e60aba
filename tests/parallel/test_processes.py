"""Several processes started by torchrun: they agree, they train the same model as one, and lost ones are reported."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parallel.programs import load, tiny_model, tiny_optimizer, train
from tests.runs import ROOT, TINY
from training.device import DistContext

pytestmark = pytest.mark.slow

PROGRAM = ("-m", "tests.parallel.programs")
THREADS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TORCHINDUCTOR_COMPILE_THREADS": "1"}


def torchrun(count: int, *command: object) -> None:
    agent = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}")
    env, argv = {**os.environ, **THREADS}, [*agent, *map(str, command)]
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


def result(folder: Path, name: str) -> Any:
    return json.loads((folder / f"{name}.json").read_text())


def change(weights: dict[str, Tensor], before: dict[str, Tensor]) -> Tensor:
    """What a run has added to all weights, as one vector."""
    return torch.cat([(value - before[key]).flatten() for key, value in weights.items()])


def test_ddp_and_fsdp_train_like_one_process(tmp_path: Path) -> None:
    """DDP and FSDP on 2 processes against one; then their checkpoints in FSDP on 4 and 1 processes, bit for bit."""
    torchrun(2, *PROGRAM, "write", tmp_path)
    for count in (4, 1):
        torchrun(count, *PROGRAM, "read", tmp_path)
    ctx = DistContext(torch.device("cpu"), torch.float32)
    for name in ("none", "fsdp"):
        first, model = tiny_model().state_dict(), tiny_model()
        optimizer = tiny_optimizer(model)
        assert result(tmp_path, name) == pytest.approx(train(model, ctx, optimizer, range(3)), rel=1e-4)
        weights, state = (load(tmp_path / f"{name}.safetensors", kind) for kind in ("weights", "state"))
        expected = change({key: model.get_parameter(key).detach() for key in weights}, first)
        assert (change(weights, first) - expected).norm() <= 0.02 * expected.norm()  # Muon rounds to bf16
        assert {key: value.shape for key, value in state.items()} == {
            key: value.shape for key, value in optimizer.state_dict().items()
        }
        for count, (kind, written) in itertools.product((4, 1), (("weights", weights), ("state", state))):
            again = load(tmp_path / f"{name}-{count}.safetensors", kind)
            assert again.keys() == written.keys() and all(torch.equal(again[key], written[key]) for key in again)


def test_gradients_are_exact_and_reduced_in_the_last_micro_batch_only(tmp_path: Path) -> None:
    torchrun(2, *PROGRAM, "gradients", tmp_path)
    assert result(tmp_path, "gradients") == {
        f"{sharding} {compiled}": {"counts": [0, 0, last], "is_exact": True, "compiled": compiled}
        for sharding, last in (("none", 1), ("fsdp", 2))
        for compiled in (False, True)
    }


def test_processes_agree(tmp_path: Path) -> None:
    torchrun(3, *PROGRAM, "agree", tmp_path)
    for rank in range(3):
        found = result(tmp_path, f"agree-{rank}")
        assert found["sum"] == 4.5 and found["max"] == 10
        assert found["text"] == "größer 0 \udc80" and found["empty"] == "" and found["last"] == "2"
        assert found["error"].startswith("settings differs: 'b = False' on process 0, 'b = True' on process 2; ")


def test_three_processes_resume_to_the_same_bits(tmp_path: Path) -> None:
    """Sums of three rounded otherwise would show here; those of two are the same in any order."""
    new = ("train.py", *TINY, "--train.batch_size=12", "--log.attention=off")
    torchrun(3, *new, f"--run.dir={tmp_path / 'whole'}")
    torchrun(3, *new, f"--run.dir={tmp_path / 'parts'}", "--run.stop_at_step=2")
    torchrun(3, "train.py", f"--run.resume={tmp_path / 'parts'}")
    for name in ("model.safetensors", "optimizer.safetensors"):
        whole, parts = (tmp_path / run / "checkpoints" / "000006" / name for run in ("whole", "parts"))
        assert whole.read_bytes() == parts.read_bytes()
