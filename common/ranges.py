"""Types of settings, each with the range of its values, and the check of a dataclass of them."""

import math
import re
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, get_type_hints


class Range(NamedTuple):
    """A range in words, and as a test that NaN fails."""

    words: str
    holds: Callable[[Any], object]


NonNegativeInt = Annotated[int, Range("at least 0", lambda value: value >= 0)]
PositiveInt = Annotated[int, Range("at least 1", lambda value: value >= 1)]
Count = Annotated[int, Range("at least 0 and below 2**63", lambda value: 0 <= value < 1 << 63)]
PositiveCount = Annotated[int, Range("at least 1 and below 2**63", lambda value: 1 <= value < 1 << 63)]
NonNegativeFloat = Annotated[float, Range("at least 0 and finite", lambda value: 0 <= value < math.inf)]
PositiveFloat = Annotated[float, Range("above 0 and finite", lambda value: 0 < value < math.inf)]
Fraction = Annotated[float, Range("between 0 and 1", lambda value: 0 <= value <= 1)]
BelowOne = Annotated[float, Range("at least 0 and below 1", lambda value: 0 <= value < 1)]
AboveZero = Annotated[float, Range("above 0 and at most 1", lambda value: 0 < value <= 1)]
Seconds = Annotated[float, Range("at least 1 and below 10**9", lambda value: 1 <= value < 1e9)]
Minutes = Annotated[float, Range("at least 0 and below 100,000", lambda value: 0 <= value < 100_000)]
Patience = Annotated[int, Range("at least 0, or -1", lambda value: value >= -1)]
StepList = Annotated[
    str, Range("such as '300 450' or empty", re.compile(r"(\d{1,12}( \d{1,12})*)?", re.ASCII).fullmatch)
]


def out_of_range(settings: Any, prefix: str) -> list[str]:
    """A line for each value of a dataclass that is outside of the range of its type; its name follows `prefix`."""
    lines = []
    for name, kind in get_type_hints(type(settings), include_extras=True).items():
        for limit in getattr(kind, "__metadata__", ()):
            if isinstance(limit, Range) and not limit.holds(value := getattr(settings, name)):
                lines.append(f"{prefix}{name} is {value!r}; it must be {limit.words}")
    return lines
