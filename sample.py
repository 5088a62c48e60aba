"""Write text with a trained model:  python sample.py RUN [--prompt TEXT] [--option value ...]

RUN is a run folder (its newest good checkpoint is taken) or one checkpoint folder.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from common.errors import escape_control_chars, run_main
from training.cli import parse


@dataclass(frozen=True)
class SampleConfig:
    """What to write."""

    run: Positional[str]
    """A run folder, or one of its checkpoints."""
    prompt: str = ""
    """How the text begins; without one the model begins itself."""
    tokens: int = 200
    """Most tokens to write; a text that the model ends is shorter."""
    samples: int = 1
    """How many texts."""
    temperature: float = 0.8
    """Below 1 likelier tokens, above 1 bolder ones; 0 always takes the likeliest."""
    top_k: int = 0
    """Draw among so many of the likeliest tokens only; 0 draws among all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together have this probability; 1 draws among all."""
    seed: int = 1
    """The same seed writes the same text."""
    weights: Literal["fp32", "fp16", "int8"] = "fp32"
    """How weights are held while writing: fp32 as trained; fp16 halves a large model's time a token and changes its
    loss by less than 0.01 %; int8 takes the least memory and reads long prompts fastest, loss within 0.5 %."""
    attend: str = ""
    """Write what each token read to this .safetensors file (inspection/attention_file.py); the written-out attention is used."""

    def problems(self) -> list[str]:
        """What is wrong with these values, a line each."""
        found = []
        if not 0 <= self.temperature < float("inf"):
            found.append(f"--temperature is {self.temperature}; it must be 0 (the likeliest token) or more")
        if not 0 < self.top_p <= 1:
            found.append(f"--top_p is {self.top_p}; it must be above 0 and at most 1")
        for name, least in (("tokens", 0), ("samples", 1), ("top_k", 0), ("seed", 0)):
            if getattr(self, name) < least:
                found.append(f"--{name} is {getattr(self, name)}; it must be at least {least}")
        if self.attend and self.samples > 1:
            found.append(f"--attend takes one text, and --samples is {self.samples}; leave one of them out")
        if self.attend and self.weights != "fp32":
            found.append(f"--attend shows what fp32 weights read, and --weights is {self.weights}; leave one out")
        return found


def main(argv: list[str]) -> None:
    config = parse(SampleConfig, argv, "Write text with a trained model.", positional="run")
    from model.quantize import quantize_
    from training.checkpoint import open_checkpoint
    from training.device import get_dist_context
    from training.text_generation import Sampling, check_prompt, first_tokens, shown, write_text

    check_prompt(config.prompt)
    saved = open_checkpoint(Path(config.run))
    if config.attend:
        from inspection.generation import attention_file, recording, write
        from training.provenance import provenance
    file = attention_file(config.attend) if config.attend else None
    tokenizer = saved.tokenizer()
    start = first_tokens(tokenizer, config.prompt, saved.documents)
    model = saved.model(get_dist_context("fp32"))
    if not file:
        quantize_(model, config.weights)
    if len(start) > model.config.context:
        print(
            f"the prompt has {len(start)} tokens, more than the context of {model.config.context}: its end is read",
            file=sys.stderr,
        )
    how = Sampling(config.temperature, config.top_k, config.top_p)
    written = partial(write_text, model, tokenizer, start, config.tokens, config.samples, config.seed, how)
    if config.samples > 1:
        texts = ["".join(text) for text in zip(*written(), strict=True)] or [""] * config.samples
        for number, text in enumerate(texts, 1):
            print(f"--- {number} ---\n{shown(config.prompt + text)}")
        return
    with recording(model, start, config.tokens) if file else nullcontext() as recorder:
        print(shown(config.prompt), end="", flush=True)
        for piece in written(recorder.drawn if recorder else None):
            print(shown(piece[0]), end="", flush=True)
        print()
    if file and recorder:
        write(file, recorder.generated(), tokenizer.token_bytes, provenance(model, tokenizer, saved.state))
        print(f"weights  {escape_control_chars(file)}", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
