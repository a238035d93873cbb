"""The equations of every fastlstm layer in NumPy, made to be read and to check the compiled engine against.

float64 in, float64 out; any complex input makes the whole calculation complex128. Every function here is
analytic (comparisons look at the real part alone), so a derivative can be had to full precision by a complex
step: ``df/dv = Im f(p + 1j*h*v) / h`` with h as small as 1e-100.

Letters: T steps, N batch, D input size, H hidden units, P projection size (H without projection), L layers,
dirs 1 or 2, G gates. A cell is one pair of functions, its forward step and its backward step, in the table
``CELLS``; the loop over time, lengths, layers, directions, dropout and zoneout are shared by all cells.

Sources: LSTM, Hochreiter & Schmidhuber 1997, with the forget gate of Gers, Schmidhuber & Cummins 2000;
projection, Sak, Senior & Beaufays 2014; GRU, Cho et al. 2014 (``gru_reset_before``; ``gru`` resets after the
recurrent product, as cuDNN and PyTorch do); RNN, Elman 1990; recurrent dropout, Gal & Ghahramani 2016;
zoneout, Krueger et al. 2017.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

__all__ = ["forward", "backward", "Tape"]


# ---- activations: the value from the pre-activation a, the slope from the value y


class Activation(NamedTuple):
    """A function ``value(a)`` and its derivative ``slope(y)``, written in terms of ``y = value(a)``."""

    value: Callable
    slope: Callable


def _abs(a):
    return np.where(a.real < 0, -a, a)  # np.abs is not analytic


def _sigmoid(a):
    e = np.exp(-_abs(a))  # never overflows
    return np.where(a.real < 0, e, 1) / (1 + e)


def _clip(a, low, high):
    return np.where(a.real <= low, low, np.where(a.real >= high, high, a))


def _inside(y, low, high):
    return (y.real > low) & (y.real < high)


ACTIVATIONS = {
    "tanh": Activation(np.tanh, lambda y: 1 - y * y),
    "relu": Activation(lambda a: np.where(a.real > 0, a, 0), lambda y: y.real > 0),
    "softsign": Activation(lambda a: a / (1 + _abs(a)), lambda y: (1 - _abs(y)) ** 2),
    "hard_tanh": Activation(lambda a: _clip(a, -1, 1), lambda y: _inside(y, -1, 1)),
    "identity": Activation(lambda a: a, lambda y: np.ones(y.shape)),
}
# hard_sigmoid = relu6(a + 3) / 6, as Keras 3 and PyTorch have it; ONNX's default is clip(0.2 a + 0.5, 0, 1).
RECURRENT_ACTIVATIONS = {
    "sigmoid": Activation(_sigmoid, lambda y: y * (1 - y)),
    "hard_sigmoid": Activation(lambda a: _clip(a + 3, 0, 6) / 6, lambda y: _inside(y, 0, 1) / 6),
}


# ---- cells: one step on n rows
# forward   f(w, act, sig, x, h, hr, c)               -> h~, c~, saved
# backward  b(w, d, act, sig, x, h, hr, c, s, dh, dc) -> dx, dh, dhr, dc     and adds to the gradients d
#   x [n,D]  h [n,P] = h_{t-1}  c [n,H] = c_{t-1}  hr [n,P] = recurrent dropout mask * h, for products
#   w, d: W = weight_ih [G*H,D]  R = weight_hh [G*H,P]  bW = bias_ih, bR = bias_hh [G*H]  P = weight_hr [P,H]
#   saved, s: the gates by name, and what else the backward step wants
#   dh, dc on the way in are of h~ and c~, on the way out of h and c


def _product_back(W, dW, db, x, da):
    """Back through ``a = x @ W.T + b``: adds to dW and db, returns dx."""
    dW += da.T @ x
    db += da.sum(axis=0)
    return da @ W


def _lstm_forward(w, act, sig, x, h, hr, c):
    # i, f, o = sig(W x + bW + R h + bR)   g = act(...)        rows of W, R: i, f, g, o
    i, f, g, o = np.split(x @ w.W.T + w.bW + hr @ w.R.T + w.bR, 4, axis=1)
    i, f, g, o = sig.value(i), sig.value(f), act.value(g), sig.value(o)
    # c~ = f * c + i * g
    c = f * c + i * g
    # m = o * act(c~)      h~ = m, or P m with a projection
    m = o * act.value(c)
    return m if w.P is None else m @ w.P.T, c, dict(i=i, f=f, g=g, o=o, c=c)


def _lstm_backward(w, d, act, sig, x, h, hr, c, s, dh, dc):
    i, f, g, o = s["i"], s["f"], s["g"], s["o"]
    y = act.value(s["c"])
    dm = dh
    if w.P is not None:
        d.P += dh.T @ (o * y)
        dm = dh @ w.P
    dc = dc + dm * o * act.slope(y)
    da = np.concatenate(
        [dc * g * sig.slope(i), dc * c * sig.slope(f), dc * i * act.slope(g), dm * y * sig.slope(o)], axis=1
    )
    return _product_back(w.W, d.W, d.bW, x, da), 0, _product_back(w.R, d.R, d.bR, hr, da), dc * f


def _gru_forward(w, act, sig, x, h, hr, c):
    # r, z = sig(W x + bW + R h + bR)   n = act(W_n x + bW_n + r * (R_n h + bR_n))     rows of W, R: r, z, n
    xr, xz, xn = np.split(x @ w.W.T + w.bW, 3, axis=1)
    qr, qz, qn = np.split(hr @ w.R.T + w.bR, 3, axis=1)
    r, z = sig.value(xr + qr), sig.value(xz + qz)
    n = act.value(xn + r * qn)
    # h~ = (1 - z) * n + z * h
    return (1 - z) * n + z * h, c, dict(r=r, z=z, n=n, q=qn)


def _gru_backward(w, d, act, sig, x, h, hr, c, s, dh, dc):
    r, z, n = s["r"], s["z"], s["n"]
    dz = dh * (h - n) * sig.slope(z)
    dn = dh * (1 - z) * act.slope(n)
    dr = dn * s["q"] * sig.slope(r)
    dx = _product_back(w.W, d.W, d.bW, x, np.concatenate([dr, dz, dn], axis=1))
    dhr = _product_back(w.R, d.R, d.bR, hr, np.concatenate([dr, dz, dn * r], axis=1))
    return dx, dh * z, dhr, dc


def _gru_reset_before_forward(w, act, sig, x, h, hr, c):
    # r, z = sig(W x + bW + R h + bR)   n = act(W_n x + bW_n + bR_n + R_n (r * h))     rows of W, R: r, z, n
    k = 2 * h.shape[1]
    ar, az, an = np.split(x @ w.W.T + w.bW + w.bR, 3, axis=1)
    qr, qz = np.split(hr @ w.R[:k].T, 2, axis=1)
    r, z = sig.value(ar + qr), sig.value(az + qz)
    n = act.value(an + (r * hr) @ w.R[k:].T)
    # h~ = (1 - z) * n + z * h
    return (1 - z) * n + z * h, c, dict(r=r, z=z, n=n)


def _gru_reset_before_backward(w, d, act, sig, x, h, hr, c, s, dh, dc):
    r, z, n = s["r"], s["z"], s["n"]
    k = 2 * h.shape[1]
    dz = dh * (h - n) * sig.slope(z)
    dn = dh * (1 - z) * act.slope(n)
    drh = _product_back(w.R[k:], d.R[k:], d.bR[k:], r * hr, dn)
    dr = drh * hr * sig.slope(r)
    dx = _product_back(w.W, d.W, d.bW, x, np.concatenate([dr, dz, dn], axis=1))
    dhr = _product_back(w.R[:k], d.R[:k], d.bR[:k], hr, np.concatenate([dr, dz], axis=1))
    return dx, dh * z, dhr + drh * r, dc


def _rnn_forward(w, act, sig, x, h, hr, c):
    # h~ = act(W x + bW + R h + bR)
    h = act.value(x @ w.W.T + w.bW + hr @ w.R.T + w.bR)
    return h, c, dict(h=h)


def _rnn_backward(w, d, act, sig, x, h, hr, c, s, dh, dc):
    da = dh * act.slope(s["h"])
    return _product_back(w.W, d.W, d.bW, x, da), 0, _product_back(w.R, d.R, d.bR, hr, da), dc


class Cell(NamedTuple):
    """One cell: its two steps and the names of its gates, in the order of the weights' rows."""

    forward: Callable
    backward: Callable
    gates: tuple[str, ...]


