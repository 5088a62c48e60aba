"""Probes promise: spans find their tokens, the readings are what one forward pass at a time would say."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inspection.capture import capture
from inspection.probes import DISCLAIMER, Probe, Reading, examine, locate, sentence
from model.gpt import GPT
from tests.test_capture import SMALL, lively, previous_token_model

TEXT = "Mia gave the kite to Tom because he was sad. Then Tom smiled."
ANSWER, EVIDENCE = (49, 53), (20, 24)


def encode_bytes(text: str) -> list[int]:
    return list(text.encode())


def byte_of(token: int) -> bytes:
    return bytes([token])


class Words:
    """A tokenizer of words with their leading space and of punctuation marks."""

    def __init__(self) -> None:
        self.pieces: list[str] = []

    def encode(self, text: str) -> list[int]:
        found = re.findall(r" ?\w+|[^\w]", text)
        self.pieces += [piece for piece in found if piece not in self.pieces]
        return [self.pieces.index(piece) for piece in found]

    def token_bytes(self, token: int) -> bytes:
        return self.pieces[token].encode()


def test_the_text_of_these_tests_says_what_it_should() -> None:
    assert TEXT[slice(*ANSWER)] == TEXT[slice(*EVIDENCE)] == " Tom"


def test_locate_finds_words() -> None:
    words = Words()
    probe = locate("pronoun", TEXT, ANSWER, [EVIDENCE], " Mia", words.encode, words.token_bytes, 999)
    assert probe.tokens == (999, *words.encode(TEXT[:49]))
    assert [words.pieces[probe.tokens[k]] for k in probe.evidence] == [" Tom"]
    assert [words.pieces[t] for t in probe.right + probe.wrong] == [" Tom", " Mia"]
    assert probe.length == len(probe.tokens)


def test_locate_finds_bytes() -> None:
    probe = locate("pronoun", TEXT, ANSWER, [EVIDENCE], " Mia", encode_bytes, byte_of, 256)
    assert bytes(probe.tokens[k] for k in probe.evidence) == b" Tom"
    assert bytes(probe.right) == b" Tom" and bytes(probe.wrong) == b" Mia"
    assert probe.length == len(probe.tokens) + 3


@given(st.text(min_size=3, max_size=30), st.data())
@settings(max_examples=100, deadline=None)
def test_locate_counts_in_bytes_where_characters_take_several(text: str, data: st.DataObject) -> None:
    text = text.encode("utf-8", "ignore").decode() + "abc"
    begin = data.draw(st.integers(0, len(text) - 3))
    end = data.draw(st.integers(begin + 1, len(text) - 2))
    span = (len(text) - 1, len(text))
    probe = locate("k", text, span, [(begin, end)], "zz", encode_bytes, byte_of, 0)
    assert bytes(probe.tokens[k] for k in probe.evidence).decode() == text[begin:end]


def test_every_mention_counts() -> None:
    words = Words()
    first = (TEXT.index("Mia"), TEXT.index("Mia") + 3)
    probe = locate("k", TEXT, ANSWER, [first, EVIDENCE], " Mia", words.encode, words.token_bytes, 999)
    assert [words.pieces[probe.tokens[k]].strip() for k in probe.evidence] == ["Mia", "Tom"]


def test_a_token_that_overlaps_the_evidence_belongs_to_it() -> None:
    pairs = {text: k for k, text in enumerate(["ab", "cd", "ef", "g", "h"])}

    def encode(text: str) -> list[int]:
        return [pairs[piece] for piece in re.findall(r"ab|cd|ef|g|h", text)]

    def token_bytes(token: int) -> bytes:
        return list(pairs)[token].encode()

    for evidence, positions in (
        ((1, 3), (1, 2)),
        ((0, 2), (1,)),
        ((2, 4), (2,)),
        ((3, 4), (2,)),
        ((0, 6), (1, 2, 3)),
    ):
        assert locate("k", "abcdefg", (6, 7), [evidence], "h", encode, token_bytes, 9).evidence == positions


def test_a_tokenizer_that_merges_across_the_border_is_refused() -> None:
    def merging(text: str) -> list[int]:
        return list(text.replace("n T", "#").encode())

    with pytest.raises(ValueError, match="' Tom' apart"):
        locate("k", TEXT, ANSWER, [EVIDENCE], " Mia", merging, byte_of, 0)
    with pytest.raises(ValueError, match="' Tim' apart"):
        locate("k", TEXT.replace("Then Tom", "Then Xom"), ANSWER, [EVIDENCE], " Tim", merging, byte_of, 0)


@pytest.mark.parametrize(
    ("answer", "evidence", "wrong"),
    [
        ((49, 53), (50, 52), " Mia"),
        ((49, 53), (20, 20), " Mia"),
        ((60, 99), (20, 24), " Mia"),
        (ANSWER, EVIDENCE, " Tom"),
    ],
)
def test_spans_that_make_no_question_are_refused(
    answer: tuple[int, int], evidence: tuple[int, int], wrong: str
) -> None:
    with pytest.raises(ValueError, match=r"do not fit|both candidates"):
        locate("k", TEXT, answer, [evidence], wrong, encode_bytes, byte_of, 0)


def test_a_tokenizer_that_loses_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="bytes"):
        locate("k", TEXT, ANSWER, [EVIDENCE], " Mia", encode_bytes, lambda token: b"??", 0)


def random_probes(count: int, kinds: tuple[str, ...], longest: int) -> list[Probe]:
    rng = random.Random(3)

    def draw(least: int, most: int) -> tuple[int, ...]:
        return tuple(rng.randrange(50) for _ in range(rng.randint(least, most)))

    probes = []
    for k in range(count):
        prompt = draw(4, longest - 3)
        evidence = tuple(sorted(rng.sample(range(len(prompt)), rng.randint(1, 3))))
        probes.append(Probe(kinds[k % len(kinds)], prompt, evidence, draw(1, 4), draw(1, 4)))
    return probes


def one_by_one(model: GPT, probes: list[Probe]) -> Reading:
    """The reading of one kind, a text at a time."""
    right_first, weights = [], []
    for probe in probes:
        scores = []
        for answer in (probe.right, probe.wrong):
            text = torch.tensor(probe.tokens + answer)
            scores.append(-float(capture(model, text).loss[-len(answer) :].sum()))
        right_first.append(scores[0] > scores[1])
        pattern = capture(model, torch.tensor(probe.tokens)).pattern
        weights.append(pattern[:, :, -1, list(probe.evidence)].sum(-1))
    best = int(torch.stack(weights[0::2]).mean(0).argmax())
    head = divmod(best, model.config.n_heads)
    weight = float(torch.stack(weights[1::2]).mean(0)[head])
    return Reading(probes[0].kind, len(probes), sum(right_first) / len(probes), head, weight)


@pytest.fixture(scope="module")
def asked() -> tuple[GPT, list[Probe], list[Reading]]:
    """A model, probes of two kinds, and what each kind should show."""
    model = lively(replace(SMALL, kernels="fused"))
    probes = random_probes(21, ("pronoun", "place"), 24)
    return model, probes, [one_by_one(model, probes[0::2]), one_by_one(model, probes[1::2])]


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_examine_agrees_with_one_text_at_a_time(asked: tuple[GPT, list[Probe], list[Reading]], batch_size: int) -> None:
    model, probes, expected = asked
    for reading, wanted in zip(examine(model, probes, batch_size), expected, strict=True):
        assert (reading.kind, reading.count, reading.head) == (wanted.kind, wanted.count, wanted.head)
        assert reading.preferred == pytest.approx(wanted.preferred)
        assert reading.weight == pytest.approx(wanted.weight, abs=1e-5)
        assert 0 < reading.preferred < 1


def test_a_head_that_reads_the_evidence_passes() -> None:
    model = previous_token_model(sharpness=1.3)
    probes = [Probe("induction", (0, *range(1, n)), (n - 2,), (1,), (2,)) for n in range(4, 14)]
    (reading,) = examine(model, probes)
    assert reading.head == (0, 0) and reading.weight > 0.9 and reading.passes
    elsewhere = [replace(probe, evidence=(0,)) for probe in probes]
    assert not examine(model, elsewhere)[0].passes


def test_the_chosen_head_is_judged_on_probes_it_was_not_chosen_by() -> None:
    """Even probes ask for the previous token, odd ones for the first: good at one is bad at the other."""
    model = previous_token_model(sharpness=1.3)
    probes = [Probe("k", tuple(range(9)), (7,) if k % 2 == 0 else (0,), (1,), (2,)) for k in range(8)]
    assert examine(model, probes)[0].weight < 0.1


def test_probes_beyond_the_context_are_left_out() -> None:
    model = lively(SMALL)
    fits = [Probe("a", tuple(range(24)), (3,), (1,), (2,))] * 3
    too_long = Probe("a", tuple(range(24)), (3,), (1, 5), (2,))
    assert examine(model, [*fits, too_long])[0].count == 3
    assert examine(model, [fits[0], too_long]) == [], "one probe cannot both choose and judge"
    assert examine(model, []) == []


def test_the_outcome_in_words() -> None:
    readings = [Reading("pronoun", 200, 0.985, (1, 2), 0.714), Reading("cause", 40, 0.5, (0, 1), 0.31)]
    assert sentence(readings) == [
        "pronoun: right in 98.5% of 200; head L1H2 reads the name that decides it (0.71)",
        "cause: right in 50.0% of 40; no head puts half of its weight on the deciding word (best L0H1, 0.31)",
        DISCLAIMER,
    ]
