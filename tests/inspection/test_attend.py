"""attend.py's commands promise: what the files of a run hold, in words and as plain data, and one line for a mistake.

The runs here are written by hand, so every number that a command tells is known.
"""

from __future__ import annotations

import csv
import gc
import io
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from inspection.ablation_results import TABLES, AblationEffects, AblationResults, Interval
from inspection.attention_file import AttentionRecord, read_attention_file, write_attention_file
from inspection.run_reader import RunFiles
from inspection.terminal import DISCLAIMER
from tests.runs import ROOT, TINY, said, script

STEPS = (100, 200, 300)
WORDS = [b"", b" Mia", b" the", b" fox", b" met", b" Tom", b" the", b" dog"]
TOKEN_IDS = {word: k for k, word in enumerate([*dict.fromkeys(WORDS)])}
SENTENCE = "By step 200 head L1H1 reads the token after an earlier match (0.90)."
COMMANDS = ("summary", "heads", "token", "timeline", "compare", "verify", "page", "figures")


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """`script` collects garbage after each call; here it need not look through all of torch a hundred times."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def seen(words: list[bytes], seed: int, top: bool = True) -> SimpleNamespace:
    """A capture of random weights."""
    draw, T = np.random.default_rng(seed), len(words)
    pattern = draw.exponential(size=(2, 2, T, T)) ** 3 * np.tril(np.ones((T, T)))
    pattern /= pattern.sum(axis=-1, keepdims=True)
    found = SimpleNamespace(
        tokens=np.array([TOKEN_IDS.setdefault(word, len(TOKEN_IDS)) for word in words]),
        pattern=pattern,
        value_norms=draw.random((2, 2, T)) + 0.1,
        loss=draw.random(T - 1),
    )
    if top:
        found.top_tokens, found.top_probs = (
            np.tile(np.arange(5), (T, 1)),
            np.tile([0.5, 0.25, 0.125, 0.0625, 0.03], (T, 1)),
        )
    return found


def write(
    path: Path,
    texts: list[Any],
    metadata: dict[str, str],
    dtype: str = "f16",
    scores: dict[str, Any] | None = None,
    token_bytes: Any = None,
) -> None:
    """An attention file of (name, capture, words); the ids of the words are those of `TOKEN_IDS`."""
    known = {token: word for word, token in TOKEN_IDS.items()}
    records = [AttentionRecord.from_cache(name, capture, known.__getitem__) for name, capture, _ in texts]
    write_attention_file(path, records, metadata, scores, dtype)


def write_step(run: Path, step: int, scores: dict[str, Any] | None = None, words: list[bytes] = WORDS) -> None:
    """A dump: the sample of the moment, a held-out text, a repeat. L1H1 becomes an induction head by step 200."""
    if scores is None:
        formed = {100: 0.1, 200: 0.5, 300: 0.9}.get(step, 0.9)
        scores = {
            "previous_token": np.array([[0.8, 0.1], [0.2, 0.3]]),
            "induction": np.array([[0.0, 0.01], [0.02, formed]]),
            "distance": np.array([[1.0, 4.0], [3.0, 2.0]]) * step / 300,
            "antecedent.pronoun": np.array([[0.1, 0.2], [0.7, 0.3]]),
        }
    moment = [*words[:3], f" {step}".encode()]
    texts = [
        ("sample", seen(moment, step), moment),
        ("held-out 1", seen(words, 7 + step), words),
        ("repeat 1", seen(WORDS[:7], step), WORDS[:7]),
    ]
    (run / "attention").mkdir(parents=True, exist_ok=True)
    metadata = {"step": str(step), "weights_sha256": f"w{step}"}
    write(run / "attention" / f"{step:06d}.safetensors", texts, metadata, "f32", scores, WORDS.__getitem__)


def effects(value: float, margin: float, unit: str = "nats/token") -> AblationEffects:
    """AblationEffects with intervals half a nat wide, 0.01 more from head to head; `margin`: how far above another head's."""

    def all_heads(number: float) -> Any:
        found = [number + 0.01 * k for k in range(4)]
        cells = [Interval(number, number - 0.25, number + 0.25) for number in found]
        return (tuple(cells[:2]), tuple(cells[2:]))

    tables = dict.fromkeys(TABLES, all_heads(value)) | {"control_zero": all_heads(value - margin)}
    return AblationEffects(
        unit, 3.0, 8, **tables | {name: all_heads(margin) for name in ("difference_zero", "difference_mean")}
    )


