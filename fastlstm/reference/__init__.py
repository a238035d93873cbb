"""The equations of every fastlstm layer in NumPy, made to be read and to check the compiled engine against.

float64 in, float64 out; any complex input makes the whole calculation complex128. Every function here is
analytic (comparisons look at the real part alone), so a derivative can be had to full precision by a complex
step: ``df/dv = Im f(p + 1j*h*v) / h`` with h as small as 1e-100.

Letters: T steps, N batch, D input size, H hidden units, P projection size (H without projection), L layers,
dirs 1 or 2, G gates. A cell is one pair of functions in `cells`, its forward step and its backward step, in the
table ``CELLS``; the loop over time, lengths, layers, directions, dropout and zoneout are shared by all cells.

Sources: LSTM, Hochreiter & Schmidhuber 1997, with the forget gate of Gers, Schmidhuber & Cummins 2000;
peepholes, Gers & Schmidhuber 2000; coupled gates, Greff et al. 2017; layer normalisation, Ba, Kiros & Hinton
2016; sLSTM, Beck et al. 2024; projection, Sak, Senior & Beaufays 2014;
GRU, Cho et al. 2014 (``gru_reset_before``; ``gru`` resets after the recurrent product, as cuDNN and PyTorch do);
RNN, Elman 1990; recurrent dropout, Gal & Ghahramani 2016; zoneout, Krueger et al. 2017.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .cells import CELLS, Choices, activation_of

__all__ = ["forward", "backward", "Tape"]


Array = NDArray[Any]
Choice = str | tuple[str | float, ...]  # of an activation

# ---- the tape


@dataclass
class _Track:
    """What one layer saw in one direction."""

    w: SimpleNamespace
    x: Array  # (T,N,D), the layer's input
    h: Array  # (T,N,P), the states h_t and c_t, zeros past lengths
    c: Array  # (T,N,H), of an slstm c, n, m side by side
    steps: list[tuple[Any, ...]]  # (t, rows, cut, h_{t-1}, c_{t-1}, zh, zc, saved) in the order in which they ran


@dataclass
class Tape:
    """The record of one forward pass. Its arrays are time-major with a batch axis, whatever x was."""

    cell: str
    choices: Choices
    masks: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]  # of the params
    dtype: np.dtype[Any]
    tracks: list[list[_Track]]  # [layer][direction]
    batch_first: bool
    unbatched: bool
    reverse: bool = False

    def gates(self, layer: int, reverse: bool = False) -> dict[str, Array]:
        """Gates of one layer, name (lstm i,f,g,o; slstm i,f,z,o; gru r,z,n; rnn h) -> (T,N,H), zeros past lengths."""
        track = self.tracks[layer][int(reverse)]
        H = track.c.shape[2] // max(1, len(CELLS[self.cell].states) - 1)
        out = {name: np.zeros((*track.c.shape[:2], H), self.dtype) for name in CELLS[self.cell].gates}
        for t, rows, *_, saved in track.steps:
            for name, values in out.items():
                values[t, rows] = saved[name]
        return out

    def cells(self, layer: int, reverse: bool = False) -> Array:
        """Cell states c_t of one LSTM layer, (T,N,H), zeros past lengths."""
        if len(CELLS[self.cell].states) == 1:
            raise ValueError(f"tape.cells: a {self.cell} layer has no cell state, only an lstm has")
        return np.split(self.tracks[layer][int(reverse)].c, len(CELLS[self.cell].states) - 1, axis=2)[0].copy()

    def hidden(self, layer: int, reverse: bool = False) -> Array:
        """Hidden states h_t of one layer, (T,N,P), zeros past lengths, before the dropout between layers."""
        return self.tracks[layer][int(reverse)].h.copy()

    def _outward(self, a: Array) -> Array:
        """(T,N,...) -> the layout in which the caller gave x."""
        return a[:, 0] if self.unbatched else a.swapaxes(0, 1) if self.batch_first else a

    def _inward(self, name: str, a: ArrayLike | None, shape: tuple[int, ...]) -> Array:
        """The caller's array, or None for zeros, -> (T,N,...) = shape."""
        if a is None:
            return np.zeros(shape, self.dtype)
        a = np.asarray(a, self.dtype)
        a = a[:, None] if self.unbatched else a.swapaxes(0, 1) if self.batch_first else a
        return _checked(name, a, shape)


