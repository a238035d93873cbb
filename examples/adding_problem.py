"""The adding problem (Hochreiter and Schmidhuber 1997): what gates are for, in one table.

A sequence of 200 steps has two features: random numbers from 0 to 1, and marks, 0 but for two steps. The target is the
sum of the two marked numbers. Always saying 1 has a mean squared error of 1/6 = 0.167; to do better, a network must
carry the first number over up to 200 steps.

After 2,000 updates the mean squared error on 2,000 new sequences is 0.0005 for the LSTM, 0.0001 for the GRU, and 0.175
for the RNN, which has learnt nothing.

Run it:  python examples/adding_problem.py
"""

import time

import numpy as np

import fastlstm
from fastlstm import nn


def batch(steps, size, rng):
    """x (steps, size, 2) and target (size, 1), float32: one mark in each half, as is usual."""
    x = np.zeros((steps, size, 2), np.float32)
    x[:, :, 0] = rng.random((steps, size))
    rows, half = np.arange(size), steps // 2
    marks = rng.integers(0, half, size), rng.integers(half, steps, size)
    for mark in marks:
        x[mark, rows, 1] = 1
    return x, (x[marks[0], rows, 0] + x[marks[1], rows, 0])[:, None]


def network(cell, hidden, steps, rng):
    """A layer and a linear one. A unit's memory lasts some 1 / (1 - f) steps: let the gates begin with memories of all
    lengths up to the sequence's, by biases log(length) (Tallec and Ollivier 2018). The RNN has none to set."""
    layer = {"lstm": fastlstm.LSTM, "gru": fastlstm.GRU, "rnn": fastlstm.RNN}[cell](2, hidden, rng=rng)
    if cell != "rnn":
        keep = np.log(rng.uniform(1, steps - 1, hidden))
        bias = layer.params["bias_ih_l0"].reshape(-1, hidden)  # gates i, f, g, o or r, z, n
        bias[1] = keep
        if cell == "lstm":
            bias[0] = -keep
    return nn.Sequential(nn.Recurrent(layer, last=True), nn.Linear(hidden, 1, rng=rng))


def train(cell, steps=200, updates=2000, hidden=40, size=50, lr=1e-2, seed=0):
    """Train on new sequences at each update; return the error on 2,000 others."""
    rng = np.random.default_rng(seed)
    model = network(cell, hidden, steps, rng)
    adam = nn.Adam([model], lr)
    for update in range(updates):
        x, target = batch(steps, size, rng)
        y, tape = model.forward(x)
        _, dy = nn.mse(y, target)
        model.zero_grad()
        model.backward(tape, dy, need_dx=False)
        nn.clip_grad_norm([model], 1.0)
        adam.lr = lr * nn.one_cycle(update / updates)
        adam.step()
    x, target = batch(steps, 2000, np.random.default_rng(12345))
    return nn.mse(model(x), target)[0]


def main(**options):
    """Print a line for each cell; return the errors."""
    errors = {}
    for cell in ("lstm", "gru", "rnn"):
        begin = time.perf_counter()
        errors[cell] = train(cell, **options)
        seconds = time.perf_counter() - begin
        print(f"{cell.upper():4}  mean squared error {errors[cell]:.5f}  {seconds:.0f} s", flush=True)
    return errors


if __name__ == "__main__":
    main()
