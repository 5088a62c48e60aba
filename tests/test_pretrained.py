"""A Hugging Face folder in sample.py, attend.py and `train.py --model.init`; transformers made it and is the reference."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from common.errors import UserError
from common.files import read_metrics
from data.tokenizer import ByteTokenizer
from tests.runs import TINY, error_line, output, script
from training.pretrained import initial_model, open_model

TEXT = "The fox met the hen at the well. The hen saw the fox and ran. Ünder the 🌳 they met again.\n" * 40
TUNE = ("--train.steps=3", "--train.eval_every=3", "--train.batch_size=2", "--log.sample_tokens=4", "--model.dropout=0")


def save_tokenizer(folder: Path, text: str) -> Any:
    """A byte-level BPE with GPT-2's end-of-text, trained here, as transformers saves it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"])
    trained.train_from_iterator([text], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained, eos_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_model(folder: Path, kind: str) -> Any:
    """A random model, and its tokenizer."""
    import transformers

    tokenizer = save_tokenizer(folder, TEXT)
    common: dict[str, Any] = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    if kind == "gpt2":
        shape = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=64, **common)
        model: Any = transformers.GPT2LMHeadModel(shape)
    else:
        sizes: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        sizes |= {"hidden_size": 32, "head_dim": 8, "intermediate_size": 48, "max_position_embeddings": 64}
        shape = transformers.Qwen3Config(tie_word_embeddings=True, **sizes, **common)
        model = transformers.Qwen3ForCausalLM(shape)
    for parameter in model.parameters():  # far from uniform, so that greedy text is no accident
        parameter.data.mul_(3 if parameter.dim() > 1 else 1)
    model.save_pretrained(folder)
    return model.eval(), tokenizer


