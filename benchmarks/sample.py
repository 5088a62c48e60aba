"""Sampling beside transformers and nanoGPT: tokens a second, one text and sixteen, after a short prompt and a long one.

    python -m benchmarks.sample --nanogpt PATH                # PATH: your own clone of nanoGPT
    python -m benchmarks.sample --run runs/quickstart         # without training that first

The shape is GPT-2's of 124 M parameters with random weights. What a token costs stands beside the machine's limit: the
quickest of three ways to multiply every matrix with one vector. What fp16 and int8 cost in loss is measured on Tiny
Shakespeare by character, on a model that is trained for it.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import nanogpt
from benchmarks.ceilings import best_seconds, gpt_matrices, stream_speed
from benchmarks.results import Page, page
from benchmarks.side_by_side import Spent, Target, Worker, alternate, options, spend, spread, table, targets
from data.config import cache_folder
from model.config import ModelConfig
from model.generate import SamplingParams, generate
from model.gpt import GPT
from model.quantize import PREPACK_ROWS, WeightDtype, quantize_
from training.checkpoint import open_checkpoint
from training.device import get_dist_context

FORMATS: tuple[WeightDtype, ...] = ("fp32", "fp16", "int8")
SHAPE = ModelConfig(preset="gpt2", n_layers=12, n_heads=12, d_model=768, context=1024, attention="sdpa")
VOCAB = 50257
CASES = {"1 text": (1, 8, 256), "16 texts": (16, 8, 32), "prompt of 768": (1, 768, 1)}
"""Texts side by side, tokens of the prompt, tokens to write."""
STORIES, CHARACTERS = "quickstart", "Shakespeare"
TRAINING = {STORIES: (), CHARACTERS: ("configs/shakespeare_char.toml",)}
WRITE = """
import json, sys, time
import torch
from model import GPT
from model import GPTConfig
torch.manual_seed(1)
model = GPT(GPTConfig(dropout=0.0, **json.loads(sys.argv[1]))).eval()
print(json.dumps({}), flush=True)
for line in sys.stdin:
    batch, prompt, count = json.loads(line)
    start = time.perf_counter()
    model.generate(torch.randint(50257, (batch, prompt)), count, temperature=0.8)
    print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)
"""
"""nanoGPT as a worker: writes (texts, prompt, tokens) with its own `generate`."""


def prompt(batch: int, length: int) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(2))


def ours(dtype: WeightDtype) -> Callable[[int, int, int], float]:
    """Seconds that we need for (texts, tokens of prompt, tokens to write)."""
    model = GPT(SHAPE, VOCAB).eval()
    quantize_(model, dtype)

    def write(batch: int, length: int, count: int) -> float:
        start = time.perf_counter()
        for _ in generate(model, prompt(batch, length), count, torch.Generator().manual_seed(1), SamplingParams(0.8)):
            pass
        return time.perf_counter() - start

    return write


def transformers() -> Callable[[int, int, int], float]:
    """The same by transformers' generate, with its cache and its defaults otherwise."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config()).eval()
    how = {
        "do_sample": True,
        "temperature": 0.8,
        "top_k": 0,
        "use_cache": True,
        "pad_token_id": 0,
        "eos_token_id": None,
    }

    def write(batch: int, length: int, count: int) -> float:
        tokens = prompt(batch, length)
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count, **how)
        return time.perf_counter() - start

    return write


def seconds_at_best() -> float:
    """Seconds of all matrices times one vector in fp32, by the quickest of three ways: the limit of one text."""
    with torch.inference_mode():
        matrices = [torch.randn(*shape) for shape in gpt_matrices(SHAPE.n_layers, SHAPE.d_model, VOCAB)]
        rows = [torch.randn(1, matrix.shape[1]) for matrix in matrices]
        found = [best_seconds(lambda: [F.linear(x, w) for x, w in zip(rows, matrices, strict=True)], 1.0)]
        turned = [matrix.T.contiguous() for matrix in matrices]
        found.append(best_seconds(lambda: [x @ w for x, w in zip(rows, turned, strict=True)], 1.0))
        del turned
        kernels = torch.ops.mkldnn
        blocks = [kernels._reorder_linear_weight(matrix, PREPACK_ROWS) for matrix in matrices]
        multiply = kernels._linear_pointwise
        pairs = list(zip(rows, blocks, strict=True))
        found.append(best_seconds(lambda: [multiply(x, w, None, "none", [], "") for x, w in pairs], 1.0))
    return min(found)


