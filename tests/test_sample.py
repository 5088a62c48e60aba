"""sample.py: weight dtypes, prompts and batches (more of it is in test_scripts.py)."""

import io
import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.tokenizer import ByteTokenizer
from model.generate import SamplingParams
from tests.model.helpers import normal, random_model
from tests.runs import TINY, error_line, output, script
from training.checkpoint import RunEnvironment, open_checkpoint
from training.device import get_dist_context
from training.text_generation import GeneratedText, encode_prompt, escape_text, generate_tokens, read_prompt


def train(folder: Path, text: str, *options: str) -> Path:
    (folder / "text.txt").write_text(text)
    output("train.py", *TINY, *options, f"--data.source={folder / 'text.txt'}", f"--run.dir={folder / 'run'}")
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = "Thé fox met the hen. The hen saw the fox. " * 60
    return train(tmp_path_factory.mktemp("sample"), text, "--data.tokenizer=byte", "--log.attention=off")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a vocabulary of words."""
    text = "The fox met the hen.\nThe hen saw the fox.\n" * 40
    return train(tmp_path_factory.mktemp("words"), text, "--data.tokenizer=bpe", "--log.attention=off")


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8"])
def test_sample_dtype(run: Path, dtype: str) -> None:
    texts = [script("sample.py", run, "--prompt=The fox", "--tokens=9", f"--dtype={dtype}").stdout for _ in range(2)]
    assert texts[0] == texts[1] and texts[0].startswith("The fox")


def test_prompt_that_is_not_utf8(run: Path) -> None:
    assert "the prompt is not valid UTF-8" in error_line(script("sample.py", run, "--prompt=\udcff"), 2)


@given(st.text() | st.sampled_from(["\u3000\xa0\u200c\u200d\ufe0f\U0001f426", "a\r\nb\x1b[2J\u202e\x9b"]))
def test_terminal_gets_the_text_but_for_what_steers_it(text: str) -> None:
    shown = escape_text(text)
    steers = "[\0-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]"
    assert not re.search(steers, shown) and (re.search(steers, text) or shown == text)
    assert re.sub(steers, "", text) == re.sub(r"\\(x..|r|u20..)", "", shown) or "\\" in text


@pytest.mark.parametrize(
    ("typed", "meant", "note"),
    [
        ("The fox ", "The fox", "spaces at the end"),
        ("<|endoftext|>", "", ""),
        ("<|endoftext|>The fox", "The fox", ""),
        (r"The hen.\nThe hen", "The hen.\nThe hen", r"\n and \t"),
        ("-- said the fox", "-- said the fox", 'never had these tokens of the prompt: "-"'),
    ],
)
def test_prompt_means_what_the_user_meant(
    typed: str, meant: str, note: str, words: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = open_checkpoint(words)
    tokenizer, environment = checkpoint.tokenizer(), checkpoint.environment
    text, tokens = read_prompt(tokenizer, typed, environment)
    assert (text, tokens) == (meant, encode_prompt(tokenizer, meant, environment.starts_with_eot))
    error = capsys.readouterr().err
    assert note in error and error.count("\n") == bool(note)
    outs = [script("sample.py", words, "--prompt", p, "--tokens=9", "--seed=2").stdout for p in (typed, meant)]
    assert outs[0] == outs[1] and outs[0].startswith(meant)
    assert read_prompt(tokenizer, "The fox \\n", RunEnvironment(True))[0] == "The fox \\n"  # it is not known


def test_many_samples_come_in_batches(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sample.BATCH_BYTES", 40_000)  # of two texts
    texts = re.split(r"--- \d ---\n", script("sample.py", run, "--samples=5", "--tokens=8", "--temperature=3").stdout)
    assert len(texts) == len(set(texts)) == 6


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sample.py", ("--samples=100000000", "--tokens=5")),
        ("sample.py", ("--tokens=1000000000000",)),
        ("sample.py", (f"--samples={2**63 - 1}",)),
        ("attend.py", ("--tokens=1000000000000",)),
    ],
)
def test_more_text_than_could_be_kept_is_one_line(run: Path, name: str, options: tuple[str, ...]) -> None:
    assert re.search(
        r" [\d,]+ tokens are too many: ask for at most 100,000,000 at once", error_line(script(name, run, *options), 6)
    )


def test_prompt_longer_than_the_context_is_its_end(run: Path) -> None:
    prompt = "The fox met the hen at the well. " * 9
    shorter = prompt[-open_checkpoint(run).config.model.context :]  # by character
    outs = [script("sample.py", run, "--prompt", text, "--tokens=1", "--temperature=0") for text in (prompt, shorter)]
    assert outs[0].stdout.endswith(outs[1].stdout) and "only the last" in outs[0].stderr


def test_encode_prompt() -> None:
    cases = ((True, "a", [256, 97]), (False, "a", [97]), (False, "", [10]))
    assert all(encode_prompt(ByteTokenizer(), prompt, documents) == tokens for documents, prompt, tokens in cases)


def test_streamed_text_is_the_decoded_tokens(run: Path) -> None:
    """Also for bytes that are not UTF-8."""
    checkpoint = open_checkpoint(run)
    model, tokenizer = checkpoint.load_model(get_dist_context("fp32")), checkpoint.tokenizer()
    prompt, params = encode_prompt(tokenizer, "é", checkpoint.environment.starts_with_eot), SamplingParams(9.0)
    (tokens,) = generate_tokens(model, tokenizer, prompt, 60, 1, params)
    done = script("sample.py", run, "--prompt=é", "--tokens=60", "--temperature=9")
    assert done.stdout == f"é{tokenizer.decode(tokens)}\n" and "\ufffd" in done.stdout


def test_generation_ends_with_every_texts_end_of_text() -> None:
    tokenizer, model = ByteTokenizer(), random_model("glass", "sdpa", n_layers=1)
    model.lm_head.weight.data = model.token_embedding.weight.data = normal(257, 30) / 3
    texts = generate_tokens(model, tokenizer, [195], 4000, 1, SamplingParams(temperature=1.5), n_samples=3)
    assert all(tokens.index(256) == len(tokens) - 1 for tokens in texts) and len(set(map(len, texts))) == 3


def test_stop_text_is_not_written(run: Path) -> None:
    """Also one that is spread over several tokens, with several of them, and one that never comes."""
    options = ("--prompt=The fox", "--tokens=60", "--temperature=2")
    whole = script("sample.py", run, *options).stdout.rstrip("\n")
    stop = whole[20:23]
    end = whole.index(stop, len("The fox"))
    for stops in ([f"--stop={stop}"], [f"--stop={stop}", "--stop=@@never@@"]):
        assert script("sample.py", run, *options, *stops).stdout == whole[:end] + "\n"
    assert script("sample.py", run, *options, "--stop=@@never@@").stdout == whole + "\n"
    two = script("sample.py", run, *options, f"--stop={stop}", "--samples=2").stdout
    assert two.startswith("--- 1 ---\nThe fox") and stop not in two.removeprefix("--- 1 ---\nThe fox").split("\n---")[0]


@pytest.mark.parametrize("stops", [["ab"], ["aab", "b"], ["aaa"], ["xyz", "ya"]])
def test_stopping_is_a_search_in_the_whole_text(stops: list[str]) -> None:
    tokenizer = ByteTokenizer()
    for number in range(3**7):
        text, digits = "", number
        for _ in range(7):
            text, digits = text + "abx"[digits % 3], digits // 3
        shown: list[str] = []
        generated = GeneratedText(tokenizer, stops, shown.append)
        for token in tokenizer.encode(text).tolist():
            if not generated.finish_reason:
                generated.add(token, 0.0)
        if not generated.finish_reason:
            generated.finish("length")
        ends = [text.index(stop) for stop in stops if stop in text]
        expected = text[: min((text.index(s) + len(s) for s in stops if s in text), default=7)]
        assert generated.finish_reason == ("stop" if ends else "length") and "".join(shown) == generated.text
        assert generated.text == (
            text if not ends else expected[: min(expected.index(s) for s in stops if s in expected)]
        )


def test_json_lines(run: Path) -> None:
    done = script("sample.py", run, "--prompt=The fox", "--tokens=5", "--samples=2", "--json")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["sample"] for row in rows] == [1, 2] and {row["finish_reason"] for row in rows} == {"length"}
    checkpoint = open_checkpoint(run)
    model, tokenizer = checkpoint.load_model(get_dist_context("fp32")), checkpoint.tokenizer()
    prompt = encode_prompt(tokenizer, "The fox", checkpoint.environment.starts_with_eot)
    for row in rows:
        assert row["text"] == tokenizer.decode(row["tokens"])
        logits = model(torch.tensor([[*prompt, *row["tokens"]]]))[0].detach().log_softmax(-1)
        expected = [float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(row["tokens"])]
        assert row["logprobs"] == pytest.approx(expected, abs=1e-4)


def test_prompt_from_a_file_or_standard_input(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prompt.txt").write_text("The fox\n")
    options = (run, "--tokens=9", "--seed=3")
    expected = script("sample.py", *options, "--prompt=The fox").stdout
    assert script("sample.py", *options, f"--prompt_file={tmp_path / 'prompt.txt'}").stdout == expected
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"The fox\n")))
    assert script("sample.py", *options, "--prompt=-").stdout == expected
    for data, words in ((b"", "standard input is empty"), (b"a\xff", "byte 0xff at offset 1")):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert words in error_line(script("sample.py", *options, "--prompt=-"), 3)
    monkeypatch.setattr("sys.stdin", None)  # closed
    assert "standard input is empty" in error_line(script("sample.py", *options, "--prompt=-"), 3)
    assert "cannot read" in error_line(script("sample.py", *options, "--prompt_file=/nowhere"), 3)


def test_interactive(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(
        ["/set temperature 0", "The fox", " met", "/set tokens x", "/set stop", "/reset", "The fox", "/quit", "never"]
    )
    monkeypatch.setattr("sample.read_lines", lambda: lines)
    help, first, second, error, *more, again = script(
        "sample.py", run, "--interactive", "--tokens=6"
    ).stdout.splitlines()
    assert first == again and error == "error: --tokens is 'x'; it takes a whole number" and more == [help]
    greedy = script("sample.py", run, f"--prompt=The fox{first} met", "--tokens=6", "--temperature=0").stdout
    assert greedy == f"The fox{first} met{second}\n"


def test_score_is_the_loss_of_the_text(run: Path, tmp_path: Path) -> None:
    """In windows of the context, each token once."""
    text = "The fox met the hen. The hen saw a zebra. " * 3
    (tmp_path / "text.txt").write_text(text)
    row = json.loads(script("sample.py", run, f"--score={tmp_path / 'text.txt'}", "--json").stdout)
    checkpoint = open_checkpoint(run)
    model, ids = checkpoint.load_model(get_dist_context("fp32")), checkpoint.tokenizer().encode(text).tolist()
    assert row["token_ids"] == ids and len(row["losses"]) == len(ids)
    ids = [checkpoint.tokenizer().end_of_text, *ids] if checkpoint.environment.starts_with_eot else ids
    for position, loss in enumerate(row["losses"][-len(ids) + 1 :], 1):
        start = max(0, (position - 1 - 8) // 8 * 8) if position > 16 else 0  # half of the context of 16
        logits = model(torch.tensor([ids[start:position]]))[0, -1].detach()
        assert loss == pytest.approx(-float(logits.log_softmax(-1)[ids[position]]), abs=1e-4), position
    plain = script("sample.py", run, f"--score={tmp_path / 'text.txt'}").stdout
    assert f"{row['loss']:.4f} nats/token" in plain and f"{row['bits_per_byte']:.4f} bits/byte" in plain
    assert "zebra." in plain and "\x1b[" not in plain
    assert "\x1b[" in script("sample.py", run, f"--score={tmp_path / 'text.txt'}", terminal=True).stdout
    (tmp_path / "text.txt").write_text(" ")
    assert "is empty" in error_line(script("sample.py", run, f"--score={tmp_path / 'text.txt'}"), 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--prompt=a --prompt_file=b", "--prompt and --prompt_file exclude each other"),
        ("--interactive --json", "--interactive and --json exclude each other"),
        ("--score=a --temperature=0", "--score and --temperature exclude each other"),
        ("--stop=", "--stop is empty"),
        ("--min_p=1.5", "--min_p is 1.5"),
        ("--repetition_penalty=0", "--repetition_penalty is 0.0"),
        ("--temperature -0.5", "--temperature is -0.5"),
        ("--top_p 0", "--top_p is 0"),
        ("--samples 0", "--samples is 0"),
        ("--temprature 1", "did you mean --temperature?"),
        ("--max_new_tokens 1", "did you mean --tokens?"),
    ],
)
def test_unusable_options_are_one_line(options: str, words: str) -> None:
    assert words in error_line(script("sample.py", "nowhere", *options.split()), 2)