CELLS = {
    "lstm": Cell(_lstm_forward, _lstm_backward, ("i", "f", "g", "o")),
    "gru": Cell(_gru_forward, _gru_backward, ("r", "z", "n")),
    "gru_reset_before": Cell(_gru_reset_before_forward, _gru_reset_before_backward, ("r", "z", "n")),
    "rnn": Cell(_rnn_forward, _rnn_backward, ("h",)),
}


# ---- the tape


@dataclass
class _Track:
    """What one layer saw in one direction."""

    w: SimpleNamespace
    x: np.ndarray  # (T,N,D), the layer's input
    h: np.ndarray  # (T,N,P), the states h_t and c_t, zeros past lengths
    c: np.ndarray  # (T,N,H)
    steps: list  # (t, rows, h_{t-1}, c_{t-1}, zh, zc, saved) in the order in which they ran


@dataclass
class Tape:
    """The record of one forward pass. Its arrays are time-major with a batch axis, whatever x was."""

    cell: str
    act: Activation
    sig: Activation
    masks: dict
    shapes: dict  # of the params
    dtype: np.dtype
    tracks: list  # [layer][direction]
    batch_first: bool
    unbatched: bool

    def gates(self, layer, reverse=False):
        """Gates of one layer, name (lstm i,f,g,o; gru r,z,n; rnn h) -> (T,N,H), zeros past lengths."""
        track = self.tracks[layer][int(reverse)]
        out = {name: np.zeros(track.c.shape, self.dtype) for name in CELLS[self.cell].gates}
        for t, rows, *_, saved in track.steps:
            for name, values in out.items():
                values[t, rows] = saved[name]
        return out

    def cells(self, layer, reverse=False):
        """Cell states c_t of one LSTM layer, (T,N,H), zeros past lengths."""
        if self.cell != "lstm":
            raise ValueError(f"tape.cells: a {self.cell} layer has no cell state, only an lstm has")
        return self.tracks[layer][int(reverse)].c.copy()

    def hidden(self, layer, reverse=False):
        """Hidden states h_t of one layer, (T,N,P), zeros past lengths, before the dropout between layers."""
        return self.tracks[layer][int(reverse)].h.copy()

    def _outward(self, a):
        """(T,N,...) -> the layout in which the caller gave x."""
        return a[:, 0] if self.unbatched else a.swapaxes(0, 1) if self.batch_first else a

    def _inward(self, name, a, shape):
        """The caller's array, or None for zeros, -> (T,N,...) = shape."""
        if a is None:
            return np.zeros(shape, self.dtype)
        a = np.asarray(a, self.dtype)
        a = a[:, None] if self.unbatched else a.swapaxes(0, 1) if self.batch_first else a
        return _checked(name, a, shape)


