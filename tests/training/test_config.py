"""Options: every mistake is reported at once, with the right name, before torch is imported."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from common.errors import CHECKPOINT, CONFIG, DATA, UserError
from data.config import DataConfig
from tests.runs import ROOT, python
from training.cli import option_types
from training.config import LogConfig, OptimConfig, RunConfig, RunSettings, parse_train, read_toml, to_toml
from training.run_dir import save_config

OPTIONS = sorted(option_types(RunConfig))


def problems(*argv: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        parse_train(list(argv))
    assert caught.value.exit_code == CONFIG
    return str(caught.value).splitlines()


def test_all_problems_are_reported_at_once() -> None:
    lines = problems(
        *("--model.n_layer", "3", "--model.attention", "sdp", "--train.steps", "many", "--model.d_model", "130"),
        *("--optim.lr", "-1", "--train.batch_size"),
    )
    assert lines[:4] == [
        "unknown option --model.n_layer; did you mean --model.n_layers?",
        "--model.attention is 'sdp'; it takes one of auto, eager, sdpa, chunked; did you mean sdpa?",
        "--train.steps is 'many'; it takes a whole number",
        "--train.batch_size needs a value: a whole number",
    ]
    assert lines[4].startswith("model.d_model is 130") and lines[5].startswith(
        "optim.lr is -1.0; it must be at least 0"
    )


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("--steps", "--train.steps"),
        ("--model.heads", "--model.n_heads"),
        ("--block_size", "--model.context"),
        ("--learning_rate", "--optim.lr"),
        ("--per_device_train_batch_size", "--train.batch_size"),
    ],
)
def test_nearest_option_is_named(typed: str, answer: str) -> None:
    assert problems(typed, "4") == [f"unknown option {typed}; did you mean {answer}?"]
    assert problems("--bias=on") == ["unknown option --bias; --help lists the options"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--data.source", "t/1.txt", "t/2.txt", "t/3.txt"], "unexpected 't/2.txt t/3.txt'; options"),
        (["data.source=x"], "did you mean --data.source=x?"),
        (["--train.steps=3", "x.toml"], "a config file comes first"),
        (["--data.source"], "--data.source needs a value: text; if it begins with dashes, write --data.source=--..."),
        (["--run.dir=s3://bucket/run"], "give a local path"),
        (["-book.txt"], "did you mean ./-book.txt? "),
        (["a.txt", "b.txt"], "unexpected 'b.txt'; options begin"),
        (["run"], "run is a run, not a text: continue it with --run.resume run"),
        (["--run.resume="], "--run.resume is empty"),
        (
            ["--run.resume=run", "--run.dir=other"],
            "--run.resume continues in run: leave out --run.dir, or resume a copy",
        ),
        (["--train.minutes=2", "--train.steps=100"], "train.minutes and train.steps both"),
        (["--train.minutes=nan"], "train.minutes is nan"),
        (["--optim.decay_at=3-x"], "such as '300 450' or empty"),
    ],
)
def test_misplaced_or_contradicting_words_are_one_line(
    argv: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run/checkpoints").mkdir(parents=True)
    for name in ("-book.txt", "b.txt", "run/config.toml"):
        Path(name).touch()
    (line,) = problems(*argv)
    assert words in line


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("texts/my book.txt", "my-book"),
        ("texts/*.txt", "texts"),
        ("texts/v1.5/", "v1-5"),
        ("b[1].txt", "b-1"),
        ("हिन्दी 📚.txt", "हिन्दी-📚"),
        ("*.txt", "corpus"),
        (".", "corpus"),
        ("texts/" + "x" * 200 + ".txt", "x" * 60),
    ],
)
def test_run_is_named_after_the_text(source: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "corpus" / "texts" / "v1.5").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "corpus")
    Path("b[1].txt").write_text("text")
    Path("config.toml").touch()  # also of other programs: this folder is not a run
    assert parse_train([f"--data.source={source}"])[1] == name
    assert parse_train([source]) == parse_train([f"--data.source={source}"])


def test_value_may_look_like_the_short_help_option() -> None:
    assert parse_train(["--log.wandb_project", "-h"])[0].log.wandb_project == "-h"
    with pytest.raises(SystemExit):
        parse_train(["-h"])


def test_home_folder_is_expanded() -> None:
    assert parse_train(["--run.dir=~/runs/x"])[0].run.dir == os.path.expanduser("~/runs/x")


@pytest.mark.parametrize(
    ("argv", "value"), [(["", "False"], False), (["=false"], False), (["=True"], True), ([""], True)]
)
def test_flag_takes_true_and_false(argv: list[str], value: bool) -> None:
    option, *rest = argv
    config, _ = parse_train([f"--model.tie_embeddings{option}", *rest, "--train.steps=5"])
    assert config.model.tie_embeddings is value and config.train.steps == 5
    assert problems("--model.tie_embeddings=no") == ["--model.tie_embeddings is 'no'; it takes True or False"]


def test_dashes_equal_underscores() -> None:
    dashes, _ = parse_train(["--model.n-layers", "3", "--train.batch-size=6"])
    underscores, _ = parse_train(["--model.n_layers=3", "--train.batch_size", "6"])
    assert dashes == underscores and (dashes.model.n_layers, dashes.train.batch_size) == (3, 6)


def test_command_line_overrides_file_overrides_defaults(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[train]\nsteps = 7\nbatch_size = 3\n")
    config, name = parse_train([str(file), "--train.steps", "9"])
    assert name == "mine" and (config.train.steps, config.train.batch_size) == (9, 3)
    assert config.train.eval_every == RunConfig().train.eval_every
    file.write_text("[train]\nstep = 7\n")
    assert problems(str(file)) == ["unknown option --train.step; did you mean --train.steps?"]


@pytest.mark.parametrize(
    "text",
    [
        *("[train\nsteps = 7", "steps = 7", "[train]\nsteps = [7]", "\xff", "a = " + "[" * 100_000),
        *("[train]\nsteps = " + "9" * 10_000, '[run]\ndir = "a\\u0000b"', "a." * 40_000 + "b = 1"),
    ],
    ids=lambda text: repr(text[:20]),
)
def test_bad_config_file_is_one_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "broken.toml"
    file.write_bytes(text.encode("latin-1"))
    (line,) = problems(str(file))
    assert len(line) < 400
    file.write_text("[train]\nsteps = 7", encoding="utf-16")
    assert problems(str(file)) == [f"{file} is no text in UTF-8; save it as UTF-8"]
    (line,) = problems(str(tmp_path / "brokn.toml"))
    assert line.endswith(f"No such file or directory; did you mean {file}?")


TEXT = st.text().map(lambda text: text.encode("utf-8", "replace")) | st.binary(max_size=20)  # names in bytes


@given(TEXT, TEXT, st.floats(0, 1e300))
@example('a "b" \\ c/\x7f\r\n\u2028\x85*.txt'.encode(), "\U0001f4da\U00020bb7".encode(), 1.0)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_config_file_roundtrip(tmp_path: Path, source: bytes, project: bytes, number: float) -> None:
    names = [os.fsdecode(name.replace(b"\0", b"") or b"x") for name in (source, project)]
    config = RunConfig(RunSettings(str(tmp_path)), DataConfig(names[0]), log=LogConfig(wandb_project=names[1]))
    config = replace(config, optim=OptimConfig(grad_clip=number))
    save_config(config)
    assert parse_train([str(tmp_path / "config.toml")])[0] == config


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.toml")), ids=lambda p: p.stem)
def test_shipped_configs_are_good(file: Path) -> None:
    config, name = parse_train([str(file)])
    assert config.problems() == [] and name == file.stem
    assert "Expect" in file.read_text()


def test_values_out_of_range_are_reported() -> None:
    lines = problems(
        *("--train.steps=0", "--train.batch_size=0", "--data.val_fraction=1.5", "--model.dropout=1", "--optim.beta1=1"),
        *("--data.vocab_size=3", "--run.seed=-1", "--log.every=0", "--optim.lr=nan"),
        *("--optim.muon_lr=inf", "--optim.grad_clip=1e999", "--run.dist_timeout=inf", "--train.patience=-2"),
    )
    assert len(lines) == 13
    assert problems("--run.threads=9999")[0].startswith("run.threads is 9999; it must be at most ")
    assert "2**63" in problems(f"--run.seed={1 << 64}")[0]


@pytest.mark.parametrize(
    "argv",
    [
        ["train.py", "--model.n_layer", "3"],
        ["sample.py", "--temprature", "1"],
        ["attend.py"],
        ["train.py", "--help"],
        ["train.py", "no.toml"],
        ["train.py", "configs/gpt2_124m.toml", "--data.source=texts"],  # a folder that is not there
        ["train.py", "README.md", "--data.val", "none.txt"],
        ["train.py", "--data.tokenizer=gtp2"],
    ],
)
def test_mistakes_are_answered_without_torch(argv: list[str]) -> None:
    code = (
        "import sys, runpy; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: assert not {'torch', 'matplotlib', 'wandb'} & set(sys.modules), 'heavy import'"
    )
    done = python(code, *argv)
    refused = DATA if "no text found" in done.stderr else CONFIG
    assert done.returncode == (0 if "--help" in argv else refused), done.stderr
    assert "Traceback" not in done.stderr and "heavy import" not in done.stderr


# ---- any config file, any command line ----

odd = st.text(max_size=12) | st.sampled_from(["", "\n", "../..", "a=b", "\x1b[2J", "nan", "inf", "1e400", "x" * 5000])
number = st.integers() | st.floats() | st.sampled_from([2**63, 2**64, 10**400, -0.0])
option = st.sampled_from(OPTIONS) | odd
FUZZ = settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@given(st.lists(st.builds("--{}={}".format, option, number | odd) | odd | option.map("--{}".format), max_size=3))
@FUZZ
def test_any_command_line_is_parsed_or_refused(argv: list[str]) -> None:
    argv = [word.replace("\x00", "") for word in argv if word not in ("-h", "--help")]
    try:
        parse_train(argv)
    except UserError as error:
        assert error.exit_code in (CONFIG, CHECKPOINT) and len(str(error).splitlines()) <= 2 * len(argv) + 3


@given(st.lists(st.tuples(st.integers(0, 1500), st.integers(0, 60), st.text(max_size=20)), min_size=1, max_size=3))
@FUZZ
def test_any_damaged_config_file_is_read_or_refused(tmp_path: Path, damage: list[tuple[int, int, str]]) -> None:
    text = to_toml(RunConfig())
    for at, cut, new in damage:
        text = text[:at] + new + text[at + cut :]
    (tmp_path / "config.toml").write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        read_toml(tmp_path / "config.toml")
    except UserError as error:
        assert error.exit_code == CONFIG and len(str(error).splitlines()) == 1
