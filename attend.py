"""Show the attention of a trained model:  python attend.py [COMMAND] RUN [--option value ...]

Without a command, `python attend.py RUN --prompt TEXT` shows a prompt: the strongest attention of each head, the next
token with its direct logit attribution and logit lens; it writes an attention file, a figure and a page. The commands
show what a run recorded at its evaluations:

    summary   the findings, and the best head for each score      ablate   ablate every head of the best checkpoint
    heads     every score of every head                           plot     figures: PNG, SVG, PDF
    token     what one token attends to in every head             page     build attention.html
    timeline  when in training each head learned what it does     verify   recompute attention files and compare
    compare   two steps, or two runs, head by head                patch    activation patching between two texts
    serve     type your own text into a model of any size
"""

from __future__ import annotations

import difflib
import hashlib
import re
import shutil
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

if sys.flags.safe_path:  # python -P, python -I
    sys.path.insert(0, str(Path(__file__).resolve().parent))

from common.errors import CHECKPOINT, DISK_OR_MEMORY, UserError, run_main, warn
from common.files import retry_if_removed
from inspection import terminal
from inspection.attention_file import AttentionFile, AttentionRecord, write_attention_file
from inspection.commands.outputs import Ablate, Page, Plot
from inspection.commands.patch import Patch
from inspection.commands.patterns import Compare, Token
from inspection.commands.scores import Heads, Summary, Timeline
from inspection.commands.serve import Serve
from inspection.commands.shared import Context, DeviceOptions, LoadedModel, parse_head
from inspection.commands.verify import Verify
from inspection.plots import draw_patterns
from training.cli import parse, split_options

if TYPE_CHECKING:
    from data.tokenizer import Tokenizer
    from inspection.activation_cache import ActivationCache
    from model.gpt import GPT
    from training.checkpoint import Checkpoint

CLASSES = Summary, Heads, Token, Timeline, Compare, Ablate, Patch, Plot, Page, Serve, Verify
COMMANDS: dict[str, Any] = {command.__name__.lower(): command for command in CLASSES}
MAX_PARTS = 6  # of a logit that are listed; the others are added up


@dataclass(frozen=True)
class AttendOptions(DeviceOptions):
    """Options of `attend.py RUN`."""

    run: Positional[str]  # A run folder, one of its checkpoints, a Hugging Face folder, or a name on its hub.
    checkpoint: str = "best"  # The checkpoint of a run: `best` (lowest validation loss), `last`, or a step.
    prompt: str = ""  # The text to show; by default the model generates one.
    head: str = ""  # The head to draw as a heat map, such as L1H2; by default the one with the clearest pattern.
    top: int = 3  # Number of queries to list for each head.
    tokens: int = 60  # Length of the generated text without a prompt.
    seed: int = 1  # Seed of the generated text.
    out: str = ""  # Folder for the files; by default the run's attention folder.
    dtype: Literal["f16", "f32"] = "f16"  # Dtype of the attention weights in the file.


@retry_if_removed
def main(argv: list[str]) -> None:
    try:
        if argv and argv[0] in COMMANDS:
            run_command(argv[0], argv[1:])
        else:
            check_command(argv)
            show_prompt(parse(AttendOptions, argv, __doc__ or "", positional=["run"]))
    except UserError as error:
        if not str(error).startswith("cannot write"):
            raise
        place = "copy the run to a folder of your own" if argv[0] == "ablate" else "choose another place with --out"
        raise UserError(f"{error}; {place}", DISK_OR_MEMORY) from error


def check_command(argv: list[str]) -> None:
    """Raise `UserError` if another word follows the first, which is not a command."""
    words = [value or "" for option, value in split_options(argv) if not option and value != "-h"]
    if len(words) > 1:
        near = difflib.get_close_matches(words[0], COMMANDS, n=1)
        others = f"the commands are {', '.join(COMMANDS)}, and texts with spaces need quotes"
        hint = f"did you mean {near[0]}?" if near else others
        raise UserError(f"{words[0]!r} comes before {words[1]!r}, but is not a command; {hint}")


def print_lines(*lines: str) -> None:
    print(terminal.printable(lines, sys.stdout.encoding))


def terminal_width() -> int:
    return min(shutil.get_terminal_size((120, 24)).columns, terminal.MAX_WIDTH)


# Commands on what a run recorded


def run_command(name: str, argv: list[str]) -> None:
    """Run a command and print its result; a failed check is a `UserError` after everything is printed (exit code 4)."""
    command = COMMANDS[name]
    words = ["run", "other"] if command is Compare else ["run"]
    usage = f"python attend.py {name} RUN" + " [OTHER]" * (command is Compare)
    options = parse(command, argv, f"{command.__doc__}  {usage}", words)
    load_on_device = partial(load_model, device=getattr(options, "device", "auto"))
    result = options.result(Context(terminal_width(), load_on_device))
    if getattr(options, "json", False):
        print(terminal.to_json(result.data))
    else:
        print_lines(*result.lines)
    if not result.ok:
        raise UserError("some attention files differ from their checkpoints; restore or rewrite them", CHECKPOINT)


def load_model(path: Path, which: str, device: str = "auto") -> LoadedModel:
    """The model of a checkpoint, or of the checkpoint `best`, `last` or of a step of a run."""
    from training.pretrained import open_model

    return load(open_model(path, which), device)


