"""A long series in windows: truncated backpropagation, and the full gradient without the full memory.

Run it:  python examples/truncated_bptt.py
"""

import numpy as np

import fastlstm
from fastlstm import nn


def series(steps, batch, rng):
    """A noisy wave per sequence, and the same wave one step later as the target; shapes (steps, batch, 1)."""
    t = np.arange(steps + 1)[:, None, None] * rng.uniform(0.05, 0.2, (batch, 1)) + rng.uniform(0, 6, (batch, 1))
    wave = np.sin(t) + 0.1 * rng.standard_normal(t.shape)
    return wave[:-1], wave[1:]


def train_truncated(lstm, head, x, target, window, epochs, lr):
    """States go on from window to window, gradients end at the window's edge. Returns the loss of each epoch.

    States are plain arrays: there is nothing to detach. Memory is that of one window, whatever the series.
    """
    adam = nn.Adam([lstm, head], lr=lr)
    losses = []
    for _ in range(epochs):
        state, total = None, 0.0
        for begin in range(0, len(x), window):
            part = slice(begin, begin + window)
            y, state, tape = lstm.forward(x[part], state)
            prediction, kept = head.forward(y)
            loss, dprediction = nn.mse(prediction, target[part])
            adam.zero_grad()
            lstm.backward(tape, head.backward(kept, dprediction))
            nn.clip_grad_norm([lstm, head], 1.0)
            adam.step()
            total += loss * len(x[part]) / len(x)
        losses.append(total)
    return losses


def gradients_in_one_pass(lstm, head, x, target):
    """Loss and gradients over the whole series at once."""
    lstm.zero_grad()
    head.zero_grad()
    y, _, tape = lstm.forward(x)
    prediction, kept = head.forward(y)
    loss, dprediction = nn.mse(prediction, target)
    dx, _ = lstm.backward(tape, head.backward(kept, dprediction))
    return loss, lstm.flat_grads.copy(), dx


def gradients_in_windows(lstm, head, x, target, window):
    """The same, holding the tape of one window at a time.

    Forward keeps the state before each window. Backward takes the windows from the last to the first, runs
    each again from its state, and hands the gradient of that state on: what `backward` returns as the one of
    the initial state, the window before takes as that of its final one. All add to the same `grads`.
    """
    lstm.zero_grad()
    head.zero_grad()
    parts = [slice(begin, begin + window) for begin in range(0, len(x), window)]
    states = [None]
    for part in parts:
        states.append(lstm(x[part], states[-1])[1])

    loss, dstate, dx = 0.0, None, np.empty_like(x)
    for part, state in zip(reversed(parts), reversed(states[:-1]), strict=True):
        y, _, tape = lstm.forward(x[part], state)
        prediction, kept = head.forward(y)
        part_loss, dprediction = nn.mse(prediction, target[part])
        share = len(x[part]) / len(x)  # the loss is a mean over the series, not over the window
        dx[part], dstate = lstm.backward(tape, head.backward(kept, dprediction * share), dstate)
        loss += part_loss * share
    return loss, lstm.flat_grads.copy(), dx


def main():
    rng = np.random.default_rng(0)
    x, target = series(600, 8, rng)
    lstm = fastlstm.LSTM(1, 24, num_layers=2, dtype=np.float64, rng=rng)
    head = nn.Linear(24, 1, dtype=np.float64, rng=rng)

    losses = train_truncated(lstm, head, x, target, window=50, epochs=4, lr=5e-3)
    print("truncated, windows of 50:", " ".join(f"{loss:.4f}" for loss in losses))

    loss, grads, dx = gradients_in_one_pass(lstm, head, x, target)
    for window in (50, 77, 1):
        loss_w, grads_w, dx_w = gradients_in_windows(lstm, head, x, target, window)
        error = np.linalg.norm(grads_w - grads) / np.linalg.norm(grads)
        error_x = np.linalg.norm(dx_w - dx) / np.linalg.norm(dx)
        print(f"full gradient in windows of {window:2d}: off by {error:.1e} (parameters), {error_x:.1e} (x)")
        assert abs(loss_w - loss) < 1e-12 and error < 1e-12 and error_x < 1e-12
    return losses


if __name__ == "__main__":
    main()
