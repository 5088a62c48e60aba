"""The training callback that records attention: thinning, metrics, resume, and the report."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from inspection.attention_file import read_attention_file
from inspection.contrast_pairs import ContrastPair
from inspection.eval_texts import EvalTexts
from inspection.page_data import PageRun, finding_tables
from inspection.recorder import KEPT_BETWEEN, AttentionRecorder, kept_steps, snapshot_steps
from model.gpt import GPT
from tests.inspection.handmade import handmade, repeats

N = 12
TEXTS = EvalTexts(
    (("held-out 1", tuple(repeats(1, N, seed=7)[0])), ("held-out 2", tuple(repeats(1, N, seed=8)[0]))),
    tuple(map(tuple, repeats(4, N))),
)


def fake_trainer(model: GPT, step: int, steps: int = 40, eval_every: int = 10) -> Any:
    return SimpleNamespace(
        model=model,
        state=SimpleNamespace(step=step),
        sample_tokens=[0, 3, 4, 5],
        config=SimpleNamespace(train=SimpleNamespace(steps=steps, eval_every=eval_every)),
        provenance=lambda: {"step": str(step), "tokens_seen": str(step * 10), "weights_sha256": f"w{step}"},
    )


def run(
    folder: Path, steps: list[int], plan: tuple[int, int] = (40, 10), start: int = 0, texts: EvalTexts = TEXTS
) -> list[str]:
    """Evaluate at some steps, each time with another model, and write metrics.jsonl; returns the printed lines."""
    lines: list[str] = []
    recorder = AttentionRecorder(texts, lambda token: b"%d " % token, folder, lines.append)
    recorder.on_start(fake_trainer(model_of(start), start, *plan))
    for step in steps:
        trainer = fake_trainer(model_of(step), step, *plan)
        metrics: dict[str, Any] = {"step": step, "val_loss": 1.0}
        recorder.on_eval(trainer, metrics)
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(metrics) + "\n")
    if steps and steps[-1] == plan[0]:
        recorder.on_end(fake_trainer(model_of(steps[-1]), steps[-1], *plan))
    return lines


def model_of(step: int) -> GPT:
    """The handmade model; before step 20 its induction head does not exist yet."""
    model = handmade(30)
    if step < 20:
        with torch.no_grad():
            model.blocks[1].attention.qkv.weight.zero_()
    return model


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "attention").rglob("*.*"))}


def test_run_writes_files_metrics_and_report(tmp_path: Path) -> None:
    lines = run(tmp_path, [10, 20, 30, 40])
    names = [f"{step:06d}.safetensors" for step in (0, 10, 20, 30, 40)]
    assert list(files_in(tmp_path)) == [*names, "ablations.json", "eval_texts.json", "findings.json"]
    (report,) = lines
    assert report.strip().splitlines() == [
        "Since step 20, head L1H1 attends to what followed the same token earlier (1.00). Ablating it raises the loss on "
        "repeated tokens by 3.40 nats/token [95% CI 3.40 to 3.40; mean ablation 3.15]; ablating a random other head of "
        "its layer raises it by 0.00.",
        "An attention weight shows what a head attends to, not why.",
    ]
    assert (tmp_path / "attention.html").is_file() and (tmp_path / "phase_change.png").is_file()
    first, *_, last = (read_attention_file(tmp_path / "attention" / name) for name in names)
    assert [text.name for text in first.texts] == ["held-out 1", "held-out 2", "repeat 1"]
    assert last.texts[0].name == "sample" and last.texts[0].queries is not None
    assert all(text.top_tokens for file in (first, last) for text in file.texts)  # what comes next
    assert last.metadata["weights_sha256"] == "w40"
    for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()):
        scores = read_attention_file(tmp_path / "attention" / f"{line['step']:06d}.safetensors").scores
        assert set(line["head_scores"]) == set(scores) >= {"induction", "entropy", "copying"}
        assert all(np.array_equal(np.array(t, np.float32), scores[name]) for name, t in line["head_scores"].items())


def test_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    for name in ("whole", "resumed"):
        (tmp_path / name).mkdir()
    whole = run(tmp_path / "whole", [10, 20, 30, 40])
    run(tmp_path / "resumed", [10, 20, 30])
    metrics = tmp_path / "resumed" / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:2]))  # the checkpoint is of step 20
    assert run(tmp_path / "resumed", [30, 40], start=20) == whole
    assert files_in(tmp_path / "resumed") == files_in(tmp_path / "whole")


@pytest.mark.parametrize(("steps", "eval_every"), [(330, 10), (340, 10), (1000, 7), (5, 9)])
def test_attention_files_are_thinned_evenly(steps: int, eval_every: int) -> None:
    evaluations = [0, *range(eval_every, steps, eval_every), steps]
    kept = kept_steps(steps, eval_every)
    assert {*snapshot_steps(steps, eval_every)} <= {*kept[:-1]} <= {*evaluations} and 0 in snapshot_steps(
        steps, eval_every
    )
    assert kept[0] == 0 and kept[-1] == steps and len(kept) == min(len(evaluations), KEPT_BETWEEN + 2)
    if len(kept) > 3:
        gaps = np.diff(kept[1:-1]) // eval_every
        assert gaps.max() - gaps.min() <= 1


def test_report_on_own_text_names_a_head_and_where_it_matters(tmp_path: Path) -> None:
    """Held-out texts that repeat themselves: the induction head matters, in their second copies."""
    texts = tuple((f"held-out {k}", tuple(repeats(1, N, seed=k)[0])) for k in range(1, 13))
    own = ContrastPair("own", texts[0][1][:5], (), (3,), (4,))  # without an antecedent
    known = replace(own, antecedent=(3,))
    (report,) = run(tmp_path / "known", [40], texts=EvalTexts(texts, TEXTS.repeats, (own, known)))
    named = json.loads((tmp_path / "known" / "attention" / "findings.json").read_text())["antecedents"][
        "antecedent.own"
    ]
    assert named == {"head": [0, 0], "value": pytest.approx(1)} and "head L0H0 attends to the word" in report
    (report,) = run(tmp_path, [10, 20, 30, 40], texts=EvalTexts(texts, TEXTS.repeats, (own, own)))
    headline, *examples, _, on_repeats, _, _, _, _, question, _ = report.strip().splitlines()
    attends = {"L0H0": "the previous token (1.00", "L1H1": "what followed the same token earlier (1.00"}
    head = headline.split()[1]  # the two need each other, so both cost the same
    assert f"it attends to {attends[head]}; uniform attention 0." in headline
    assert "matters most on this text: ablating it raises held-out loss by 1.56 [1.56, 1.56], another" in headline
    assert on_repeats.startswith("Since step 20, head L1H1")
    assert re.fullmatch(r"  own: right in [\d.]+% of 2", question)  # ablating no head lowers the logit difference
    data = json.loads((tmp_path / "attention" / "findings.json").read_text())
    assert data["headline"] == headline and data["findings"][0]["summary"] == headline
    last = read_attention_file(tmp_path / "attention" / "000040.safetensors")
    names = [text.name for text in last.texts]
    for example, line in zip(data["examples"], examples, strict=True):
        tokens, k = dict(texts)[example["text"]], example["position"]
        assert k >= N + 2 and example["loss_increase"] == pytest.approx(np.log(30), abs=0.01)
        assert line.endswith(f"{tokens[k - 2]} {tokens[k - 1]} [{tokens[k]} ]  +3.40 nats ({example['text']})")
    page = finding_tables(data, PageRun("", [last]), {data["findings"][0]["score"]: {}}, names)["findings"][0]
    first = data["examples"][0]
    assert (names[page["text"]], page["query"]) == (first["text"], first["position"] - 1)