def write_evidence(run: Path, step: int = 300) -> None:
    measures = {
        "repeats": effects(1.5, 1.0),
        "corpus": effects(0.5, 0.4),
        "logit_diff.pronoun": effects(0.2, 0.0, "nats"),
    }
    AblationResults(step, f"w{step}", 1, measures).save(run / "attention" / "ablations.json")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps, with evidence and claims."""
    run = tmp_path_factory.mktemp("runs") / "mine"
    for step in STEPS:
        write_step(run, step)
    write_evidence(run)
    (run / "attention" / "findings.json").write_text(json.dumps({"headline": SENTENCE, "findings": []}))
    (run / "config.toml").write_text("")
    (run / "metrics.jsonl").write_text('{"step": 100, "val_loss": 3.5}\n{"step": 200, "val_loss": 2.5}\n{"ste')
    return run


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(made, tmp_path / "mine"))


def told(*argv: object) -> str:
    done = script("attend.py", *argv)
    assert done.returncode == 0, done.stderr
    return done.stdout


def data(*argv: object) -> Any:
    return json.loads(told(*argv, "--json"), parse_constant=pytest.fail)


def rows(*argv: object) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(told(*argv, "--csv"))))


def line_with(text: str, *words: str) -> str:
    """The one line that holds all the words."""
    (line,) = [line for line in text.splitlines() if all(word in line for word in words)]
    return line


# summary


def test_summary_says_the_sentence_and_the_best_heads(made: Path) -> None:
    out = told("summary", made)
    assert out.startswith(SENTENCE) and DISCLAIMER in out
    assert "3 steps, 100 to 300, shown is step 300" in out
    assert "3 of 4 to 8 tokens: sample, held-out 1, repeat 1" in out
    line = line_with(out, "induction", "L1H1", "+1.53")
    assert line.split()[2] == "0.90" and line.count("+1.530 [+1.280, +1.780]") == 2
    assert "+0.530 [+0.280, +0.780]" in line  # another head of its layer
    assert line_with(out, "distance", "L0H1", "4.00", "+0.510 [+0.260, +0.760]")


def test_a_high_weight_without_effect_is_marked(made: Path) -> None:
    out = told("summary", made)
    assert "0.70!" in line_with(out, "reads pronoun", "L1H0", "[")
    assert "! L1H0 reads pronoun 0.70: high weight, no effect" in out
    assert out.count("no effect") == 1  # the distance is large, but no weight; the others matter
    found = {one["score"]: one for one in data("summary", made)["best"]}
    assert found["antecedent.pronoun"]["mark"] == "high weight, no effect"
    assert found["antecedent.pronoun"]["zero"] == pytest.approx([0.22, -0.03, 0.47])
    assert found["induction"]["label"] == "supported" and found["induction"]["mark"] == ""


def test_an_effect_that_any_head_has_is_marked_too(run: Path) -> None:
    alike = {"logit_diff.pronoun": effects(0.9, 0.0), "corpus": effects(0.9, 0.0)}
    AblationResults(300, "w300", 1, alike).save(run / "attention" / "ablations.json")
    out = told("summary", run)
    assert "! L1H0 reads pronoun 0.70: high weight, no effect beyond that of another head" in out
    assert out.count("high weight") == 1  # a long distance is no weight


def test_without_evidence_it_says_so(run: Path) -> None:
    for name in ("ablations", "findings"):
        (run / "attention" / f"{name}.json").unlink()
    out = told("summary", run)
    assert "was not measured" in out and DISCLAIMER in out and "no effect" not in out
    assert data("summary", run)["headline"] is None
    assert {one["zero"] for one in data("heads", run)["heads"]} == {None}


def test_effects_of_other_weights_are_said_to_be(run: Path) -> None:
    assert "effects were measured at step 300, the scores are of step 200" in told("heads", run, "--step=200")
    write_step(run, 400)
    write_evidence(run, 400)
    assert "effects were measured" not in told("summary", run)
    file = run / "attention" / "ablations.json"
    file.write_text(file.read_text().replace("w400", "w401"))
    assert "the effects are not of these weights" in told("summary", run)


# heads


def test_heads_shows_every_score_of_every_head_with_its_effect(made: Path) -> None:
    out = told("heads", made)
    assert all(re.search(rf"^{head} ", out, re.M) for head in ("L0H0", "L0H1", "L1H0", "L1H1"))
    assert line_with(out, "L1H0", "0.70", "+0.22!")
    records = data("heads", made)["heads"]
    assert len(records) == 4 * 4
    effect = {"previous_token": 1.5, "induction": 1.5, "distance": 0.5, "antecedent.pronoun": 0.2}
    dump = read_attention_file(made / "attention" / "000300.safetensors")
    for one in records:
        layer, head = int(one["head"][1]), int(one["head"][3])
        assert one["value"] == float(dump.scores[one["score"]][layer, head])
        assert one["zero"][0] == pytest.approx(effect[one["score"]] + 0.01 * (2 * layer + head))
    measured = {one["score"]: (one["measure"], one["unit"]) for one in records}
    assert measured == {
        "previous_token": ("repeats", "nats/token"),
        "induction": ("repeats", "nats/token"),
        "distance": ("corpus", "nats/token"),
        "antecedent.pronoun": ("logit_diff.pronoun", "nats"),
    }


def test_one_score_is_sorted(made: Path) -> None:
    out = told("heads", made, "--score", "antecedent.pronoun", "--step", "100")
    assert re.findall(r"^(L\dH\d) ", out, re.M)[:4] == ["L1H0", "L1H1", "L0H1", "L0H0"]
    table = rows("heads", made, "--score", "antecedent.pronoun")
    assert [row["head"] for row in table] == ["L1H0", "L1H1", "L0H1", "L0H0"]
    assert float(table[0]["difference_mean"]) == 0.02 and float(table[0]["difference_mean_low"]) == -0.23


# token


def test_token_tells_what_each_head_reads(made: Path) -> None:
    found = data("token", made, "--text=held-out 1", "--position=5", "--step=200")
    text = read_attention_file(made / "attention" / "000200.safetensors").texts[1]
    row = text.pattern()[:, :, 5]
    assert found["token"] == " Tom" and found["loss"] == float(text.loss[4])
    assert len(found["reads"]) == 4 * 3
    for one in found["reads"]:
        weights = row[int(one["head"][1]), int(one["head"][3])]
        assert one["weight"] == weights[one["key"]] == np.sort(weights)[-one["rank"]]
        assert one["token"].encode() == WORDS[one["key"]] or one["key"] == 0
        assert one["back"] == 5 - one["key"]
    assert [one["probability"] for one in found["next"]] == pytest.approx([0.5, 0.25, 0.125, 0.0625, 0.03])


def test_token_in_words(made: Path) -> None:
    out = told("token", made, "--text=held-out 1", "--position=5")
    text = read_attention_file(made / "attention" / "000300.safetensors").texts[1]
    weights = text.pattern()[1, 0, 5]
    best = int(weights.argmax())
    shown = WORDS[best].decode() or "<end>"
    assert f'"{shown}" {weights[best] * 100:.1f} % (' in line_with(out, "L1H0")
    assert f'token 5 is " Tom": its loss {text.loss[4]:.3f} nats; then comes " the"' in out
    assert 'expects next: "<end>" 50.0 %, " Mia" 25.0 %, " the" 12.5 %' in out
    assert " met[ Tom] the" in out


def test_token_finds_a_word(made: Path) -> None:
    assert data("token", made, "--text=held-out 1", "--find=fox")["position"] == 3
    assert data("token", made, "--text=held-out 1", "--find=Mia the fox met")["position"] == 4
    found = told("token", made, "--text=held-out 1", "--find", "the")
    assert "'the' ends at tokens 2, 6; the last one is shown" in found and "token 6 is" in found


def test_value_weighted_readings_sum_to_one(made: Path) -> None:
    options = ("--text=held-out 1", "--position=7", "--head=L0H1", "--value_weighted")
    found = data("token", made, *options)["reads"]
    text = read_attention_file(made / "attention" / "000300.safetensors").texts[1]
    moved = text.pattern()[0, 1, 7] * text.value_norms[0, 1]
    assert sum(one["weight"] for one in found) == pytest.approx(1)
    assert [one["weight"] for one in found] == pytest.approx(np.sort(moved / moved.sum())[::-1], rel=1e-5)
    plain = data("token", made, *options[:-1])["reads"]
    assert [one["weight"] for one in plain] != [one["weight"] for one in found]


def test_a_file_without_likely_tokens_says_so(tmp_path: Path) -> None:
    file = tmp_path / "own.safetensors"
    write(file, [("mine", seen(WORDS, 1, top=False), WORDS)], {"step": "5"})
    assert "were not kept" in told("token", file)
    assert data("token", file)["next"] is None and data("token", file)["step"] == 5
    assert data("token", file, "--position=0")["loss"] is None


# timeline


def test_timeline_says_when_a_head_learned(made: Path) -> None:
    out = told("timeline", made, "--score=induction")
    assert line_with(out, "L1H1").split() == ["L1H1", "▁▅█", "0.10", "0.90", "0.90", "200"]
    assert line_with(out, "L0H0").split()[-1] == "never"
    found = {(one["head"], one["score"]): one for one in data("timeline", made)["timelines"]}
    assert len(found) == 4 * 4
    one = found["L1H1", "induction"]
    assert one["half_step"] == 200 and one["values"] == pytest.approx([0.1, 0.5, 0.9])
    far = found["L0H1", "distance"]  # grows without bound: half of its own farthest
    assert far["half"] == pytest.approx(2) and far["half_step"] == 200
    assert len(rows("timeline", made, "--score=induction")) == 4 * 3


def test_timeline_without_a_score_shows_the_best_heads(made: Path) -> None:
    out = told("timeline", made)
    assert re.findall(r"(L\dH\d)", out) == ["L0H0", "L1H1", "L0H1", "L1H0"]
    assert len(re.findall(r"L\dH\d", told("timeline", made, "--score=all"))) == 16


def test_a_score_that_came_later_has_a_gap(run: Path) -> None:
    write_step(run, 400, {"induction": np.full((2, 2), 0.5), "fresh": np.ones((2, 2))})
    found = {(one["head"], one["score"]): one for one in data("timeline", run)["timelines"]}
    assert found["L0H0", "fresh"]["values"] == [None, None, None, 1.0]
    assert found["L0H0", "distance"]["last"] is None


# compare


def test_compare_is_signed(made: Path) -> None:
    found = data("compare", made)  # the newest against the oldest
    assert (found["first"]["step"], found["second"]["step"], found["identical"]) == (300, 100, False)
    changed = {(one["head"], one["score"]): one["difference"] for one in found["scores"]}
    assert changed["L1H1", "induction"] == pytest.approx(0.8) and changed["L0H0", "induction"] == 0
    back = data("compare", made, "--step=100", "--against=300")["scores"]
    assert {(one["head"], one["score"]): -one["difference"] for one in back} == changed
    assert "+0.80" in line_with(told("compare", made), "L1H1")


def test_patterns_are_compared_where_the_tokens_are_the_same(made: Path) -> None:
    found = data("compare", made, "--step=200", "--against=100")
    assert {one["text"] for one in found["patterns"]} == {"held-out 1", "repeat 1"}
    assert found["notes"] == ["text 'sample' has other tokens in the two: compared by scores only"]
    a, b = (
        read_attention_file(made / "attention" / f"000{step}.safetensors").texts[1].pattern() for step in (200, 100)
    )
    for one in found["patterns"]:
        if one["text"] == "held-out 1":
            difference = np.abs(a - b)[int(one["head"][1]), int(one["head"][3])]
            assert one["difference"] == pytest.approx(difference.sum() / 36)
            assert one["moved"] == pytest.approx(difference.sum(axis=-1).mean() / 2)
    assert "compared by scores only" in told("compare", made, "--text=sample")


def test_a_run_against_itself_is_all_zeros_and_says_so(made: Path) -> None:
    for options in ((made,), ("--against=300",), ("--step=200", "--against=200")):
        out, found = told("compare", made, *options), data("compare", made, *options)
        assert "there is no difference at all" in out and found["identical"] is True
        assert {one["difference"] for one in [*found["scores"], *found["patterns"]]} == {0.0}
    table = rows("compare", made, made)
    assert {float(row["difference"]) for row in table} == {0.0} and len(table) == 4 * 4 + 3 * 4


def test_two_runs_are_compared(made: Path, tmp_path: Path) -> None:
    write_step(tmp_path / "b", 50, {"induction": np.zeros((2, 2)), "other": np.zeros((2, 2))})
    found = data("compare", made, tmp_path / "b", "--step=100")
    assert found["second"] == {"run": str(tmp_path / "b"), "step": 50}
    assert {one["score"] for one in found["scores"]} == {"induction"}
    assert any("only one of the two has the scores distance, other" in note for note in found["notes"])


def test_other_heads_cannot_be_compared(made: Path, tmp_path: Path) -> None:
    (tmp_path / "c" / "attention").mkdir(parents=True)
    write(tmp_path / "c" / "attention" / "000100.safetensors", [], {}, scores={"induction": np.zeros((1, 3))})
    line = said(script("attend.py", "compare", made, tmp_path / "c"), 2)
    assert "2 layers of 2 heads" in line and "1 layers of 3 heads: they cannot be compared" in line


# page and figures


def test_page_is_built(run: Path, tmp_path: Path) -> None:
    assert str(run / "attention.html") in told("page", run)
    page = (run / "attention.html").read_text("utf-8")
    assert SENTENCE in page and "held-out 1" in page
    told("page", run, f"--against={run}", f"--out={tmp_path / 'two.html'}")
    assert (tmp_path / "two.html").stat().st_size > len(page)
    assert said(script("attend.py", "page", run, "--out=/proc/nowhere/x.html"), 6)


def test_figures_are_drawn(run: Path, tmp_path: Path) -> None:
    out = told("figures", run)
    names = {"attention.png", "head.png", "timeline.png", "phase_change.png"}
    assert {path.name for path in (run / "figures").iterdir()} == names
    assert all((run / "figures" / name).read_bytes().startswith(b"\x89PNG") for name in names)
    assert out.count("figure  ") == 4
    told("figures", run, "--format=svg", f"--out={tmp_path / 'svg'}", "--score=all")
    assert len(list((tmp_path / "svg").glob("timeline-*.svg"))) == 4
    drawn = ["".join(text.itertext()) for text in ElementTree.parse(tmp_path / "svg" / "phase_change.svg").iter()]
    assert any("induction score of L1H1" in text for text in drawn) and any("loss on repeats" in text for text in drawn)
    assert "--out" in said(script("attend.py", "figures", run, "--out=/proc/nowhere"), 6)


def test_the_loss_on_repeats_is_that_of_the_second_saying(made: Path) -> None:
    from inspection.commands.plot import repeats_loss, validation_loss

    name, steps, values = repeats_loss(RunFiles.open(made)) or ("", [], [])
    losses = [read_attention_file(made / "attention" / f"000{step}.safetensors").texts[2].loss for step in STEPS]
    assert (name, steps) == ("loss on repeats", list(STEPS))
    assert values == pytest.approx([loss[4:].mean() for loss in losses])  # first, r1 r2 r3, r1 r2 r3: r2 and r3
    assert validation_loss(RunFiles.open(made)) == ("validation loss", [100, 200], [3.5, 2.5])


# verify


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run of two evaluations, with a checkpoint at each."""
    root = tmp_path_factory.mktemp("trained")
    (root / "text.txt").write_text("The fox met the hen. The hen met the fox. " * 40)
    done = script("train.py", *TINY, f"--data.source={root / 'text.txt'}", f"--run.dir={root / 'run'}")
    assert done.returncode == 0, done.stderr
    return root / "run"


