"""attend.py: every command prints what the files of a run hold, as text and JSON, and one line for a mistake."""

import json
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

import attend
from common.errors import UserError
from inspection.ablation_results import TABLES
from inspection.attention_file import AttentionFile, AttentionRecord, read_attention_file, write_attention_file
from inspection.run_reader import RunFiles
from inspection.terminal import DISCLAIMER, strongest_attention
from tests.runs import error_line, output, python, script

STEPS = [0, 3, 6]
HEADS = ["L0H0", "L0H1", "L1H0", "L1H1"]


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


text = partial(output, "attend.py")


def data(*argv: object) -> Any:
    return json.loads(text(*argv, "--json"), parse_constant=pytest.fail)


def line_with(output: str, *words: str) -> str:
    """The one line that contains all the words."""
    (line,) = [line for line in output.splitlines() if all(word in line for word in words)]
    return line


def attention_file(run: Path, step: int = 6) -> AttentionFile:
    return RunFiles.open(run).read(step)


def record(run: Path, name: str, step: int = 6) -> AttentionRecord:
    return next(text for text in attention_file(run, step).texts if text.name == name)


def at(table: np.ndarray[Any, Any], head: str) -> Any:
    return table[int(head[1]), int(head[3])]


def test_summary_shows_headline_and_best_heads(trained: Path) -> None:
    output, found = text("summary", trained), data("summary", trained)
    headline = json.loads((trained / "attention" / "findings.json").read_text())["headline"]
    assert found["headline"] == headline and headline[:30] in output and DISCLAIMER in output
    assert (found["n_layers"], found["n_heads"], found["step"], found["steps"]) == (2, 2, 6, STEPS)
    assert "3 attention files, steps 0 to 6; this is step 6" in output
    file = attention_file(trained)
    assert [each["name"] for each in found["texts"]] == [each.name for each in file.texts]
    for row in found["best_heads"]:
        values = file.scores[row["score"]]
        best = values.min() if row["score"] == "entropy" else values.max()
        assert row["value"] == at(values, row["head"]) == best
        assert row["head"] in line_with(output, row["score"], f"{best:.2f}")


def test_antecedent_scores_name_the_head_of_the_report(run: Path) -> None:
    """At the step of the report its head and value; at another step, as for other scores, the best head."""
    path, values = run / "attention" / "findings.json", np.array([[0.1, 0.9], [0.2, 0.3]], np.float32)
    for step in (3, 6):
        file = attention_file(run, step)
        write_attention_file(RunFiles.open(run).paths[step], file.texts, file.metadata, {"antecedent.own": values})
    findings = json.loads(path.read_text())
    path.write_text(json.dumps(findings | {"antecedents": {"antecedent.own": {"head": [1, 0], "value": 0.25}}}))
    for opened, expected in ((run, ("L1H0", 0.25)), (run / "attention" / "000003.safetensors", ("L0H1", values.max()))):
        assert [(row["head"], row["value"]) for row in data("summary", opened)["best_heads"]] == [expected]
    path.write_text(json.dumps(findings | {"antecedents": {"antecedent.own": {"head": 1}}}))
    assert "findings.json" in error_line(script("attend.py", "summary", run), 4)


def test_heads_lists_scores_with_their_effects(trained: Path) -> None:
    file, results = attention_file(trained), RunFiles.open(trained).ablation
    assert results is not None
    found = data("heads", trained)["heads"]
    assert [(row["score"], row["head"]) for row in found] == [(name, head) for name in file.scores for head in HEADS]
    for row in found:
        assert row["value"] == at(file.scores[row["score"]], row["head"]) and {*TABLES, "label", "unit"} <= set(row)
        assert row["zero"] == at(results.measures[row["measure"]].tables["zero"], row["head"]).tolist()
    assert all(re.search(rf"^{head} ", text("heads", trained), re.M) for head in HEADS)
    one = data("heads", trained, "--score=induction")["heads"]
    assert [row["value"] for row in one] == sorted(file.scores["induction"].ravel().tolist(), reverse=True)
    printed = re.findall(r"^(L\dH\d) ", text("heads", trained, "--score=induction"), re.M)
    assert printed == [row["head"] for row in one]


