"""`sample.py --interactive`: type a text, the model continues it; the next line continues both."""

from collections.abc import Callable, Iterator
from typing import Any

from common.errors import UserError

SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "tokens", "seed")
HELP = f"type a text to continue it; /set NAME VALUE ({', '.join(SETTINGS)}), /reset, /quit"


def read_lines() -> Iterator[str]:
    """What is typed, line by line, until the end of the input (Ctrl-D)."""
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def run_interactive(
    parse: Callable[[list[str]], Any],
    start: list[int],
    encode: Callable[[str], list[int]],
    write: Callable[[Any, list[int]], list[int]],
) -> None:
    """Read lines and continue the text so far.

    Args:
        parse: further options, such as `--top_k=5`, to settings; raises UserError.
        start: the tokens that a text begins with.
        write: (settings, tokens so far) to the new tokens, which it prints.
    """
    print(HELP)
    options, settings, history = list[str](), parse([]), list(start)
    for line in read_lines():
        command, *words = line.split(maxsplit=2) or [""]
        try:
            if command in ("/quit", "/exit"):
                return
            if command == "/reset":
                history = list(start)
            elif command == "/set" and words and words[0] in SETTINGS:
                settings = parse([*options, f"--{'='.join(words)}"])
                options.append(f"--{'='.join(words)}")
            elif command.startswith("/"):
                print(HELP)
            else:
                history += encode(line)
                history += write(settings, history) if history else []
        except UserError as error:
            print(f"error: {error}")