def test_verify_computes_everything_again(trained: Path) -> None:
    """Of the first step, before training, no checkpoint is kept: it is checked by itself, and that is said."""
    found = data("verify", trained)
    assert found["ok"] is True and found["without_checkpoint"] == [0]
    assert {one["step"] for one in found["checks"]} == {0, 3, 6} and all(one["ok"] for one in found["checks"])
    names = {one["check"] for one in found["checks"] if one["step"] == 6}
    assert {"weights_sha256", "tokenizer_sha256", "attention recomputed", "scores recomputed"} <= names
    assert "attention recomputed" not in {one["check"] for one in found["checks"] if one["step"] == 0}
    first = trained / "attention" / "000000.safetensors"
    out = told("verify", first)
    assert "no checkpoint is kept of step 0" in out and "all checks hold" in out
    assert {row["ok"] for row in rows("verify", first)} == {"True"}


def damage_weights(run: Path) -> None:
    """Another pattern under the same name: rows sum to 1, but the model has not computed them."""
    file = run / "attention" / "000006.safetensors"
    dump = read_attention_file(file)
    texts = []
    for text in dump.texts:
        pattern = text.pattern()
        pattern[:, :, 1:, [0, 1]] = pattern[:, :, 1:, [1, 0]]
        rest = dict(tokens=text.tokens, value_norms=text.value_norms, loss=text.loss)
        texts.append((text.name, SimpleNamespace(pattern=pattern, **rest), text.token_bytes))
    write(file, texts, dump.metadata, scores=dump.scores)


