"""Stories: exact entropy, one derivation for each text, right labels, disjoint splits."""

import hashlib
import itertools
import math
import re
import statistics
from functools import cache
from typing import Any

import pytest

from data import stories as corpus
from data.story_grammar import Pool, Split, Story, Writer, entropy
from tests.data.story_parser import derivations

SPLITS: tuple[Split, ...] = ("train", "val")
POOLS = {
    "animal": Pool((("cat", "purrs"), ("dog", "barks"), ("cow", "moos")), ("does",)),
    "size": Pool((("big",), ("old",))),
}


@cache
def sample(split: Split) -> list[Story]:
    return list(corpus.stories(split, 6000, seed=77))


def combination(text: str) -> tuple[str, str, str]:
    """Who put which thing where."""
    match = re.search(r"(\w+) put the \w+ (\w+) into the (\w+)\.", text)
    assert match
    return match.group(1), match.group(2), match.group(3)


def rows(pool: str) -> list[str]:
    return [row[0] for row in corpus.POOLS[pool].rows]


def test_entropy_of_a_small_grammar_against_brute_force() -> None:
    def grammar(w: Writer) -> None:
        w.write("The <x:animal> and the <y:animal!x> are <z:size>.")
        w.choose(Writer.write, (" The <x> <x.does>.",), (" The <y> sleeps.",), p=(0.7, 0.3))

    generated = list(derivations(grammar, POOLS))
    assert len({story.text for story in generated}) == len(generated) == 3 * 2 * 2 * 2
    assert math.fsum(math.exp(story.log_prob) for story in generated) == pytest.approx(1)
    assert -math.fsum(math.exp(s.log_prob) * s.log_prob for s in generated) == pytest.approx(entropy(grammar, POOLS))


def test_another_word_is_drawn_from_the_same_group() -> None:
    pools = {"name": Pool((("Ann", "she"), ("Ben", "he"), ("Eve", "she"), ("Leo", "he")), ("he",), "he")}

    def grammar(w: Writer) -> None:
        w.write("<x:name> and <y:name!x>")

    texts = sorted(story.text for story in derivations(grammar, pools))
    assert texts == ["Ann and Eve", "Ben and Leo", "Eve and Ann", "Leo and Ben"]
    assert entropy(grammar, pools) == pytest.approx(math.log(4))
    with pytest.raises(AssertionError, match="equally large"):
        _ = Pool((("Ann", "she"), ("Eve", "she"), ("Leo", "he")), ("he",), "he").others


@pytest.mark.parametrize("split", SPLITS)
def test_entropy_is_the_mean_log_loss_on_either_split(split: Split) -> None:
    costs = [-story.log_prob for story in sample(split)]
    error = statistics.stdev(costs) / math.sqrt(len(costs))
    assert abs(statistics.mean(costs) - corpus.entropy()) < min(4 * error, 0.08)


def test_every_story_has_one_derivation() -> None:
    for story in sample("train")[:100] + sample("val")[:100]:
        assert list(derivations(corpus.story, corpus.POOLS, story.text)) == [story]


SOUNDS = {
    **{"fox": "yelped", "bear": "growled", "hen": "clucked", "frog": "croaked", "mouse": "squeaked"},
    **{"mole": "sniffed", "duck": "quacked", "goat": "bleated", "pig": "grunted", "dove": "cooed"},
}


def expected_answer(kind: str, before: str) -> str:
    """The answer from the text before it, by independent rules."""

    def last(pattern: str) -> Any:
        return re.findall(pattern, before)[-1]

    if kind == "induction":
        return last(rf"a {before.split()[-1]} (\w+)\.")
    if kind == "place":
        return combination(before)[2]
    if kind == "agreement":
        return "were" if last(r"The (\w+) near").endswith("s") else "was"
    if kind == "cause":
        mood = last(rf"{before.split()[-1]} was (happy|sad|sleepy|scared)")
        return {"happy": "sang", "sad": "cried", "sleepy": "yawned", "scared": "hid"}[mood]
    if kind == "gender":
        met, pronoun = re.fullmatch(r"(\w+ the \w+ met \w+ the \w+)\. (She|He)", before).groups()  # type: ignore[union-attr]
        she, he = sorted(met.split(" met "), key=lambda animal: animal.split()[0] in rows("name")[1::2])
        return SOUNDS[(she if pronoun == "She" else he).split()[-1]]
    if kind == "crossing":
        animal, way, why = last(r"The (\w+) did not cross the (\w+) because it was too (\w+)")
        return animal if why in ("tired", "slow", "lazy") else way
    giver, taker, why = last(r"(\w+) (?:gave a pie to|shared a cake with) (\w+) because \w+ was (\w+)")
    return giver if why in ("rich", "full", "generous") else taker