def _checked(name, a, shape):
    if a.shape != shape:
        raise ValueError(f"{name}: expected shape {shape} (time-major, batched), got {a.shape}")
    return a


def _state_in(name, state, tape, *shapes):
    """(h, c), h alone, or None -> fresh h (L*dirs,N,P) and c (L*dirs,N,H)."""
    given = (None, None) if state is None else state if tape.cell == "lstm" else (state, None)
    out = []
    for a, shape in zip(given, shapes, strict=True):
        a = np.zeros(shape, tape.dtype) if a is None else np.array(a, tape.dtype)
        out.append(_checked(name, a[:, None] if tape.unbatched and a.ndim == 2 else a, shape))
    return out


def _state_out(h, c, tape):
    h, c = (h[:, 0], c[:, 0]) if tape.unbatched else (h, c)
    return (h, c) if tape.cell == "lstm" else h


def _weights(params, layer, direction, dtype):
    """One layer's arrays under their short names; no bias: zeros, no projection: None."""
    suffix = f"_l{layer}" + ("_reverse" if direction else "")
    short = dict(W="weight_ih", R="weight_hh", bW="bias_ih", bR="bias_hh", P="weight_hr")
    w = SimpleNamespace(**{k: params.get(name + suffix) for k, name in short.items()})
    w.bW, w.bR = (np.zeros(len(w.W), dtype) if b is None else b for b in (w.bW, w.bR))
    return w


