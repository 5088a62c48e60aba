"""A small language of story templates: generate a story, and compute the entropy of the grammar.

`stories.py` writes its grammar as a tree of the nodes below; nothing here depends on what the stories are about.

* `generate` walks the tree, calls `pick` at every choice, and collects the text, its log-probability and labels.
* `entropy` adds up by the chain rule, H(X, Y) = H(X) + H(Y | X). This is exact because the probabilities of a choice
  never depend on earlier choices; only the words that they select do.

A story is determined by its option numbers. If every text has one derivation only, the probability of the text is the
product of the probabilities of its choices.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal, TypeAlias

CharSpan: TypeAlias = tuple[int, int]
Split: TypeAlias = Literal["train", "val"]
Pick: TypeAlias = Callable[[tuple[float, ...]], int]
"""Gets the cumulative probabilities of all options but the last, returns the number of the selected one."""


@dataclass(frozen=True)
class Label:
    """A word of a story that is determined by earlier words.

    Spans are character offsets `(start, end)` into the text; a leading space belongs to the word.
    """

    kind: str
    answer: CharSpan
    """The word that is determined by the text before it."""
    antecedents: tuple[CharSpan, ...]
    """Every earlier mention of the word that determines it, in order."""
    wrong: str
    """The wrong candidate in place of the answer, including its leading space."""
    nouns: tuple[CharSpan, ...]
    """Every mention of a noun before the answer, in order."""


@dataclass(frozen=True)
class Story:
    """A text of the grammar; `log_prob` is in nats, under the full grammar whatever the split."""

    text: str
    log_prob: float
    labels: tuple[Label, ...]
    held_out: bool


@dataclass(frozen=True)
class Pool:
    """The words of one kind, all equally likely. A row is a word and its attributes, named by `fields`.

    "Another" word of the pool shares the attribute `group` if that is given, or with `apart` differs in it.
    """

    rows: tuple[tuple[str, ...], ...]
    fields: tuple[str, ...] = ()
    group: str = ""
    apart: bool = False
    noun: bool = False
    others: tuple[tuple[int, ...], ...] = field(init=False)
    """For each row, those that can be drawn as another one: equally many, or the entropy would vary."""

    def __post_init__(self) -> None:
        groups = [row[1 + self.fields.index(self.group)] if self.group else "" for row in self.rows]
        numbered = list(enumerate(groups))
        others = tuple(
            tuple(j for j, other in numbered if (other != own if self.apart else other == own and j != i))
            for i, own in numbered
        )
        assert len({len(rows) for rows in others}) == 1, "groups must be equally large"
        object.__setattr__(self, "others", others)

    def __len__(self) -> int:
        return len(self.rows)

    def names(self, variable: str) -> tuple[str, ...]:
        """Names of the words of a row drawn for the variable `x`: `x`, `x.field`, ..."""
        return (variable, *(f"{variable}.{field}" for field in self.fields))


class State:
    """A story while it is generated."""

    def __init__(self, pick: Pick, split: Split | None = None) -> None:
        self.pick = pick
        self.split = split
        self.text: list[str] = []
        self.length = 0
        self.log_prob = 0.0
        self.words: dict[str, str] = {}
        self.rows: dict[str, int] = {}
        self.mentions: dict[str, list[CharSpan]] = {}
        self.nouns: set[str] = set()
        self.labels: list[Label] = []
        self.held_out = False


@dataclass(frozen=True)
class Text:
    """Writes fixed text and the words of variables: pairs of (literal, variable or '')."""

    pieces: tuple[tuple[str, str], ...]

    def generate(self, state: State) -> None:
        out, end = state.text, state.length
        for literal, variable in self.pieces:
            out.append(literal)
            end += len(literal)
            if variable:
                word = state.words[variable]
                out.append(word)
                start = end - literal.endswith(" ")
                end += len(word)
                state.mentions.setdefault(variable, []).append((start, end))
                owner = variable.partition(".")[0]
                if literal == " the " and owner != variable:  # `Mia the fox` is one mention of Mia
                    state.mentions[owner][-1] = (state.mentions[owner][-1][0], end)
        state.length = end

    def entropy(self) -> float:
        return 0.0


@dataclass(frozen=True)
class Draw:
    """Draws a row of `pool` for `variable`, other than the row drawn for `unlike`; writes nothing.

    With `partners`, the row completes a combination. It is held out when the row numbers of the partners and
    its own add up to a multiple of the pool's size: exactly one row for any choice of the partners (a Latin
    square). The split `val` gets that row, `train` one of the others.
    """

    variable: str
    pool: Pool
    unlike: str = ""
    partners: tuple[str, ...] = ()

    def generate(self, state: State) -> None:
        rows, held_out = self.options(state.rows), -1
        if self.partners:
            held_out = -sum(state.rows[partner] for partner in self.partners) % len(self.pool)
            if state.split:
                rows = [row for row in rows if (row == held_out) == (state.split == "val")]
        row = rows[state.pick(_EVEN[len(rows)])]
        state.held_out |= row == held_out
        state.log_prob -= self.entropy()
        state.rows[self.variable] = row
        if self.pool.noun:
            state.nouns.add(self.variable)
        state.words.update(zip(self.pool.names(self.variable), self.pool.rows[row], strict=True))

    def entropy(self) -> float:
        return math.log(len(self.pool.others[0] if self.unlike else self.pool))

    def options(self, rows: Mapping[str, int]) -> Sequence[int]:
        """The rows that can be drawn, given the rows of other variables."""
        return self.pool.others[rows[self.unlike]] if self.unlike else range(len(self.pool))


_EVEN = tuple(tuple(option / n for option in range(1, n)) for n in range(64))
"""Cumulative probabilities of n equally likely options."""


@dataclass(frozen=True)
class Choose:
    """One of several nodes, each with its own probability."""

    options: tuple[tuple[float, Node], ...]

    def generate(self, state: State) -> None:
        cumulative = tuple(accumulate(p for p, _ in self.options[:-1]))
        probability, node = self.options[state.pick(cumulative)]
        state.log_prob += math.log(probability)
        node.generate(state)

    def entropy(self) -> float:
        return sum(p * (node.entropy() - math.log(p)) for p, node in self.options)


@dataclass(frozen=True)
class Chain:
    """Several nodes, one after the other."""

    parts: tuple[Node, ...]

    def generate(self, state: State) -> None:
        for part in self.parts:
            part.generate(state)

    def entropy(self) -> float:
        return sum(part.entropy() for part in self.parts)


@dataclass(frozen=True)
class Note:
    """Labels the latest mention of `answer` as determined by `antecedent`; writes nothing."""

    kind: str
    answer: str
    antecedent: str
    wrong: str
    """The variable whose word is the wrong candidate."""

    def generate(self, state: State) -> None:
        answer = state.mentions[self.answer][-1]
        antecedents = tuple(span for span in state.mentions[self.antecedent] if span != answer)
        nouns = sorted(span for noun in state.nouns for span in state.mentions.get(noun, ()) if span < answer)
        space = " " * (answer[1] - answer[0] - len(state.words[self.answer]))
        state.labels.append(Label(self.kind, answer, antecedents, space + state.words[self.wrong], tuple(nouns)))

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


def generate(node: Node, pick: Pick, split: Split | None = None) -> Story:
    """The story with the choices of `pick`; without a split, any story of the full grammar."""
    state = State(pick, split)
    node.generate(state)
    return Story("".join(state.text), state.log_prob, tuple(state.labels), state.held_out)