def _checked(name: str, a: Array, shape: tuple[int, ...]) -> Array:
    if a.shape != shape:
        raise ValueError(f"{name}: expected shape {shape} (time-major, batched), got {a.shape}")
    return a


def _state_in(name: str, state: Any, tape: Tape, *shapes: tuple[int, ...]) -> tuple[Array, Array]:
    """(h, c, ...), h alone, or None -> fresh h (L*dirs,N,P) and c (L*dirs,N,C), the others side by side."""
    others = len(CELLS[tape.cell].states) - 1
    given = (None,) * (1 + others) if state is None else state if others else (state,)
    out = []
    for a, shape in zip(given, (shapes[0], *shapes[1:] * others), strict=True):
        a = np.zeros(shape, tape.dtype) if a is None else np.array(a, tape.dtype)
        out.append(_checked(name, a[:, None] if tape.unbatched and a.ndim == 2 else a, shape))
    return out[0], np.concatenate(out[1:] or [np.zeros(shapes[1], tape.dtype)], axis=2)


def _state_out(h: Array, c: Array, tape: Tape) -> Any:
    others = len(CELLS[tape.cell].states) - 1
    h, c = (h[:, 0], c[:, 0]) if tape.unbatched else (h, c)
    return (h, *np.split(c, others, axis=-1)) if others else h


def _weights(params: dict[str, Array], layer: int, direction: int, dtype: np.dtype[Any]) -> SimpleNamespace:
    """One layer's arrays under their short names; no bias: zeros, no projection: None."""
    suffix = f"_l{layer}" + ("_reverse" if direction else "")
    short = dict(W="weight_ih", R="weight_hh", bW="bias_ih", bR="bias_hh", P="weight_hr")
    short |= dict(pi="weight_ci", pf="weight_cf", po="weight_co")
    short |= {"g" + k: "weight_ln_" + k for k in "ifgoc"} | {"u" + k: "bias_ln_" + k for k in "ifgoc"}
    w = SimpleNamespace(**{k: params.get(name + suffix) for k, name in short.items()})
    w.bW, w.bR = (np.zeros(len(w.W), dtype) if b is None else b for b in (w.bW, w.bR))
    return w


# ---- the two passes


