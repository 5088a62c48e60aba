"""nanoGPT as a contestant: run by its own code in a copy of the user's clone; it is never imported or changed."""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.common import CommandResult, run_command

RECIPE = (
    *("--device=cpu", "--compile=False", "--eval_iters=20", "--log_interval=100", "--block_size=64", "--batch_size=12"),
    *("--n_layer=4", "--n_head=4", "--n_embd=128", "--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0"),
)
"""nanoGPT's README, "I only have a macbook"."""
WHOLE_SPLIT = """
import numpy as np, torch
from model import GPT
from model import GPTConfig
saved = torch.load("out-shakespeare-char/ckpt.pt", map_location="cpu", weights_only=True)
model = GPT(GPTConfig(**saved["model_args"]))
model.load_state_dict(saved["model"])
model.eval()
tokens = torch.from_numpy(np.fromfile("data/shakespeare_char/val.bin", dtype=np.uint16).astype(np.int64))
T, total, count = saved["model_args"]["block_size"], 0.0, 0
with torch.no_grad():
    for start in range(0, len(tokens) - 1, T)[:: max(1, len(tokens) // (8192 * T))]:
        x, y = tokens[start : start + T], tokens[start + 1 : start + T + 1]
        _, loss = model(x[None, : len(y)], y[None])
        total, count = total + float(loss) * len(y), count + len(y)
print(total / count)
"""
"""The mean loss over the validation split, in sequences of the block size; of a large one over 8,192 to 16,384 of them."""
STEPS = """
import json, re, sys, time
import numpy as np, torch
from model import GPT
from model import GPTConfig
shape, file, rows, device, compiled = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3]), *sys.argv[4:]
torch.backends.cuda.matmul.allow_tf32 = True
tokens = torch.from_numpy(np.load(file).astype(np.int64))
model = GPT(GPTConfig(dropout=0.0, bias=False, **shape)).to(device)
optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), device)
train_model = torch.compile(model) if compiled == "compiled" else model
T = shape["block_size"]
def get_batch():
    at = torch.randint(len(tokens) - T, (rows,))
    pair = [torch.stack([tokens[i + j : i + j + T] for i in at]) for j in (0, 1)]
    return [t.pin_memory().to(device, non_blocking=True) for t in pair] if device == "cuda" else pair
batch = get_batch()
def step():
    global batch
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        _, loss = train_model(*batch)
    batch = get_batch()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss
def peak():
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1e3
step(); step()
matrices = sum(p.numel() for n, p in model.named_parameters() if p.dim() > 1 and "wpe" not in n)
print(json.dumps({"parameters": sum(p.numel() for p in model.parameters()), "matrices": matrices}), flush=True)
for line in sys.stdin:
    start = time.perf_counter()
    for _ in range(int(line)):
        loss = step()
    loss.item()
    print(json.dumps({"seconds": time.perf_counter() - start, "megabytes": peak()}), flush=True)
"""
"""A worker that takes steps like its train.py, with its model and optimizer, on tokens from a .npy file.

Arguments: model shape as JSON, file, batch size, device, `compiled` or `eager`.
"""


@contextmanager
def copied(clone: Path, text: str = "") -> Iterator[Path]:
    """A copy of the clone in a temporary folder; with `text` as its Tiny Shakespeare, prepared by its own script."""
    if not (clone / "model.py").is_file() or not (clone / "train.py").is_file():
        sys.exit(f"{clone} is not a clone of nanoGPT: it has no model.py and train.py")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "nanoGPT"
        shutil.copytree(clone, folder, ignore=shutil.ignore_patterns(".git", "out*"))
        if text:
            (folder / "data" / "shakespeare_char" / "input.txt").write_text(text, encoding="utf-8")
            run_command([sys.executable, "data/shakespeare_char/prepare.py"], folder)
        yield folder


def train(folder: Path, *changes: str) -> CommandResult:
    """Its train.py with its README's recipe for a CPU in a prepared copy; the checkpoint stays there."""
    return run_command(
        [sys.executable, "-u", "train.py", "config/train_shakespeare_char.py", *RECIPE, *changes], folder
    )


def whole_split_loss(folder: Path) -> float:
    """Loss of the checkpoint of `train` on the whole validation split."""
    return float(run_command([sys.executable, "-c", WHOLE_SPLIT], folder).output.split()[-1])