# ---- the two passes


def forward(
    params,
    x,
    state=None,
    lengths=None,
    *,
    cell="lstm",
    num_layers=1,
    bidirectional=False,
    batch_first=False,
    activation="tanh",
    recurrent_activation="sigmoid",
    zoneout=(0.0, 0.0),
    masks=None,
):
    """Run the layers over a batch of sequences.

    Parameters
    ----------
    params : dict
        PyTorch's names, shapes and gate order: weight_ih_l0 (G*H,D), weight_hh_l0 (G*H,P), and where wanted
        bias_ih_l0, bias_hh_l0 (G*H), weight_hr_l0 (P,H); suffix _l{layer}, then _reverse.
    x : array (T,N,D), with batch_first (N,T,D), or (T,D) for one sequence
        What stands past a row's length is never read.
    state : (h, c) of shapes (L*dirs,N,P) and (L*dirs,N,H), or h alone (gru, rnn), or None for zeros
        Without N where x is (T,D).
    lengths : integers (N,), each 0..T, in any order, or None for T
    cell : "lstm", "gru" (reset after the product), "gru_reset_before" or "rnn"
    activation, recurrent_activation : str
        A name in ACTIVATIONS (an rnn's nonlinearity too) and one in RECURRENT_ACTIVATIONS.
    zoneout : (zh, zc)
        Probabilities of keeping h_{t-1} and c_{t-1}: the expectation, used where `masks` has no zoneout mask.
    masks : dict or None
        "dropout": list, per layer but the last, of (T,N,dirs*P) factors on that layer's output, or None;
        "recurrent": dict (layer, direction) -> (N,P), factors on h_{t-1} where a recurrent product reads it;
        "zoneout_h", "zoneout_c": dict (layer, direction) -> (T,N,P), (T,N,H): 1 keeps the old state, 0 not.
        Always time-major with a batch axis. What is absent or None is not applied.

    Returns
    -------
    y : array like x with dirs*P features, zeros past lengths
    state : like `state`: each row's last valid step (of length 0: its initial state)
    tape : Tape, for `backward`

    Notes
    -----
    From a cell's new states h~, c~ (see the steps above): h_t = zh * h_{t-1} + (1 - zh) * h~; c_t likewise.
    """
    absent = {"dropout": [], "recurrent": {}, "zoneout_h": {}, "zoneout_c": {}}
    masks = {key: (masks or {}).get(key) or empty for key, empty in absent.items()}
    given = [a for a in (state if isinstance(state, (tuple, list)) else (state,)) if a is not None]
    dtype = np.result_type(np.float64, *(np.asarray(a).dtype for a in (x, *given, *params.values())))
    tape = Tape(
        cell,
        ACTIVATIONS[activation],
        RECURRENT_ACTIVATIONS[recurrent_activation],
        masks,
        {name: np.shape(p) for name, p in params.items()},
        dtype,
        [],
        batch_first and np.ndim(x) == 3,
        np.ndim(x) == 2,
    )
    params = {name: np.array(p, dtype) for name, p in params.items()}
    x = np.array(x, dtype)
    x = x[:, None] if tape.unbatched else x.swapaxes(0, 1) if tape.batch_first else x
    T, N = x.shape[:2]
    lengths = np.full(N, T) if lengths is None else _checked("lengths", np.atleast_1d(lengths), (N,))
    if not np.issubdtype(lengths.dtype, np.integer) or np.any((lengths < 0) | (lengths > T)):
        raise ValueError(f"lengths: expected integers in 0..{T}, got {lengths}")

    dirs = 2 if bidirectional else 1
    H = params["weight_ih_l0"].shape[0] // len(CELLS[cell].gates)
    P = params["weight_hh_l0"].shape[1]
    h_n, c_n = _state_in("state", state, tape, (num_layers * dirs, N, P), (num_layers * dirs, N, H))
    for layer in range(num_layers):
        tape.tracks.append([])
        for direction in range(dirs):
            k = layer * dirs + direction
            w = _weights(params, layer, direction, dtype)
            track = _Track(w, x, np.zeros((T, N, P), dtype), np.zeros((T, N, H), dtype), [])
            _run_forward(tape, track, h_n[k], c_n[k], lengths, (layer, direction), zoneout)
            tape.tracks[layer].append(track)
        x = np.concatenate([track.h for track in tape.tracks[layer]], axis=2)
        drop = _dropout(masks, layer, num_layers)
        x = x if drop is None else x * drop
    return tape._outward(x), _state_out(h_n, c_n, tape), tape


