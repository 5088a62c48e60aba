"""Weights & Biases in a process of its own: what `tracking.py` starts, one JSON object a line in, one word a line out.

It is run by its path and needs nothing of ours. In here wandb may do what it likes, and it likes much: replace
`sys.exit` and the standard streams, interrupt the main thread when the server says so, wait at exit for a service.

The first line is {"init": keywords of wandb.init, "argv": the trainer's command line, "patience": seconds}. Each
further one is {"step", "values"} and perhaps "sample" (text) and "image" ([name, suffix, base64]); the last one is
{"close": exit code}. Said are `ready`, `row` for each line, `finishing`, `done`, and `failed REASON`.
"""

from __future__ import annotations

import base64
import html
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main() -> None:
    say = speaker()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # meant for the trainer, who then closes the run
        signal.signal(number, signal.SIG_IGN)
    first = json.loads(sys.stdin.buffer.readline())
    outlive(os.getppid(), first["patience"])
    sys.argv = first["argv"]  # wandb shows how a run was started
    try:
        run = start(first["init"])
        say("ready")
        exit_code = 1  # of a trainer that ends without a word
        for line in sys.stdin.buffer:
            row = json.loads(line)
            if "close" in row:
                exit_code = row["close"]
                break
            log(run, row)
            say("row")
        say("finishing")
        run.finish(exit_code=exit_code)
    except BaseException as error:
        first_line = (str(error).splitlines() or [""])[0][:150]
        say(f"failed {type(error).__name__}: {first_line}")
        os._exit(1)  # whatever else wandb wants to do at exit is of no use
    say("done")


def speaker() -> Callable[[str], None]:
    """A function that says a word to the trainer; what wandb prints goes nowhere."""
    words = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="backslashreplace")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    return lambda word: print(word, file=words, flush=True)


def outlive(trainer: int, patience: float) -> None:
    """End this process `patience` seconds after the trainer's end, wherever wandb hangs by then."""

    def watch() -> None:
        while os.getppid() == trainer:
            time.sleep(0.5)
        signal.alarm(max(1, round(patience)))  # whose default action ends a process, with no word of Python's

    threading.Thread(target=watch, daemon=True).start()


def start(keywords: dict[str, Any]) -> Any:
    """The run there, new or gone on with."""
    import wandb

    settings = wandb.Settings(
        init_timeout=30,
        silent=True,
        console="off",
        stop_fn=lambda: None,  # the server's stop button is not the trainer's
        x_stats_pid=os.getppid(),  # the trainer's load, not this process's
    )
    return wandb.init(settings=settings, **keywords)


def log(run: Any, row: dict[str, Any]) -> None:
    """One step's numbers, and perhaps a sample of text and a picture."""
    import wandb

    values = dict(row["values"])
    if "sample" in row:
        values["sample"] = wandb.Html(f"<pre>{html.escape(row['sample'])}</pre>", inject=False)
    with tempfile.TemporaryDirectory() as folder:
        if "image" in row:
            name, suffix, content = row["image"]
            path = Path(folder, f"picture{suffix}")
            path.write_bytes(base64.b64decode(content))
            values[f"pictures/{name}"] = wandb.Image(str(path))
        run.log(values, step=row["step"])  # copies the picture


if __name__ == "__main__":
    main()
