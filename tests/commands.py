"""Commands as the documents write them: each must be one that the program understands."""

import shlex

import attend
import export
import sample
from tests.runs import ROOT
from training.cli import parse
from training.config import parse_train
from training.hardware import parse_plan_option


def check_command(command: str) -> None:
    """Parse a command line as the program would, up to where it would begin to work."""
    program, script, *argv = shlex.split(command.replace("RUN", "runs/quickstart"))
    if program == "pip":
        assert (ROOT / argv[-1]).is_file()
    elif script == "train.py":
        argv, _ = parse_plan_option(argv)
        if not {"--run.resume", "--help"} & set(argv):  # a run to resume is made in tests/training/test_train.py
            parse_train([str(ROOT / word) if word.endswith(".toml") else word for word in argv])
    elif script == "sample.py":
        parse(sample.SampleConfig, argv, "", positional=["run"])
    elif script == "export.py":
        parse(export.ExportConfig, argv, "", positional=["run", "out"])
    elif script == "attend.py" and argv[0] in attend.COMMANDS:
        parse(attend.COMMANDS[argv[0]], argv[1:], "", positional=["run"])
    elif script == "attend.py":
        parse(attend.AttendOptions, argv, "", positional=["run"])
    elif argv[0].startswith("benchmarks."):
        assert all(f'"{word}"' in (ROOT / f"{argv[0].replace('.', '/')}.py").read_text() for word in argv[1:2])
    else:
        assert [script, *argv] == ["-m", "pytest"]
