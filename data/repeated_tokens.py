"""The second embedded corpus: random letters, said twice. The smallest text that asks for an induction head.

A document is a word of 16 to 32 letters and then the same word again, with nothing between: `qvKd...qvKd...`. Nothing
can be known of the first saying. In the second every letter is certain, but only to a model that finds where the
present letter stood before and reads what came after it: an induction head (Olsson et al. 2022).

What keeps a model from doing it in any other way:

* The letters of a word are all different, drawn from the 52 of both cases. So a letter of the second saying has stood
  in one earlier place, and there is no second match to confuse with it.
* The length is drawn too, each from 16 to 32 equally often. So what is wanted stands at no fixed distance: a head that
  looks back a fixed number of places, as one layer with rotary positions can, is wrong nine times out of ten.
* Nothing marks where the second saying begins. With a space there, a model of two layers found its way by the space,
  and had no head that did the same where there was none.
* Every word is new. So there is nothing to learn by heart.

The entropy is known in closed form. A word of n letters has one of 52! / (52 - n)! equally likely forms and every
length is equally likely, so the length of a document says how surprising it is. Each length comes equally often in
either split: so the mean over a split is exactly `entropy()`.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from string import ascii_letters

from data.documents import DOCUMENT_SEPARATOR

__all__ = ["LENGTHS", "LETTERS", "documents", "entropy", "version", "write"]

LETTERS = ascii_letters
LENGTHS = range(16, 33)
"""Letters of a word. A document has up to 64 of them: with the end-of-text before it, it fills a context of 65, and no
two documents fit there together."""
SPLITS = {"train": 1200, "val": 60}
"""How many words of each length there are."""
SEED = 1


def documents(split: str, each: int, seed: int = SEED) -> Iterator[str]:
    """Documents of a split, `each` for every length, in random order: the same for the same seed, on every machine."""
    rng = random.Random(f"{split} {seed}")
    lengths = [length for length in LENGTHS for _ in range(each)]
    rng.shuffle(lengths)
    for length in lengths:
        word = "".join(rng.sample(LETTERS, length))
        yield word + word


def entropy() -> float:
    """Entropy of a document in nats: that of its length, and that of its word given the length.

    ln 17 + mean over n of ln(52! / (52 - n)!)
    """
    orders = [math.lgamma(len(LETTERS) + 1) - math.lgamma(len(LETTERS) - length + 1) for length in LENGTHS]
    return math.log(len(LENGTHS)) + math.fsum(orders) / len(LENGTHS)


@cache
def version() -> str:
    """A short hash of all that determines the corpus, by which a cache can tell that it is out of date."""
    digest = hashlib.sha256(repr((LETTERS, LENGTHS, SPLITS, SEED, DOCUMENT_SEPARATOR)).encode())
    for split in SPLITS:
        for document in documents(split, 1):
            digest.update(document.encode())
    return digest.hexdigest()[:12]


def write(folder: Path) -> None:
    """Write `train.txt` and `val.txt` into `folder`.

    Raises:
        OSError: if the disk refuses.
    """
    for split, each in SPLITS.items():
        text = f"\n{DOCUMENT_SEPARATOR}\n".join(documents(split, each))
        (folder / f"{split}.txt").write_text(text, "ascii", newline="\n")