def _dropout(masks, layer, num_layers):
    return masks["dropout"][layer] if layer < min(num_layers - 1, len(masks["dropout"])) else None


def _run_forward(tape, track, h, c, lengths, key, zoneout):
    """The time loop of one layer in one direction. h (N,P), c (N,H): initial states in, final states out."""
    step, T = CELLS[tape.cell].forward, len(track.x)
    mask = tape.masks["recurrent"].get(key)
    for t in reversed(range(T)) if key[1] else range(T):
        rows = np.flatnonzero(t < lengths)  # in reverse, a row joins at its own last valid step
        h_prev, c_prev = h[rows], c[rows]
        hr = h_prev if mask is None else h_prev * mask[rows]
        h_new, c_new, saved = step(track.w, tape.act, tape.sig, track.x[t, rows], h_prev, hr, c_prev)
        zh, zc = (
            tape.masks[name][key][t, rows] if key in tape.masks[name] else z
            for name, z in zip(("zoneout_h", "zoneout_c"), zoneout, strict=True)
        )
        h[rows] = track.h[t, rows] = zh * h_prev + (1 - zh) * h_new
        c[rows] = track.c[t, rows] = zc * c_prev + (1 - zc) * c_new
        track.steps.append((t, rows, h_prev, c_prev, zh, zc, saved))


def backward(tape, dy, dstate=None):
    """Backpropagation through time: the gradient of ``sum(dy * y) + sum(dstate * state)``.

    Parameters
    ----------
    tape : Tape
        From `forward`; may be used again.
    dy : array like y, or None for zeros
        What stands past a row's length is never read.
    dstate : like state, or None for zeros
        The gradient at the final states.

    Returns
    -------
    dx : array like x, zeros past lengths
    dstate0 : like state, the gradient at the initial states
    grads : dict like params
    """
    tracks, num_layers, dirs = tape.tracks, len(tape.tracks), len(tape.tracks[0])
    grads = {name: np.zeros(shape, tape.dtype) for name, shape in tape.shapes.items()}
    (T, N, P), H = tracks[0][0].h.shape, tracks[0][0].c.shape[2]
    dy = tape._inward("dy", dy, (T, N, dirs * P))
    dh, dc = _state_in("dstate", dstate, tape, (num_layers * dirs, N, P), (num_layers * dirs, N, H))
    for layer in reversed(range(num_layers)):
        drop = _dropout(tape.masks, layer, num_layers)
        dy = dy if drop is None else dy * drop
        dx = np.zeros(tracks[layer][0].x.shape, tape.dtype)
        for direction, track in enumerate(tracks[layer]):
            k, part = layer * dirs + direction, slice(direction * P, (direction + 1) * P)
            d = _weights(grads, layer, direction, tape.dtype)
            _run_backward(tape, track, d, dy[:, :, part], dx, dh[k], dc[k], (layer, direction))
        dy = dx
    return tape._outward(dx), _state_out(dh, dc, tape), grads


def _run_backward(tape, track, d, dy, dx, dh, dc, key):
    """The mirror of _run_forward. dh, dc: of the final states in, of the initial ones out. Adds to d, dx."""
    step = CELLS[tape.cell].backward
    mask = tape.masks["recurrent"].get(key)
    for t, rows, h, c, zh, zc, saved in reversed(track.steps):
        m = 1 if mask is None else mask[rows]
        dh_t, dc_t = dh[rows] + dy[t, rows], dc[rows]
        dx_t, dh_prev, dhr, dc_prev = step(
            track.w, d, tape.act, tape.sig, track.x[t, rows], h, m * h, c, saved, (1 - zh) * dh_t, (1 - zc) * dc_t
        )
        dx[t, rows] += dx_t
        dh[rows] = zh * dh_t + dh_prev + m * dhr
        dc[rows] = zc * dc_t + dc_prev
