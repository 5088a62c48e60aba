"""Sampling next to transformers and nanoGPT: tokens per second, and whole commands.

    python -m benchmarks.sample --nanogpt PATH                # PATH: your own clone of nanoGPT
    python -m benchmarks.sample --run runs/quickstart --characters runs/shakespeare

Speed is measured with random weights of GPT-2's shape (124 M parameters) and compared with the limit of the machine:
every matrix times one vector.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import common, nanogpt
from data.config import cache_folder
from model.config import ModelConfig
from model.generate import SamplingParams, generate
from model.gpt import GPT
from model.quantize import PREPACK_ROWS, WeightDtype, quantize_

DTYPES: tuple[WeightDtype, ...] = ("fp32", "fp16", "int8")
SHAPE = ModelConfig(preset="gpt2", n_layers=12, n_heads=12, d_model=768, context=1024, attention="sdpa")
VOCAB = 50257
CASES = {"1 text": (1, 8, 256), "16 texts": (16, 8, 32), "prompt of 768": (1, 768, 1)}  # texts, prompt, to sample
Generate = Callable[[int, int, int], float]
NANOGPT_WORKER = """
import json, sys, time
import torch
from model import GPT
from model import GPTConfig
torch.manual_seed(1)
model = GPT(GPTConfig(dropout=0.0, bias=True, vocab_size=50257)).eval()
print(json.dumps({}), flush=True)
for line in sys.stdin:
    batch, prompt, count = json.loads(line)
    start = time.perf_counter()
    model.generate(torch.randint(50257, (batch, prompt)), count, temperature=0.8)
    print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)
"""


def prompt(batch: int, length: int, device: str = "cpu") -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(2)).to(device)


def ours(dtype: WeightDtype, device: str = "cpu") -> Generate:
    """Seconds of our `generate` for (texts, tokens of the prompt, tokens to sample)."""
    model = GPT(SHAPE, VOCAB).eval().to(device)
    quantize_(model, dtype)

    def run(batch: int, length: int, count: int) -> float:
        generator = torch.Generator(device).manual_seed(1)
        start = time.perf_counter()
        steps = list(generate(model, prompt(batch, length, device), count, generator, SamplingParams(0.8)))
        steps[-1][0].cpu()  # waits for a GPU
        return time.perf_counter() - start

    return run


def transformers() -> Generate:
    """The same of transformers' `generate`."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config()).eval()
    settings = {"do_sample": True, "temperature": 0.8, "top_k": 0, "pad_token_id": 0, "eos_token_id": None}

    def run(batch: int, length: int, count: int) -> float:
        tokens = prompt(batch, length)
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count, **settings)
        return time.perf_counter() - start

    return run


def matrix_vector_seconds() -> float:
    """Seconds of all matrices times one vector in fp32, by the faster of two kernels: the limit of one text."""
    mkldnn = torch.ops.mkldnn
    with torch.inference_mode():
        matrices = [torch.randn(*shape) for shape in common.gpt_matrices(SHAPE.n_layers, SHAPE.d_model, VOCAB)]
        pairs = [(torch.randn(1, matrix.shape[1]), matrix) for matrix in matrices]
        plain = common.best_seconds(lambda: [F.linear(x, w) for x, w in pairs], 1.0)
        packed = [(x, mkldnn._reorder_linear_weight(w, PREPACK_ROWS)) for x, w in pairs]
        products = lambda: [mkldnn._linear_pointwise(x, w, None, "none", [], "") for x, w in packed]  # noqa: E731
        return min(plain, common.best_seconds(products))


