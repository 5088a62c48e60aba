"""Holding `train.minutes`: how many steps a run has is settled when its rate is about to fall.

A processor that others use, too, changes its speed from one minute to the next. Until the rate falls no step depends on
how many there will be (`get_lr_scale`), so their number can be settled as late as that, by the time that steps really took.
What is settled is written into the run's config: begun again with that, a run takes the same steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from training.config import RunConfig

ENOUGH = 0.01
"""Share of the steps by which a plan may be off and is kept."""
SHORTEST = 0.2
"""Share of the steps in which the rate falls, at least, whatever the clock says: without it too little is learned."""


@dataclass
class Pace:
    """The clock of a run by minutes.

    Args:
        end: when its last step should be over, by `time.perf_counter()`.
        settle: told the config with another number of steps.
    """

    end: float
    settle: Callable[[RunConfig], None]
    begun: float = field(default_factory=time.perf_counter)

    def look(self, config: RunConfig, step: int) -> None:
        """Settle the number of steps if `step` of them are made and the rate is about to fall."""
        if step != turn(config):
            return
        now = time.perf_counter()
        settled = as_long_as(config, step, (now - self.begun) / step, self.end - now)
        if abs(settled.train.steps - config.train.steps) > ENOUGH * config.train.steps:
            self.settle(settled)


def turn(config: RunConfig) -> int:
    """The last step whose rate does not depend on how many there will be (`get_lr_scale`, linear); at least 1."""
    return max(1, int(config.train.steps * (1 - config.optim.decay_fraction)))


def as_long_as(config: RunConfig, step: int, each: float, left: float) -> RunConfig:
    """The config with as many steps as the time allows; those up to `step` keep their rates.

    Args:
        step: steps that are made, none of them at a rate that falls.
        each: seconds that each took, evaluations included.
        left: seconds until the last should be over.
    """
    steps = max(step + int(left / each), round(step / (1 - SHORTEST)), step + 1)
    share = min(config.optim.decay_fraction, (steps - step) / steps)
    optim = replace(config.optim, decay_fraction=share)
    return replace(config, train=replace(config.train, steps=steps), optim=optim)
