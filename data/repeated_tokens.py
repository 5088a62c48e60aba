"""Generated corpus "repeats": random letters, repeated. The smallest text that needs an induction head.

A document is a word of 16 to 32 letters, all different, and then the same word again: `qvKd...qvKd...`. In the second copy
every letter is certain, but only to a model that finds the earlier occurrence of the current letter and attends to what
followed it: an induction head (Olsson et al. 2022).
"""

import math
import random
from collections.abc import Iterator
from string import ascii_letters

LETTERS = ascii_letters
LENGTHS = range(16, 33)
"""Letters of a word. The distance to the match varies, so a head that attends a fixed number of tokens back is wrong in 16
of 17 documents. The longest one, with end-of-text, fills a context of 65; no two documents fit in it."""
WORDS_PER_LENGTH = {"train": 1200, "val": 60}  # Number of words of each length.
SEED = 1


def documents(split: str, per_length: int | None = None, seed: int = SEED) -> Iterator[str]:
    """Documents of a split, `per_length` of every length, in random order: the same on every machine.

    Nothing marks the second copy: with a space there, a model of two layers located the copy by the space.
    """
    per_length = WORDS_PER_LENGTH[split] if per_length is None else per_length
    rng = random.Random(f"{split} {seed}")
    lengths = [length for length in LENGTHS for _ in range(per_length)]
    rng.shuffle(lengths)
    for length in lengths:
        word = "".join(rng.sample(LETTERS, length))
        yield word + word


def entropy() -> float:
    """Entropy of a document in nats: ln 17 + mean over n of ln(52! / (52 - n)!), of its length and its word. As every length
    occurs equally often, it is the mean over either split too."""
    given_length = [math.lgamma(len(LETTERS) + 1) - math.lgamma(len(LETTERS) - length + 1) for length in LENGTHS]
    return math.log(len(LENGTHS)) + math.fsum(given_length) / len(LENGTHS)
