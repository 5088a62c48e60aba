"""What safety costs:

    python -m benchmarks.safety save    # a checkpoint of 124 M parameters, against writing and fsyncing as many bytes
    python -m benchmarks.safety run     # a quickstart: the share of locking, verifying and checking in its time

Files lie in a folder under --folder (by default the system's for temporary files), which must be on the disk to be
measured, and take up to 4 GB while it runs. Times are of this machine: read the ratio and the shares.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.attend import timed

BLOCK = 1 << 24


def plain_write(folder: Path, size: int) -> float:
    """Seconds that writing and fsyncing so many bytes takes: large blocks, one file."""
    path, block = folder / "plain", os.urandom(BLOCK)
    start = time.perf_counter()
    with path.open("xb", buffering=0) as file:
        for at in range(0, size, BLOCK):
            file.write(memoryview(block)[: size - at])
        os.fsync(file.fileno())
    took = time.perf_counter() - start
    path.unlink()
    return took


def model_124m() -> tuple[Any, Any, Any]:
    """A config of GPT-2's smallest shape with AdamW, its weights, and moments of random numbers."""
    from model.config import ModelConfig
    from model.gpt import GPT
    from training.checkpoint import model_weights
    from training.config import OptimConfig, RunConfig

    shape = ModelConfig("gpt2", n_layers=12, n_heads=12, d_model=768, context=1024, attention="sdpa")
    weights = model_weights(GPT(shape, 50257))
    moments = {
        f"{name}/{kind}": torch.rand_like(w) for name, w in weights.items() for kind in ("exp_avg", "exp_avg_sq")
    }
    moments |= {f"{name}/step": torch.tensor(1.0) for name in weights}
    return RunConfig(model=shape, optim=OptimConfig("adamw")), weights, moments


def save(root: str | None, rounds: int) -> None:
    """Saves and plain writes of the same bytes in turn."""
    from training.saving import CheckpointWriter

    from data.tokenizer import ByteTokenizer
    from training.checkpoint import RunEnvironment, TrainState

    config, weights, moments = model_124m()
    raw, blocked, verified = [], [], []
    with tempfile.TemporaryDirectory(dir=root) as folder:
        saver = CheckpointWriter(Path(folder), keep=1)
        for step in range(1, rounds + 1):
            start = time.perf_counter()
            final = saver.save(config, TrainState(step), weights, moments, ByteTokenizer(), 50257, RunEnvironment(True))
            blocked.append(time.perf_counter() - start)
            saver.finish()  # what is verified behind training's back would disturb the plain write
            verified.append(time.perf_counter() - start - blocked[-1])
            size = sum(path.stat().st_size for path in final.iterdir())
            raw.append(plain_write(Path(folder), size))
            print(f"round {step}: plain {raw[-1]:.2f} s, blocked {blocked[-1]:.2f} s, verified {verified[-1]:.2f} s")
    parameters = sum(weight.numel() for weight in weights.values())
    print(f"{parameters:,} parameters, {size:,} bytes; medians of {rounds} rounds, in turn")
    for name, took in (("plain write and fsync", raw), ("training is blocked", blocked)):
        print(f"{name:<24}{statistics.median(took):>8.2f} s  ({min(took):.2f} to {max(took):.2f})")
    print(f"{'verified behind it':<24}{statistics.median(verified):>8.2f} s")
    print(
        f"{'blocked against plain':<24}{statistics.median(blocked) / statistics.median(raw):>8.2f} x  (promised: 1.3)"
    )


def watched() -> dict[str, list[float]]:
    """Put a clock on everything that keeps a run safe; the seconds of each call, by what it is for."""
    from data import prepare
    from training import run_dir as folder
    from training import saving
    from training.trainer import Trainer

    parts: tuple[tuple[str, Any, str], ...] = (
        ("locking the folder", folder, "lock_folder"),
        ("refusing links in it", folder, "check_links"),
        ("verifying the tokens", prepare, "_sha256"),
        ("finite numbers only", saving, "check_finite"),
        ("hashing, as it is written", saving.Hashed, "take"),
        ("verifying what is written", saving.CheckpointWriter, "verify"),
        ("agreeing on whether to stop", Trainer, "is_asked_to_stop"),
    )
    spent: dict[str, list[float]] = {}
    for what, owner, name in parts:
        setattr(owner, name, timed(getattr(owner, name), spent.setdefault(what, [])))
    return spent


def run(root: str | None) -> None:
    """A whole quickstart in this process, with what keeps it safe on a clock."""
    from training.saving import CheckpointWriter

    import train
    from data.prepare import prepare
    from training.config import parse_train

    with tempfile.TemporaryDirectory(dir=root) as folder:
        arguments = [f"--run.dir={folder}/run"]
        prepare(parse_train(arguments)[0].data)  # so that the tokens are there, and are verified
        spent, saving = watched(), list[float]()
        CheckpointWriter.save = timed(CheckpointWriter.save, saving)  # type: ignore[method-assign]
        start = time.perf_counter()
        train.main(arguments)
        whole = time.perf_counter() - start
    print(f"\n{'':<30}{'calls':>7}{'seconds':>10}{'share':>9}")
    print(f"{'whole run':<30}{1:>7}{whole:>10.2f}{1:>9.2%}")
    for what, took in spent.items():
        print(f"{what:<30}{len(took):>7}{sum(took):>10.3f}{sum(took) / whole:>9.2%}")
    total = sum(map(sum, spent.values()))
    print(f"{'together':<30}{'':>7}{total:>10.3f}{total / whole:>9.2%}   (promised: below 1%)")
    print(f"{'(saving, as training waits)':<30}{len(saving):>7}{sum(saving):>10.3f}{sum(saving) / whole:>9.2%}")


def main() -> None:
    parser = argparse.ArgumentParser(description="What safety costs.")
    parser.add_argument("what", choices=["save", "run"])
    parser.add_argument("--folder", help="where temporary files lie; on the disk to be measured")
    parser.add_argument("--rounds", type=int, default=7, help="of saves and plain writes in turn")
    asked = parser.parse_args()
    if asked.what == "save":
        save(asked.folder, asked.rounds)
    else:
        run(asked.folder)


if __name__ == "__main__":
    main()