@pytest.mark.parametrize(("effect", "label", "mark"), [(1.5, "supported", ""), (0.1, "no effect", "!")])
def test_high_attention_without_effect_is_marked(run: Path, effect: float, label: str, mark: str) -> None:
    file, scores = attention_file(run), {"induction": [[0.0, 0.1], [0.2, 0.9]], "distance": [[1.0, 2.0], [3.0, 4.0]]}
    write_attention_file(run / "attention" / "000006.safetensors", file.texts, file.metadata, scores)
    path = run / "attention" / "ablations.json"
    results = json.loads(path.read_text())
    table = np.tile([effect, effect - 0.25, effect + 0.25], (2, 2, 1)).tolist()
    results["measures"]["repeats"] |= dict.fromkeys(TABLES, table)
    path.write_text(json.dumps(results))
    found, output = {row["score"]: row for row in data("summary", run)["best_heads"]}, text("summary", run)
    assert found["induction"]["head"] == "L1H1" and found["induction"]["label"] == label
    assert f"0.90{mark} " in line_with(output, "induction", "[") and found["distance"]["note"] == ""
    assert ("! L1H1 induction 0.90: high" in output) == bool(found["induction"]["note"]) == bool(mark)


def test_missing_or_outdated_ablations_are_reported(run: Path) -> None:
    assert "ablation effects are of step 6, scores of step 3" in text("heads", run, "--step=3")
    path = run / "attention" / "ablations.json"
    results = json.loads(path.read_text())
    path.write_text(json.dumps(results | {"weights_sha256": "0" * 64}))
    assert "ablation effects are of other weights" in text("summary", run)
    path.unlink()
    (run / "attention" / "findings.json").unlink()
    assert f"python attend.py ablate {run}" in text("summary", run)
    assert data("summary", run)["headline"] is None
    assert {row["zero"] for row in data("heads", run)["heads"]} == {None}


def test_token_shows_what_each_head_attends_to(trained: Path) -> None:
    found = data("token", trained, "--text=line 1", "--position=5", "--step=3")
    each = record(trained, "line 1", 3)
    pattern = each.pattern()[:, :, 5]
    assert found["loss"] == float(each.loss[4]) and len(found["attention"]) == 4 * 3
    for row in found["attention"]:
        weights = at(pattern, row["head"])
        assert row["attention"] == weights[row["key"]] == np.sort(weights)[-row["rank"]]
        assert row["token"].encode() == each.token_bytes[row["key"]] or row["key"] == 0
        assert row["distance"] == 5 - row["key"]
    assert [n["probability"] for n in found["next_tokens"]] == [p for _, p in each.top_tokens[5]]
    found, sample, output = data("token", trained), record(trained, "sample"), text("token", trained)
    assert found["text"] == "sample" and found["position"] == len(sample.tokens) - 1
    assert f"next: {json.dumps(found['next_tokens'][0]['token'])} {sample.top_tokens[-1][0][1]:.1%}" in output
    assert f"{found['attention'][0]['attention']:.1%}" in line_with(output, "L0H0")


def test_token_finds_the_end_of_a_word(trained: Path) -> None:
    options = ("token", trained, "--text=line 1")
    letters = b"".join(record(trained, "line 1").token_bytes).decode()
    assert data(*options, "--find=hen")["position"] == letters.index("hen") + 3  # after end-of-text
    output = text(*options, "--find=The")
    assert "'The' ends at tokens" in output and f"token {len(letters)} " in output  # the last one