def load(checkpoint: Checkpoint, device: str = "auto") -> LoadedModel:
    """The model of a checkpoint in fp32."""
    from training.checkpoint import provenance
    from training.device import get_dist_context
    from training.text_generation import encode_prompt

    model, tokenizer = checkpoint.load_model(get_dist_context("fp32", device=device)), checkpoint.tokenizer()
    metadata = provenance(model, tokenizer, checkpoint.state)
    encode = partial(encode_prompt, tokenizer, documents=checkpoint.environment.starts_with_eot)
    return LoadedModel(model, checkpoint.state.step, metadata, tokenizer, encode)


# A prompt


def show_prompt(options: AttendOptions) -> None:
    """Print the attention on one text and write an attention file, a figure and a page."""
    from inspection.activation_cache import run_with_cache_batch
    from training.pretrained import open_model
    from training.text_generation import check_token_count, generate_tokens, read_prompt

    check_token_count(1, options.tokens)
    checkpoint = open_model(options.run, options.checkpoint)
    tokenizer = checkpoint.tokenizer()
    text, tokens = read_prompt(tokenizer, options.prompt, checkpoint.environment)
    loaded = load(checkpoint, options.device)
    model, config = loaded.model, loaded.model.config
    head = parse_head(options.head, (config.n_layers, config.n_heads)) if options.head else None
    if not text:
        tokens += generate_tokens(model, tokenizer, tokens, options.tokens, options.seed)[0]
    if len(tokens) > config.context:
        warn(f"the text has {len(tokens)} tokens; showing the last {config.context} (the context)")
        tokens = tokens[-config.context :]
    cache = run_with_cache_batch(model, [tokens], details=True)[0]
    print_attention(cache, [tokenizer.token_bytes(token) for token in tokens], head, options.top)
    print_next_token(model, tokenizer, tokens)
    write_files(replace(options, prompt=text), checkpoint, loaded, cache)


def print_attention(cache: ActivationCache, tokens: list[bytes], head: tuple[int, int] | None, top: int) -> None:
    """Print the strongest attention of every head, and one head as a heat map."""
    pattern = cache.pattern.numpy()
    layer, head_index = head or terminal.clearest_head(pattern)
    print_lines(
        f"Strongest attention of each head (top {top} queries):",
        *(f"  {line}" for line in terminal.strongest_attention(pattern, tokens, top)),
        "",
        f"Head {terminal.head_name(layer, head_index)}:",
        *(f"  {line}" for line in terminal.heat_map(pattern[layer, head_index], tokens, terminal_width())),
        "",
        terminal.DISCLAIMER,
    )


def print_next_token(model: GPT, tokenizer: Tokenizer, tokens: list[int]) -> None:
    """Print the most likely next token, its direct logit attribution, and the logit lens."""
    import torch

    from inspection.attribution import direct_logit_attribution, logit_lens

    def quote(token: int) -> str:
        return terminal.quote_token(tokenizer.token_bytes(token))

    lens = logit_lens(model, torch.tensor(tokens))[:, -1]
    token, parts = direct_logit_attribution(model, torch.tensor(tokens))
    largest = sorted(parts.items(), key=lambda part: -abs(part[1]))
    shown = [f"{label} {value:+.2f}" for label, value in largest[:MAX_PARTS]]
    if rest := [value for _, value in largest[MAX_PARTS:]]:
        shown.append(f"{len(rest)} others {sum(rest):+.2f}")
    layers = ", ".join(map(quote, lens.argmax(dim=-1).tolist()))
    print_lines(
        "",
        f"Next token: {quote(token)} ({lens[-1].softmax(dim=-1)[token]:.1%})",
        f"  direct logit attribution: {sum(parts.values()):.2f} = {', '.join(shown)}",
        f"  logit lens, before the first layer and after each: {layers}",
        "",
    )


def write_files(options: AttendOptions, checkpoint: Checkpoint, loaded: LoadedModel, cache: ActivationCache) -> None:
    """Write an attention file, a figure of all heads, and a page, named by step and text."""
    from inspection.page_builder import PageRun, write_page

    run, tokens = checkpoint.run_dir, cache.tokens.tolist()
    name = options.prompt or f"generated, seed {options.seed}"
    slug = "-".join(re.findall(r"[a-z0-9]+", name.lower()))[:24].strip("-")
    digest = hashlib.sha256(repr(tokens).encode()).hexdigest()[:6]
    path = (Path(options.out) if options.out else run / "attention") / f"{loaded.step:06d}-{slug}-{digest}"
    record = AttentionRecord.from_cache(name, cache, loaded.token_bytes)
    write_attention_file(Path(f"{path}.safetensors"), [record], loaded.metadata, dtype=options.dtype)
    draw_patterns(Path(f"{path}.png"), cache.pattern.numpy(), record.token_bytes, f"step {loaded.step}: {name[:60]}")
    files = [AttentionFile([record], dict(loaded.metadata))]
    write_page(Path(f"{path}.html"), [PageRun(run.name, files, (), run)], None, None, name)
    print_lines(f"attention  {path}.safetensors", f"figure     {path}.png", f"page       {path}.html")


if __name__ == "__main__":
    run_main(main)
