"""Schedules of the learning rate: functions of the progress (0 at the first step, towards 1) that return a factor.

They keep no state: ``optimiser.lr = lr * cosine(step / steps)`` before each step is all, and a resumed run goes on
where it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[float], float]


def constant(progress: float) -> float:
    """1 throughout."""
    return 1.0


def linear(progress: float) -> float:
    """From 1 in a straight line to 0."""
    return max(0.0, 1 - progress)


def cosine(progress: float) -> float:
    """From 1 to 0 as half a cosine (Loshchilov and Hutter 2017)."""
    return 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


def one_cycle(progress: float, warm_up: float = 0.1) -> float:
    """Up in a straight line over the first tenth, then down to 0 as half a cosine (Smith and Topin 2018)."""
    if progress < warm_up:
        return max(progress, 1e-3) / warm_up
    return cosine((progress - warm_up) / (1 - warm_up))


SCHEDULES: dict[str, Schedule] = {"constant": constant, "linear": linear, "cosine": cosine, "one_cycle": one_cycle}


def schedule(which: str | Schedule) -> Schedule:
    """The schedule of this name; a function of your own is taken as it is."""
    if callable(which):
        return which
    if not isinstance(which, str) or which not in SCHEDULES:
        raise ValueError(f"schedule: expected one of {', '.join(map(repr, SCHEDULES))} or a function, got {which!r}")
    return SCHEDULES[which]
