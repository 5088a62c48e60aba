"""A small language of story templates: generate a story, and compute the entropy of the grammar.

A grammar is a function that writes a story with the methods of a `Writer`; nothing here depends on what the stories are
about. The probabilities of a choice must never depend on earlier choices; only the words that they select may. Then the
entropy is exact by the chain rule, H(X, Y) = H(X) + H(Y | X). If every text has one derivation only, the probability of
the text is the product of the probabilities of its choices.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal, TypeAlias

CharSpan: TypeAlias = tuple[int, int]  # start and end of a word with the space before it
Split: TypeAlias = Literal["train", "val"]
Pick: TypeAlias = Callable[[tuple[float, ...]], int]
"""Gets the cumulative probabilities of all options but the last, returns the number of the selected one."""


@dataclass(frozen=True)
class Label:
    """A word of a story that is determined by earlier words."""

    kind: str
    answer: CharSpan  # The word that is determined by the text before it.
    antecedents: tuple[CharSpan, ...]  # Every earlier mention of the word that determines it, in order.
    wrong: str  # The wrong candidate in place of the answer, including its leading space.
    nouns: tuple[CharSpan, ...]  # Every mention of a noun before the answer, in order.


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

    @cached_property
    def others(self) -> list[list[int]]:
        """For each row, those that can be drawn as another one: equally many, or the entropy would vary."""
        groups = [row[1 + self.fields.index(self.group)] if self.group else "" for row in self.rows]
        others = []
        for own, group in enumerate(groups):
            others.append([row for row, g in enumerate(groups) if row != own and (g != group) == self.apart])
        assert len({len(rows) for rows in others}) == 1, "groups must be equally large"
        return others


class Writer:
    """Writes one story: the text, its log-probability and the labels; `pick` makes every choice.

    Without a split, it is any story of the full grammar.
    """

    def __init__(self, pools: Mapping[str, Pool], pick: Pick, split: Split | None = None) -> None:
        self.pools, self.pick, self.split = pools, pick, split
        self.text, self.log_prob, self.held_out = "", 0.0, False
        self.words: dict[str, str] = {}
        self.rows: dict[str, int] = {}
        self.mentions: dict[str, list[CharSpan]] = {}
        self.nouns: set[str] = set()
        self.labels: list[Label] = []

    def write(self, template: str) -> None:
        """`<x>` writes the word of x, `<x:pool>` draws it first, `<x:pool!y>` draws one other than that of y."""
        for literal, variable, pool, unlike in _SLOT.findall(template):
            if pool:
                self.draw(variable, pool, unlike)
            self.append(literal, variable)

    def append(self, literal: str, variable: str) -> None:
        """Write fixed text and the word of a variable (or '')."""
        self.text += literal
        if variable:
            start = len(self.text) - literal.endswith(" ")
            self.text += self.words[variable]
            end = len(self.text)
            self.mentions.setdefault(variable, []).append((start, end))
            owner = variable.partition(".")[0]
            if literal == " the " and owner != variable:  # `Mia the fox` is one mention of Mia
                self.mentions[owner][-1] = (self.mentions[owner][-1][0], end)

    def draw(self, variable: str, pool_name: str, unlike: str = "", partners: tuple[str, ...] = ()) -> None:
        """Draw a row of a pool for `variable`, other than the row drawn for `unlike`; writes nothing.

        With `partners`, the row completes a combination. It is held out when the row numbers of the partners and
        its own add up to a multiple of the pool's size: exactly one row for any choice of the partners (a Latin
        square). The split `val` gets that row, `train` one of the others.
        """
        pool, held_out = self.pools[pool_name], -1
        rows: Sequence[int] = pool.others[self.rows[unlike]] if unlike else range(len(pool.rows))
        self.log_prob -= math.log(len(rows))
        if partners:
            held_out = -sum(self.rows[partner] for partner in partners) % len(pool.rows)
            if self.split:
                rows = [row for row in rows if (row == held_out) == (self.split == "val")]
        row = rows[self.pick(tuple(option / len(rows) for option in range(1, len(rows))))]
        self.held_out |= row == held_out
        self.rows[variable] = row
        if pool.noun:
            self.nouns.add(variable)
        names = (variable, *(f"{variable}.{field}" for field in pool.fields))
        self.words.update(zip(names, pool.rows[row], strict=True))

    def choose(self, write: Callable[..., None], *cases: tuple[Any, ...], p: Sequence[float] = ()) -> None:
        """`write(self, *case)` for one of the cases, all equally likely unless `p` has their probabilities."""
        p = p or [1 / len(cases)] * len(cases)
        number = self.pick(tuple(accumulate(p[:-1])))
        self.log_prob += math.log(p[number])
        write(self, *cases[number])

    def note(self, kind: str, answer: str, antecedent: str, wrong: str) -> None:
        """Label the latest mention of `answer` as determined by `antecedent`; the word of `wrong` is the wrong one."""
        span = self.mentions[answer][-1]
        antecedents = tuple(mention for mention in self.mentions[antecedent] if mention != span)
        nouns = sorted(mention for noun in self.nouns for mention in self.mentions.get(noun, ()) if mention < span)
        space = " " * (span[1] - span[0] - len(self.words[answer]))
        self.labels.append(Label(kind, span, antecedents, space + self.words[wrong], tuple(nouns)))

    def story(self) -> Story:
        return Story(self.text, self.log_prob, tuple(self.labels), self.held_out)


class _EntropyCounter(Writer):
    """Follows all choices of a grammar and adds up their entropy; writes nothing."""

    nats = 0.0

    def append(self, literal: str, variable: str) -> None:
        pass

    def draw(self, variable: str, pool_name: str, unlike: str = "", partners: tuple[str, ...] = ()) -> None:
        pool = self.pools[pool_name]
        self.nats += math.log(len(pool.others[0] if unlike else pool.rows))

    def choose(self, write: Callable[..., None], *cases: tuple[Any, ...], p: Sequence[float] = ()) -> None:
        before, mean = self.nats, 0.0
        for probability, case in zip(p or [1 / len(cases)] * len(cases), cases, strict=True):
            self.nats = -math.log(probability)
            write(self, *case)
            mean += probability * self.nats
        self.nats = before + mean

    def note(self, kind: str, answer: str, antecedent: str, wrong: str) -> None:
        pass


_SLOT = re.compile(r"([^<]*)(?:<([\w.]+)(?::(\w+)(?:!([\w.]+))?)?>)?")
"""Literal text and the slot after it, if there is one: `<variable:pool!unlike>`."""


def entropy(grammar: Callable[[Writer], None], pools: Mapping[str, Pool]) -> float:
    """Entropy of a story of the full grammar in nats: summed over its choices, without sampling."""
    counter = _EntropyCounter(pools, len)
    grammar(counter)
    return counter.nats