def test_timeline_has_all_evaluations(trained: Path) -> None:
    found = data("timeline", trained)
    files = {step: attention_file(trained, step) for step in STEPS}
    assert found["steps"] == STEPS and len(found["timelines"]) == 4 * len(files[6].scores)
    for each in found["timelines"]:
        values = [at(files[step].scores[each["score"]], each["head"]) for step in STEPS]
        assert each["values"] == values
        assert (each["first"], each["last"], each["max"]) == (values[0], values[-1], max(values))
    assert re.findall(r"L\dH\d", text("timeline", trained, "--score=copying")) == HEADS


def test_timeline_comes_from_metrics(run: Path) -> None:
    table = [[0.1, 0.2], [0.3, 0.9]]
    lines = [json.dumps({"step": step, "head_scores": {"induction": table}}) for step in (1, 2, 3, 6)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + '\n{"ste')
    (run / "attention" / "000003.safetensors").write_text("unread")
    found = data("timeline", run, "--score=induction")
    assert found["steps"] == [0, 1, 2, 3, 6]  # step 0 has an attention file only
    (l1h1,) = [each for each in found["timelines"] if each["head"] == "L1H1"]
    assert l1h1["values"][1:] == pytest.approx([0.9] * 4) and l1h1["threshold_step"] == 1


def test_compare_subtracts_the_second_from_the_first(trained: Path) -> None:
    found = data("compare", trained)  # the newest and the oldest step
    assert (found["first"]["step"], found["second"]["step"], found["identical"]) == (6, 0, False)
    first, second = attention_file(trained).scores, attention_file(trained, 0).scores
    scores = [row for row in found["differences"] if row["kind"] == "score"]
    assert len(scores) == 4 * len(first)
    for row in scores:
        assert row["difference"] == float(at(first[row["name"]] - second[row["name"]].astype(float), row["head"]))
    moved = {(row["name"], row["head"]): row["difference"] for row in found["differences"] if row["kind"] == "moved"}
    patterns = [record(trained, "line 1", step).pattern().astype(float) for step in (6, 0)]
    expected = abs(patterns[0] - patterns[1]).sum(axis=-1).mean(axis=-1) / 2
    assert [moved["line 1", head] for head in HEADS] == pytest.approx([at(expected, head) for head in HEADS])
    swapped = data("compare", trained, "--step=0", "--against=6")["differences"]
    assert [-row["difference"] for row in swapped if row["kind"] == "score"] == [row["difference"] for row in scores]