def cut(run: Path) -> None:
    file = run / "attention" / "000006.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def other_step(run: Path) -> None:
    folder = run / "attention"
    shutil.copy(folder / "000003.safetensors", folder / "000006.safetensors")


@pytest.mark.parametrize(
    ("damage", "check"),
    [(damage_weights, "attention recomputed"), (cut, "can be read"), (other_step, "weights_sha256")],
)
def test_verify_finds_what_is_wrong(trained: Path, tmp_path: Path, damage: Callable[[Path], None], check: str) -> None:
    copy = shutil.copytree(trained, tmp_path / "run")
    damage(copy)
    done = script("attend.py", "verify", copy / "attention" / "000006.safetensors")
    said(done, 4)
    assert re.search(rf"FAIL  step 6: .*{check}", done.stdout)


def test_one_bad_file_does_not_hide_the_others(run: Path) -> None:
    file = run / "attention" / "000200.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    done = script("attend.py", "verify", run, "--json")
    assert done.returncode == 4
    found = json.loads(done.stdout)
    assert found["ok"] is False and {one["step"] for one in found["checks"]} == set(STEPS)
    assert [one["step"] for one in found["checks"] if one["check"] == "the file can be read" and not one["ok"]] == [200]


# an own text


def test_an_own_text_gets_a_page_over_the_kept_checkpoints(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from inspection import page_builder as pages

    write_page, given = pages.write_page, []
    monkeypatch.setattr(pages, "write_page", lambda *args: [given.append(args), write_page(*args)][1])
    out = told(trained, "--prompt", "The hen met", f"--out={tmp_path}")
    (page,) = tmp_path.glob("000006-the-hen-met-*.html")
    assert f"page     {page}" in out
    text = page.read_text("utf-8")
    assert "The hen met" in text
    (whole,) = given[0][1]
    assert [dump.metadata["step"] for dump in whole.dumps] == ["3", "6"]
    assert [dump.texts[0].queries is not None for dump in whole.dumps] == [False, True]
    told(trained / "checkpoints" / "000003", "--prompt", "The hen met", f"--out={tmp_path / 'one'}")
    (alone,) = (tmp_path / "one").glob("000003-*.html")
    assert alone.stat().st_size < page.stat().st_size


# mistakes


def test_a_switch_may_stand_before_the_run(made: Path) -> None:
    assert told("heads", "--json", made) == told("heads", made, "--json")
    assert told("compare", "--json", made, made) == told("compare", made, "--other", made, "--json")


def test_the_folder_may_be_named_in_several_ways(made: Path, run: Path) -> None:
    whole = told("summary", made)
    assert told("summary", made / "attention") == whole
    (run / "checkpoints" / "000200").mkdir(parents=True)
    (run / "checkpoints" / "000200" / "manifest.json").write_text("{}")
    for path in (run / "checkpoints" / "000200", run / "attention" / "000200.safetensors"):
        found = data("summary", path)
        assert found["step"] == 200 and found["run"].endswith("mine") and found["steps"] == list(STEPS)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["sumary", "."], "did you mean summary?"),
        (["nonsense", "."], "the commands are summary, heads"),
        (["heads", "--scor=x", "."], "did you mean --score?"),
        (["heads", ".", "--score"], "--score needs a value"),
        (["heads"], "run is missing"),
        (["timeline", ".", "--json", "--csv"], "do not go together"),
        (["timeline", ".", "--json=1"], "it takes no value"),
        (["token", ".", "--position=x"], "it takes a whole number"),
        (["token", ".", "--head=1.2"], "such as L1H2"),
        (["token", ".", "--find=a", "--position=1"], "do not go together"),
        (["heads", ".", "--step=-4"], "--step is -4"),
        (["compare", ".", "--against=-4"], "--against is -4"),
        (["figures", ".", "--format=pngg"], "did you mean png?"),
    ],
)
def test_a_mistake_is_answered_before_anything_is_read(argv: list[str], words: str) -> None:
    assert words in said(script("attend.py", *argv), 2)


