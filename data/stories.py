"""The embedded corpus: generated short stories of which every regularity is known, and the entropy computed.

This is where the quickstart's text comes from. In a story two animals find a thing, one puts it away, the
other looks for it in the wrong place, two of four episodes follow, and it ends. The story is written down
once, below, as a tree of choices; `grammar.py` tells it, reads it back and measures its entropy.

A is the animal that is named first, B the other. The two always share their pronoun, so that meaning alone
says who `she` is; and A is always the one who finds, puts and gives. A first grammar with free roles and mixed
pronouns left a tiny model at chance on half of the families.

Six families of regularities, each labelled where it occurs. The text before the `answer` leaves one
possibility for it, and the `evidence` says which.

* induction: `found a red kite. Mia put the red kite`: what was red is found where red was mentioned before.
* place: `put the red kite into the basket. Tom looked in the box, but the kite was in the basket`: not what
  was named last.
* pronoun: `Ben gave a pie to Tom because he was hungry. Then Tom felt`: hunger is the receiver's, wealth the
  giver's.
* cause: `Mia was happy and Ann was scared. Soon Mia sang and Ann hid`: a reaction follows from a feeling. They
  come in the same order, so that position alone can tell too; in any order they were not learned in 720 steps.
* agreement: `The trees near the house were`: the verb follows the first noun, not the nearest one.
* crossing: `The dog did not cross the road because it was too wide. "What was too wide?" ... "The road,"`.

Held-out combinations: a story's combination is who puts which thing where. Number the names, the things and
the containers from 0 to 9: a combination is held out if its three numbers add up to a multiple of 10. The
validation split consists of the stories with held-out combinations, the training split of all others. A name
and a thing leave exactly one held-out container, a name and a container one thing, a thing and a container
one name: so in either split each of the three, and each pair of them, stays uniform. And as the three are
drawn evenly and every later choice has the same probabilities whatever they are, the expected -log p under
the full grammar is the same given any combination: it is `entropy()` on both splits, and a validation loss
can be held against it.
"""

from __future__ import annotations

import hashlib
import os
import random
from bisect import bisect_right
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from common.errors import DISK_OR_MEMORY, UserError
from data.story_grammar import Chain, Choose, Draw, Node, Note, evenly, line, read, tell
from data.telling import Label, Pool, Split, Story

__all__ = [
    "KINDS",
    "TRAIN_STORIES",
    "VAL_STORIES",
    "Label",
    "Story",
    "entropy",
    "parse",
    "stories",
    "version",
    "write",
]

KINDS = ("pronoun", "agreement", "induction", "place", "cause", "crossing")
TRAIN_STORIES = 15_000
VAL_STORIES = 1_500
SEED = 1
_SPLITS: tuple[tuple[Split, int], ...] = (("train", TRAIN_STORIES), ("val", VAL_STORIES))
SEPARATOR = "\n<|endoftext|>\n"


def _words(rows: str, *fields: str, group: str = "", apart: bool = False, noun: bool = False) -> Pool:
    """A pool from 'row, row, ...'; a row is a word and, behind slashes, its companions."""
    return Pool(tuple(tuple(row.split("/")) for row in rows.split(", ")), fields, group, apart, noun)


POOLS = {
    "name": _words(
        "Mia/fox/she, Tom/bear/he, Ann/hen/she, Ben/frog/he, Sue/mouse/she, Leo/mole/he, "
        "Eve/duck/she, Gus/goat/he, Pam/pig/she, Roy/dove/he",
        *("kind", "he"),
        group="he",
        noun=True,
    ),
    "thing": _words(
        "kite/ball, ball/drum, drum/hat, hat/ring, ring/doll, "
        "doll/flute, flute/spoon, spoon/lamp, lamp/book, book/kite",
        "other",
        noun=True,
    ),
    "box": _words(
        "basket/soft, box/hard, bag/soft, chest/hard, sack/soft, "
        "barrel/hard, pouch/soft, tub/hard, net/soft, crate/hard",
        "stuff",
        group="stuff",
        apart=True,
        noun=True,
    ),
    "colour": _words("red, blue, green, white"),
    "time": _words("One morning, One day"),
    "found": _words("found, made"),
    "gives": _words("gave a pie to, shared a cake with"),
    "need": _words("hungry, poor, sick"),
    "wealth": _words("rich, full, generous"),
    "then": _words("Then, After that"),
    "mood": _words("happy/sang, sad/cried, sleepy/yawned, scared/hid", "does"),
    "animal": _words("dog, cat, horse", noun=True),
    "way": _words("street, road, river", noun=True),
    "tired": _words("tired, slow, lazy"),
    "wide": _words("wide, dark, muddy"),
    "one": _words("tree, flower, stone, chair", noun=True),
    "many": _words("trees, flowers, stones, chairs", noun=True),
    "near_one": _words("house, gate, wall", noun=True),
    "near_many": _words("houses, gates, walls", noun=True),
    "be": _words("be/was/were", "one", "many"),
    "look": _words("old, pretty"),
}


def _line(template: str) -> Chain:
    return line(template, POOLS)


