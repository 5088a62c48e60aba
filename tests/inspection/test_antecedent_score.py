"""Relations promise: heads are chosen on one half of the probes and judged on the other, beside rules of place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from data.stories import KINDS, stories
from inspection import antecedent_score as module
from inspection.antecedent_score import AntecedentScore, halves, relations, sentence
from inspection.contrast_pairs import ContrastPair, locate
from tests.inspection.handmade import INDUCTION, PREVIOUS, handmade, repeats
from tests.inspection.test_activation_cache import SMALL, lively
from tests.inspection.test_contrast_pairs import Words, one_by_one, random_probes

N = 20
Patch = pytest.MonkeyPatch


def matches(count: int, seed: int = 1) -> list[ContrastPair]:
    """Repeats of changing lengths that break off in the second saying; the token after the first match decides."""
    probes = []
    for k in range(count):
        n = N - 2 * (k % 4)
        text = tuple(repeats(1, n, seed=seed + k)[0])
        end = n + 3 + k % 5
        probes.append(
            ContrastPair("match", text[:end], (end - n,), (text[end],), (text[1],), nearest=(end - n - k % 2,))
        )
    return probes


def check_by_hand() -> None:
    """The induction head reads what decides, whatever its distance: N - 1, N - 3, N - 5 or N - 7 back."""
    (found,) = relations(handmade(), matches(40))
    assert (found.kind, found.count, found.preferred, found.head) == ("match", 40, 1.0, INDUCTION)
    assert found.weight == pytest.approx(1, abs=1e-6) and found.passes
    choosing, judging = halves(range(40))
    distances = [N - 1 - 2 * (k % 4) for k in range(40)]
    most = max(sorted(set(distances)), key=lambda d: sum(distances[k] == d for k in choosing))
    assert found.offset == most
    assert found.offset_weight == pytest.approx(sum(distances[k] == most for k in judging) / 20)
    assert found.nearest_weight == pytest.approx(sum(k % 2 == 0 for k in judging) / 20)


def check_halves() -> None:
    """The half that chooses asks for the previous token, the other one for the first: good at one, bad at the other."""
    choosing, _ = halves(range(16))
    tokens = tuple(repeats(1, 12)[0])
    probes = [ContrastPair("k", tokens[:9], (7,) if k in choosing else (0,), (1,), (2,)) for k in range(16)]
    (found,) = relations(handmade(), probes)
    assert found.head == PREVIOUS and found.weight < 1e-6 and not found.passes
    assert found.offset == 1 and found.offset_weight == 0 and found.nearest_weight is None


def check_no_period() -> None:
    """Kinds that come in turns, as the two feelings of a story do, come in both halves."""
    for count in (40, 196):
        for half in module.halves(range(count)):
            assert 0.3 < sum(k % 2 for k in half) / len(half) < 0.7


def check_nearest_parts() -> None:
    """A noun of three tokens of which two decide counts two thirds, and an unknown one not at all."""
    probes = [replace(probe, evidence=(3, 4), nearest=(4, 5, 3)) for probe in matches(20)]
    probes[::5] = [replace(probe, nearest=()) for probe in probes[::5]]
    assert relations(handmade(), probes)[0].nearest_weight == pytest.approx(2 / 3)


CHECKS = (check_by_hand, check_halves, check_no_period, check_nearest_parts)


@pytest.mark.parametrize("check", CHECKS)
def test_relations_are_what_they_should_be(check: Callable[[], None]) -> None:
    check()


def all_of(probes: list[int]) -> tuple[list[int], list[int]]:
    return list(probes), list(probes)


def in_turns(probes: list[int]) -> tuple[list[int], list[int]]:
    return list(probes[::2]), list(probes[1::2])


MUTANTS: dict[str, tuple[str, object, Callable[[], None]]] = {
    "chosen and judged on the same": ("halves", all_of, check_halves),
    "every other one": ("halves", in_turns, check_no_period),
    "counted from the answer": ("at_offset", lambda p, d: float(len(p.tokens) - d in p.evidence), check_by_hand),
    "counted from the start": ("at_offset", lambda p, d: float(d in p.evidence), check_by_hand),
    "the rarest distance": ("best_offset", lambda probes: 0, check_by_hand),
    "any token of the noun": (
        "at_nearest",
        lambda p: float(bool(set(p.nearest) & set(p.evidence))),
        check_nearest_parts,
    ),
    "share of the evidence": (
        "at_nearest",
        lambda p: len(set(p.nearest) & set(p.evidence)) / len(p.evidence),
        check_nearest_parts,
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_rule_is_noticed(name: str, monkeypatch: Patch) -> None:
    target, wrong, check = MUTANTS[name]
    monkeypatch.setattr(module, target, wrong)
    with pytest.raises(AssertionError):
        check()


def test_a_relation_is_what_its_probes_say_one_by_one() -> None:
    model = lively(replace(SMALL, attention="sdpa"))
    probes = random_probes(13, ("pronoun", "place"), 24)
    found = relations(model, probes, 4)
    assert [relation.kind for relation in found] == ["pronoun", "place"]
    for relation, mine in zip(found, (probes[0::2], probes[1::2]), strict=True):
        seen = [one_by_one(model, probe) for probe in mine]
        choosing, judging = halves(range(len(mine)))
        head = divmod(int(torch.stack([seen[k][1] for k in choosing]).mean(0).argmax()), 4)
        assert (relation.head, relation.count) == (head, len(mine))
        assert relation.preferred == pytest.approx(sum(margin > 0 for margin, _ in seen) / len(mine))
        assert relation.weight == pytest.approx(sum(float(seen[k][1][head]) for k in judging) / len(judging), abs=1e-5)
        assert 0 < relation.preferred < 1 and relation.nearest_weight is None


@pytest.mark.parametrize("count", [2, 3, 10, 11])
def test_halves_part_the_probes_the_same_way_every_time(count: int) -> None:
    choosing, judging = halves(range(count))
    assert sorted(choosing + judging) == list(range(count))
    assert 0 <= len(choosing) - len(judging) <= 1 and judging
    assert (choosing, judging) == halves(range(count))


def test_probes_beyond_the_context_are_left_out() -> None:
    model = lively(SMALL)
    fits = [ContrastPair("a", tuple(range(24)), (3,), (1,), (2,))] * 3
    too_long = ContrastPair("a", tuple(range(24)), (3,), (1, 5), (2,))
    assert relations(model, [*fits, too_long])[0].count == 3
    assert relations(model, [fits[0], too_long]) == [], "one probe cannot both choose and judge"
    assert relations(model, []) == relations(model, [too_long]) == []


def test_the_rules_on_the_stories_are_known() -> None:
    """Where a story's grammar fixes the place of what decides, a rule without content finds it every time."""
    words, probes = Words(), []
    for story in stories("val", 60):
        for label in story.labels:
            spans = (label.answer, label.antecedents, label.wrong)
            located = locate(label.kind, story.text, *spans, words.encode, words.token_bytes, 0, label.nouns)
            probes.append(located)
    model = lively(replace(SMALL, context=128), vocab_size=max(len(words.pieces), 1))
    found = {relation.kind: relation for relation in relations(model, probes)}
    assert set(found) == set(KINDS)
    assert [found[kind].offset_weight for kind in ("induction", "place", "agreement")] == [1, 1, 1]
    assert [found[kind].offset for kind in ("induction", "agreement")] == [5, 3]
    assert 0.3 < found["cause"].offset_weight < 0.7 and 0.3 < found["crossing"].offset_weight < 0.7
    for kind in ("induction", "place", "agreement", "cause", "crossing"):
        assert found[kind].nearest_weight == 0
    nearest = found["pronoun"].nearest_weight
    assert nearest is not None and 0.2 < nearest < 0.8


def test_the_outcome_in_words() -> None:
    found = [
        AntecedentScore("pronoun", 107, 1.0, (1, 0), 0.794, 9, 0.312, 0.481),
        AntecedentScore("cause", 40, 0.5, (0, 1), 0.31, 1, 0.2, None),
        AntecedentScore("own", 12, 0.755, (0, 2), 0.5, 0, 0.0, 0.0),
    ]
    assert sentence(found) == [
        "pronoun: right in 100.0% of 107; head L1H0 reads the name that decides it "
        "(0.79; 9 tokens back 0.31; nearest noun 0.48)",
        "cause: right in 50.0% of 40; no head puts half of its weight on the deciding word "
        "(best L0H1, 0.31; 1 token back 0.20)",
        "own: right in 75.5% of 12; head L0H2 reads the word that decides it "
        "(0.50; the last token 0.00; nearest noun 0.00)",
    ]
