"""What the README promises of a whole quickstart. Slow."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import glassgpt
from common.files import read_metrics
from data.config import cache_folder
from data.stories import KINDS, POOLS, story
from model.generate import SamplingParams
from tests.data.story_parser import derivations
from tests.runs import process
from training.checkpoint import open_checkpoint
from training.device import get_dist_context
from training.text_generation import encode_prompt, generate_tokens

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the output of a whole quickstart."""
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    # The tests set OMP_WAIT_POLICY for a busy machine; a user does not.
    done = process("train.py", f"--run.dir={folder}", timeout=900, env={"OMP_WAIT_POLICY": ""})
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_loss_is_within_0_002_of_the_floor(quickstart: tuple[Path, str]) -> None:
    last = read_metrics(quickstart[0] / "metrics.jsonl")[-1]
    assert abs(last["final_val_loss"] - last["floor"]) < 0.002
    assert last["floor"] < last["trigram"] < last["unigram"] < last["uniform"]


def test_every_kind_of_contrast_pair_is_answered(quickstart: tuple[Path, str]) -> None:
    accuracy = dict(re.findall(r"^  (\w+): right in ([\d.]+)% of \d+;", quickstart[1], re.M))
    assert set(accuracy) == set(KINDS)
    assert min(map(float, accuracy.values())) >= 95, accuracy


@pytest.mark.parametrize(("temperature", "least"), [(1.0, 150), (0.8, 180)])
def test_samples_are_sentences_of_the_grammar(quickstart: tuple[Path, str], temperature: float, least: int) -> None:
    checkpoint = open_checkpoint(quickstart[0])
    model, tokenizer = checkpoint.load_model(get_dist_context("fp32")), checkpoint.tokenizer()
    prompt = encode_prompt(tokenizer, "", checkpoint.environment.starts_with_eot)
    params, count = SamplingParams(temperature), model.config.context - 1
    texts = list(map(tokenizer.decode, generate_tokens(model, tokenizer, prompt, count, 1, params, n_samples=200)))
    assert sum(any(derivations(story, POOLS, text)) for text in texts) >= least
    assert len(set(texts)) > 190


def test_headline_names_a_head_with_its_ablation_effect(quickstart: tuple[Path, str]) -> None:
    (headline,) = re.findall(r"^(Since step \d+, head L\dH\d.*)$", quickstart[1], re.M)
    assert "antecedent" in headline or "earlier" in headline
    effect = r"Ablating it \w+ the .* by [\d.]+ nats \[95% CI [\d.]+ to [\d.]+; .*\]; ablating a random other head of its layer"
    assert re.search(effect, headline), headline
    page = (quickstart[0] / "attention.html").read_text("utf-8")
    assert json.dumps(headline)[1:-1] in page and len(page) < 8_000_000


def test_without_the_headline_s_head_she_may_be_another(quickstart: tuple[Path, str]) -> None:
    (head,) = re.findall(r"^Since step \d+, head (L\dH\d)", quickstart[1], re.M)
    run = glassgpt.open(quickstart[0])

    (yelped,) = run.tokens(" yelped", start=False)

    def probability() -> float:
        p = np.exp(run.logits("Mia the fox met Tom the bear. She")[-1].astype(float))
        return float(p[yelped] / p.sum())

    before = probability()
    with run.ablate(head):
        assert before > 0.99 and probability() < 0.8


def test_verify_recomputes_the_attention_files(quickstart: tuple[Path, str]) -> None:
    done = process("attend.py", "verify", quickstart[0])
    assert done.returncode == 0, done.stdout
    assert "all checks passed" in done.stdout


def test_shakespeare_reaches_nanogpt_s_loss(tmp_path: Path) -> None:
    if not (cache_folder() / "tinyshakespeare.txt").is_file():
        pytest.skip("Tiny Shakespeare is not in the cache, and tests use no network")
    argv = ("configs/shakespeare_char.toml", f"--run.dir={tmp_path / 'run'}")
    done = process("train.py", *argv, timeout=900, env={"OMP_WAIT_POLICY": ""})
    assert done.returncode == 0, done.stderr
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["final_val_loss"] <= 1.898
