"""Parses stories: every derivation of a text by the grammar, found by exhaustive search."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from data.story_grammar import Chain, Choose, Draw, Node, Pick, Story, Text, generate


class Partial(NamedTuple):
    """A derivation of the text up to `end`."""

    end: int
    words: Mapping[str, str]
    rows: Mapping[str, int]
    choices: tuple[int, ...]


def parse_all(node: Node, text: str) -> list[Story]:
    """The story of every derivation of `text`."""
    derivations = [partial for partial in _parse(node, text, Partial(0, {}, {}, ())) if partial.end == len(text)]
    return [generate(node, _replay(partial.choices)) for partial in derivations]


def _replay(choices: tuple[int, ...]) -> Pick:
    remaining = iter(choices)
    return lambda cumulative: next(remaining)


def _parse(node: Node, text: str, partial: Partial) -> Iterator[Partial]:
    end, words, rows, choices = partial
    if isinstance(node, Text):
        expected = "".join(literal + (words[name] if name else "") for literal, name in node.pieces)
        if text.startswith(expected, end):
            yield partial._replace(end=end + len(expected))
    elif isinstance(node, Draw):
        names = node.pool.names(node.variable)
        for option, row in enumerate(node.options(rows)):
            drawn = dict(zip(names, node.pool.rows[row], strict=True))
            yield Partial(end, {**words, **drawn}, {**rows, node.variable: row}, (*choices, option))
    elif isinstance(node, Choose):
        for option, (_, inner) in enumerate(node.options):
            yield from _parse(inner, text, partial._replace(choices=(*choices, option)))
    elif isinstance(node, Chain):
        partials = [partial]
        for part in node.parts:
            partials = [longer for shorter in partials for longer in _parse(part, text, shorter)]
        yield from partials
    else:
        yield partial
