"""See what a trained model reads:  python attend.py RUN [--prompt TEXT] [--option value ...]

RUN is a run folder (its newest good checkpoint is taken) or one checkpoint folder. Without a prompt, the model's own
sample is looked at. Prints each head's strongest readings and a map of one head; writes the weights and a picture.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from runtime.cli import parse
from runtime.errors import DISK_OR_MEMORY, UserError, run_main

if TYPE_CHECKING:
    from data.tokenizer import Tokenizer
    from inspection.capture import Capture
    from model.gpt import GPT
    from runtime.checkpoint import Checkpoint


@dataclass(frozen=True)
class AttendConfig:
    """What to look at."""

    run: Positional[str]
    """A run folder, or one of its checkpoints."""
    prompt: str = ""
    """The text to read; without one the model writes its own."""
    head: str = ""
    """The head to draw in characters, such as L1H2; by default the one that points most clearly."""
    top: int = 3
    """Strongest readings to print for each head."""
    tokens: int = 60
    """Length of the model's own text where there is no prompt."""
    seed: int = 1
    """Seed of that text."""
    out: str = ""
    """Folder for the files; by default the run's attention folder."""
    dtype: Literal["f16", "f32"] = "f16"
    """Number format of the stored weights."""

    def problems(self) -> list[str]:
        """What is wrong with these values, a line each."""
        found = [
            f"--{name} is {getattr(self, name)}; it must be at least {least}"
            for name, least in (("top", 1), ("tokens", 1), ("seed", 0))
            if getattr(self, name) < least
        ]
        if self.head and not re.fullmatch(r"L\d+H\d+", self.head):
            found.append(f"--head is {self.head!r}; it takes a layer and a head, such as L1H2")
        return found


def main(argv: list[str]) -> None:
    config = parse(AttendConfig, argv, "See what a trained model reads.", positional="run")
    from inspection.capture import capture_batch
    from inspection.words import token_text
    from runtime.checkpoint import open_checkpoint
    from runtime.device import find_machine
    from runtime.sampling import check_prompt, first_tokens, sample_tokens

    check_prompt(config.prompt)
    saved = open_checkpoint(Path(config.run))
    tokenizer = saved.tokenizer()
    tokens = first_tokens(tokenizer, config.prompt, saved.documents)
    model = saved.model(find_machine("fp32"))
    chosen = find_head(config.head, model.config.n_layers, model.config.n_heads)
    if not config.prompt:
        tokens = sample_tokens(model, tokenizer, tokens, config.tokens, config.seed)
    if len(tokens) > model.config.context:
        print(
            f"the text has {len(tokens)} tokens; the last {model.config.context}, a whole context, are looked at",
            file=sys.stderr,
        )
        tokens = tokens[-model.config.context :]
    seen = capture_batch(model, [tokens])[0]
    encoding = sys.stdout.encoding
    quoted = [token_text(tokenizer.token_bytes(t), encoding, space=" ") for t in tokens]
    labels = [token_text(tokenizer.token_bytes(t), encoding) for t in tokens]
    tell(seen, quoted, labels, chosen, config.top)
    write_files(config, saved, model, tokenizer, tokens, seen)


def find_head(name: str, n_layers: int, n_heads: int) -> tuple[int, int] | None:
    """The layer and head that `--head` names.

    Raises:
        UserError: if the model has no such head (exit code 2).
    """
    if not name:
        return None
    layer, head = map(int, re.findall(r"\d+", name))
    if layer >= n_layers or head >= n_heads:
        raise UserError(f"--head is {name}; the model has L0H0 to L{n_layers - 1}H{n_heads - 1}")
    return layer, head


def tell(seen: Capture, quoted: list[str], labels: list[str], chosen: tuple[int, int] | None, top: int) -> None:
    """Print the strongest readings of every head, and one head as a map of characters."""
    from inspection.probes import DISCLAIMER
    from inspection.words import clearest_head, head_name, heat_map, strongest

    pattern = seen.pattern.numpy()
    print(f"The {top} strongest readings of each head:")
    for line in strongest(pattern, quoted, top):
        print("  " + line)
    layer, head = chosen or clearest_head(pattern)
    width = shutil.get_terminal_size((110, 24)).columns
    print(f"\nHead {head_name(layer, head)}: query (row) reads key (column)")
    for line in heat_map(pattern[layer, head], labels, width - 2, sys.stdout.encoding):
        print("  " + line)
    print(f"\n{DISCLAIMER}")


def write_files(
    config: AttendConfig, saved: Checkpoint, model: GPT, tokenizer: Tokenizer, tokens: list[int], seen: Capture
) -> None:
    """Write the weights as safetensors and a picture of all heads, named after the step and the text."""
    from inspection.figures import head_grid
    from inspection.observer import write_dump
    from inspection.words import token_text
    from runtime.provenance import provenance

    folder = Path(config.out) if config.out else saved.folder.parent.parent / "attention"
    text = config.prompt or f"own text, seed {config.seed}"
    slug = "-".join(re.findall(r"[a-z0-9]+", text.lower()))[:24].strip("-")
    stem = f"{saved.state.step:06d}-{slug}-{hashlib.sha256(repr(tokens).encode()).hexdigest()[:6]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        metadata = provenance(model, tokenizer, saved.state)
        write_dump(
            folder / f"{stem}.safetensors", model, [(text, tokens)], tokenizer.token_bytes, metadata, config.dtype
        )
        labels = [token_text(tokenizer.token_bytes(t)) for t in tokens]
        head_grid(folder / f"{stem}.png", seen.pattern.numpy(), labels, f"step {saved.state.step}: {text[:60]}")
    except OSError as error:
        raise UserError(
            f"cannot write into {folder}: {error.strerror}; choose another with --out", DISK_OR_MEMORY
        ) from error
    print(f"weights  {folder / stem}.safetensors\npicture  {folder / stem}.png")


if __name__ == "__main__":
    run_main(main)
