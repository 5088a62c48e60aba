"""A small language of story templates, and what can be done with one: tell it, read it back, measure it.

`stories.py` writes its story once, as a tree of the nodes below; nothing here knows what the story is about.

* **Telling** walks the tree, asks `pick` at every choice, and collects the text, its log-probability and
  labels.
* **Reading** finds every way in which the tree could have told a given text, all of them side by side.
* **Measuring** adds up the entropy by the chain rule, H(X, Y) = H(X) + H(Y | X). This is exact because the
  probabilities of a choice never depend on what was chosen before, only which words they fall on does.

A way of telling is a tuple of option numbers. If every text has one way only, the probability of the text is
the product of the probabilities of its choices.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TypeAlias

from data.telling import Label, Page, Pick, Pool, Reading, Split, Story, Telling


@dataclass(frozen=True)
class Text:
    """Writes fixed text and the words of variables: pairs of (literal, variable or '')."""

    pieces: tuple[tuple[str, str], ...]

    def tell(self, telling: Telling) -> None:
        out, end = telling.text, telling.length
        for literal, variable in self.pieces:
            out.append(literal)
            end += len(literal)
            if variable:
                word = telling.words[variable]
                out.append(word)
                start = end - literal.endswith(" ")
                end += len(word)
                telling.mentions.setdefault(variable, []).append((start, end))
                owner = variable.partition(".")[0]
                if literal == " the " and owner != variable:  # `Mia the fox` is one mention of Mia
                    telling.mentions[owner][-1] = (telling.mentions[owner][-1][0], end)
        telling.length = end

    def read(self, page: Page, so_far: Reading) -> list[Reading]:
        end = so_far.end
        for literal, variable in self.pieces:
            for expected in (literal, so_far.words[variable] if variable else ""):
                if not page.text.startswith(expected, end):
                    page.misses.append((end, expected))
                    return []
                end += len(expected)
        return [Reading(end, so_far.words, so_far.rows, so_far.choices)]

    def entropy(self) -> float:
        return 0.0


@dataclass(frozen=True)
class Draw:
    """Draws a row of `pool` for `variable`, other than the row drawn for `unlike`; writes nothing.

    With `partners`, the row completes a combination. It is held out when the row numbers of the partners and
    its own add up to a multiple of the pool's size: exactly one row for any choice of the partners (a Latin
    square). A telling for the split `val` takes that row, one for `train` takes one of the others.
    """

    variable: str
    pool: Pool
    unlike: str = ""
    partners: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert not (self.unlike and self.partners), "the two restrictions cannot be combined"

    def tell(self, telling: Telling) -> None:
        rows = self._rows(telling.rows)
        held_out = self._held_out(telling.rows)
        if self.partners and telling.split:
            rows = [row for row in rows if (row == held_out) == (telling.split == "val")]
        row = rows[telling.pick(_EVEN[len(rows)])]
        telling.held_out |= row == held_out
        telling.log_prob -= self.entropy()
        telling.rows[self.variable] = row
        if self.pool.noun:
            telling.nouns.add(self.variable)
        telling.words.update(zip(self.pool.names(self.variable), self.pool.rows[row], strict=True))

    def read(self, page: Page, so_far: Reading) -> list[Reading]:
        names = self.pool.names(self.variable)
        return [
            Reading(
                so_far.end,
                {**so_far.words, **dict(zip(names, self.pool.rows[row], strict=True))},
                {**so_far.rows, self.variable: row},
                (*so_far.choices, option),
            )
            for option, row in enumerate(self._rows(so_far.rows))
        ]

    def entropy(self) -> float:
        return math.log(len(self.pool.others[0] if self.unlike else self.pool))

    def _rows(self, rows: Mapping[str, int]) -> Sequence[int]:
        return self.pool.others[rows[self.unlike]] if self.unlike else range(len(self.pool))

    def _held_out(self, rows: Mapping[str, int]) -> int:
        return -sum(rows[partner] for partner in self.partners) % len(self.pool) if self.partners else -1


_EVEN = tuple(tuple(option / n for option in range(1, n)) for n in range(64))
"""Cumulative probabilities of n equally likely options."""


@dataclass(frozen=True)
class Choose:
    """Goes one of several ways, each with its own probability."""

    options: tuple[tuple[float, Node], ...]
    edges: tuple[float, ...] = field(init=False)

    def __post_init__(self) -> None:
        assert math.isclose(sum(p for p, _ in self.options), 1.0), "probabilities must add up to 1"
        edges = tuple(sum(p for p, _ in self.options[: i + 1]) for i in range(len(self.options) - 1))
        object.__setattr__(self, "edges", edges)

    def tell(self, telling: Telling) -> None:
        probability, node = self.options[telling.pick(self.edges)]
        telling.log_prob += math.log(probability)
        node.tell(telling)

    def read(self, page: Page, so_far: Reading) -> list[Reading]:
        end, words, rows, choices = so_far
        return [
            reading
            for option, (_, node) in enumerate(self.options)
            for reading in node.read(page, Reading(end, words, rows, (*choices, option)))
        ]

    def entropy(self) -> float:
        return sum(p * (node.entropy() - math.log(p)) for p, node in self.options)


@dataclass(frozen=True)
class Chain:
    """Several nodes, one after the other."""

    parts: tuple[Node, ...]

    def tell(self, telling: Telling) -> None:
        for part in self.parts:
            part.tell(telling)

    def read(self, page: Page, so_far: Reading) -> list[Reading]:
        readings = [so_far]
        for part in self.parts:
            readings = [longer for reading in readings for longer in part.read(page, reading)]
        return readings

    def entropy(self) -> float:
        return sum(part.entropy() for part in self.parts)


@dataclass(frozen=True)
class Note:
    """Labels the latest mention of `answer` as known from what was said of `evidence`; writes nothing."""

    kind: str
    answer: str
    evidence: str
    wrong: str
    """The variable whose word is the wrong candidate."""

    def tell(self, telling: Telling) -> None:
        answer = telling.mentions[self.answer][-1]
        evidence = tuple(span for span in telling.mentions[self.evidence] if span != answer)
        nouns = sorted(span for noun in telling.nouns for span in telling.mentions.get(noun, ()) if span < answer)
        space = " " * (answer[1] - answer[0] - len(telling.words[self.answer]))
        telling.labels.append(Label(self.kind, answer, evidence, space + telling.words[self.wrong], tuple(nouns)))

    def read(self, page: Page, so_far: Reading) -> list[Reading]:
        return [so_far]

    def entropy(self) -> float:
        return 0.0


Node: TypeAlias = Text | Draw | Choose | Chain | Note

_SLOT = re.compile(r"<([\w.]+)(?::(\w+)(?:!([\w.]+))?)?>")


def line(template: str, pools: Mapping[str, Pool]) -> Chain:
    """A template as nodes. `<x>` writes x, `<x:pool>` draws it first, `<x:pool!y>` draws one other than y."""
    parts: list[Node] = []
    pieces: list[tuple[str, str]] = []
    position = 0
    for slot in _SLOT.finditer(template):
        variable, pool, unlike = slot.groups()
        if pool:
            parts += [Text(tuple(pieces)), Draw(variable, pools[pool], unlike or "")]
            pieces = []
        pieces.append((template[position : slot.start()], variable))
        position = slot.end()
    return Chain((*parts, Text((*pieces, (template[position:], "")))))


def evenly(*nodes: Node) -> Choose:
    """Each of the nodes with the same probability."""
    return Choose(tuple((1 / len(nodes), node) for node in nodes))


def tell(node: Node, pick: Pick, split: Split | None = None) -> Story:
    """The story that the choices of `pick` make; without a split, any story of the full grammar."""
    telling = Telling(pick, split)
    node.tell(telling)
    return telling.story()


def read(node: Node, text: str) -> list[Story]:
    """Every way to tell `text`, searched to the end.

    Raises:
        ValueError: if there is none; it names the first character that no telling could have written there.
    """
    page = Page(text, [])
    readings = node.read(page, Reading(0, {}, {}, ()))
    whole = [reading for reading in readings if reading.end == len(text)]
    if not whole:
        page.misses.extend((reading.end, "") for reading in readings)
        raise ValueError(_complaint(page))
    return [tell(node, _replay(reading.choices)) for reading in whole]


def _replay(choices: tuple[int, ...]) -> Pick:
    remaining = iter(choices)
    return lambda edges: next(remaining)


def _complaint(page: Page) -> str:
    furthest, expected = 0, set[str]()
    for start, words in page.misses:
        same = zip(words, page.text[start:], strict=False)
        at = start + sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], same))
        if at > furthest:
            furthest, expected = at, set()
        if at == furthest:
            expected.add(repr(words[at - start :]) if words else "the end of the story")
    found = repr(page.text[furthest : furthest + 12]) if furthest < len(page.text) else "the end of the text"
    return f"no such story: at character {furthest}: expected {' or '.join(sorted(expected))}, found {found}"