def compare(say: Page, clone: Path | None, rounds: int) -> list[Target]:
    """Every contestant on every case."""
    contestants: dict[str, Callable[[int, int, int], float]] = {f"ours, {name}": ours(name) for name in FORMATS}
    contestants["transformers, fp32"] = transformers()
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as empty:
        worker = None
        if clone:
            code = [sys.executable, "-c", WRITE, '{"bias": true, "vocab_size": 50257}']
            worker = Worker(code, clone.resolve(), PYTHONDONTWRITEBYTECODE="1", PYTHONPYCACHEPREFIX=empty)
            contestants["nanoGPT, fp32"] = lambda *case: float(worker.ask(list(case))["seconds"])
        for write in contestants.values():
            write(1, 8, 2)
        limit = seconds_at_best()
        for name, case in CASES.items():
            turns = {who: partial(write, *case) for who, write in contestants.items()}
            found[name] = alternate(turns, rounds)
        limit = min(limit, seconds_at_best())
        if worker:
            worker.process.kill()
    say.say(f"Tokens/s of 124 M parameters; seconds for the first token after a prompt of 768. Medians of {rounds}.")
    speeds = {name: {who: [case[0] * case[2] / s for s in took] for who, took in found[name].items()}
              for name, case in CASES.items()}  # fmt: skip
    say.say(table(("", *CASES), [
        (who, spread(speeds["1 text"][who], ".1f"), spread(speeds["16 texts"][who], ".1f"),
         spread(found["prompt of 768"][who], ".3f")) for who in contestants]))  # fmt: skip
    middle = {who: statistics.median(took) for who, took in speeds["1 text"].items()}
    n_bytes = 4 * sum(a * b for a, b in gpt_matrices(SHAPE.n_layers, SHAPE.d_model, VOCAB))
    say.say(
        f"The limit of one text in fp32: {1 / limit:.1f} passes over the matrices a second, "
        f"{n_bytes / limit / 1e9:.1f} GB/s; reading alone {stream_speed() / 1e9:.1f} GB/s."
    )
    mine = middle["ours, fp32"]
    wanted = [
        Target("one text, fp32, against transformers", mine / middle["transformers, fp32"], 1.35),
        Target("one text, fp32, share of the limit", mine * limit, 0.9),
        Target("one text, fp16 against our fp32", middle["ours, fp16"] / mine, 1.7),
        Target("one text, int8 against our fp32", middle["ours, int8"] / mine, 1.7),
    ]
    if clone:
        wanted.append(Target("one text, fp32, against nanoGPT", mine / middle["nanoGPT, fp32"], 5.0))
    return wanted


def loss_of(model: GPT, tokens: Tensor) -> float:
    """Nats a token over a whole text, in windows of the context."""
    T, total = model.config.context, 0.0
    with torch.inference_mode():
        for start in range(0, len(tokens) - 1, T):
            window = tokens[start : start + T + 1]
            total += float(F.cross_entropy(model(window[None, :-1])[0], window[1:], reduction="sum"))
    return total / (len(tokens) - 1)


