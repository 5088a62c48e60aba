"""From a command line to a dataclass, or to one line for each mistake.

Every option and value is checked, so that all problems are reported at once, with the nearest right name; tyro prints
the help. Imports no torch: a mistake is answered within a fraction of a second.
"""

import contextlib
import dataclasses
import difflib
import os
import re
import typing
from collections.abc import Collection, Iterator, Sequence
from typing import Any, TypeVar

import tyro

from common.errors import CONFIG, UserError

ALIASES = {
    **dict.fromkeys(("block_size", "n_ctx", "n_positions", "max_position_embeddings"), "model.context"),
    **dict.fromkeys(("n_embd", "hidden_size"), "model.d_model"),
    "num_attention_heads": "model.n_heads",
    "head_dim": "model.d_head",
    "intermediate_size": "model.d_mlp",
    "tie_word_embeddings": "model.tie_embeddings",
    "output_dir": "run.dir",
    "init_from": "model.init",
    "resume_from_checkpoint": "run.resume",
    "learning_rate": "optim.lr",
    "max_grad_norm": "optim.grad_clip",
    "gradient_accumulation_steps": "train.micro_batch_size",
    **dict.fromkeys(("eval_interval", "eval_steps"), "train.eval_every"),
    **dict.fromkeys(("log_interval", "logging_steps"), "log.every"),
    "start": "prompt",
}
"""Options of nanoGPT and Hugging Face, by their last part, whose counterpart here is not the most similar name."""
PATHS = (
    *("run.dir", "run.resume", "model.init", "data.tokenizer", "data.source", "data.val", "log.prompts", "prompts"),
    *("out", "against", "attend"),
)
OPTION = re.compile(r"--[^\W\d][\w.-]*(=|\Z)")  # unlike `-- said the bird`, which is a value.
TEXTS = tuple[str, ...]  # the type of an option that may be given several times
BOOLEANS = ("True", "true", "False", "false")
S = TypeVar("S")


def parse(settings: type[S], args: list[str], description: str, positional: Sequence[str] = ()) -> S:
    """The settings that `args` describe.

    Args:
        settings: a dataclass, perhaps of dataclasses, whose method `problems()` checks the values.
        positional: the fields that are given without an option name, in order; the first is required.

    Raises:
        UserError: with a line for each problem (exit code 2).
        SystemExit: after `--help`.
    """
    types = {name: kind for name, kind in option_types(settings).items() if name not in positional[:1]}
    values: dict[str, Any] = {}
    wrong: list[str] = []
    words: list[str] = []
    pairs = list(split_options(args, [name for name, kind in types.items() if kind is bool]))
    if "--help" in args or ("", "-h") in pairs:
        tyro.cli(settings, args=["--help"], description=description, config=(tyro.conf.FlagConversionOff,))
    for option, value in pairs:
        try:
            if option:
                name, converted = field_name(option), _convert(option, value, types)
                values[name] = (*values.get(name, ()), converted) if types[name] == TEXTS else converted
            elif free := [name for name in positional if name not in values]:
                values[free[0]] = value
            else:
                words.append(value or "")
        except ValueError as problem:
            wrong.append(str(problem))
    if words:
        wrong.append(_describe_unexpected(words, types))
    for name in positional[:1]:
        if name not in values:
            wrong.append(f"{name} is missing; --help shows the usage")
            values[name] = ""
    sections: dict[str, dict[str, Any]] = {"": {}}
    for option, value in values.items():
        section, _, name = option.rpartition(".")
        sections.setdefault(section, {})[name] = value
    own, kinds = sections.pop(""), typing.get_type_hints(settings)
    parsed: Any = settings(**own, **{section: kinds[section](**chosen) for section, chosen in sections.items()})
    if wrong := wrong + parsed.problems():
        raise UserError(wrong, CONFIG)
    return parsed  # type: ignore[no-any-return]


def option_types(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Every option of a (nested) dataclass, such as `model.n_layers`, with the type of its value."""
    types: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(settings).items():
        types |= option_types(kind, f"{name}.") if dataclasses.is_dataclass(kind) else {prefix + name: kind}
    return types


def split_options(args: list[str], flags: Collection[str] = ()) -> Iterator[tuple[str, str | None]]:
    """(option, value) pairs: the option with its dashes, or '' for a word on its own; `flags` and options at the end of
    `args` or before another option have no value, None; of flags only `True` and `False` are values."""
    rest = list(args)
    while rest:
        word = rest.pop(0)
        if not OPTION.match(word):
            yield "", word
        elif "=" in word:
            option, value = word.split("=", 1)
            yield option, value
        else:
            is_flag = field_name(word) in flags and (not rest or rest[0] not in BOOLEANS)
            alone = is_flag or not rest or bool(OPTION.match(rest[0]))
            yield word, None if alone else rest.pop(0)


def _describe_unexpected(words: list[str], types: dict[str, Any]) -> str:
    hint = f"did you mean --{words[0]}? " if field_name(words[0].partition("=")[0]) in types else ""
    hint = f"did you mean ./{words[0]}? " if words[0].startswith("-") and os.path.exists(words[0]) else hint
    hint += "options begin with two dashes, a config file comes first, patterns and texts with spaces need quotes"
    return f"unexpected {' '.join(words[:3])!r}; {hint}"


def _convert(option: str, value: str | None, types: dict[str, Any]) -> Any:
    """The value of an option. Raises ValueError that says in one line what is wrong with its name or value."""
    name = field_name(option)
    if name not in types:
        raise ValueError(f"unknown option {option}; {_suggestion(name, types)}")
    kind, choices = (str, ()) if types[name] == TEXTS else (types[name], typing.get_args(types[name]))
    numbers = {int: "a whole number", float: "a number"}
    expected = f"one of {', '.join(choices)}" if choices else numbers.get(kind, "text")
    if kind is bool:
        if value is None or value in BOOLEANS:
            return value in (None, "True", "true")
        expected = "True or False"
    if value is None:
        dashes = f"; if it begins with dashes, write {option}=--..." if kind is str else ""
        raise ValueError(f"{option} needs a value: {expected}{dashes}")
    if name in PATHS and re.match(r"\w[\w+.-]+://", value):
        raise ValueError(f"{option} is {value}; give a local path")
    if kind is str or value in choices:
        return os.path.expanduser(value) if name in PATHS and not name.startswith("data.") else value
    if kind in numbers:
        with contextlib.suppress(ValueError):
            return kind(value)
    nearest = difflib.get_close_matches(value, choices, n=1)
    raise ValueError(f"{option} is {value!r}; it takes {expected}" + "".join(f"; did you mean {n}?" for n in nearest))


def _suggestion(name: str, types: dict[str, Any]) -> str:
    """What to type instead of an unknown option: the alias, the option with that last part, or the nearest name."""
    last = name.rsplit(".", 1)[-1]
    candidates = [ALIASES.get(last, ""), *(key for key in types if key.rsplit(".", 1)[-1] == last)]
    candidates += difflib.get_close_matches(name, types, n=1)
    nearest = next((key for key in candidates if key in types), None)
    return f"did you mean --{nearest}?" if nearest else "--help lists the options"


def field_name(option: str) -> str:
    """`--top-k` as the field `top_k`."""
    return option.removeprefix("--").replace("-", "_")