def test_the_command_comes_first(made: Path) -> None:
    assert f"attend.py summary {made}" in said(script("attend.py", made, "summary"), 2)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["heads", "--score=inducton"], "did you mean induction? it has previous_token, induction"),
        (["timeline", "--score=inducton"], "did you mean induction?"),
        (["figures", "--score=inducton"], "did you mean induction?"),
        (["heads", "--step=240"], "the nearest are 100, 200, 300"),
        (["compare", "--against=5"], "no attention file of step 5"),
        (["token", "--text=held-out"], "did you mean held-out 1?"),
        (["compare", "--text=nothing"], "it has sample, held-out 1, repeat 1"),
        (["token", "--find=fox"], "it stands in --text 'held-out 1'"),
        (["token", "--find=zebra"], "'zebra' is not in text 'sample'; the text begins ' Mia the 300'"),
        (["token", "--position=4"], "has tokens 0 to 3"),
        (["token", "--head=L2H0"], "L0H0 to L1H1"),
    ],
)
def test_what_a_run_does_not_have_is_named(made: Path, tmp_path: Path, argv: list[str], words: str) -> None:
    out = [f"--out={tmp_path}"] if argv[0] == "figures" else []
    assert words in said(script("attend.py", argv[0], made, *argv[1:], *out), 2)


