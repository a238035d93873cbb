"""The least time that a call needs on this machine, by the arithmetic and the reading that nothing can save."""

from __future__ import annotations

from dataclasses import dataclass

from cases import Case

# Activations of one unit at one step; and those that backward computes once more, since no tape keeps them: tanh(c).
FORWARD = {"lstm": {"sigmoid": 3, "tanh": 2}, "gru": {"sigmoid": 2, "tanh": 1}, "rnn": {"tanh": 1}}
BACKWARD = {"lstm": {"tanh": 1}, "gru": {}, "rnn": {}}


@dataclass(frozen=True)
class Core:
    """What one core does in a second, in 1e9, measured in the process that is judged.

    peak: floating-point operations. read: bytes, of as many as the core reads again at every step. sigmoid, tanh:
    activations of numbers in its L1 cache.
    """

    peak: float
    read: float
    sigmoid: float
    tanh: float


def least_time(case: Case, threads: int, core: Core) -> float:
    """Seconds that a call of ``case`` takes at least on so many cores.

        t = ((F - k R) / peak + k max(R / peak, V / read) + S / sigmoid + H / tanh) / threads

    F: floating-point operations of all products.  R: of those that wait for the step before, h W_hh', once (k = 1) at
    inference, and dG W_hh as well (k = 2) in training.  V: bytes of W_hh times the steps, for each of these reads the
    whole of it at every step; threads share it, so that each reads ``threads`` times fewer bytes, from the nearer cache
    that these fit.  A stream cannot compute ahead, so x W_ih belongs to R, and W_ih to V.  S, H: sigmoids and tanhs.

    Products and activations add up, since they use the same units; reading goes on beside the products.  What is left
    out, and so shows as distance from the limit: packing, the tape's way to memory and back, the start of a team and
    its meetings, Python.  Activations that share work can beat their part of it.
    """
    training = case.mode == "training"
    products = (case.flops - (1 + training) * case.step_flops) / core.peak
    steps = (1 + training) * max(case.step_flops / core.peak, case.steps * case.step_bytes / core.read)
    units = case.rows * case.H * case.layers * case.dirs
    counts = [FORWARD[case.cell], BACKWARD[case.cell] if training else {}]
    activations = sum(units * n / getattr(core, name) for count in counts for name, n in count.items())
    return (products + steps + activations) / threads / 1e9