def costs(say: Page, run: Path) -> list[Target]:
    """What each format costs in loss, over the last tenth of Tiny Shakespeare."""
    saved = open_checkpoint(run)
    text = (cache_folder() / "tinyshakespeare.txt").read_text(encoding="utf-8")
    tokens = torch.from_numpy(saved.tokenizer().encode(text[int(0.9 * len(text)) :]).astype("int64"))
    losses = {}
    for stored in FORMATS:
        model = saved.load_model(get_dist_context("fp32"))
        quantize_(model, dtype)
        losses[stored] = loss_of(model, tokens)
    say.say(f"Loss of a model of Tiny Shakespeare by character, {len(tokens):,} held-out tokens.")
    more = {name: loss / losses["fp32"] - 1 for name, loss in losses.items()}
    say.say(table(("weights", "nats/token", "more"), [(n, f"{v:.6f}", f"{more[n]:+.4%}") for n, v in losses.items()]))
    return [Target(f"loss with {name}, more by", more[name], 0.005, True, ".4%") for name in ("fp16", "int8")]


def commands(runs: dict[str, Path], clone: Path | None) -> Iterator[tuple[str, list[str], Path]]:
    """Whole commands that write up to 500 tokens a text: name, words, folder."""
    here = Path(__file__).parent.parent
    for name, run in runs.items():
        words = [sys.executable, "sample.py", str(run.resolve()), "--tokens=500"]
        yield f"sample.py, {name}", words, here
        if name == STORIES:  # which the model ends long before; so as many tokens once more, in ten of them
            yield f"sample.py, {name}, ten texts", [*words, "--samples=10"], here
    if clone:
        how = ("--device=cpu", "--num_samples=1", "--max_new_tokens=500", "--out_dir=out-shakespeare-char")
        yield "nanoGPT's sample.py", [sys.executable, "sample.py", *how], clone


def whole(say: Page, runs: dict[str, Path], clone: Path | None, rounds: int) -> list[Target]:
    """sample.py from its start to its end, beside nanoGPT's with its README's character model."""
    turns: dict[str, Callable[[], Spent]] = {
        name: partial(spend, words, folder) for name, words, folder in commands(runs, clone)
    }
    turns["python -c 'import torch'"] = partial(spend, [sys.executable, "-c", "import torch"])
    found = alternate(turns, rounds)
    say.say(f"Whole commands, up to 500 tokens a text; a story ends sooner, ten are longer. Medians of {rounds}.")
    say.say(table(("", "seconds", "peak MB", "characters"), [
        (name, spread([s.seconds for s in all_]), f"{statistics.median(s.megabytes for s in all_):.0f}",
         len(all_[0].output)) for name, all_ in found.items()]))  # fmt: skip
    middle = {name: statistics.median(s.seconds for s in all_) for name, all_ in found.items()}
    theirs = middle.get("nanoGPT's sample.py")
    return [
        Target(f"{name}, against nanoGPT's", seconds / theirs, 0.6, at_most=True)
        for name, seconds in middle.items()
        if theirs and name.startswith("sample.py")
    ]


def main() -> None:
    parser = options(__doc__ or "", rounds=3, nanogpt=True)
    parser.add_argument("--run", type=Path, metavar="PATH", help="a run of the quickstart, if there")
    parser.add_argument(
        "--characters", type=Path, metavar="PATH", help="a run of configs/shakespeare_char.toml, if there"
    )
    asked = parser.parse_args()
    with page("sample", asked.record) as say, tempfile.TemporaryDirectory() as folder:
        runs = {STORIES: asked.run, CHARACTERS: asked.characters}
        for name, run in runs.items():
            if run is None:
                runs[name] = Path(folder) / name
                spend([sys.executable, "train.py", *TRAINING[name], f"--run.dir={runs[name]}"])
        found = costs(say, runs[CHARACTERS])
        if asked.nanogpt:
            with nanogpt.copied(asked.nanogpt, cache_folder() / "tinyshakespeare.txt") as clone:
                nanogpt.train(clone, "--max_iters=40", "--eval_interval=20", "--eval_iters=1")
                found += whole(say, runs, clone, asked.rounds)
                found += compare(say, clone, asked.rounds)
        else:
            found += whole(say, runs, None, asked.rounds)
            found += compare(say, None, asked.rounds)
        say.say(targets(found))


if __name__ == "__main__":
    main()
