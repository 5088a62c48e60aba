"""Show the attention of a trained model:  python attend.py [COMMAND] RUN [--option value ...]

Without a command, `python attend.py RUN --prompt TEXT` shows a prompt: the strongest attention of each head, the next
token with its direct logit attribution and logit lens; it writes an attention file, a figure and a page. The commands
show what a run recorded at its evaluations:

    summary   the findings, and the best head for each score      ablate   ablate every head of the newest checkpoint
    heads     every score of every head                           plot     figures, PNG or SVG
    token     what one token attends to in every head             page     build attention.html
    timeline  when in training each head learned what it does     verify   recompute attention files and compare
    compare   two steps, or two runs, head by head
"""

from __future__ import annotations

import difflib
import hashlib
import re
import shutil
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from common.errors import CHECKPOINT, UserError, escape_control_chars, run_main
from inspection import terminal
from inspection.attention_file import AttentionFile, AttentionRecord, package_versions, write_attention_file
from inspection.commands.shared import LoadedModel, parse_head
from inspection.plots import head_grid
from inspection.terminal import Terminal, head_name, quote_token, token_text
from training.cli import parse, split_options

if TYPE_CHECKING:
    from data.tokenizer import Tokenizer
    from inspection.activation_cache import ActivationCache
    from model.gpt import GPT
    from training.checkpoint import Checkpoint

COMMANDS = ("summary", "heads", "token", "timeline", "compare", "ablate", "plot", "page", "verify")
"""Each is a module of inspection/commands with a dataclass of options of the same name, and `run`."""
TAKES_MODEL = ("ablate", "verify")
MAX_PARTS = 6
"""Parts of a logit that are listed; the others are added up."""


@dataclass(frozen=True)
class AttendOptions:
    """Options of `attend.py RUN`."""

    run: Positional[str]
    """A run folder, or one of its checkpoints."""
    prompt: str = ""
    """The text to show; by default the model generates one."""
    head: str = ""
    """The head to draw as a heat map, such as L1H2; by default the one with the clearest pattern."""
    top: int = 3
    """Number of queries to list for each head."""
    tokens: int = 60
    """Length of the generated text without a prompt."""
    seed: int = 1
    """Seed of the generated text."""
    out: str = ""
    """Folder for the files; by default the run's attention folder."""
    dtype: Literal["f16", "f32"] = "f16"
    """Dtype of the attention weights in the file."""

    def problems(self) -> list[str]:
        """One line for each invalid value."""
        problems = [
            f"--{name} is {getattr(self, name)}; it must be at least {least}"
            for name, least in (("top", 1), ("tokens", 1), ("seed", 0))
            if getattr(self, name) < least
        ]
        if self.head and not re.fullmatch(r"L\d{1,6}H\d{1,6}", self.head):
            problems.append(f"--head is {self.head!r}; it must be a layer and a head, such as L1H2")
        return problems


def main(argv: list[str]) -> None:
    if argv and argv[0] in COMMANDS:
        run_command(argv[0], argv[1:])
    else:
        check_command(argv)
        show_prompt(parse(AttendOptions, argv, __doc__ or "", positional="run"))


