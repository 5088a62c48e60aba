"""See what a trained model reads:  python attend.py [COMMAND] RUN [--option value ...]

Without a command one text is looked at: `python attend.py RUN [--prompt TEXT]`. The commands read what a run has kept
at each of its evaluations, most of them without loading torch:

    summary   what the heads read and whether it matters        compare   two steps, or two runs, head by head
    heads     every score of every head                         verify    are the attention files what they say?
    token     what one token reads in every head                page      (re)build attention.html
    timeline  when in training each head learned what it does   plot      pictures, PNG or SVG
    ablate    take every head away again, and write anew what that shows
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

from common.errors import CHECKPOINT, DISK_OR_MEMORY, UserError, escape_control_chars, run_main
from training.cli import parse, split_options
from training.run_dir import check_links

if TYPE_CHECKING:
    from data.tokenizer import Tokenizer
    from inspection.activation_cache import ActivationCache
    from inspection.commands.verify import Origin
    from inspection.terminal import Terminal
    from model.gpt import GPT
    from training.checkpoint import Checkpoint

COMMANDS = ("summary", "heads", "token", "timeline", "compare", "verify", "page", "plot", "ablate")
"""Each a module of inspection/commands with its options, a dataclass of the same name, and `run`."""
WRITING = ("page", "plot", "ablate")
"""Those that write into the run folder."""
MOST_PARTS = 6
"""Parts of a logit that are named; the others are added up."""


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
    if argv and argv[0] in COMMANDS:
        command(argv[0], argv[1:])
        return
    refuse_near_command(argv)
    look(parse(AttendConfig, argv, __doc__ or "", positional="run"))


def refuse_near_command(argv: list[str]) -> None:
    """Raise `UserError` where a command was meant: mistyped, or behind the run."""
    words = [value or "" for option, value in split_options(argv) if not option]
    behind = [word for word in words[1:] if word in COMMANDS]
    if behind:
        raise UserError(f"the command comes first: python attend.py {behind[0]} {escape_control_chars(words[0])}")
    if words and not Path(words[0]).exists():
        near = difflib.get_close_matches(words[0], COMMANDS, n=1)
        if near or len(words) > 1:
            hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
            raise UserError(f"{escape_control_chars(words[0])!r} is neither a folder nor a command; {hint}")


def command(name: str, argv: list[str]) -> None:
    """Run one of the commands on what a run has kept, and print what it found.

    Raises:
        UserError: for what the user can mend; if a check fails, once all of them are told (exit code 4).
    """
    module = import_module(f"inspection.commands.{name}")
    settings = getattr(module, name.capitalize())
    words = [value for option, value in split_options(argv, ("json", "csv", "value_weighted")) if not option]
    if name == "compare" and len(words) == 2:
        at = len(argv) - 1 - argv[::-1].index(str(words[1]))
        argv = [*argv[:at], f"--other={words[1]}", *argv[at + 1 :]]
    config: Any = parse(settings, argv, f"{settings.__doc__}  python attend.py {name} RUN", positional="run")
    from inspection.run_reader import run_of
    from inspection.terminal import to_csv, to_json

    if name in WRITING and Path(config.run).is_dir():
        check_links(run_of(Path(config.run)))
    extra = {"origin": origin} if name in ("verify", "evidence") else {}
    result = module.run(config, terminal(), **extra)
    if getattr(config, "json", False):
        print(to_json(result.data))
    elif getattr(config, "csv", False):
        print(to_csv(result.records))
    else:
        print("\n".join(escape_control_chars(line.rstrip()) for line in result.lines))
    if not result.ok:
        raise UserError("the attention files do not hold what they say; write them anew, or restore them", CHECKPOINT)


def terminal() -> Terminal:
    """What the standard output can show."""
    from inspection.terminal import WIDEST, Terminal

    return Terminal(sys.stdout.encoding, min(shutil.get_terminal_size((120, 24)).columns, WIDEST))


def origin(folder: Path, step: int) -> Origin | None:
    """The model and tokenizer of a run's step, if its checkpoint is kept and whole; of the newest for a step below 0.

    Args:
        folder: of the run; of a single attention file, the file, which may lie in one.
    """
    from inspection.commands.verify import Origin
    from training.checkpoint import open_checkpoint, read_checkpoint, verify_checkpoint
    from training.device import get_dist_context
    from training.provenance import provenance

    if step < 0:
        saved = open_checkpoint(folder)
    else:
        near = [base / "checkpoints" / f"{step:06d}" for base in (folder, folder.parent, folder.parent.parent)]
        kept = [path for path in near[: 1 if folder.is_dir() else 3] if path.is_dir()]
        if not kept:
            return None
        if fault := verify_checkpoint(kept[0]):
            print(
                f"passing over the damaged checkpoint {escape_control_chars(kept[0])}: {escape_control_chars(fault)}",
                file=sys.stderr,
            )
            return None
        saved = read_checkpoint(kept[0])
    model, tokenizer = saved.load_model(get_dist_context("fp32")), saved.tokenizer()
    return Origin(model, saved.state.step, provenance(model, tokenizer, saved.state), tokenizer.token_bytes)


def look(config: AttendConfig) -> None:
    """Read one text, say what the heads read in it, and write weights, picture and page."""
    from inspection.activation_cache import run_with_cache_batch
    from inspection.terminal import token_text
    from training.checkpoint import open_checkpoint
    from training.device import get_dist_context
    from training.text_generation import check_prompt, encode_prompt, generate_tokens

    check_prompt(config.prompt)
    saved = open_checkpoint(Path(config.run))
    tokenizer = saved.tokenizer()
    tokens = encode_prompt(tokenizer, config.prompt, saved.starts_with_eot)
    model = saved.load_model(get_dist_context("fp32"))
    chosen = find_head(config.head, model.config.n_layers, model.config.n_heads)
    if not config.prompt:
        tokens = generate_tokens(model, tokenizer, tokens, config.tokens, config.seed)
    if len(tokens) > model.config.context:
        print(
            f"the text has {len(tokens)} tokens; the last {model.config.context}, a whole context, are looked at",
            file=sys.stderr,
        )
        tokens = tokens[-model.config.context :]
    seen = run_with_cache_batch(model, [tokens])[0]
    encoding = sys.stdout.encoding
    quoted = [token_text(tokenizer.token_bytes(t), encoding, space=" ") for t in tokens]
    labels = [token_text(tokenizer.token_bytes(t), encoding) for t in tokens]
    tell(seen, quoted, labels, chosen, config.top)
    tell_next(model, tokenizer, tokens)
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


def tell(seen: ActivationCache, quoted: list[str], labels: list[str], chosen: tuple[int, int] | None, top: int) -> None:
    """Print the strongest readings of every head, and one head as a map of characters."""
    from inspection.terminal import DISCLAIMER, clearest_head, head_name, heat_map, strongest

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


def tell_next(model: GPT, tokenizer: Tokenizer, tokens: list[int]) -> None:
    """Print the likeliest next token, what its logit is the sum of, and what would have come after each layer."""
    import torch

    from inspection.attribution import direct_logit_attribution, logit_lens
    from inspection.terminal import token_text

    def quoted(token: int) -> str:
        return '"' + token_text(tokenizer.token_bytes(token), sys.stdout.encoding, space=" ") + '"'

    text = torch.tensor(tokens)
    lens = logit_lens(model, text)[:, -1]
    found = direct_logit_attribution(model, text)
    order = found.parts.abs().argsort(descending=True).tolist()
    parts = [f"{found.labels[k]} {found.parts[k]:+.2f}" for k in order[:MOST_PARTS]]
    if rest := order[MOST_PARTS:]:
        parts.append(f"{len(rest)} others {found.parts[rest].sum():+.2f}")
    chance = lens[-1].softmax(dim=-1)[found.token]
    print(f"\nNext comes {quoted(found.token)} ({chance:.1%}). Its logit {found.total:.2f} is the sum of")
    print("  " + ", ".join(parts))
    print("  read off before the first layer and after each: " + ", ".join(map(quoted, lens.argmax(dim=-1).tolist())))
    print()


def write_files(
    config: AttendConfig, saved: Checkpoint, model: GPT, tokenizer: Tokenizer, tokens: list[int], seen: ActivationCache
) -> None:
    """Write weights, a picture of all heads, and a page over the kept checkpoints, named after step and text."""
    from inspection.plots import head_grid
    from inspection.recorder import write_dump
    from inspection.terminal import token_text
    from training.provenance import provenance

    if not config.out and saved.folder.parent.name == "checkpoints":
        check_links(saved.folder.parent.parent)
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
        write_own_page(folder / f"{stem}.html", saved, text, tokens)
    except OSError as error:
        raise UserError(
            f"cannot write into {folder}: {error.strerror}; choose another with --out", DISK_OR_MEMORY
        ) from error
    where = escape_control_chars(folder / stem)
    print(f"weights  {where}.safetensors\npicture  {where}.png\npage     {where}.html")


def write_own_page(path: Path, newest: Checkpoint, text: str, tokens: list[int]) -> None:
    """A page of one text over the checkpoints that are kept, up to the one that was opened."""
    import tempfile

    from inspection import attention_file as dump
    from inspection import record
    from inspection.activation_cache import run_with_cache_batch
    from inspection.page_builder import PageRun, write_page
    from training.checkpoint import list_checkpoints, read_checkpoint, verify_checkpoint
    from training.device import get_dist_context
    from training.provenance import provenance

    machine, seen = get_dist_context("fp32"), []
    folders = [
        f
        for f in list_checkpoints(newest.folder.parent)
        if int(f.name) < newest.state.step and verify_checkpoint(f) is None
    ]
    for saved in [*map(read_checkpoint, folders), newest]:
        model, tokenizer = saved.load_model(machine), saved.tokenizer()
        capture = run_with_cache_batch(model, [tokens], details=saved is newest)[0]
        rows = [(text, capture, [tokenizer.token_bytes(token) for token in tokens])]
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "dump.safetensors"
            record.write_attention_file(
                file, rows, provenance(model, tokenizer, saved.state), "f16", None, tokenizer.token_bytes, "f32"
            )
            seen.append(dump.read_attention_file(file))
    write_page(path, [PageRun(newest.folder.parent.parent.name, seen)], None, None, text)


if __name__ == "__main__":
    run_main(main)