def test_labels_have_answer_antecedent_and_wrong_candidate() -> None:
    for story in itertools.chain(sample("train")[:500], sample("val")[:500]):
        text = story.text
        for label in story.labels:
            answer, antecedent = text[slice(*label.answer)], text[slice(*label.antecedents[-1])]
            assert answer == " " + expected_answer(label.kind, text[: label.answer[0]])
            assert label.antecedents[-1][1] <= label.answer[0]
            assert antecedent.startswith(" ") or label.antecedents[-1][0] == 0
            assert not text[label.answer[1]].isalnum() and not text[label.antecedents[-1][1]].isalnum()
            if antecedent == answer:  # every earlier mention and nothing else
                mentions = [text[slice(*span)].split(" the ")[0].strip() for span in label.antecedents]
                assert mentions == re.findall(rf"\b{answer.strip()}\b", text[: label.answer[0]])
            assert label.wrong != answer and label.wrong.startswith(" ")
            if label.kind in ("pronoun", "place", "crossing"):  # families with two candidates in the story
                assert label.wrong.strip() in re.findall(r"\w+", text[: label.answer[0]])
            assert (antecedent == answer) == (label.kind not in ("agreement", "cause", "gender"))
            assert label.kind != "agreement" or antecedent.endswith("s") == (answer == " were")


def test_wrong_candidates_are_not_in_the_grammar() -> None:
    for story in sample("train")[:40]:
        for label in story.labels:
            text = story.text[: label.answer[0]] + label.wrong + story.text[label.answer[1] :]
            assert not list(derivations(corpus.story, corpus.POOLS, text))


NOUNS = ("name", "thing", "box", "animal", "way", "one", "many", "near_one", "near_many")


def test_labels_have_every_noun_before_the_answer() -> None:
    nouns = {word for pool in NOUNS for word in rows(pool)}
    for story in itertools.chain(sample("train")[:300], sample("val")[:300]):
        for label in story.labels:
            before = story.text[: label.answer[0]]
            mentions = [before[slice(*span)] for span in label.nouns]
            assert list(label.nouns) == sorted(set(label.nouns))
            assert all(
                mention.startswith(" ") or start == 0 for mention, (start, _) in zip(mentions, label.nouns, strict=True)
            )
            first_words = [mention.split()[0] for mention in mentions]
            assert first_words == [word for word in re.findall(r"\w+", before) if word in nouns]
            kinds = [mention.split(" the ")[1] for mention in mentions if " the " in mention]
            introduced = re.findall(r"[A-Z]\w+ the (\w+)", before)
            assert kinds == introduced, "an animal is introduced, as `Mia the fox`, and that is one mention"
            assert label.answer not in label.nouns


def test_nearest_noun_is_no_shortcut() -> None:
    is_nearest: dict[str, list[bool]] = {kind: [] for kind in corpus.KINDS}
    for story in sample("val"):
        for label in story.labels:
            is_nearest[label.kind].append(label.nouns[-1] in label.antecedents)
    for kind in ("pronoun", "gender"):
        assert statistics.mean(is_nearest.pop(kind)) == pytest.approx(0.5, abs=0.05)
    assert not any(any(nearest) for nearest in is_nearest.values())


def test_pronoun_is_resolved_by_meaning_alone() -> None:
    pronoun_of = {row[0]: row[3] for row in corpus.POOLS["name"].rows}
    for story in sample("val"):
        for label in (label for label in story.labels if label.kind == "pronoun"):
            pronoun = re.findall(r"because (he|she) was", story.text[: label.answer[0]])[-1]
            assert pronoun == pronoun_of[story.text[slice(*label.answer)].strip()] == pronoun_of[label.wrong.strip()]


def test_splits_share_no_combination() -> None:
    combinations = {split: {combination(story.text) for story in sample(split)} for split in SPLITS}
    assert not combinations["train"] & combinations["val"]
    assert len(combinations["val"]) == 100 and 890 <= len(combinations["train"]) <= 900
    names, things, boxes = rows("name"), rows("thing"), rows("box")
    for name, thing, box in combinations["train"] | combinations["val"]:
        held_out = (names.index(name) + things.index(thing) + boxes.index(box)) % 10 == 0
        assert held_out == ((name, thing, box) in combinations["val"])
    assert all(story.held_out == (split == "val") for split in SPLITS for story in sample(split))


def test_stories_of_a_seed_never_change() -> None:
    first = [story.text for split in SPLITS for story in corpus.stories(split, 100)]
    assert first[:50] == [story.text for story in corpus.stories("train", 50)]
    assert first != [story.text for split in SPLITS for story in corpus.stories(split, 100, seed=2)]
    assert hashlib.sha256("\n".join(first).encode()).hexdigest()[:16] == "c00a98fe22433ebe"
