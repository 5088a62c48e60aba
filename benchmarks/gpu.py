"""On a GPU: how much of its matrix products training reaches, how long a known loss takes, how quickly text is written.

    python -m benchmarks.gpu [--nanogpt PATH] [--record]
    python -m benchmarks.gpu --smoke                    # the same code with tiny shapes on the processor, for tests

- Model FLOPs utilisation of GPT-2's shapes of 124 M and 350 M parameters at context 1024, bf16, compiled, against the
  bf16 peak measured in the same run.
- Wall time of the whole command until the loss over the whole validation split of Tiny Shakespeare is what nanoGPT's
  GPU recipe is published with, 1.4697; nanoGPT's clock stops when its own estimate, of 200 batches, says so.
- Tokens a second sampled from the shape of 124 M, against the memory's speed.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch

from benchmarks import nanogpt
from benchmarks.ceilings import flops_per_token, gpt_matrices, peak_speed, stream_speed, vector_speed
from benchmarks.results import Page, page
from benchmarks.side_by_side import Worker, alternate, options, spread, table
from benchmarks.start import logged, seconds_until
from benchmarks.steps import random_tokens
from model.config import ModelConfig
from model.generate import generate
from model.gpt import GPT

PUBLISHED = 1.4697


@dataclass(frozen=True)
class Shape:
    """A GPT-2, and how many windows fit a step."""

    layers: int
    heads: int
    width: int
    context: int
    rows: int


@dataclass(frozen=True)
class Scale:
    """How large everything is: as promised, or as a smoke test can bear it."""

    device: str
    shapes: dict[str, Shape]
    vocabulary: int
    compile: str
    steps: int
    sizes: tuple[int, ...]
    """Of the matrix products whose speed is the peak."""
    recipe: tuple[str, ...]
    """Ours to the published loss, as arguments of train.py."""
    theirs: tuple[str, ...]
    """What nanoGPT's recipe is changed in."""
    loss: float
    written: int
    """Tokens to sample."""


FULL = Scale(
    device="cuda",
    shapes={"124 M": Shape(12, 12, 768, 1024, 32), "350 M": Shape(24, 16, 1024, 1024, 16)},
    vocabulary=50304,
    compile="on",
    steps=10,
    sizes=(4096, 8192, 16384),
    recipe=(
        *("configs/shakespeare_char.toml", "--model.n_layers=6", "--model.n_heads=6", "--model.d_model=384"),
        *("--model.context=256", "--model.dropout=0.2", "--train.batch_size=64", "--train.steps=1500"),
        *("--train.eval_every=100", "--train.eval_tokens=200000", "--train.save_every=1500", "--log.sample_tokens=0"),
    ),
    theirs=(),
    loss=PUBLISHED,
    written=256,
)
SMOKE = Scale(
    device="cpu",
    shapes={"tiny": Shape(2, 2, 32, 32, 2)},
    vocabulary=300,
    compile="off",
    steps=1,
    sizes=(64,),
    recipe=(
        *("--data.source=stories", "--data.tokenizer=char", "--model.n_layers=1", "--model.n_heads=1"),
        *(
            "--model.d_model=16",
            "--model.context=32",
            "--train.steps=2",
            "--train.eval_every=1",
            "--log.sample_tokens=0",
        ),
    ),
    theirs=("--device=cpu", "--compile=False", "--eval_iters=2", "--eval_interval=1", "--n_layer=1", "--n_embd=48"),
    loss=99.0,
    written=8,
)


def utilisation(scale: Scale, clone: Path | None, rounds: int, say: Page) -> None:
    """Steps of each shape as a share of the measured peak."""
    peak = peak_speed(torch.bfloat16, scale.device, scale.sizes)
    say.say(f"Large bf16 matrix products of this machine: {peak / 1e12:.3g} TFLOP/s.")
    rows = []
    for name, shape in scale.shapes.items():
        speeds, memory, matrices = steps(scale, shape, clone, rounds)
        for who, speed in speeds.items():
            flops = flops_per_token(matrices, shape.layers, shape.width, shape.context) * speed
            about = (f"{speed:,.0f}", f"{flops / 1e12:.3g}", f"{flops / peak:.1%}", f"{memory[who]:,.0f}")
            rows.append((f"{name}, {shape.rows} x {shape.context}, {who}", *about))
    say.say(table(("", "tokens/s", "TFLOP/s", "of the peak", "peak MB"), rows))


def steps(
    scale: Scale, shape: Shape, clone: Path | None, rounds: int
) -> tuple[dict[str, float], dict[str, float], int]:
    """Tokens a second and peak memory by contestant, and the parameters of matrix products."""
    sizes = {"n_layer": shape.layers, "n_head": shape.heads, "n_embd": shape.width, "block_size": shape.context}
    ours = [
        *("--model.preset=gpt2", "--optim.optimizer=adamw", "--train.dtype=bf16", f"--train.compile={scale.compile}"),
        *(f"--model.n_layers={shape.layers}", f"--model.n_heads={shape.heads}", f"--model.d_model={shape.width}"),
        *(f"--model.context={shape.context}", f"--train.batch_size={shape.rows}", "--train.steps=100000"),
    ]
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        tokens = Path(temporary) / "tokens.npy"
        random_tokens(tokens, scale.vocabulary)
        step = [sys.executable, "-m", "benchmarks.steps", str(tokens), str(scale.vocabulary), *ours]
        workers = {"ours": stack.enter_context(Worker(step))}
        if clone:
            mode = "compiled" if scale.compile == "on" else "eager"
            about = json.dumps({**sizes, "vocab_size": scale.vocabulary})
            program = [sys.executable, "-c", nanogpt.STEPS, about, str(tokens), str(shape.rows), scale.device, mode]
            workers["nanoGPT"] = stack.enter_context(Worker(program, stack.enter_context(nanogpt.copied(clone))))
        asks = {name: lambda worker=worker: worker.ask(scale.steps) for name, worker in workers.items()}
        found = alternate(asks, rounds)
        matrices = workers["ours"].ready["matrices"]
    counted = scale.steps * shape.rows * shape.context
    speeds = {name: counted / median(one["seconds"] for one in all_of) for name, all_of in found.items()}
    return speeds, {name: max(one["megabytes"] for one in all_of) for name, all_of in found.items()}, matrices


