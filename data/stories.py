"""Generated corpus "stories": short stories with known regularities and an exactly computed entropy.

The grammar is the function `story`, below; `story_grammar.py` generates from it and computes the entropy. In a story, words of
seven kinds (`KINDS`) are determined by the text before them. Each is an answer, labelled with the earlier word that decides it.
"""

import random
from bisect import bisect_right
from collections.abc import Callable, Iterator

from data import story_grammar
from data.story_grammar import Pool, Split, Story, Writer

KINDS = ("pronoun", "gender", "agreement", "induction", "place", "cause", "crossing")
STORIES: dict[Split, int] = {"train": 15_000, "val": 1_500}  # Number of stories in each split.
SEED = 1


def _words(rows: str, *fields: str, group: str = "", apart: bool = False, noun: bool = False) -> Pool:
    """A pool from 'row, row, ...'; a row is a word and, after slashes, its attributes."""
    return Pool(tuple(tuple(row.split("/")) for row in rows.split(", ")), fields, group, apart, noun)


_NAMES = (
    "Mia/fox/yelped/she/She, Tom/bear/growled/he/He, Ann/hen/clucked/she/She, Ben/frog/croaked/he/He, "
    "Sue/mouse/squeaked/she/She, Leo/mole/sniffed/he/He, Eve/duck/quacked/she/She, Gus/goat/bleated/he/He, "
    "Pam/pig/grunted/she/She, Roy/dove/cooed/he/He"
)
POOLS = {
    "name": _words(_NAMES, "kind", "sound", "he", "He", group="he", noun=True),
    "other_gender": _words(_NAMES, "kind", "sound", "he", "He", group="he", apart=True, noun=True),
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


def story(w: Writer) -> None:
    """A whole story: a meeting or none, a thing put away and looked for, two episodes in any order, ending.

    A and B share their pronoun, so that meaning alone determines who `she` is, and A is always the one who finds, puts and
    gives. (Where either could, and their pronouns could differ, a tiny model only guessed on half of the kinds.)
    """
    w.draw("A", "name")
    # Half of the stories begin with a meeting.
    w.choose(lambda w, opening: opening(w), (_meeting,), (lambda w: None,))
    w.write("<time:time> <A> the <A.kind> and <B:name!A> the <B.kind> <found:found> a <colour:colour> <thing:thing>.")
    # Who puts which thing where (`Writer.draw`): for each A and thing one of the ten containers is only in the held-out
    # stories. No later choice depends on it, so `entropy()` is the mean of -log p on both splits.
    w.write(" <A> put the <colour> <thing>")
    w.note("induction", "thing", "thing", "thing.other")
    w.draw("box", "box", partners=("A", "thing"))
    w.write(" into the <box>.")
    # B looks in the wrong container, one of other stuff.
    w.write(" <B> looked in the <other:box!box>, but the <thing> was in the <box>")
    w.note("place", "box", "box", "other")
    w.write(".")
    w.choose(_two_episodes, *((first,) for first in EPISODES))
    took = " At last they took the <colour> <thing> home."
    left = " In the end they left the <colour> <thing> there."
    w.choose(Writer.write, (took,), (left,))


def _meeting(w: Writer) -> None:
    """A meets C, who is of the other gender, and one of the two makes its sound: `She` or `He` decides which."""
    w.write("<A> the <A.kind> met <C:other_gender!A> the <C.kind>.")
    w.choose(_answers, ("A", "C"), ("C", "A"))


def _answers(w: Writer, who: str, other: str) -> None:
    w.write(f" <{who}.He> <{who}.sound>")
    w.note("gender", f"{who}.sound", who, f"{other}.sound")
    w.write(". ")


def _two_episodes(w: Writer, first: Callable[[Writer], None]) -> None:
    first(w)
    w.choose(lambda w, second: second(w), *((second,) for second in EPISODES if second is not first))


def _gift(w: Writer) -> None:
    """A gives to B: because A has enough (and feels proud) or because B is in need (and feels better)."""
    w.choose(_because, ("A", "wealth", "B", "proud"), ("B", "need", "A", "better"))


def _because(w: Writer, who: str, why: str, other: str, feels: str) -> None:
    w.write(f" <A> <gives:gives> <B> because <{who}.he> was <why:{why}>. <then:then> <{who}>")
    w.note("pronoun", who, who, other)
    w.write(f" felt {feels}.")


def _feelings(w: Writer) -> None:
    """Two feelings, then what each of the two does about it, in the same order: in any order a tiny model did not learn it."""
    w.write(" <A> was <A.mood:mood> and <B> was <B.mood:mood!A.mood>")
    for link, who, other in ((". Soon", "A", "B"), (" and", "B", "A")):
        w.write(f"{link} <{who}> <{who}.mood.does>")
        w.note("cause", f"{who}.mood.does", f"{who}.mood", f"{other}.mood.does")
    w.write(".")


def _crossing(w: Writer) -> None:
    """What `it` was: only the animal can be tired, only the way can be wide."""
    w.choose(_too, ("animal", "tired", "way"), ("way", "wide", "animal"))


def _too(w: Writer, which: str, why: str, other: str) -> None:
    w.write(f" The <animal:animal> did not cross the <way:way> because it was too <why:{why}>.")
    w.write(f' "What was too <why>?" asked <B>. "The <{which}>," said <A>.')
    w.note("crossing", which, which, other)


def _scene(w: Writer) -> None:
    """Something to see near a second noun, which is of the other number three times out of four."""
    w.choose(_seen, ("one", "many"), ("many", "one"))


def _seen(w: Writer, number: str, other: str) -> None:
    w.choose(_near, (number, other, other), (number, number, other), p=(0.75, 0.25))
    w.write(" <look:look>.")


def _near(w: Writer, number: str, near: str, other: str) -> None:
    w.write(f" The <seen:{number}> near the <near:near_{near}>")
    w.draw("be", "be")
    w.write(f" <be.{number}>")
    if near != number:
        w.note("agreement", f"be.{number}", "seen", f"be.{other}")


EPISODES = (_gift, _feelings, _crossing, _scene)


def stories(split: Split, count: int, seed: int = SEED) -> Iterator[Story]:
    """The first `count` stories of a split: the same for the same seed, on every machine."""
    rng = random.Random(f"{split} {seed}")

    def pick(cumulative: tuple[float, ...]) -> int:
        return bisect_right(cumulative, rng.random())

    for _ in range(count):
        writer = Writer(POOLS, pick, split)
        story(writer)
        yield writer.story()


def documents(split: Split) -> Iterator[str]:
    return (s.text for s in stories(split, STORIES[split]))


def entropy() -> float:
    """Entropy of a story of the full grammar in nats."""
    return story_grammar.entropy(story, POOLS)
