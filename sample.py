"""Generate text with a trained model:  python sample.py RUN [--prompt TEXT] [--option value ...]

RUN is a run folder, a checkpoint folder, a Hugging Face folder (GPT-2, Qwen3, Llama), or a name on its hub.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

if sys.flags.safe_path:  # python -P, python -I
    sys.path.insert(0, str(Path(__file__).resolve().parent))

from common.errors import DATA, UserError, run_main, warn
from common.files import retry_if_removed
from common.ranges import AboveZero, Count, Fraction, NonNegativeFloat, PositiveCount, PositiveFloat, out_of_range
from training.cli import parse

if TYPE_CHECKING:
    from data.tokenizer import Tokenizer
    from model.generate import SamplingParams
    from model.gpt import GPT

BATCH_BYTES = 1 << 29  # of keys, values and probabilities of the texts that are generated at once
SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "tokens", "seed")
HELP = f"type a text to continue it; /set NAME VALUE ({', '.join(SETTINGS)}), /reset, /quit"


@dataclass(frozen=True)
class SampleConfig:
    """Sampling settings."""

    run: Positional[str]  # Run folder, checkpoint folder, Hugging Face folder, or a name on its hub.
    checkpoint: str = "best"  # The checkpoint of a run: `best` (lowest validation loss), `last`, or a step.
    prompt: str = ""  # Beginning of the text; `-` reads it from standard input.
    prompt_file: str = ""  # A UTF-8 file with the beginning of the text.
    tokens: Count = 200  # Maximum number of new tokens; generation stops at end-of-text.
    samples: PositiveCount = 1  # Number of texts.
    temperature: NonNegativeFloat = 0.8  # Sampling temperature; 0 is greedy.
    top_k: Count = 0  # Sample from the k most likely tokens; 0 keeps all.
    top_p: AboveZero = 1.0  # Sample from the fewest tokens that together have this probability; 1 keeps all.
    min_p: Fraction = 0.0  # Sample from the tokens with at least this fraction of the highest probability; 0 keeps all.
    repetition_penalty: PositiveFloat = 1.0  # Above 1, tokens that the text has become less likely.
    stop: tuple[str, ...] = ()  # Stop before this text; may be given several times.
    seed: Count = 1  # Random seed; the same seed gives the same text.
    interactive: bool = False  # Read prompts from the terminal; each continues the text so far.
    score: str = ""  # Instead of generating: a UTF-8 file whose loss, perplexity and most surprising words are printed.
    json: bool = False  # Print a line of JSON for each text: tokens, log-probabilities, why it ended.
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; `auto` is a CUDA GPU if there is one, else the CPU."""
    dtype: Literal["fp32", "fp16", "int8"] = "fp32"
    """Storage of the weights. fp16 and int8 halve the time per token of a large model and need an x86 CPU. fp16 changes
    the loss by less than 0.01 %; int8 keeps it within 0.5 %, takes the least memory, and is faster for several texts."""

    def problems(self) -> list[str]:
        problems = out_of_range(self, "--")
        problems += ["--stop is empty; name the text to stop before"] if "" in self.stop else []
        changed = {field.name for field in fields(self)[1:] if getattr(self, field.name) != field.default}
        generating = changed - {"checkpoint", "dtype", "json", "score", "run"}
        exclusive = {
            "prompt": {"prompt_file"},
            "interactive": {"prompt", "prompt_file", "samples", "json", "score"},
            "score": generating,
        }
        for name in exclusive.keys() & changed:
            if others := sorted(exclusive[name] & changed):
                problems.append(f"--{name} and --{others[0]} exclude each other")
        return problems


@retry_if_removed
def main(argv: list[str]) -> None:
    config = parse_options(argv)
    typed = read_text(config)
    from model.quantize import quantize_
    from training.device import get_dist_context
    from training.pretrained import open_model
    from training.text_generation import check_token_count, read_prompt

    check_token_count(config.samples, config.tokens)
    checkpoint = open_model(config.run, config.checkpoint)
    tokenizer, trained = checkpoint.tokenizer(), checkpoint.environment
    is_typed = typed == config.prompt
    text, prompt = ("", []) if config.score else read_prompt(tokenizer, typed, trained, is_typed)
    on_cpu = config.device == "auto" and config.dtype != "fp32"  # the only device that has kernels for them
    model = checkpoint.load_model(get_dist_context("fp32", device="cpu" if on_cpu else config.device))
    quantize_(model, config.dtype)
    if config.score:
        from training.scoring import print_score, score_text

        print_score(score_text(model, tokenizer, typed, trained.starts_with_eot), tokenizer, config.json)
    elif config.interactive:
        run_interactive(model, tokenizer, argv, trained.starts_with_eot)
    else:
        context = model.config.context
        if len(prompt) > context:
            warn(f"the prompt has {len(prompt)} tokens; only the last {context} (the context) are used")
        write_samples(model, tokenizer, config, text, prompt[-context:])