def test_folders_without_attention_are_told_apart(made: Path, tmp_path: Path) -> None:
    def line(path: Path) -> str:
        return said(script("attend.py", "summary", path), 4)

    assert "did you mean" in line(made.parent / "mien") and "mine" in line(made.parent / "mien")
    assert "is no folder; give a run folder" in line(tmp_path / "nothing")
    assert f"holds 1: give one of them, such as {made}" in line(made.parent)
    (tmp_path / "bare").mkdir()
    assert "holds no attention files; train with" in line(tmp_path / "bare")
    (tmp_path / "bare" / "config.toml").write_text("")
    assert "--prompt" in line(tmp_path / "bare")


def test_damage_is_one_line(run: Path) -> None:
    for name in ("ablations.json", "findings.json"):
        file = run / "attention" / name
        whole = file.read_text()
        for text in ("[" * 100_000, '{"headline": 3, "findings": []}'):
            file.write_text(text)
            assert name in said(script("attend.py", "summary", run), 4)
        file.write_text(whole)
    file = run / "attention" / "000300.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    for name in ("summary", "timeline", "compare", "page"):
        assert "000300.safetensors is no attention file that can be read" in said(script("attend.py", name, run), 4)


def test_an_older_run_without_scores_still_shows_its_tokens(tmp_path: Path) -> None:
    write_step(tmp_path / "old", 100, {})
    assert "hold no scores" in told("summary", tmp_path / "old")
    for name in ("heads", "timeline"):
        assert "hold no scores" in said(script("attend.py", name, tmp_path / "old"), 4)
    assert "L0H0" in told("token", tmp_path / "old")
    assert "no difference at all" in told("compare", tmp_path / "old")


