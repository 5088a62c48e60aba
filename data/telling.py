"""What a story is while it is told or read: its words, its labels, its probability so far.

`grammar.py` has the language of templates that works on these; `stories.py` says what the story is about.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

Span: TypeAlias = tuple[int, int]
Split: TypeAlias = Literal["train", "val"]
Pick: TypeAlias = Callable[[tuple[float, ...]], int]
"""Takes the cumulative probabilities of all options but the last, returns the number of the one to take."""


@dataclass(frozen=True)
class Label:
    """A place in a story where the next word can be known, and what it can be known from.

    Spans are character offsets `(start, end)` into the text; a leading space belongs to the word.
    """

    kind: str
    answer: Span
    """The word that can be known from what stands before it."""
    antecedents: tuple[Span, ...]
    """Every earlier mention of the word that decides it, in order."""
    wrong: str
    """What the other candidate would look like in the place of the answer, leading space included."""
    nouns: tuple[Span, ...]
    """Every mention of a noun before the answer, in order: names, things, places, whatever a noun pool holds."""


@dataclass(frozen=True)
class Story:
    """One text of the grammar; `log_prob` is in nats, under the full grammar whatever the split."""

    text: str
    log_prob: float
    labels: tuple[Label, ...]
    held_out: bool


@dataclass(frozen=True)
class Pool:
    """The words of one kind, all equally likely. A row is a word and its companions, named by `fields`.

    With `group`, the name of a field, another word is always one that has that companion in common; with `apart`,
    always one that has another. `noun` says that the words are nouns; it changes no text, so the corpus's version
    does not depend on it.
    """

    rows: tuple[tuple[str, ...], ...]
    fields: tuple[str, ...] = ()
    group: str = ""
    apart: bool = False
    noun: bool = field(default=False, repr=False)
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
        """What the words of a row are called once it is drawn for the variable `x`: `x`, `x.field`, ..."""
        return (variable, *(f"{variable}.{field}" for field in self.fields))


class Telling:
    """A story while it is being told."""

    def __init__(self, pick: Pick, split: Split | None = None) -> None:
        self.pick = pick
        self.split = split
        self.text: list[str] = []
        self.length = 0
        self.log_prob = 0.0
        self.words: dict[str, str] = {}
        self.rows: dict[str, int] = {}
        self.mentions: dict[str, list[Span]] = {}
        self.nouns: set[str] = set()
        self.labels: list[Label] = []
        self.held_out = False

    def story(self) -> Story:
        return Story("".join(self.text), self.log_prob, tuple(self.labels), self.held_out)


class Reading(NamedTuple):
    """A way in which the text up to `end` could have been told."""

    end: int
    words: Mapping[str, str]
    rows: Mapping[str, int]
    choices: tuple[int, ...]


class Page(NamedTuple):
    """A text that is being read. `misses` collects what was expected but not found, for the error."""

    text: str
    misses: list[tuple[int, str]]