def measure_speed(out: common.Report, clone: Path | None, rounds: int) -> list[tuple[str, ...]]:
    """Every contestant on every case."""
    contestants: dict[str, Generate] = {f"ours, {dtype}": ours(dtype) for dtype in DTYPES}
    contestants["transformers, fp32"] = transformers()
    worker = common.Worker([sys.executable, "-c", NANOGPT_WORKER], clone) if clone else None
    if worker:
        contestants["nanoGPT, fp32"] = lambda *case: float(worker.ask(list(case))["seconds"])
    for run in contestants.values():
        run(1, 8, 2)
    limit = matrix_vector_seconds()
    times = {
        name: common.interleave({who: partial(run, *case) for who, run in contestants.items()}, rounds)
        for name, case in CASES.items()
    }
    if worker:
        worker.process.kill()
    out.add(f"Tokens/s of 124 M parameters; seconds to the first token after a prompt of 768. Medians of {rounds}.")
    rows, speed = [], {}
    for who in contestants:
        one, many = ([CASES[name][0] * CASES[name][2] / s for s in times[name][who]] for name in list(CASES)[:2])
        speed[who] = statistics.median(one)
        first = common.spread(times["prompt of 768"][who], ".3f")
        rows.append((who, common.spread(one, ".1f"), common.spread(many, ".1f"), first))
    out.add(common.table(("", *CASES), rows))
    elements = [a * b for a, b in common.gpt_matrices(SHAPE.n_layers, SHAPE.d_model, VOCAB)]
    n_bytes, length = 4 * sum(elements), CASES["prompt of 768"][1]
    # two FLOPs per position and weight (the LM head sees the last position only), and 2 T C per layer for causal attention
    flops = length * 2 * (sum(elements[:-1]) + length * SHAPE.d_model * SHAPE.n_layers)
    peak = common.matmul_flops((1024, 1024, 1024), torch.float32)
    share = flops / statistics.median(times["prompt of 768"]["ours, fp32"]) / peak
    reads = f"{1 / limit:.1f} reads of all matrices per second, {n_bytes / limit / 1e9:.1f} GB/s"
    out.add(f"The limit of one text in fp32: {reads}; of a prompt: {peak / 1e9:.0f} GFLOP/s.")
    targets = [
        common.target("one text, fp32, of transformers", speed["ours, fp32"] / speed["transformers, fp32"], 1.35),
        common.target("one text, fp32, share of the limit", speed["ours, fp32"] * limit, 0.75),
        common.target("one text, fp16, of our fp32", speed["ours, fp16"] / speed["ours, fp32"], 1.7),
        common.target("one text, int8, of our fp32", speed["ours, int8"] / speed["ours, fp32"], 2.5),
        common.target("a prompt of 768, fp32, share of the peak", share, 0.7),
    ]
    if clone:
        targets.append(common.target("one text, fp32, of nanoGPT", speed["ours, fp32"] / speed["nanoGPT, fp32"], 5.0))
    return targets


def measure_commands(
    out: common.Report, runs: dict[str, Path], clone: Path | None, rounds: int
) -> list[tuple[str, ...]]:
    """sample.py from start to end, next to nanoGPT's with its README's character model."""
    commands = {
        f"sample.py, {name}": (["sample.py", str(run.resolve()), "--tokens=500"], common.ROOT)
        for name, run in runs.items()
    }
    commands["python -c 'import torch'"] = (["-c", "import torch"], common.ROOT)
    if clone:
        options = ("--device=cpu", "--num_samples=1", "--max_new_tokens=500", "--out_dir=out-shakespeare-char")
        commands["nanoGPT's sample.py"] = (["sample.py", *options], clone)
    runners = {
        name: partial(common.run_command, [sys.executable, *words], at) for name, (words, at) in commands.items()
    }
    results = common.interleave(runners, rounds)
    out.add(f"Whole commands, up to 500 tokens; a story ends sooner. Medians of {rounds}.")
    rows = []
    for name, all_of in results.items():
        megabytes = statistics.median(result.megabytes for result in all_of)
        rows.append((name, common.spread([r.seconds for r in all_of]), f"{megabytes:.0f}", len(all_of[0].output)))
    out.add(common.table(("", "seconds", "peak MB", "characters"), rows))
    seconds = {name: statistics.median(result.seconds for result in all_of) for name, all_of in results.items()}
    peer = seconds.get("nanoGPT's sample.py")
    names = [name for name in seconds if peer and name.startswith("sample.py")]
    return [common.target(f"{name}, of nanoGPT's", seconds[name] / (peer or 1), 0.6, at_most=True) for name in names]


def main() -> None:
    options = common.parser(__doc__, rounds=3, nanogpt=True)
    options.add_argument("--run", type=Path, metavar="PATH", help="a quickstart run; default: trained first")
    options.add_argument("--characters", type=Path, metavar="PATH", help="a run of configs/shakespeare_char.toml")
    args = options.parse_args()
    with common.report("sample", args.record) as out, tempfile.TemporaryDirectory() as folder:
        runs = {"quickstart": args.run, "shakespeare_char": args.characters}
        for name, run in runs.items():
            if run is None:
                runs[name] = Path(folder) / name
                common.run_command([sys.executable, "train.py", f"configs/{name}.toml", f"--run.dir={runs[name]}"])
        with ExitStack() as stack:
            clone = None
            if args.nanogpt:
                text = (cache_folder() / "tinyshakespeare.txt").read_text(encoding="utf-8")
                clone = stack.enter_context(nanogpt.copied(args.nanogpt, text))
                nanogpt.train(clone, "--max_iters=40", "--eval_interval=20", "--eval_iters=1")
            targets = measure_commands(out, runs, clone, args.rounds) + measure_speed(out, clone, args.rounds)
        out.add(common.table(common.TARGET_HEAD, targets))


if __name__ == "__main__":
    main()