def check_command(argv: list[str]) -> None:
    """Raise `UserError` for a first word that is neither a command nor a path, if it looks like a command."""
    words = [value or "" for option, value in split_options(argv) if not option]
    if words and not Path(words[0]).exists() and (len(words) > 1 or "/" not in words[0]):
        near = difflib.get_close_matches(words[0], COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
        raise UserError(f"{escape_control_chars(words[0])!r} is neither a run folder nor a command; {hint}")
    if len(words) > 1 and words[1] in COMMANDS:
        raise UserError(f"the command comes first: python attend.py {words[1]} {escape_control_chars(words[0])}")


# Commands on what a run recorded


def run_command(name: str, argv: list[str]) -> None:
    """Run a command and print its result.

    Raises:
        UserError: for a mistake of the user; for a failed check, after everything is printed (exit code 4).
    """
    module = import_module(f"inspection.commands.{name}")
    options_class = getattr(module, name.capitalize())
    words = [value for option, value in split_options(argv, ("json", "csv", "value_weighted")) if not option]
    if name == "compare" and len(words) == 2:
        last = len(argv) - 1 - argv[::-1].index(str(words[1]))
        argv = [*argv[:last], f"--other={words[1]}", *argv[last + 1 :]]
    options: Any = parse(options_class, argv, f"{options_class.__doc__}  python attend.py {name} RUN", positional="run")
    result = module.run(options, stdout_terminal(), *([load_model] if name in TAKES_MODEL else []))
    if getattr(options, "json", False):
        print(terminal.to_json(result.data))
    elif getattr(options, "csv", False):
        print(terminal.to_csv(result.rows))
    else:
        print("\n".join(escape_control_chars(line.rstrip()) for line in result.lines))
    if not result.ok:
        raise UserError("some attention files differ from their checkpoints; restore or rewrite them", CHECKPOINT)


def stdout_terminal() -> Terminal:
    return Terminal(sys.stdout.encoding, min(shutil.get_terminal_size((120, 24)).columns, terminal.MAX_WIDTH))


def load_model(folder: Path, step: int) -> LoadedModel | None:
    """The model of a step of a run, or of the newest checkpoint if `step` is negative; None if it is not kept or damaged.

    Args:
        folder: a run folder, or an attention file, whose run is searched.
    """
    from training.checkpoint import open_checkpoint, provenance, read_checkpoint
    from training.device import get_dist_context

    if step < 0:
        checkpoint = open_checkpoint(folder)
    else:
        run = folder if folder.is_dir() else folder.parent.parent
        path = run / "checkpoints" / f"{step:06d}"
        if not path.is_dir():
            return None
        try:
            checkpoint = read_checkpoint(path)
        except UserError as error:
            print(f"skipping a damaged checkpoint: {error}", file=sys.stderr)
            return None
    model, tokenizer = checkpoint.load_model(get_dist_context("fp32")), checkpoint.tokenizer()
    metadata = provenance(model, tokenizer, checkpoint.state)
    return LoadedModel(model, checkpoint.state.step, metadata, tokenizer.token_bytes)


# A prompt


def show_prompt(options: AttendOptions) -> None:
    """Print the attention on one text and write an attention file, a figure and a page."""
    from inspection.activation_cache import run_with_cache_batch
    from training.checkpoint import open_checkpoint
    from training.device import get_dist_context
    from training.text_generation import encode_prompt, generate_tokens

    checkpoint = open_checkpoint(Path(options.run))
    tokenizer = checkpoint.tokenizer()
    tokens = encode_prompt(tokenizer, options.prompt, checkpoint.environment.starts_with_eot)
    model = checkpoint.load_model(get_dist_context("fp32"))
    head = parse_head(options.head, model.config.n_layers, model.config.n_heads) if options.head else None
    if not options.prompt:
        tokens += [token for (token,) in generate_tokens(model, tokenizer, tokens, options.tokens, options.seed)]
    context = model.config.context
    if len(tokens) > context:
        print(f"the text has {len(tokens)} tokens; showing the last {context} (the context)", file=sys.stderr)
        tokens = tokens[-context:]
    cache = run_with_cache_batch(model, [tokens], details=True)[0]
    print_attention(cache, tokenizer, head, options.top)
    print_next_token(model, tokenizer, tokens)
    write_files(options, checkpoint, model, cache)


def print_attention(cache: ActivationCache, tokenizer: Tokenizer, head: tuple[int, int] | None, top: int) -> None:
    """Print the strongest attention of every head, and one head as a heat map."""
    pattern, encoding = cache.pattern.numpy(), sys.stdout.encoding
    token_bytes = [tokenizer.token_bytes(token) for token in cache.tokens.tolist()]
    print(f"Strongest attention of each head (top {top} queries):")
    for line in terminal.strongest_attention(pattern, [token_text(t, encoding, space=" ") for t in token_bytes], top):
        print("  " + line)
    layer, head_index = head or terminal.clearest_head(pattern)
    print(f"\nHead {head_name(layer, head_index)}:")
    texts = [token_text(t, encoding) for t in token_bytes]
    for line in terminal.heat_map(pattern[layer, head_index], texts, stdout_terminal()):
        print("  " + line)
    print(f"\n{terminal.DISCLAIMER}")


def print_next_token(model: GPT, tokenizer: Tokenizer, tokens: list[int]) -> None:
    """Print the most likely next token, its direct logit attribution, and the logit lens."""
    import torch

    from inspection.attribution import direct_logit_attribution, logit_lens

    text, encoding = torch.tensor(tokens), sys.stdout.encoding
    lens = logit_lens(model, text)[:, -1]
    logit = direct_logit_attribution(model, text)
    order = logit.parts.abs().argsort(descending=True).tolist()
    parts = [f"{logit.labels[k]} {logit.parts[k]:+.2f}" for k in order[:MAX_PARTS]]
    if rest := order[MAX_PARTS:]:
        parts.append(f"{len(rest)} others {logit.parts[rest].sum():+.2f}")
    probability = lens[-1].softmax(dim=-1)[logit.token]
    layers = [quote_token(tokenizer.token_bytes(token), encoding) for token in lens.argmax(dim=-1).tolist()]
    print(f"\nNext token: {quote_token(tokenizer.token_bytes(logit.token), encoding)} ({probability:.1%})")
    print(f"  direct logit attribution: {logit.total:.2f} = {', '.join(parts)}")
    print(f"  logit lens, before the first layer and after each: {', '.join(layers)}\n")


def write_files(options: AttendOptions, checkpoint: Checkpoint, model: GPT, cache: ActivationCache) -> None:
    """Write an attention file, a figure of all heads, and a page over the kept checkpoints, named by step and text."""
    from inspection.page_builder import PageRun, write_page
    from training.checkpoint import provenance

    run, step, tokenizer = checkpoint.folder.parent.parent, checkpoint.state.step, checkpoint.tokenizer()
    name = options.prompt or f"generated, seed {options.seed}"
    slug = "-".join(re.findall(r"[a-z0-9]+", name.lower()))[:24].strip("-")
    digest = hashlib.sha256(repr(cache.tokens.tolist()).encode()).hexdigest()[:6]
    path = (Path(options.out) if options.out else run / "attention") / f"{step:06d}-{slug}-{digest}"
    record = AttentionRecord.from_cache(name, cache, tokenizer.token_bytes)
    metadata = {**provenance(model, tokenizer, checkpoint.state), "versions": package_versions()}
    write_attention_file(Path(f"{path}.safetensors"), [record], metadata, dtype=options.dtype)
    labels = [token_text(token) for token in record.token_bytes]
    head_grid(Path(f"{path}.png"), cache.pattern.numpy(), labels, f"step {step}: {name[:60]}")
    files = [*earlier_files(checkpoint, name, cache.tokens.tolist()), AttentionFile([record], metadata)]
    write_page(Path(f"{path}.html"), [PageRun(run.name, files)], None, None, name)
    where = escape_control_chars(path)
    print(f"attention  {where}.safetensors\nfigure     {where}.png\npage       {where}.html")


def earlier_files(checkpoint: Checkpoint, name: str, tokens: list[int]) -> list[AttentionFile]:
    """The attention of a text at each kept checkpoint before this one."""
    from inspection.recorder import capture_texts
    from training.checkpoint import list_checkpoints, provenance, read_checkpoint
    from training.device import get_dist_context

    files = []
    for path in list_checkpoints(checkpoint.folder.parent):
        if int(path.name) >= checkpoint.state.step:
            break
        try:
            earlier = read_checkpoint(path)
        except UserError:
            continue
        model, tokenizer = earlier.load_model(get_dist_context("fp32")), earlier.tokenizer()
        records = capture_texts(model, [(name, tokens)], tokenizer.token_bytes)
        files.append(AttentionFile(records, provenance(model, tokenizer, earlier.state)))
    return files


if __name__ == "__main__":
    run_main(main)
