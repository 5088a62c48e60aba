"""`attend.py serve RUN`: type your own text into a model of any size, in the browser."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common.errors import CONFIG, UserError
from inspection.attention_file import AttentionFile
from inspection.commands.shared import Context, DeviceOptions, Result
from inspection.page_data import PageRun
from inspection.run_reader import RunFiles

TEXT = "The animal didn't cross the street because it was too tired"


@dataclass(frozen=True)
class Serve(DeviceOptions):
    """Show the page of a run or a Hugging Face folder, whose model runs on this machine as you type. Ctrl-C ends it."""

    port: int = 0  # Port of 127.0.0.1; 0: a free one.

    def result(self, context: Context) -> Result:
        from inspection.eval_texts import pretrained_texts
        from inspection.page_builder import build_page
        from inspection.page_model import describe_model
        from inspection.recorder import capture_texts
        from inspection.serve import Backend, PageServer

        path = Path(self.run)
        newest = context.load_model(path, "best")
        kept = [int(folder.name) for folder in path.glob("checkpoints/*") if folder.name.isdecimal()]
        loaders = {step: partial(context.load_model, path, str(step)) for step in kept} | {newest.step: lambda: newest}
        try:
            run = RunFiles.open(path)
            page_run = PageRun(path.name, *run.history(newest.step))
            findings, ablation = run.findings, run.ablation
            texts = run.eval_texts(newest.model.vocab_size, newest.model.config.context)
        except (UserError, KeyError):  # no attention was recorded, or not of this step
            sentence = [("a sentence", newest.encode(TEXT))]
            records = capture_texts(newest.model, sentence, newest.token_bytes, details=True)
            page_run = PageRun(path.name, [AttentionFile(records, dict(newest.metadata))])
            findings = ablation = texts = None
        texts = texts or pretrained_texts(newest.tokenizer, newest.model.config)
        model = describe_model(newest, sorted({newest.step} | ({*kept} & {*page_run.steps})))
        page, _ = build_page([page_run], findings, ablation, path.name, model)
        try:
            server = PageServer(page, Backend(loaders, texts.scored_texts() or texts.repeats), self.port)
        except (OSError, OverflowError) as error:
            raise UserError(f"cannot serve on port {self.port}: {error}; choose another --port", CONFIG) from error
        print(f"open {server.address}   (Ctrl-C ends it)", flush=True)
        with server:
            server.serve_forever()
        return Result([])
