"""Probes promise: spans find their tokens, and a batch says what one forward pass at a time would say."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inspection import contrast_pairs as probes_module
from inspection.activation_cache import run_with_cache
from inspection.contrast_pairs import ContrastPair, locate, measure
from model.gpt import GPT
from tests.inspection.test_activation_cache import SMALL, lively

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


def test_the_nearest_noun_is_the_last_one() -> None:
    words = Words()
    nouns = [(start, start + len(noun)) for noun in ("Tom", "Mia", "kite") for start in [TEXT.index(noun)]]
    probe = locate("k", TEXT, ANSWER, [EVIDENCE], " Mia", words.encode, words.token_bytes, 999, nouns)
    assert [words.pieces[probe.tokens[k]] for k in probe.nearest] == [" Tom"]
    assert probe == replace(
        locate("k", TEXT, ANSWER, [EVIDENCE], " Mia", words.encode, words.token_bytes, 999), nearest=probe.evidence
    )
    assert locate("k", TEXT, ANSWER, [EVIDENCE], " Mia", encode_bytes, byte_of, 0).nearest == ()
    in_bytes = locate("k", TEXT, ANSWER, [EVIDENCE], " Mia", encode_bytes, byte_of, 0, nouns[1:])
    assert bytes(in_bytes.tokens[k] for k in in_bytes.nearest) == b"kite"
    with pytest.raises(ValueError, match="do not fit"):
        locate("k", TEXT, ANSWER, [EVIDENCE], " Mia", encode_bytes, byte_of, 0, [(50, 53)])


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


def random_probes(count: int, kinds: tuple[str, ...], longest: int) -> list[ContrastPair]:
    rng = random.Random(3)

    def draw(least: int, most: int) -> tuple[int, ...]:
        return tuple(rng.randrange(50) for _ in range(rng.randint(least, most)))

    probes = []
    for k in range(count):
        prompt = draw(4, longest - 3)
        evidence = tuple(sorted(rng.sample(range(len(prompt)), rng.randint(1, 3))))
        probes.append(ContrastPair(kinds[k % len(kinds)], prompt, evidence, draw(1, 4), draw(1, 4)))
    return probes


def one_by_one(model: GPT, probe: ContrastPair) -> tuple[float, torch.Tensor]:
    """log p(right) - log p(wrong), and each head's weight on the evidence."""
    scores = []
    for answer in (probe.right, probe.wrong):
        text = torch.tensor(probe.tokens + answer)
        scores.append(-float(run_with_cache(model, text).loss[-len(answer) :].sum()))
    pattern = run_with_cache(model, torch.tensor(probe.tokens)).pattern
    return scores[0] - scores[1], pattern[:, :, -1, list(probe.evidence)].sum(-1)


@pytest.fixture(scope="module")
def asked() -> tuple[GPT, list[ContrastPair], list[tuple[float, torch.Tensor]]]:
    """A model; probes, of which some go on from others; and what each should show."""
    model = lively(replace(SMALL, attention="sdpa"))
    probes = random_probes(15, ("pronoun", "place"), 24)
    probes += [replace(probe, tokens=probe.tokens[:4], evidence=(1, 2)) for probe in probes[::4]]
    probes += [replace(probe, tokens=(probe.tokens + probe.right + probe.wrong)[:20]) for probe in probes[:6]]
    probes += [replace(probe, right=probe.wrong, wrong=probe.right) for probe in probes[3:5]]
    return model, probes, [one_by_one(model, probe) for probe in probes]


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_probes_show_what_they_show_one_by_one(
    asked: tuple[GPT, list[ContrastPair], list[tuple[float, torch.Tensor]]], batch_size: int
) -> None:
    model, probes, wanted = asked
    margins, weights = measure(model, probes, batch_size)
    torch.testing.assert_close(margins, torch.tensor([margin for margin, _ in wanted]), atol=1e-4, rtol=0)
    torch.testing.assert_close(weights, torch.stack([weight for _, weight in wanted]), atol=1e-5, rtol=0)
    assert margins.min() < 0 < margins.max()


def test_questions_about_one_text_are_read_together(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    real = probes_module.observe
    monkeypatch.setattr(
        probes_module, "observe", lambda model, tokens, *rest: read.append(len(tokens)) or real(model, tokens, *rest)
    )
    story = tuple(range(20))
    measure(lively(SMALL), [ContrastPair("k", story[:n], (1,), (n,), (40,)) for n in (5, 9, 20)])
    assert read == [1]


def test_no_probes_show_nothing() -> None:
    margins, weights = measure(lively(SMALL), [])
    assert margins.shape == (0,) and weights.shape == (0, SMALL.n_layers, SMALL.n_heads)


def test_a_probe_longer_than_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match="the model reads 1 to 24"):
        measure(lively(SMALL), [ContrastPair("a", tuple(range(24)), (3,), (1, 5), (2,))])
