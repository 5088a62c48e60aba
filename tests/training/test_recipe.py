"""An own text gets defaults by its size; what is typed, a config file and named corpora keep theirs."""

from pathlib import Path

import pytest

from common.errors import UserError
from data.prepare import prepare
from tests.runs import ROOT, output
from training import time_budget
from training.config import parse_train, read_toml
from training.recipe import read_recipe


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "book.txt").write_text("".join(f"{i * i % 311} foxes met {i % 97} hens. " for i in range(100)))
    return tmp_path / "book.txt"


def test_own_text_is_trained_by_its_recipe(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_budget, "measure_step", lambda *args: 0.01)
    shape = ("--model.n_layers=1", "--model.d_model=16", "--model.context=32", "--train.batch_size=8")
    typed = (*shape, "--log.attention=off", "--model.dropout=0.4")
    printed = output("train.py", *typed, f"--data.source={text}", f"--run.dir={text.parent / 'run'}")
    line = "recipe  3 kB of text: vocabulary 512, dropout 0.4, weight decay 2, at most 30 epochs"
    assert printed.startswith(f"{line}\nplan    2 min")
    config = parse_train([str(text.parent / "run" / "config.toml")])[0]
    assert (config.data.vocab_size, config.model.dropout, config.optim.weight_decay) == (512, 0.4, 2.0)
    assert (config.model.d_model, config.model.context, config.train.batch_size, config.train.minutes) == (16, 32, 8, 0)
    assert config.train.steps == max(time_budget.MIN_STEPS, 30 * len(prepare(config.data).train) // (8 * 32))


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030", "utf-16"])
def test_chinese_is_encoded_by_character(encoding: str, tmp_path: Path) -> None:
    file = tmp_path / "poems.txt"
    file.write_bytes("".join(map(chr, range(0x4E00, 0x4E00 + 1001))).encode(encoding))
    argv = [
        f"--data.source={file}",
        f"--data.encoding={encoding if encoding != 'utf-16' else 'utf-8'}",
    ]  # it has a mark
    assert read_recipe(parse_train(argv)[0], argv)[0][0] == "--data.tokenizer=char"
    for option in ("--data.vocab_size=600", "--data.tokenizer=bpe"):
        wanted = [*argv, option]
        assert read_recipe(parse_train(wanted)[0], wanted)[0][0] == "--data.vocab_size=512"
    file.write_text("Several different characters: äöü한국어. " * 500, encoding="utf-8")
    assert read_recipe(parse_train(argv)[0], argv)[0][0] == "--data.vocab_size=512"


def test_config_files_and_named_corpora_have_no_recipe(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def options(*argv: str) -> list[str]:
        return read_recipe(parse_train(list(argv))[0], list(argv))[0]

    source = f"--data.source={text}"
    assert options(source)[-1] == "--train.minutes=2"
    assert options(source, "--train.steps", "5")[-1] == "--optim.weight_decay=2.0"
    packed = text.with_name("b.txt.gz")
    packed.write_bytes(b"x" * 100_000)  # about 300 kB of text
    assert options(f"--data.source={packed}")[0] == "--data.vocab_size=1024"
    assert not options() and not options("--data.source=shakespeare")
    assert not any(options(str(file), source) for file in (ROOT / "configs").glob("*.toml"))
    with pytest.raises(UserError, match="no text found for nowhere"):
        options("--data.source=nowhere")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert options(source)[-1] == "--optim.weight_decay=2.0"
    assert "--train.minutes=2" not in read_toml(ROOT / "configs" / "quickstart.toml")
