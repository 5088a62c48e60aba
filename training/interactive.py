"""`sample.py --interactive`: type a text, the model continues it; the next line continues both."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from common.errors import UserError

SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "tokens", "seed")
HELP = f"type a text to continue it; /set NAME VALUE ({', '.join(SETTINGS)}), /reset, /quit"


def read_lines(read: Callable[[str], str] = input) -> Iterator[str]:
    """What is typed, line by line, until the end of the input (Ctrl-D)."""
    while True:
        try:
            yield read("> ")
        except EOFError:
            print()
            return


def run_interactive(
    config: Any, start: list[int], encode: Callable[[str], list[int]], write: Callable[..., list[int]]
) -> None:
    """Read lines and continue the text so far.

    Args:
        config: the settings of `sample.py`, which `/set` replaces.
        start: the tokens that a text begins with.
        encode: a line as tokens.
        write: (config, tokens so far) -> the new tokens; prints them.
    """
    print(HELP)
    history = list(start)
    for line in read_lines():
        command, *words = line.split()[:3] or [""]
        if command in ("/quit", "/exit"):
            return
        try:
            if command == "/reset":
                history = list(start)
            elif command == "/set":
                config = change(config, *words)
            elif command.startswith("/"):
                print(HELP)
            else:
                history += encode(line)
                history += write(config, history) if history else []
        except UserError as error:
            print(f"error: {error}")


def change(config: Any, name: str = "", value: str = "") -> Any:
    """The settings with one of them replaced. Raises UserError (2) for a name or value that does not fit."""
    if name not in SETTINGS:
        raise UserError(f"/set {name} VALUE: the settings are {', '.join(SETTINGS)}")
    try:
        config = dataclasses.replace(config, **{name: type(getattr(config, name))(value)})
    except ValueError as error:
        raise UserError(f"/set {name} {value}: it takes a number") from error
    if problems := config.problems():
        raise UserError("; ".join(problems))
    return config
