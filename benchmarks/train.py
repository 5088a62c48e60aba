"""Time to a given loss, beside nanoGPT, one after the other on the same machine:

    python -m benchmarks.train --nanogpt PATH       # PATH: your own clone of nanoGPT

Both train on Tiny Shakespeare by character, on the processor, each with its own recipe: nanoGPT with its README's for a
CPU, we with configs/shakespeare_char.toml. The clock runs over the whole command. The loss is over the whole validation
split for both: nanoGPT's own print is a sample of 20 batches, so its checkpoint is read and evaluated here.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
RECIPE = (
    *("--device=cpu", "--compile=False", "--eval_iters=20", "--log_interval=100", "--block_size=64", "--batch_size=12"),
    *("--n_layer=4", "--n_head=4", "--n_embd=128", "--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0"),
)
"""nanoGPT's README, "I only have a macbook"."""
WHOLE_SPLIT = """
import numpy as np, torch
from model import GPT, GPTConfig
saved = torch.load("out-shakespeare-char/ckpt.pt", map_location="cpu", weights_only=True)
model = GPT(GPTConfig(**saved["model_args"]))
model.load_state_dict(saved["model"])
model.eval()
tokens = torch.from_numpy(np.fromfile("data/shakespeare_char/val.bin", dtype=np.uint16).astype(np.int64))
T, total, count = saved["model_args"]["block_size"], 0.0, 0
with torch.no_grad():
    for start in range(0, len(tokens) - 1, T):
        x, y = tokens[start : start + T], tokens[start + 1 : start + T + 1]
        _, loss = model(x[None, : len(y)], y[None])
        total, count = total + float(loss) * len(y), count + len(y)
print(total / count)
"""
"""Run inside the clone, by its own model: the mean over every target, in windows of its block size."""


def run(command: list[str], folder: Path, **environment: str) -> tuple[float, str]:
    """Seconds of wall time, and what the command printed; its end is the benchmark's if it fails."""
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={**os.environ, **environment})
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return seconds, done.stdout


def nanogpt(clone: Path, text: Path) -> tuple[float, float]:
    """Seconds and loss of nanoGPT's recipe; preparing its data is not counted."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "nanoGPT"
        shutil.copytree(clone, folder, ignore=shutil.ignore_patterns(".git"))
        shutil.copy(text, folder / "data" / "shakespeare_char" / "input.txt")
        run([sys.executable, "data/shakespeare_char/prepare.py"], folder)
        seconds, _ = run([sys.executable, "train.py", "config/train_shakespeare_char.py", *RECIPE], folder)
        _, printed = run([sys.executable, "-c", WHOLE_SPLIT], folder)
        return seconds, float(printed.split()[-1])


def ours() -> tuple[float, float]:
    """Seconds and loss of our recipe, from the command's start to its end."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", "configs/shakespeare_char.toml", f"--run.dir={folder}/run"]
        seconds, _ = run(command, ROOT)
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
        return seconds, json.loads(lines[-1])["final_val_loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, help="a clone of nanoGPT; without it only ours is run")
    parser.add_argument("--repeats", type=int, default=1, help="times that both are run, in turn")
    arguments = parser.parse_args()
    from data.config import cache_folder

    text = cache_folder() / "tinyshakespeare.txt"
    for _ in range(arguments.repeats):
        seconds, loss = ours()
        print(f"ours     {seconds:7.1f} s   loss {loss:.4f} over the whole validation split", flush=True)
        if arguments.nanogpt:
            theirs, their_loss = nanogpt(arguments.nanogpt, text)
            print(f"nanoGPT  {theirs:7.1f} s   loss {their_loss:.4f} over the whole validation split")
            print(f"ratio    {seconds / theirs:7.3f}", flush=True)


if __name__ == "__main__":
    main()