@pytest.fixture(scope="module", params=["gpt2", "qwen3"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    return folder, *save_model(folder, request.param)


@pytest.fixture
def foreign(saved: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved[0], tmp_path / "foreign"))


@pytest.fixture
def book(tmp_path: Path) -> Path:
    (tmp_path / "book.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path / "book.txt"


def tune(source: Path, book: Path, run: Path, *options: str) -> Any:
    return script("train.py", f"--model.init={source}", f"--data.source={book}", f"--run.dir={run}", *TUNE, *options)


def test_sample_writes_the_greedy_text_of_transformers(saved: Any) -> None:
    folder, model, tokenizer = saved
    prompt = tokenizer("The fox 🌳", return_tensors="pt")
    with torch.no_grad():
        expected = model.generate(**prompt, max_new_tokens=40, do_sample=False, pad_token_id=0)
    text = output("sample.py", folder, "--prompt=The fox 🌳", "--temperature=0", "--tokens=40")
    assert text == tokenizer.decode(expected[0], skip_special_tokens=True) + "\n"


def test_every_inspection_works_on_it(foreign: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("The fox met\t the\t and\nThe hen saw\t the\t fox\nThe fox ran\n")
    assert "has no" not in script("attend.py", foreign, "--prompt=The fox met the hen").stderr
    assert list((foreign / "attention").glob("*-the-fox-met-the-hen-*.html"))
    line = error_line(script("attend.py", "summary", foreign), 4)
    assert f"python attend.py ablate {foreign}" in line
    commands = (f"ablate --prompts={tmp_path / 'prompts.txt'}", "summary", "heads", "verify", "page", "plot", "token")
    for command, *options in map(str.split, commands):
        printed = output("attend.py", command, foreign, *options)
        assert "all checks passed" in printed or command != "verify"
    assert (foreign / "attention.html").is_file() and (foreign / "attention" / "ablations.json").is_file()


def test_fine_tuning_starts_with_the_loss_of_the_source(saved: Any, foreign: Path, book: Path, tmp_path: Path) -> None:
    _, model, tokenizer = saved
    (tmp_path / "val.txt").write_text("The hen met the fox. They saw the well.", encoding="utf-8")
    done = tune(foreign, book, tmp_path / "run", f"--data.val={tmp_path / 'val.txt'}", "--train.dtype=fp32")
    assert done.returncode == 0, done.stderr
    assert f"init    {foreign}" in done.stdout and "lower than for training" in done.stdout
    ids = torch.tensor([[0, *tokenizer("The hen met the fox. They saw the well.")["input_ids"], 0]])
    with torch.no_grad():
        expected = F.cross_entropy(model(ids[:, :-1]).logits[0], ids[0, 1:])
    first = next(line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "val_loss" in line)
    assert first["step"] == 0 and math.isclose(first["val_loss"], float(expected), abs_tol=1e-4)
    changed = script("attend.py", "compare", tmp_path / "run", "--against_init")
    assert "fine-tuning moved the attention of these heads most: L" in changed.stdout, changed.stderr
    shutil.rmtree(foreign)  # the run has all that it needs
    output("train.py", f"--run.resume={tmp_path / 'run'}", "--train.steps=4")
    output("sample.py", tmp_path / "run", "--prompt=The fox", "--tokens=3")


def test_fine_tuning_can_be_planned(foreign: Path, book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLASSGPT_CACHE", str(tmp_path / "cache"))  # where the text is not prepared yet
    done = tune(foreign, book, tmp_path / "run", "--plan=h100")
    assert done.returncode == 0 and "(the tokenizer of that folder)" in done.stdout, done.stderr


def test_run_is_continued_on_another_text(book: Path, tmp_path: Path) -> None:
    output("train.py", *TINY, f"--data.source={book}", f"--run.dir={tmp_path / 'first'}")
    (tmp_path / "other.txt").write_text("The fox saw the well. They met the hen.\n" * 50)
    done = tune(tmp_path / "first", tmp_path / "other.txt", tmp_path / "second")
    assert done.returncode == 0, done.stderr
    one, two = (open_model(tmp_path / name, "last") for name in ("first", "second"))
    assert one.tokenizer().fingerprint() == two.tokenizer().fingerprint()
    start = script("attend.py", "compare", tmp_path / "second", tmp_path / "first", "--step=0", "--json")
    assert {
        round(row["difference"], 5) for row in json.loads(start.stdout)["differences"] if row["kind"] == "moved"
    } <= {0}
    line = error_line(script("attend.py", "compare", tmp_path / "first", "--against_init"), 2)
    assert "did not start from --model.init" in line


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        ("--model.d_model=64", "--model.d_model is that of --model.init"),
        ("--data.tokenizer=byte", "--data.tokenizer is that of --model.init"),
        ("--model.context=65", "model.context is 65; that of --model.init"),
    ],
)
def test_options_that_contradict_the_source(
    option: str, problem: str, foreign: Path, book: Path, tmp_path: Path
) -> None:
    assert problem in error_line(tune(foreign, book, tmp_path / "run", option), 2)
    assert not (tmp_path / "run").exists()


def test_names_and_folders_without_a_model(tmp_path: Path, book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    for command in (("sample.py", "gpt2-of-nobody"), ("attend.py", "gpt2-of-nobody")):
        line = error_line(script(*command), 4)
        assert (
            "there is no folder gpt2-of-nobody, and the model of that name cannot be fetched" in line
            and "check the name" in line
        )
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "bert"}')
    assert "bert" in error_line(script("sample.py", "empty"), 4)
    assert "bert" in error_line(tune(tmp_path / "empty", book, tmp_path / "run"), 4)


def test_name_on_the_hub_is_fetched_once(foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its cache if it is there; what is written about it goes to runs/NAME."""
    cache, calls = tmp_path / "hub" / "models--me--tales" / "snapshots" / "0123", list[bool]()

    def snapshot_download(name: str, allow_patterns: list[str], local_files_only: bool) -> str:
        calls.append(local_files_only)
        assert name == "me/tales" and "*.safetensors" in allow_patterns and not any("bin" in p for p in allow_patterns)
        if local_files_only and not cache.exists():
            raise OSError("not in the cache")
        if not cache.exists():
            shutil.copytree(foreign, cache)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    for expected in ([True, False], [True]):
        calls.clear()
        assert script("sample.py", "me/tales", "--tokens=2").returncode == 0
        assert calls == expected
    assert script("attend.py", "me/tales", "--prompt=The fox").returncode == 0
    assert list((tmp_path / "runs" / "me--tales" / "attention").glob("*.safetensors"))
    (cache / "config.json").unlink()
    assert "it has no config.json" in error_line(script("sample.py", "me/tales"), 4)


def test_shorter_context_and_another_tokenizer(foreign: Path, book: Path, tmp_path: Path) -> None:
    done = tune(foreign, book, tmp_path / "run", "--model.context=32", "--log.attention=off")
    assert done.returncode == 0 and open_model(tmp_path / "run").config.model.context == 32, done.stderr
    with pytest.raises(UserError, match="is not the tokenizer of"):
        initial_model(replace(open_model(foreign).config.model, init=str(foreign)), ByteTokenizer())
