"""Generated corpus "repeats": random letters, repeated. The smallest text that needs an induction head.

A document is a word of 16 to 32 letters and then the same word again, without a separator: `qvKd...qvKd...`. The first
copy cannot be predicted. In the second copy every letter is certain, but only to a model that finds the earlier
occurrence of the current letter and attends to what followed it: an induction head (Olsson et al. 2022).

What rules out other solutions:

* The letters of a word are distinct, drawn from the 52 of both cases: each has one earlier occurrence to match.
* The length is uniform over 16 to 32, so the distance to the match varies: a head that attends a fixed number of
  tokens back, as one layer with rotary positions can, is wrong in 16 of 17 documents.
* Nothing marks the start of the second copy. With a space there, a model of two layers located the copy by the space,
  and had no head that did the same without it.
* Every word is new, so nothing can be memorised.

The entropy has a closed form. A word of n letters is one of 52! / (52 - n)! equally likely ones and every length is
equally likely. Each length occurs equally often in either split, so the mean over a split is exactly `entropy()`.
"""

import math
import random
from collections.abc import Iterator
from string import ascii_letters

LETTERS = ascii_letters
LENGTHS = range(16, 33)
"""Letters of a word. The longest document, with end-of-text, fills a context of 65; no two documents fit in it."""
WORDS_PER_LENGTH = {"train": 1200, "val": 60}
"""Number of words of each length."""
SEED = 1


def documents(split: str, per_length: int | None = None, seed: int = SEED) -> Iterator[str]:
    """Documents of a split, `per_length` of every length, in random order: the same on every machine."""
    per_length = WORDS_PER_LENGTH[split] if per_length is None else per_length
    rng = random.Random(f"{split} {seed}")
    lengths = [length for length in LENGTHS for _ in range(per_length)]
    rng.shuffle(lengths)
    for length in lengths:
        word = "".join(rng.sample(LETTERS, length))
        yield word + word


def entropy() -> float:
    """Entropy of a document in nats: of its length, and of its word given the length.

    ln 17 + mean over n of ln(52! / (52 - n)!)
    """
    given_length = [math.lgamma(len(LETTERS) + 1) - math.lgamma(len(LETTERS) - length + 1) for length in LENGTHS]
    return math.log(len(LENGTHS)) + math.fsum(given_length) / len(LENGTHS)
