"""Contrast pairs: a prompt, a right and a wrong answer, and the antecedent that decides between them.

Such pairs show whether the model knows the answer, and which head attends to the antecedent. The corpus labels both by
character (`data/stories.py`); `make_contrast_pair` finds the token positions. `eval_items.py` scores them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from data.tokenizer import Tokenizer

CharSpan = tuple[int, int]  # first character, and the one after the last


@dataclass(frozen=True)
class ContrastPair:
    """A prompt with a right and a wrong answer, in tokens."""

    kind: str
    tokens: tuple[int, ...]  # the prompt; begins with end_of_text
    antecedent: tuple[int, ...]  # positions in `tokens` of the mention that decides the answer; empty if unknown
    right: tuple[int, ...]
    wrong: tuple[int, ...]
    nearest_noun: tuple[int, ...] = ()  # positions of the last noun before the answer; empty if unknown

    @property
    def length(self) -> int:
        """Number of positions the model needs: prompt and longer answer, without its last token."""
        return len(self.tokens) + max(len(self.right), len(self.wrong)) - 1


def make_contrast_pair(
    tokenizer: Tokenizer,
    kind: str,
    text: str,
    answer: CharSpan,
    antecedent: Sequence[CharSpan],
    wrong: str,
    nouns: Sequence[CharSpan] = (),
) -> ContrastPair:
    """From character spans of `text` to token positions. A token belongs to a span if they overlap by a byte or more.

    `answer` is the right one, leading space included; `antecedent` the mentions that decide it, and `nouns` those before
    it, both empty if unknown; `wrong` is written as it would be in place of the right answer.
    Raises ValueError if both answers are the same, or if the tokenizer merges prompt and answer or changes the text.
    """

    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text).tolist())

    prompt, right = text[: answer[0]], text[slice(*answer)]
    tokens, answers = encode(prompt), [encode(right), encode(wrong)]
    for string, each in zip((right, wrong), answers, strict=True):
        if not each or tokens + each != encode(prompt + string):
            raise ValueError(f"the tokenizer merges {string!r} with the text before it")
    if answers[0] == answers[1]:
        raise ValueError(f"both answers are {wrong!r}")
    pieces = [tokenizer.token_bytes(token) for token in tokens]
    if b"".join(pieces) != prompt.encode():
        raise ValueError("the tokenizer changes the bytes of the text")
    nearest = sorted(nouns, key=lambda span: span[1])[-1:]
    spans = (_overlapping(text, antecedent, pieces), *answers, _overlapping(text, nearest, pieces))
    return ContrastPair(kind, (tokenizer.end_of_text, *tokens), *spans)


def _overlapping(text: str, spans: Sequence[CharSpan], pieces: Sequence[bytes]) -> tuple[int, ...]:
    """Positions of the tokens, whose bytes are `pieces`, that overlap character spans."""
    in_bytes = [tuple(len(text[:character].encode()) for character in span) for span in spans]
    ends = list(accumulate(map(len, pieces)))
    tokens = enumerate(zip([0, *ends[:-1]], ends, strict=True), 1)  # position 0 is end_of_text
    return tuple(k for k, (start, end) in tokens if any(start < last and end > first for first, last in in_bytes))
