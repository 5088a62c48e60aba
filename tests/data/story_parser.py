"""Every derivation of a grammar, or of one text, found by following all choices."""

from collections.abc import Callable, Iterator, Mapping

from data.story_grammar import Pool, Story, Writer

Grammar = Callable[[Writer], None]


class _Differs(Exception):
    """The story does not begin like the text."""


def derivations(grammar: Grammar, pools: Mapping[str, Pool], text: str | None = None) -> Iterator[Story]:
    """The stories of a grammar; with `text`, those with this text."""
    open_choices: list[list[int]] = [[]]
    while open_choices:
        writer = Writer(pools, lambda cumulative: 0)
        writer.pick = _follow(open_choices.pop(), open_choices, writer, text)
        try:
            grammar(writer)
        except _Differs:
            continue
        if text in (None, writer.text):
            yield writer.story()


def _follow(
    options: list[int], open_choices: list[list[int]], writer: Writer, text: str | None
) -> Callable[[tuple[float, ...]], int]:
    """Picks `options`, then the first of every choice, and adds the others to `open_choices`."""
    picked: list[int] = []

    def pick(cumulative: tuple[float, ...]) -> int:
        if text is not None and not text.startswith(writer.text):
            raise _Differs
        if len(picked) == len(options):
            open_choices.extend([*picked, option] for option in range(1, len(cumulative) + 1))
            options.append(0)
        picked.append(options[len(picked)])
        return picked[-1]

    return pick
