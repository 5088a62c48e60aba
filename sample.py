"""Generate text with a trained model:  python sample.py RUN [--prompt TEXT] [--option value ...]

RUN is a run folder or a checkpoint folder.
"""

from __future__ import annotations

import codecs
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

if sys.flags.safe_path:  # python -P, python -I
    sys.path.insert(0, str(Path(__file__).resolve().parent))

from common.errors import run_main
from common.files import retry_if_removed
from training.cli import parse

BATCH_BYTES = 1 << 29  # of keys, values and probabilities of the texts that are generated at once


@dataclass(frozen=True)
class SampleConfig:
    """Sampling settings."""

    run: Positional[str]
    """Run folder or checkpoint folder."""
    checkpoint: str = "best"
    """The checkpoint of a run: `best` (lowest validation loss), `last`, or a step."""
    prompt: str = ""
    """Beginning of the text."""
    tokens: int = 200
    """Maximum number of new tokens; generation stops at end-of-text."""
    samples: int = 1
    """Number of texts."""
    temperature: float = 0.8
    """Sampling temperature; 0 is greedy."""
    top_k: int = 0
    """Sample from the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Sample from the smallest set of most likely tokens with this total probability; 1 keeps all."""
    seed: int = 1
    """Random seed; the same seed gives the same text."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; `auto` is a CUDA GPU if there is one, else the CPU."""
    dtype: Literal["fp32", "fp16", "int8"] = "fp32"
    """Storage of the weights. fp16 halves the time per token of a large model and changes its loss by less than
    0.01 %. int8 takes the least memory and encodes long prompts fastest, with the loss within 0.5 %. Both need an x86 CPU."""

    def problems(self) -> list[str]:
        """What is wrong with these values, one line each."""
        problems = []
        if not 0 <= self.temperature < float("inf"):
            problems.append(f"--temperature is {self.temperature}; it must be at least 0 (greedy) and finite")
        if not 0 < self.top_p <= 1:
            problems.append(f"--top_p is {self.top_p}; it must be above 0 and at most 1")
        for name, minimum in (("tokens", 0), ("samples", 1), ("top_k", 0), ("seed", 0)):
            if not minimum <= getattr(self, name) < 1 << 63:
                problems.append(f"--{name} is {getattr(self, name)}; it must be at least {minimum} and below 2**63")
        return problems


@retry_if_removed
def main(argv: list[str]) -> None:
    config = parse(SampleConfig, argv, "Generate text with a trained model.", positional=["run"])
    from model.generate import SamplingParams
    from model.quantize import quantize_
    from training.checkpoint import open_checkpoint
    from training.device import get_dist_context
    from training.text_generation import check_token_count, escape_text, generate_tokens, read_prompt

    check_token_count(config.samples, config.tokens)
    checkpoint = open_checkpoint(Path(config.run), config.checkpoint)
    tokenizer = checkpoint.tokenizer()
    text, prompt = read_prompt(tokenizer, config.prompt, checkpoint.environment)
    shown: Callable[[str], str] = escape_text if sys.stdout.isatty() else str  # a file gets the text as it is
    model = checkpoint.load_model(get_dist_context("fp32", device=config.device))
    if len(prompt) > (context := model.config.context):
        print(f"the prompt has {len(prompt)} tokens; only the last {context} (the context) are used", file=sys.stderr)
        prompt = prompt[-context:]
    quantize_(model, config.dtype)
    params = SamplingParams(config.temperature, config.top_k, config.top_p)
    if config.samples > 1:
        shape = model.config
        text_bytes = 8 * shape.n_layers * shape.n_kv_heads * shape.d_head * context + 40 * model.vocab_size
        rows = max(1, BATCH_BYTES // text_bytes)
        for first in range(0, config.samples, rows):
            n, seed = min(rows, config.samples - first), (config.seed + first * 0x9E3779B97F4A7C15) % (1 << 63)
            steps = generate_tokens(model, tokenizer, prompt, config.tokens, seed, params, n)
            for number, sample in enumerate(list(zip(*steps, strict=True)) or [()] * n, first + 1):
                print(f"--- {number} ---\n{shown(text + tokenizer.decode(sample))}")
        return
    steps = generate_tokens(model, tokenizer, prompt, config.tokens, config.seed, params)
    print(shown(text), end="", flush=True)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may be spread over several tokens
    for (token,) in steps:
        print(shown(decoder.decode(tokenizer.token_bytes(token))), end="", flush=True)
    print(shown(decoder.decode(b"", final=True)))


if __name__ == "__main__":
    run_main(main)
