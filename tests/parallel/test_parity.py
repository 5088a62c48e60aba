"""One process, accumulation, DDP and FSDP2 learn the same: the bounds of `benchmarks/processes.py`."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.runs import ROOT


@pytest.mark.slow
def test_every_way_of_sharing_learns_what_one_process_learns() -> None:
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.processes"],
        cwd=ROOT,
        env={**os.environ, **threads},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    _, bounds, *rows, verdict = ended.stdout.splitlines()
    assert bounds.split()[1:5] == ["1e-06", "1e-06", "-", "1e-05"]
    ways = ["one process, 6", "DDP x2", "DDP x2, 3", "FSDP2 x2", "FSDP2 x2, 3", "DDP x4", "FSDP2 x4"]
    assert [row.startswith(way) for row, way in zip(rows, ways, strict=True)] == [True] * 7
    for row in rows:
        gradient, weights, _, loss = map(float, row[24:].split()[:4])
        assert gradient <= 1e-6 and weights <= 1e-6 and loss <= 1e-5
        shares = [int(word) for word in row.partition("e-")[2].split("  ")[-1].split(" + ")]
        assert len(shares) == 1 or len(set(shares)) > 1, "the processes count different numbers of targets"
    assert verdict == "every bound holds"