def _opening() -> Node:
    return _line(
        "<time:time> <A:name> the <A.kind> and <B:name!A> the <B.kind> <found:found> a <colour:colour> <thing:thing>."
    )


def _put() -> Node:
    """A puts the thing somewhere: the combination that may be held out."""
    return Chain(
        (
            _line(" <A> put the <colour> <thing>"),
            Note("induction", "thing", "thing", "thing.other"),
            Draw("box", POOLS["box"], partners=("A", "thing")),
            _line(" into the <box>."),
        )
    )


def _search() -> Node:
    """B looks in the wrong container, one of other stuff."""
    looked = _line(" <B> looked in the <other:box!box>, but the <thing> was in the <box>")
    return Chain((looked, Note("place", "box", "box", "other"), _line(".")))


def _gift() -> Node:
    """A gives to B: because A has enough (and feels proud) or because B is in need (and feels better)."""

    def because(who: str, why: str, other: str, feels: str) -> Node:
        return Chain(
            (
                _line(f" <A> <gives:gives> <B> because <{who}.he> was <why:{why}>. <then:then> <{who}>"),
                Note("pronoun", who, who, other),
                _line(f" felt {feels}."),
            )
        )

    return evenly(because("A", "wealth", "B", "proud"), because("B", "need", "A", "better"))


def _feelings() -> Node:
    """Two feelings, then what each of the two does about it."""
    told: list[Node] = []
    for link, who, other in ((". Soon", "A", "B"), (" and", "B", "A")):
        told.append(_line(f"{link} <{who}> <{who}.mood.does>"))
        told.append(Note("cause", f"{who}.mood.does", f"{who}.mood", f"{other}.mood.does"))
    moods = _line(" <A> was <A.mood:mood> and <B> was <B.mood:mood!A.mood>")
    return Chain((moods, *told, _line(".")))


def _scene(number: str, other: str) -> Node:
    """Something to see near a second noun, which is of the other number three times out of four."""
    verb = Chain((Draw("be", POOLS["be"]), _line(f" <be.{number}>")))
    across = Note("agreement", f"be.{number}", "seen", f"be.{other}")
    near_other = Chain((_line(f" The <seen:{number}> near the <near:near_{other}>"), verb, across))
    near_same = Chain((_line(f" The <seen:{number}> near the <near:near_{number}>"), verb))
    return Chain((Choose(((0.75, near_other), (0.25, near_same))), _line(" <look:look>.")))


def _crossing() -> Node:
    """What `it` was: only the animal can be tired, only the way can be wide."""

    def too(which: str, why: str, other: str) -> Node:
        return Chain(
            (
                _line(f" The <animal:animal> did not cross the <way:way> because it was too <why:{why}>."),
                _line(f' "What was too <why>?" asked <B>. "The <{which}>," said <A>.'),
                Note("crossing", which, which, other),
            )
        )

    return evenly(too("animal", "tired", "way"), too("way", "wide", "animal"))


def _story() -> Node:
    """The whole story: opening, a thing put away and looked for, two episodes in any order, ending."""
    scene = evenly(_scene("one", "many"), _scene("many", "one"))
    episodes = [_gift(), _feelings(), _crossing(), scene]
    two = evenly(*(Chain((first, evenly(*(e for e in episodes if e is not first)))) for first in episodes))
    took = _line(" At last they took the <colour> <thing> home.")
    left = _line(" In the end they left the <colour> <thing> there.")
    return Chain((_opening(), _put(), _search(), two, evenly(took, left)))


STORY = _story()


def stories(split: Split, count: int, seed: int = SEED) -> Iterator[Story]:
    """The first `count` stories of a split: the same ones for the same seed, on every machine."""
    rng = random.Random(f"{split} {seed}")

    def pick(edges: tuple[float, ...]) -> int:
        return bisect_right(edges, rng.random())

    for _ in range(count):
        yield tell(STORY, pick, split)


def parse(text: str) -> Story:
    """The story that `text` is. Raises ValueError, naming the first impossible character, if it is none."""
    found = read(STORY, text)
    assert len(found) == 1, "the grammar is ambiguous"
    return found[0]


def entropy() -> float:
    """Entropy of a story of the full grammar, in nats: summed over its choices, without any sampling."""
    return STORY.entropy()


@cache
def version() -> str:
    """A short hash of all that determines the corpus, by which a cache can tell that it is out of date."""
    digest = hashlib.sha256(repr((STORY, TRAIN_STORIES, VAL_STORIES, SEED, SEPARATOR)).encode())
    for split, _ in _SPLITS:
        for story in stories(split, 50):
            digest.update(story.text.encode())
    return digest.hexdigest()[:12]


def write(folder: Path) -> None:
    """Write `train.txt` and `val.txt` into `folder`, each whole or not at all.

    Raises:
        UserError: (6) if the disk refuses.
    """
    for split, count in _SPLITS:
        target = folder / f"{split}.txt"
        temporary = folder / f".{split}.{os.getpid()}.tmp"
        text = SEPARATOR.join(story.text for story in stories(split, count))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_text(text, "ascii", newline="\n")
                os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            message = f"cannot write {target}: {error.strerror}; free some space or choose another folder"
            raise UserError(message, DISK_OR_MEMORY) from error
