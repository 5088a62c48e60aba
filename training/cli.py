"""From a command line to a dataclass, or to one clear line for each mistake.

tyro judges every value. What is added here: all problems are reported at once, each with the nearest right name, and
settings read from a file take the same way as those that were typed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import typing
from collections.abc import Collection, Iterator
from typing import Any, Protocol, TypeVar

import tyro

from common.errors import CONFIG, UserError, escape_control_chars


class Settings(Protocol):
    """A dataclass that can judge its own values."""

    def problems(self) -> list[str]: ...


S = TypeVar("S", bound=Settings)


def option_types(settings: type, prefix: str = "") -> dict[str, Any]:
    """Every option of a (nested) dataclass, such as `model.n_layers`, with the type of its value."""
    found: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(settings).items():
        if dataclasses.is_dataclass(kind):
            found |= option_types(typing.cast(type, kind), f"{prefix}{name}.")
        else:
            found[prefix + name] = kind
    return found


def expected(kind: Any) -> str:
    """The kind of value an option takes, in words."""
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    return {int: "a whole number", float: "a number", bool: "no value"}.get(kind, "a value")


def field_name(option: str) -> str:
    """`--top-k` as the field `top_k`."""
    return option.removeprefix("--").replace("-", "_")


def split_options(args: list[str], switches: Collection[str] = ()) -> Iterator[tuple[str, str | None]]:
    """(option, value) pairs: the option with its dashes, or '' for a word on its own; a missing value is None.

    Args:
        switches: fields that are turned on by their option alone: the word after it is not its value.
    """
    rest = list(args)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            yield "", word
        elif "=" in word:
            option, value = word.split("=", 1)
            yield option, value
        else:
            alone = field_name(word) in switches or not rest or rest[0].startswith("--")
            yield word, None if alone else rest.pop(0)


def accepts(settings: type[S], args: list[str]) -> S | None:
    """What tyro makes of `args`, or None where it refuses them."""
    silent = io.StringIO()
    try:
        with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
            return tyro.cli(settings, args=args)
    except SystemExit:
        return None


def judge(option: str, value: str | None, known: dict[str, Any]) -> str | None:
    """What is wrong with the name of an option, or with a value whose choices are known; None when nothing is."""
    name = field_name(option)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5) or [
            key for key in known if key.rsplit(".", 1)[-1] == name
        ]
        return f"unknown option {escape_control_chars(option)}" + (
            f"; did you mean --{near[0]}?" if near else "; --help lists the options"
        )
    if value is None:
        return None if known[name] is bool else f"{option} needs a value: {expected(known[name])}"
    if typing.get_origin(known[name]) is typing.Literal and value not in typing.get_args(known[name]):
        near = difflib.get_close_matches(value, typing.get_args(known[name]), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{option} is {value!r}; it takes {expected(known[name])}{hint}"
    return None


def refused(settings: type[S], pairs: list[tuple[str, str | None]], words: list[str]) -> list[tuple[str, str | None]]:
    """The options that tyro does not take, found by halves: a question costs it a hundredth of a second, however long.

    Args:
        words: what has to stand on the line besides, for tyro to accept it.
    """
    if not pairs or accepts(settings, [*words, *(written(*pair) for pair in pairs)]) is not None:
        return []
    if len(pairs) == 1:
        return pairs
    middle = len(pairs) // 2
    return refused(settings, pairs[:middle], words) + refused(settings, pairs[middle:], words)


def parse(settings: type[S], args: list[str], description: str, positional: str | None = None) -> S:
    """The settings that `args` describe.

    Args:
        settings: a dataclass, perhaps of dataclasses, with a method `problems()`.
        positional: the one field that is given without an option's name.

    Raises:
        UserError: with a line for each problem (exit code 2).
        SystemExit: after `--help`.
    """
    if "--help" in args or "-h" in args:
        tyro.cli(settings, args=["--help"], description=description)
    known = {name: kind for name, kind in option_types(settings).items() if name != positional}
    pairs = list(split_options(args, {name for name, kind in known.items() if kind is bool}))
    words = [value for option, value in pairs if not option]
    wrong: list[str] = []
    result = None
    if len(words) == bool(positional) and all(not option or field_name(option) in known for option, _ in pairs):
        result = accepts(settings, [written(*pair) for pair in pairs])
    if result is None:
        wrong, good = mistakes(settings, pairs, known, positional)
        result = accepts(settings, good)
        if result is None and not wrong:
            wrong.append(f"these options do not go together: {' '.join(good)}")
    wrong += result.problems() if result is not None else []
    if wrong:
        raise UserError("\n".join(wrong), CONFIG)
    assert result is not None
    return result


def written(option: str, value: str | None) -> str:
    """An option and its value, or a word, as one argument."""
    return str(value) if not option else option if value is None else f"{option}={value}"


def mistakes(
    settings: type[S], pairs: list[tuple[str, str | None]], known: dict[str, Any], positional: str | None
) -> tuple[list[str], list[str]]:
    """A line for each problem, and the arguments that have none."""
    plausible = [pair for pair in pairs if pair[0] and judge(*pair, known) is None]
    bad = refused(settings, plausible, ["."] if positional else [])
    wrong: list[str] = []
    good: list[str] = []
    words = 0
    for option, value in pairs:
        if (option, value) in bad:
            problem: str | None = f"{option} is {value!r}; it takes {expected(known[field_name(option)])}"
        elif option:
            problem = judge(option, value, known)
        else:
            words += 1
            problem = None if positional and words == 1 else f"unexpected {value!r}; options begin with two dashes"
        if problem:
            wrong.append(problem)
        else:
            good.append(written(option, value))
    if positional and not words:
        wrong.append(f"{positional} is missing; --help shows the usage")
        good.insert(0, ".")
    return wrong, good