def test_compare_two_runs(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "attention" / "000006.safetensors"
    write_attention_file(path, [], {}, {"induction": np.zeros((2, 2)), "other": np.zeros((2, 2))})
    found = data("compare", trained, tmp_path)
    assert {(row["kind"], row["name"]) for row in found["differences"]} == {("score", "induction")}
    assert re.search(r"only in one of the two.* other", found["notes"][0])
    write_attention_file(path, [], {}, {"induction": np.zeros((1, 3))})
    line = error_line(script("attend.py", "compare", trained, tmp_path), 2)
    assert "2 layers of 2 heads" in line and "1 layers of 3 heads: they cannot be compared" in line


def test_compare_matches_heads_of_other_seeds_by_their_scores(run: Path, tmp_path: Path) -> None:
    """The other run has the same heads in another order. Runs with equal initial weights are not matched."""
    other, order, file = Path(shutil.copytree(run, tmp_path / "other")), [3, 0, 1, 2], attention_file(run)
    moved = {name: table.reshape(-1)[order].reshape(2, 2) for name, table in file.scores.items()}
    texts = [replace(t, pattern_tril=t.pattern_tril.reshape(4, -1)[order].reshape(2, 2, -1)) for t in file.texts]
    write_attention_file(RunFiles.open(other).paths[6], texts, file.metadata, moved)
    assert {row["head"] == row["matched"] for row in data("compare", run, other)["differences"]} == {True}
    write_attention_file(RunFiles.open(other).paths[0], texts, {"weights_sha256": "0" * 64, "step": "0"})
    found, output = data("compare", run, other), text("compare", run, other)
    assert {(row["head"], row["matched"], row["difference"]) for row in found["differences"]} == {
        (head, HEADS[order.index(k)], 0.0) for k, head in enumerate(HEADS)
    }
    assert "head numbers do not correspond" in output and re.search(r"^L0H0  L0H1 +0\.000", output, re.M)
    assert "began with other weights" in text("page", run, f"--against={other}", f"--out={tmp_path / 'two.html'}")


def test_page(run: Path, tmp_path: Path) -> None:
    (run / "attention.html").unlink()
    assert str(run / "attention.html") in text("page", run)
    page = (run / "attention.html").read_text("utf-8")
    assert "line 1" in page
    assert "other weights" not in text("page", run, f"--against={run}", f"--out={tmp_path / 'two.html'}")
    assert (tmp_path / "two.html").stat().st_size > len(page)


def test_plot(run: Path, tmp_path: Path) -> None:
    output = text("plot", run)
    names = {"attention.png", "head.png", "timeline.png"}  # no score has formed after six steps
    assert {path.name for path in (run / "figures").iterdir()} == names and output.count("figure  ") == 3
    assert all((run / "figures" / name).read_bytes().startswith(b"\x89PNG") for name in names)
    text("plot", run, "--format=svg", f"--out={tmp_path / 'svg'}", "--score=entropy")
    assert "entropy of its attention" in (tmp_path / "svg" / "timeline.svg").read_text("utf-8")


@pytest.mark.parametrize("options", [["plot"], ["page"], ["--prompt=The hen"]])
def test_folder_that_cannot_be_written(run: Path, options: list[str]) -> None:
    """A run of someone else's: another place is advised."""
    done = script("attend.py", *options, run, "--out=train.py/nowhere")
    assert re.search("cannot write train.py.nowhere.*; choose another place with --out", error_line(done, 6))


@pytest.mark.parametrize("name", ["attention/ablations.json", "attention.html"])
def test_ablate_run_that_cannot_be_written(run: Path, name: str) -> None:
    (run / name).unlink()
    (run / name).mkdir()
    line = error_line(script("attend.py", "ablate", run), 6)
    assert re.search(f"cannot write .*{name}.*; copy the run to a folder of your own", line)
    (run / name).rmdir()
    text("ablate", run)


def test_memory_is_not_a_matter_of_place(run: Path) -> None:
    with mock.patch("attend.show_prompt", side_effect=UserError("out of memory", 6)):
        assert error_line(script("attend.py", run), 6) == "error: out of memory"


def test_ablate_some_heads_together(run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    output = text("ablate", run, "--heads=L0H1,L1H0")
    assert "step 6: L0H1, L1H0 ablated together" in output and "corpus.judge" not in output
    rows = [line.split()[0] for line in output.splitlines() if "nats" in line]
    assert rows[:2] == ["repeats", "corpus"] and "+" in output
    assert "no head L2H0" in error_line(script("attend.py", "ablate", run, "--heads=L0H1,L2H0"), 2)
    assert "'L0' is not a head" in error_line(script("attend.py", "ablate", run, "--heads=L0"), 2)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_ablate_rewrites_findings_and_page(run: Path) -> None:
    before = (run / "attention" / "ablations.json").read_bytes()
    for name in ("attention/ablations.json", "attention/findings.json", "attention.html"):
        (run / name).unlink()
    output = text("ablate", run)
    assert (run / "attention" / "ablations.json").read_bytes() == before
    earliest = min((run / "checkpoints").iterdir())
    text("ablate", earliest)
    assert json.loads((run / "attention" / "ablations.json").read_text())["step"] == int(earliest.name) < 6
    assert f"written  {run / 'attention.html'}" in output and DISCLAIMER in output
    single = run / "prompt.safetensors"
    shutil.copy(run / "attention" / "000006.safetensors", single)
    assert "ablation needs a run folder" in error_line(script("attend.py", "ablate", single), 4)


def test_verify_recomputes_from_the_checkpoints(trained: Path) -> None:
    found = data("verify", trained)
    assert found["ok"] is True and found["steps_without_checkpoint"] == [0]
    names = {step: {row["check"] for row in found["checks"] if row["step"] == step} for step in STEPS}
    assert names[6] == {"readable", "hashes", "pattern", "loss", "scores"}
    assert names[0] == {"readable"} and "all checks passed" in text("verify", trained)


def test_verify_reports_every_bad_file(run: Path) -> None:
    folder = run / "attention"
    shutil.copy(folder / "000003.safetensors", folder / "000006.safetensors")
    (folder / "000003.safetensors").write_bytes((folder / "000003.safetensors").read_bytes()[:-10])
    done = script("attend.py", "verify", run)
    assert "differ from their checkpoints" in error_line(done, 4)
    assert "FAIL  step 3: readable inf: " in done.stdout and "FAIL  step 6: hashes inf: weights_sha256" in done.stdout
    done = script("attend.py", "verify", folder / "000006.safetensors", "--json")
    assert [(row["step"], row["ok"]) for row in json.loads(done.stdout)["checks"]] == [(6, True), (6, False)]


def test_prompt_prints_attention_and_writes_files(trained: Path, tmp_path: Path) -> None:
    output = text(trained, "--prompt", "The hen met", "--head=L1H0", "--dtype=f32", f"--out={tmp_path}")
    (path,) = tmp_path.glob("000006-the-hen-met-*.safetensors")
    (each,) = read_attention_file(path).texts
    expected = strongest_attention(each.pattern(), each.token_bytes, top=3)
    assert re.findall(r"^  (L\dH\d  .* attends to .*)$", output, re.M) == expected and len(expected) == 4 * 3
    assert "Head L1H0:" in output and "Next token: " in output and DISCLAIMER in output
    total, parts = re.findall(r"direct logit attribution: (\S+) = (.*)", output)[0]
    assert sum(map(float, re.findall(r"[+-]\d+\.\d+", parts))) == pytest.approx(float(total), abs=0.06)
    assert re.search(r'logit lens, .*: ("[^"]+"(, )?){3}', output)
    assert f"page       {path.with_suffix('.html')}" in output and path.with_suffix(".png").is_file()


def test_prompt_is_generated_or_cut_to_the_context(trained: Path, tmp_path: Path) -> None:
    text(trained, "--tokens=9", f"--out={tmp_path}")
    (path,) = tmp_path.glob("000006-generated-seed-1-*.safetensors")
    assert len(read_attention_file(path).texts[0].tokens) == 10
    done = script("attend.py", trained, "--prompt", "The hen " * 9, f"--out={tmp_path}")
    assert "showing the last 32" in done.stderr and done.returncode == 0


def test_run_is_found_from_its_parts(trained: Path) -> None:
    for path in (trained / "checkpoints" / "000003", trained / "attention" / "000003.safetensors"):
        found = data("summary", path)
        assert found["step"] == 3 and found["run"] == str(trained) and found["steps"] == STEPS


MISTAKES = {
    "sumary .": "did you mean summary?",
    ". summary": "'.' comes before 'summary', but is not a command; the commands are summary, ",
    "RUN --prompt One day": "comes before 'day', but is not a command; the commands are ",
    ". --top=0": "it must be at least 1",
    "token . --head=1.2": "such as L1H2",
    "token . --find=a --position=2": "exclude each other",
    "heads RUN --score=inducton": " induction, ",
    "heads RUN --step=5": "the nearest are 0, 3, 6",
    "token RUN --text=nothing": "it has sample, line 1",
    "token RUN --find=hen --text=sample": "it is in --text 'line 1'",
    "token RUN --find=zebra": "the text begins '",
    "token RUN --position=999": "has tokens 0 to",
    "RUN --head=L0H2": "L0H0 to L1H1",
}


@pytest.mark.parametrize(("command", "words"), MISTAKES.items())
def test_mistakes_are_one_line(trained: Path, command: str, words: str) -> None:
    argv = [str(trained) if word == "RUN" else word for word in command.split()]
    assert words in error_line(script("attend.py", *argv), 2)


def test_folders_without_attention_are_told_apart(trained: Path, tmp_path: Path) -> None:
    def error(path: Path) -> str:
        return error_line(script("attend.py", "summary", path), 4)

    assert f"contains 1; give one of them, such as {trained}" in error(trained.parent)
    assert "is not a folder; give a run folder" in error(tmp_path / "nothing")
    assert "is not a run folder; python train.py makes a run folder" in error(tmp_path)
    (tmp_path / "config.toml").write_text("")
    assert "--log.attention off" in error(tmp_path)


@pytest.mark.parametrize("name", ["ablations.json", "findings.json", "000006.safetensors"])
@pytest.mark.parametrize("damage", ["[" * 100_000, '{"headline": 3, "findings": []}'])
def test_damaged_files_are_one_line(run: Path, name: str, damage: str) -> None:
    (run / "attention" / name).write_text(damage)
    for command in ("summary", "page"):
        assert name in error_line(script("attend.py", command, run), 4)


@pytest.mark.parametrize(
    ("command", "step"), [("plot RUN", 3), ("compare RUN RUN", 0), ("summary RUN", 0), ("ablate RUN --checkpoint=6", 6)]
)
def test_damaged_file_is_left_out_or_written_again(run: Path, command: str, step: int) -> None:
    (run / "attention" / f"{step:06d}.safetensors").write_text("damage")
    text(*(run if word == "RUN" else word for word in command.split()))


def test_checkpoint_without_attention_file_is_not_another_step(run: Path) -> None:
    (run / "attention" / "000003.safetensors").unlink()
    line = error_line(script("attend.py", "heads", run / "checkpoints" / "000003"), 2)
    assert "has no attention file of step 3; the nearest are 0, 6" in line


@pytest.mark.parametrize("path", ["字" * 90, "x" * 300])
def test_path_that_is_too_long_is_one_line(path: str) -> None:
    assert "Traceback" not in script("attend.py", path).stderr
    assert "is not a folder" in error_line(script("attend.py", "summary", path), 4)


@pytest.mark.parametrize("command", sorted({*attend.COMMANDS, ""} - {"patch", "serve"}))
def test_attention_file_that_is_removed_while_it_is_read(
    run: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By training that is resumed from an earlier step: what is left is listed again, and nothing is called damaged."""
    listed = [run / "attention" / "000006.safetensors"]

    def read(path: Path) -> AttentionFile:
        while listed:
            listed.pop().unlink()
        return read_attention_file(path)

    monkeypatch.setattr("inspection.run_reader.read_attention_file", read)
    done = script("attend.py", *command.split(), run)
    assert done.returncode == 0 and "damaged" not in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("scores", ["3", "[]", '{"a": 1}', '{"a": [["x"]]}', '{"a": [[1, 2], [3]]}', '{"a": [[null]]}'])
def test_malformed_head_scores_are_left_out(run: Path, scores: str) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write(f'{{"step": 4, "head_scores": {scores}}}\n')
    assert "step 4" not in text("timeline", run) and text("page", run)


def test_json_is_parsed_up_to_a_size(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.files.MAX_JSON_BYTES", 100)
    for name, *argv in (("attend.py", "summary"), ("sample.py",)):
        assert "more than 100 bytes of JSON" in error_line(script(name, *argv, run), 4)


WITHOUT_TORCH = "import sys, attend, common.errors as e; e.run_main(attend.main); sys.exit('torch' in sys.modules)"


@pytest.mark.parametrize("name", ["summary", "heads", "token", "timeline", "compare"])
def test_reading_needs_neither_torch_nor_unicode(trained: Path, name: str) -> None:
    done = python(WITHOUT_TORCH, name, trained, PYTHONIOENCODING="ascii", LC_ALL="C")
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii() and "L1H1" in done.stdout