def parse_options(argv: list[str]) -> SampleConfig:
    return parse(SampleConfig, argv, "Generate text with a trained model.", positional=["run"])


def read_text(config: SampleConfig) -> str:
    """The prompt, or the text to score, from wherever it comes; one line break at the end of a file is not part of it.

    Raises UserError (3) if it cannot be read, is not UTF-8, or standard input is empty.
    """
    path = config.score or config.prompt_file
    if not path and config.prompt != "-":
        return config.prompt
    name = path or "standard input"
    try:
        data = Path(path).read_bytes() if path else sys.stdin.buffer.read() if sys.stdin else b""
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror}", DATA) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}", DATA) from error
    if not text.strip():
        raise UserError(f"{name} is empty", DATA)
    return text.replace("\r\n", "\n").removesuffix("\n")


def sampling_params(config: SampleConfig) -> SamplingParams:
    from model.generate import SamplingParams

    return SamplingParams(**{field.name: getattr(config, field.name) for field in fields(SamplingParams)})


def write_text(model: GPT, tokenizer: Tokenizer, config: SampleConfig, prompt: list[int]) -> list[int]:
    """Print a continuation of the prompt while it is generated; returns its tokens."""
    from training.text_generation import GeneratedText, escape_text, generate_texts

    def show(piece: str) -> None:
        print(escape_text(piece) if sys.stdout.isatty() else piece, end="", flush=True)  # a file gets the text as it is

    sample = GeneratedText(tokenizer, config.stop, show)
    generate_texts(model, prompt, config.tokens, config.seed, sampling_params(config), [sample])
    print()
    return sample.tokens


def write_samples(model: GPT, tokenizer: Tokenizer, config: SampleConfig, text: str, prompt: list[int]) -> None:
    """Print all texts: one as it is generated, several in batches of bounded memory."""
    from training.text_generation import GeneratedText, escape_text, generate_texts

    is_terminal, shape = sys.stdout.isatty(), model.config
    if config.samples == 1 and not config.json:
        print(escape_text(text) if is_terminal else text, end="", flush=True)
        write_text(model, tokenizer, config, prompt)
        return
    text_bytes = 8 * shape.n_layers * shape.n_kv_heads * shape.d_head * shape.context + 40 * model.vocab_size
    rows = max(1, BATCH_BYTES // text_bytes)
    for first in range(0, config.samples, rows):
        n, seed = min(rows, config.samples - first), (config.seed + first * 0x9E3779B97F4A7C15) % (1 << 63)
        samples = [GeneratedText(tokenizer, config.stop) for _ in range(n)]
        generate_texts(model, prompt, config.tokens, seed, sampling_params(config), samples)
        for number, sample in enumerate(samples, first + 1):
            if config.json:
                line = {"prompt": text, "text": sample.text, "tokens": sample.tokens, "logprobs": sample.logprobs}
                print(
                    json.dumps({**line, "finish_reason": sample.finish_reason, "seed": config.seed, "sample": number})
                )
            else:
                whole = text + sample.text
                print(f"--- {number} ---\n{escape_text(whole) if is_terminal else whole}")


def run_interactive(model: GPT, tokenizer: Tokenizer, argv: list[str], starts_with_eot: bool) -> None:
    """Continue what is typed; the next line continues both."""
    print(HELP)
    start = [tokenizer.end_of_text] if starts_with_eot else list(tokenizer.prompt_prefix)
    config, history = parse_options(argv), list(start)
    for line in read_lines():
        command, *words = line.split(maxsplit=2) or [""]
        try:
            if command in ("/quit", "/exit"):
                return
            if command == "/reset":
                history = list(start)
            elif command == "/set" and words and words[0] in SETTINGS:
                config = parse_options([*argv, f"--{'='.join(words)}"])
                argv = [*argv, f"--{'='.join(words)}"]
            elif command.startswith("/"):
                print(HELP)
            else:
                history += tokenizer.encode(line).tolist()
                history += write_text(model, tokenizer, config, history) if history else []
        except UserError as error:
            print(f"error: {error}")


def read_lines() -> Iterator[str]:
    """What is typed, line by line, until the end of the input (Ctrl-D)."""
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


if __name__ == "__main__":
    run_main(main)