# anywhere


PROGRAM = """
import sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError("there is no torch here", name=name)

sys.meta_path.insert(0, NoTorch())
import attend
from common.errors import run_main
run_main(attend.main)
"""


def without_torch(*argv: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, *map(str, argv)]
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, env=env)


@pytest.mark.parametrize("name", ["summary", "heads", "token", "timeline", "compare"])
def test_no_torch_and_no_fine_terminal_is_needed(made: Path, name: str) -> None:
    done = without_torch(name, made)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii() and "L1H1" in done.stdout


def test_every_command_has_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    import attend

    for name in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            attend.main([name, "--help"])
        out = capsys.readouterr().out
        assert not stop.value.code and f"python attend.py {name} RUN" in out and "A run folder" in out
    with pytest.raises(SystemExit):
        attend.main(["--help"])
    out = capsys.readouterr().out
    assert all(f"{name} " in out for name in COMMANDS) and "--prompt" in out


def test_names_and_tokens_cannot_drive_a_terminal(tmp_path: Path) -> None:
    words = [b"\x1b[31m", b"\xff", b"\n", "\u202e".encode(), b'"', b"=1+1"]
    run, name = tmp_path / "a\x1b[2Jb", "sample \x1b[2J\n"
    (run / "attention").mkdir(parents=True)
    for step in (1, 2):
        file = run / "attention" / f"00000{step}.safetensors"
        scores = {"bad \x1b[2J": np.ones((2, 2))}
        write(file, [(name, seen(words, step), words)], {"step": "2"}, scores=scores, token_bytes=words.__getitem__)
    for name, *options in (
        *(("summary",), ("summary", "--json"), ("heads",), ("token",), ("token", "--csv")),
        *(("timeline",), ("compare", "--csv"), ("token", "--text=x")),
    ):
        done = script("attend.py", name, run, *options)
        assert done.returncode == (2 if "x" in str(options[-1:])[-4:] else 0), done.stderr
        assert all(c.isprintable() or c == "\n" for c in done.stdout + done.stderr), name