def our_seconds(scale: Scale) -> float:
    """Until an evaluation of our run is at the loss that is wanted."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "run" / "metrics.jsonl"
        command = [sys.executable, "train.py", *scale.recipe, f"--run.dir={folder}/run"]
        return seconds_until(command, lambda _: any(line.get("val_loss", 1e9) <= scale.loss for line in logged(log)))


def their_seconds(scale: Scale, folder: Path) -> float:
    """Until an evaluation that nanoGPT prints is at that loss."""

    def reached(text: str) -> bool:
        return any(float(loss) <= scale.loss for loss in re.findall(r"val loss (\d+\.\d+)", text))

    command = [sys.executable, "-u", "train.py", "config/train_shakespeare_char.py", *scale.theirs]
    return seconds_until(command, reached, folder)


def time_to_loss(scale: Scale, clone: Path | None, rounds: int, say: Page) -> None:
    """Whole commands, from their start until the loss is reached."""
    from data.config import DataConfig, cache_folder
    from data.prepare import prepare

    with ExitStack() as stack:
        contestants: dict[str, Callable[[], float]] = {"ours": lambda: our_seconds(scale)}
        if scale.device == "cuda" or clone:
            prepare(DataConfig(source="shakespeare", tokenizer="char"))  # for both, before the clock runs
        if clone:
            folder = stack.enter_context(nanogpt.copied(clone, cache_folder() / "tinyshakespeare.txt"))
            contestants["nanoGPT"] = lambda: their_seconds(scale, folder)
        found = alternate(contestants, rounds)
    rows = [(name, spread(took, ".1f")) for name, took in found.items()]
    say.say(table((f"until a loss of {scale.loss}", "seconds"), rows))


def sampling(scale: Scale, rounds: int, say: Page) -> None:
    """Tokens a second of the first shape, as random weights write them, and the weights read a second."""
    shape = next(iter(scale.shapes.values()))
    sizes = {"n_layers": shape.layers, "n_heads": shape.heads, "d_model": shape.width, "context": shape.context}
    config = ModelConfig("gpt2", attention="sdpa", **sizes)
    model = GPT(config, scale.vocabulary).to(scale.device, torch.bfloat16).eval()
    n_bytes = sum(p.nbytes for name, p in model.named_parameters() if name != "position_embedding.weight")
    matrices = gpt_matrices(shape.layers, shape.width, scale.vocabulary)
    ceiling = vector_speed(matrices, torch.bfloat16, scale.device, seconds=0.2)
    stream = stream_speed(device=scale.device, gigabytes=0.01 if scale.device == "cpu" else 4.0)
    say.say(
        f"Memory read at {stream / 1e9:,.0f} GB/s from end to end, at {ceiling / 1e9:,.0f} GB/s in bf16 matrix-vector "
        "products of this model."
    )
    contestants = {str(batch): partial(written, scale, model, batch) for batch in (1, 16)}
    found = alternate(contestants, rounds)
    rows = []
    for batch, took in found.items():
        passes = scale.written / median(took)
        share = f"{passes * n_bytes / ceiling:.1%}"
        rows.append((f"batch {batch}", f"{passes * int(batch):,.0f}", f"{passes * n_bytes / 1e9:,.1f}", share))
    say.say(table((f"{scale.written} tokens, bf16", "tokens/s", "GB/s of weights", "of that ceiling"), rows))


def written(scale: Scale, model: GPT, batch: int) -> float:
    """Seconds for so many tokens of each text."""
    prompt = torch.zeros(batch, 1, dtype=torch.long, device=scale.device)
    generator = torch.Generator(scale.device).manual_seed(1)
    start = time.perf_counter()
    last = [tokens for tokens in generate(model, prompt, scale.written, generator)][-1]
    last.tolist()  # what is on the GPU is waited for
    return time.perf_counter() - start


def main() -> None:
    parser = options(__doc__ or "", rounds=3, nanogpt=True)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the processor: does it run?")
    asked = parser.parse_args()
    if not asked.smoke and not torch.cuda.is_available():
        sys.exit("error: there is no CUDA here; --smoke runs the same code with tiny shapes on the processor")
    if asked.smoke and asked.record:
        sys.exit("error: --smoke measures nothing that is worth recording")
    scale = SMOKE if asked.smoke else FULL
    with page("gpu", asked.record) as say:
        utilisation(scale, asked.nanogpt, asked.rounds, say)
        sampling(scale, asked.rounds, say)
        time_to_loss(scale, asked.nanogpt, asked.rounds, say)


if __name__ == "__main__":
    main()