def forward(
    params: Mapping[str, ArrayLike],
    x: ArrayLike,
    state: Any = None,
    lengths: ArrayLike | None = None,
    *,
    cell: str = "lstm",
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    activation: Choice = "tanh",
    output_activation: Choice | None = None,
    recurrent_activation: Choice = "sigmoid",
    clip: float | None = None,
    cell_clip: float | None = None,
    proj_clip: float | None = None,
    layer_norm_eps: float = 1e-5,
    num_heads: int = 1,
    forget_gate: str = "sigmoid",
    zoneout: tuple[float, float] = (0.0, 0.0),
    masks: Mapping[str, Any] | None = None,
    mask: ArrayLike | None = None,
    resets: ArrayLike | None = None,
    reverse: bool = False,
) -> tuple[Array, Any, Tape]:
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
    cell : a name in CELLS
        "lstm", "lstm_peephole", "lstm_coupled", "lstm_norm", "slstm", "gru" (reset after the product),
        "gru_reset_before" or "rnn".
    activation, output_activation, recurrent_activation : str or tuple
        Of the candidate (an rnn's nonlinearity too), of the cell on its way out (None: the same) and of the gates: a
        name in ACTIVATIONS, or a name in FAMILIES with its numbers.
    clip, cell_clip, proj_clip : float or None
        Limits of what goes into the activations of candidate and gates, of the new cell, of the projected h.
    layer_norm_eps, num_heads, forget_gate
        Of lstm_norm; of slstm, "sigmoid" or "exponential".
    zoneout : (zh, zc)
        Probabilities of keeping h_{t-1} and c_{t-1}: the expectation, used where `masks` has no zoneout mask.
    masks : dict or None
        "dropout": list, per layer but the last, of (T,N,dirs*P) factors on that layer's output, or None;
        "recurrent": dict (layer, direction) -> (N,P), factors on h_{t-1} where a recurrent product reads it;
        "zoneout_h", "zoneout_c": dict (layer, direction) -> (T,N,P), (T,N,H): 1 keeps the old state, 0 not.
        Always time-major with a batch axis. What is absent or None is not applied.
    mask, resets : bool (T,N) or None
        Time-major. False in mask: the step is skipped, as beyond a length. True in resets: what is carried between the
        steps t-1 and t is zero, in either direction; at t = 0 the initial state of the forward direction.
    reverse : bool
        The only direction walks from the last step to the first.

    Returns
    -------
    y : array like x with dirs*P features, zeros past lengths
    state : like `state`: each row's last valid step (of length 0: its initial state)
    tape : Tape, for `backward`

    Notes
    -----
    From a cell's new states h~, c~ (see the steps above): h_t = zh * h_{t-1} + (1 - zh) * h~; c_t likewise.
    """
    absent: dict[str, Any] = {"dropout": [], "recurrent": {}, "zoneout_h": {}, "zoneout_c": {}}
    drawn = {key: (masks or {}).get(key) or empty for key, empty in absent.items()}
    given = [a for a in (state if isinstance(state, (tuple, list)) else (state,)) if a is not None]
    dtype = np.result_type(np.float64, *(np.asarray(a).dtype for a in (x, *given, *params.values())))
    act, sig = activation_of(activation, clip), activation_of(recurrent_activation, clip)
    choices = Choices(act, activation_of(output_activation or activation), sig, cell_clip, proj_clip, layer_norm_eps)
    choices = choices._replace(num_heads=num_heads, forget_gate=forget_gate)
    shapes = {name: np.shape(p) for name, p in params.items()}
    tape = Tape(cell, choices, drawn, shapes, dtype, [], batch_first and np.ndim(x) == 3, np.ndim(x) == 2, reverse)
    weights = {name: np.array(p, dtype) for name, p in params.items()}
    x = np.array(x, dtype)
    x = x[:, None] if tape.unbatched else x.swapaxes(0, 1) if tape.batch_first else x
    T, N = x.shape[:2]
    valid, cuts = _steps(T, N, lengths, mask, resets)

    dirs = 2 if bidirectional else 1
    H = weights["weight_ih_l0"].shape[0] // len(CELLS[cell].gates)
    P = weights["weight_hh_l0"].shape[1] * num_heads
    h_n, c_n = _state_in("state", state, tape, (num_layers * dirs, N, P), (num_layers * dirs, N, H))
    for layer in range(num_layers):
        tape.tracks.append([])
        for direction in range(dirs):
            k = layer * dirs + direction
            w = _weights(weights, layer, direction, dtype)
            track = _Track(w, x, np.zeros((T, N, P), dtype), np.zeros((T, N, c_n.shape[2]), dtype), [])
            _run_forward(tape, track, h_n[k], c_n[k], valid, cuts, (layer, direction), zoneout)
            tape.tracks[layer].append(track)
        x = np.concatenate([track.h for track in tape.tracks[layer]], axis=2)
        drop = _dropout(drawn, layer, num_layers)
        x = x if drop is None else x * drop
    return tape._outward(x), _state_out(h_n, c_n, tape), tape


def _steps(
    T: int, N: int, lengths: ArrayLike | None, mask: ArrayLike | None, resets: ArrayLike | None
) -> tuple[Array, Array]:
    """Which steps are valid (T,N), and where what is carried between t-1 and t is cut (T+1,N)."""
    lengths = np.full(N, T) if lengths is None else _checked("lengths", np.atleast_1d(lengths), (N,))
    if not np.issubdtype(lengths.dtype, np.integer) or np.any((lengths < 0) | (lengths > T)):
        raise ValueError(f"lengths: expected integers in 0..{T}, got {lengths}")
    valid = np.arange(T)[:, None] < lengths
    if mask is not None:
        valid &= _checked("mask", np.asarray(mask, bool), (T, N))
    cuts = np.zeros((T + 1, N), bool)
    if resets is not None:
        cuts[:T] = _checked("resets", np.asarray(resets, bool), (T, N))
    return valid, cuts


def _dropout(masks: dict[str, Any], layer: int, num_layers: int) -> Any:
    return masks["dropout"][layer] if layer < min(num_layers - 1, len(masks["dropout"])) else None


def _run_forward(
    tape: Tape, track: _Track, h: Array, c: Array, valid: Array, cuts: Array, key: tuple[int, int],
    zoneout: tuple[float, float],
) -> None:  # fmt: skip
    """The time loop of one layer in one direction. h (N,P), c (N,H): initial states in, final states out."""
    step, T = CELLS[tape.cell].forward, len(track.x)
    mask = tape.masks["recurrent"].get(key)
    back = bool(key[1] or tape.reverse)
    for t in reversed(range(T)) if back else range(T):
        rows = np.flatnonzero(valid[t])  # in reverse, a row joins at its own last valid step
        cut = cuts[t + back]
        h[cut] = c[cut] = 0
        h_prev, c_prev = h[rows], c[rows]
        hr = h_prev if mask is None else h_prev * mask[rows]
        h_new, c_new, saved = step(track.w, tape.choices, track.x[t, rows], h_prev, hr, c_prev)
        zh, zc = (
            tape.masks[name][key][t, rows] if key in tape.masks[name] else z
            for name, z in zip(("zoneout_h", "zoneout_c"), zoneout, strict=True)
        )
        h[rows] = track.h[t, rows] = zh * h_prev + (1 - zh) * h_new
        c[rows] = track.c[t, rows] = zc * c_prev + (1 - zc) * c_new
        track.steps.append((t, rows, cut, h_prev, c_prev, zh, zc, saved))


def backward(tape: Tape, dy: ArrayLike | None, dstate: Any = None) -> tuple[Array, Any, dict[str, Array]]:
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
    (T, N, P), C = tracks[0][0].h.shape, tracks[0][0].c.shape[2]
    H = C // max(1, len(CELLS[tape.cell].states) - 1)
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


def _run_backward(
    tape: Tape, track: _Track, d: SimpleNamespace, dy: Array, dx: Array, dh: Array, dc: Array, key: tuple[int, int]
) -> None:
    """The mirror of _run_forward. dh, dc: of the final states in, of the initial ones out. Adds to d, dx."""
    step = CELLS[tape.cell].backward
    mask = tape.masks["recurrent"].get(key)
    for t, rows, cut, h, c, zh, zc, saved in reversed(track.steps):
        m = 1 if mask is None else mask[rows]
        dh_t, dc_t = dh[rows] + dy[t, rows], dc[rows]
        dx_t, dh_prev, dhr, dc_prev = step(
            track.w, d, tape.choices, track.x[t, rows], h, m * h, c, saved, (1 - zh) * dh_t, (1 - zc) * dc_t
        )
        dx[t, rows] += dx_t
        dh[rows] = zh * dh_t + dh_prev + m * dhr
        dc[rows] = zc * dc_t + dc_prev
        dh[cut] = dc[cut] = 0
