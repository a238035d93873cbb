"""Activations and cells: one step forward and one step backward on n rows."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

# ---- activations: the value from the pre-activation a, the slope from the value y


class Activation(NamedTuple):
    """A function ``value(a)`` and its derivative ``slope(y)``, written in terms of ``y = value(a)``."""

    value: Callable[..., Any]
    slope: Callable[..., Any]


def _abs(a):
    return np.where(a.real < 0, -a, a)  # np.abs is not analytic


def _sigmoid(a):
    e = np.exp(-_abs(a))  # never overflows
    return np.where(a.real < 0, e, 1) / (1 + e)


def _clip(a, low, high):
    return np.where(a.real <= low, low, np.where(a.real >= high, high, a))


def _inside(y, low, high):
    return (y.real > low) & (y.real < high)


def _softplus(a):
    return np.where(a.real > 0, a, 0) + np.log1p(np.exp(-_abs(a)))


def _linear_sigmoid(alpha, beta):
    return Activation(lambda a: _clip(alpha * a + beta, 0, 1), lambda y: alpha * _inside(y, 0, 1))


def _elu(alpha=1.0):
    return Activation(
        lambda a: np.where(a.real > 0, a, alpha * np.expm1(a)), lambda y: np.where(y.real > 0, 1, y + alpha)
    )


def _leaky_relu(alpha=0.01):
    return Activation(lambda a: np.where(a.real > 0, a, alpha * a), lambda y: np.where(y.real > 0, 1, alpha))


def _scaled_tanh(alpha, beta):
    return Activation(lambda a: alpha * np.tanh(beta * a), lambda y: alpha * beta * (1 - (y / alpha) ** 2))


ACTIVATIONS = {
    "tanh": Activation(np.tanh, lambda y: 1 - y * y),
    "relu": Activation(lambda a: np.where(a.real > 0, a, 0), lambda y: y.real > 0),
    "softsign": Activation(lambda a: a / (1 + _abs(a)), lambda y: (1 - _abs(y)) ** 2),
    "hard_tanh": Activation(lambda a: _clip(a, -1, 1), lambda y: _inside(y, -1, 1)),
    "identity": Activation(lambda a: a, lambda y: np.ones(y.shape)),
    "sigmoid": Activation(_sigmoid, lambda y: y * (1 - y)),
    # relu6(a + 3) / 6, as Keras 3 and PyTorch have it; with numbers alpha, beta it is ONNX's line.
    "hard_sigmoid": Activation(lambda a: _clip(a + 3, 0, 6) / 6, lambda y: _inside(y, 0, 1) / 6),
    "softplus": Activation(_softplus, lambda y: -np.expm1(-y)),
}
# Those that take numbers, as ONNX has them.
FAMILIES: dict[str, Callable[..., Activation]] = {
    "hard_sigmoid": _linear_sigmoid,
    "elu": _elu,
    "leaky_relu": _leaky_relu,
    "scaled_tanh": _scaled_tanh,
}


def activation_of(choice, clip=None):
    """The activation of a name, or of a tuple (name, number, ...); clip: of min(max(a, -clip), clip)."""
    name, *numbers = (choice,) if isinstance(choice, str) else choice
    plain = FAMILIES[name](*numbers) if numbers or name not in ACTIVATIONS else ACTIVATIONS[name]
    if clip is None:
        return plain
    low, high = (plain.value(np.array(a, float)) for a in (-clip, clip))  # all of them rise
    return Activation(
        lambda a: plain.value(_clip(a, -clip, clip)), lambda y: plain.slope(y) * _inside(y, low.real, high.real)
    )


class Choices(NamedTuple):
    """What the steps below apply: activations of candidate, output and gates, and limits (None: no limit)."""

    act: Activation
    out: Activation
    sig: Activation
    cell_clip: float | None = None
    proj_clip: float | None = None
    epsilon: float = 1e-5  # added to a variance
    num_heads: int = 1
    forget_gate: str = "sigmoid"


# ---- cells: one step on n rows
# forward   f(w, a, x, h, hr, c)               -> h~, c~, saved
# backward  b(w, d, a, x, h, hr, c, s, dh, dc) -> dx, dh, dhr, dc     and adds to the gradients d
#   a: the choices
#   x [n,D]  h [n,P] = h_{t-1}  c [n,H] = c_{t-1}  hr [n,P] = recurrent dropout mask * h, for products
#   w, d: W = weight_ih [G*H,D]  R = weight_hh [G*H,P]  bW = bias_ih, bR = bias_hh [G*H]  P = weight_hr [P,H]
#         pi, pf, po = weight_ci, weight_cf, weight_co [H]
#         gi, gf, gg, go, gc = weight_ln_* [H], gains; ui, uf, ug, uo, uc = bias_ln_* [H]
#   saved, s: the gates by name, and what else the backward step wants
#   dh, dc on the way in are of h~ and c~, on the way out of h and c


def _product_back(W, dW, db, x, da):
    """Back through ``a = x @ W.T + b``: adds to dW and db, returns dx."""
    dW += da.T @ x
    db += da.sum(axis=0)
    return da @ W


def _limit(v, clip):
    return v if clip is None else _clip(v, -clip, clip)


def _passes(v, clip):
    """1 where a gradient passes the limit, else 0."""
    return 1 if clip is None else _inside(v, -clip, clip)


def _leave(w, a, o, c):
    """m = o * out(c~)      h~ = m, or limit(P m) with a projection."""
    m = o * a.out.value(c)
    return m if w.P is None else _limit(m @ w.P.T, a.proj_clip)


def _back_out(w, d, a, s, dh):
    """y = out(c~) and dm, the gradient of m; adds to that of the projection."""
    y = a.out.value(s["c"])
    if w.P is None:
        return y, dh
    m = s["o"] * y
    dh = dh * _passes(m @ w.P.T, a.proj_clip)
    d.P += dh.T @ m
    return y, dh @ w.P


def _lstm_forward(w, a, x, h, hr, c):
    # i, f, o = sig(W x + bW + R h + bR)   g = act(...)        rows of W, R: i, f, g, o
    i, f, g, o = np.split(x @ w.W.T + w.bW + hr @ w.R.T + w.bR, 4, axis=1)
    i, f, g, o = a.sig.value(i), a.sig.value(f), a.act.value(g), a.sig.value(o)
    # c~ = limit(f * c + i * g)
    c = _limit(f * c + i * g, a.cell_clip)
    return _leave(w, a, o, c), c, dict(i=i, f=f, g=g, o=o, c=c)


def _lstm_backward(w, d, a, x, h, hr, c, s, dh, dc):
    i, f, g, o = s["i"], s["f"], s["g"], s["o"]
    y, dm = _back_out(w, d, a, s, dh)
    dc = (dc + dm * o * a.out.slope(y)) * _passes(s["c"], a.cell_clip)
    da = np.concatenate(
        [dc * g * a.sig.slope(i), dc * c * a.sig.slope(f), dc * i * a.act.slope(g), dm * y * a.sig.slope(o)], axis=1
    )
    return _product_back(w.W, d.W, d.bW, x, da), 0, _product_back(w.R, d.R, d.bR, hr, da), dc * f


def _lstm_peephole_forward(w, a, x, h, hr, c):
    # i, f = sig(W x + bW + R h + bR + p c)   g = act(...)      rows of W, R: i, f, g, o
    i, f, g, o = np.split(x @ w.W.T + w.bW + hr @ w.R.T + w.bR, 4, axis=1)
    i, f, g = a.sig.value(i + w.pi * c), a.sig.value(f + w.pf * c), a.act.value(g)
    c = _limit(f * c + i * g, a.cell_clip)
    # o = sig(... + p c~)
    o = a.sig.value(o + w.po * c)
    return _leave(w, a, o, c), c, dict(i=i, f=f, g=g, o=o, c=c)


def _lstm_peephole_backward(w, d, a, x, h, hr, c, s, dh, dc):
    i, f, g, o = s["i"], s["f"], s["g"], s["o"]
    y, dm = _back_out(w, d, a, s, dh)
    do = dm * y * a.sig.slope(o)
    dc = (dc + dm * o * a.out.slope(y) + do * w.po) * _passes(s["c"], a.cell_clip)
    di, df = dc * g * a.sig.slope(i), dc * c * a.sig.slope(f)
    d.pi += (di * c).sum(axis=0)
    d.pf += (df * c).sum(axis=0)
    d.po += (do * s["c"]).sum(axis=0)
    da = np.concatenate([di, df, dc * i * a.act.slope(g), do], axis=1)
    dc = dc * f + di * w.pi + df * w.pf
    return _product_back(w.W, d.W, d.bW, x, da), 0, _product_back(w.R, d.R, d.bR, hr, da), dc


def _lstm_coupled_forward(w, a, x, h, hr, c):
    # f, o = sig(W x + bW + R h + bR)   g = act(...)        rows of W, R: f, g, o
    f, g, o = np.split(x @ w.W.T + w.bW + hr @ w.R.T + w.bR, 3, axis=1)
    f, g, o = a.sig.value(f), a.act.value(g), a.sig.value(o)
    # c~ = limit(f * c + (1 - f) * g)
    c = _limit(f * c + (1 - f) * g, a.cell_clip)
    return _leave(w, a, o, c), c, dict(f=f, g=g, o=o, c=c)


def _lstm_coupled_backward(w, d, a, x, h, hr, c, s, dh, dc):
    f, g, o = s["f"], s["g"], s["o"]
    y, dm = _back_out(w, d, a, s, dh)
    dc = (dc + dm * o * a.out.slope(y)) * _passes(s["c"], a.cell_clip)
    da = np.concatenate([dc * (c - g) * a.sig.slope(f), dc * (1 - f) * a.act.slope(g), dm * y * a.sig.slope(o)], axis=1)
    return _product_back(w.W, d.W, d.bW, x, da), 0, _product_back(w.R, d.R, d.bR, hr, da), dc * f


def _norm(v, gain, bias, epsilon):
    """gain * n + bias with n = (v - mean) / sqrt(variance + epsilon) over the units -> that, (n, scale)."""
    d = v - v.mean(axis=1, keepdims=True)
    scale = 1 / np.sqrt((d * d).mean(axis=1, keepdims=True) + epsilon)
    return gain * d * scale + bias, (d * scale, scale)


def _norm_back(saved, gain, dgain, dbias, dy):
    """Back through _norm: adds to the gradients of gain and bias, returns dv."""
    n, scale = saved
    dgain += (dy * n).sum(axis=0)
    dbias += dy.sum(axis=0)
    dn = dy * gain
    return scale * (dn - dn.mean(axis=1, keepdims=True) - n * (dn * n).mean(axis=1, keepdims=True))


def _lstm_norm_forward(w, a, x, h, hr, c):
    # i, f, o = sig(norm(W x + bW + R h + bR))   g = act(norm(...))   gate by gate       rows of W, R: i, f, g, o
    parts = zip(np.split(x @ w.W.T + w.bW + hr @ w.R.T + w.bR, 4, axis=1), "ifgo", strict=True)
    normed = {k: _norm(v, getattr(w, "g" + k), getattr(w, "u" + k), a.epsilon) for v, k in parts}
    i, f, g, o = ((a.act if k == "g" else a.sig).value(v) for k, (v, _) in normed.items())
    c = _limit(f * c + i * g, a.cell_clip)
    # m = o * out(norm(c~))
    r, normed["c"] = _norm(c, w.gc, w.uc, a.epsilon)
    saved = {k: normed[k][1] for k in "ifgo"} | {"c": normed["c"]}
    return _leave(w, a, o, r), c, dict(i=i, f=f, g=g, o=o, c=r, cell=c, norms=saved)


def _lstm_norm_backward(w, d, a, x, h, hr, c, s, dh, dc):
    i, f, g, o, norms = s["i"], s["f"], s["g"], s["o"], s["norms"]
    y, dm = _back_out(w, d, a, s, dh)
    dc = dc + _norm_back(norms["c"], w.gc, d.gc, d.uc, dm * o * a.out.slope(y))
    dc = dc * _passes(s["cell"], a.cell_clip)
    grads = dc * g * a.sig.slope(i), dc * c * a.sig.slope(f), dc * i * a.act.slope(g), dm * y * a.sig.slope(o)
    back = [
        _norm_back(norms[k], getattr(w, "g" + k), getattr(d, "g" + k), getattr(d, "u" + k), v)
        for k, v in zip("ifgo", grads, strict=True)
    ]
    da = np.concatenate(back, axis=1)
    return _product_back(w.W, d.W, d.bW, x, da), 0, _product_back(w.R, d.R, d.bR, hr, da), dc * f


def _heads(a, v):
    """[n, heads * k] -> [n, heads, k]"""
    return v.reshape(len(v), a.num_heads, v.shape[1] // a.num_heads)


def _slstm_gates(w, a, x, hr):
    """Pre-activations of i, f, z, o, each [n,H]. Rows of W: head by head i, f, z, o; a head sees its own part of h."""
    R = w.R.reshape(a.num_heads, -1, w.R.shape[1])
    sums = _heads(a, x @ w.W.T + w.bW + w.bR) + np.einsum("nku,kgu->nkg", _heads(a, hr), R)
    return [v.reshape(len(x), w.R.shape[0] // 4) for v in np.split(sums, 4, axis=2)]


def _slstm_forward(w, a, x, h, hr, c):
    # c holds c, n, m side by side
    c, n, m = np.split(c, 3, axis=1)
    ai, af, az, ao = _slstm_gates(w, a, x, hr)
    # k = log f + m   m~ = max(k, a_i), a_i where n = 0   i = exp(a_i - m~)   f = exp(k - m~)
    k = m + (-_softplus(-af) if a.forget_gate == "sigmoid" else af)
    kept = (k.real > ai.real) & (n.real != 0)
    new = np.where(kept, k, ai)
    f = np.exp(np.where(k.real - new.real > 700, 700, k - new))  # where n = 0; times 0 then, unless that overflowed
    i, z, o = np.exp(ai - new), a.act.value(az), a.sig.value(ao)
    # c~ = f c + i z   n~ = f n + i   h~ = o c~ / n~
    c, n = f * c + i * z, f * n + i
    slope = a.sig.value(-af) if a.forget_gate == "sigmoid" else np.ones(af.shape)
    return o * c / n, np.concatenate([c, n, new], axis=1), dict(i=i, f=f, z=z, o=o, c=c, n=n, kept=kept, slope=slope)


def _slstm_backward(w, d, a, x, h, hr, c, s, dh, dc):
    c, n, _ = np.split(c, 3, axis=1)
    dc, dn, dm = np.split(dc, 3, axis=1)
    i, f, z, o = s["i"], s["f"], s["z"], s["o"]
    y = s["c"] / s["n"]
    dc = dc + dh * o / s["n"]
    dn = dn - dh * o * y / s["n"]
    df, di = f * (dc * c + dn * n), i * (dc * z + dn)
    dm = dm - df - di
    dk, di = np.where(s["kept"], df + dm, df), np.where(s["kept"], di, di + dm)
    parts = [di, dk * s["slope"], dc * i * a.act.slope(z), dh * y * a.sig.slope(o)]
    da = np.concatenate([_heads(a, v) for v in parts], axis=2)  # [n, heads, 4 * units]
    dR = np.einsum("nkg,nku->kgu", da, _heads(a, hr))
    d.R += dR.reshape(d.R.shape)
    dhr = np.einsum("nkg,kgu->nku", da, w.R.reshape(a.num_heads, -1, w.R.shape[1])).reshape(hr.shape)
    da = da.reshape(len(x), len(w.R))
    d.bR += da.sum(axis=0)
    return _product_back(w.W, d.W, d.bW, x, da), 0, dhr, np.concatenate([dc * f, dn * f, dk], axis=1)


def _gru_forward(w, a, x, h, hr, c):
    # r, z = sig(W x + bW + R h + bR)   n = act(W_n x + bW_n + r * (R_n h + bR_n))     rows of W, R: r, z, n
    xr, xz, xn = np.split(x @ w.W.T + w.bW, 3, axis=1)
    qr, qz, qn = np.split(hr @ w.R.T + w.bR, 3, axis=1)
    r, z = a.sig.value(xr + qr), a.sig.value(xz + qz)
    n = a.act.value(xn + r * qn)
    # h~ = (1 - z) * n + z * h
    return (1 - z) * n + z * h, c, dict(r=r, z=z, n=n, q=qn)


def _gru_backward(w, d, a, x, h, hr, c, s, dh, dc):
    r, z, n = s["r"], s["z"], s["n"]
    dz = dh * (h - n) * a.sig.slope(z)
    dn = dh * (1 - z) * a.act.slope(n)
    dr = dn * s["q"] * a.sig.slope(r)
    dx = _product_back(w.W, d.W, d.bW, x, np.concatenate([dr, dz, dn], axis=1))
    dhr = _product_back(w.R, d.R, d.bR, hr, np.concatenate([dr, dz, dn * r], axis=1))
    return dx, dh * z, dhr, dc


def _gru_reset_before_forward(w, a, x, h, hr, c):
    # r, z = sig(W x + bW + R h + bR)   n = act(W_n x + bW_n + bR_n + R_n (r * h))     rows of W, R: r, z, n
    k = 2 * h.shape[1]
    ar, az, an = np.split(x @ w.W.T + w.bW + w.bR, 3, axis=1)
    qr, qz = np.split(hr @ w.R[:k].T, 2, axis=1)
    r, z = a.sig.value(ar + qr), a.sig.value(az + qz)
    n = a.act.value(an + (r * hr) @ w.R[k:].T)
    # h~ = (1 - z) * n + z * h
    return (1 - z) * n + z * h, c, dict(r=r, z=z, n=n)


def _gru_reset_before_backward(w, d, a, x, h, hr, c, s, dh, dc):
    r, z, n = s["r"], s["z"], s["n"]
    k = 2 * h.shape[1]
    dz = dh * (h - n) * a.sig.slope(z)
    dn = dh * (1 - z) * a.act.slope(n)
    drh = _product_back(w.R[k:], d.R[k:], d.bR[k:], r * hr, dn)
    dr = drh * hr * a.sig.slope(r)
    dx = _product_back(w.W, d.W, d.bW, x, np.concatenate([dr, dz, dn], axis=1))
    dhr = _product_back(w.R[:k], d.R[:k], d.bR[:k], hr, np.concatenate([dr, dz], axis=1))
    return dx, dh * z, dhr + drh * r, dc


def _rnn_forward(w, a, x, h, hr, c):
    # h~ = act(W x + bW + R h + bR)
    h = a.act.value(x @ w.W.T + w.bW + hr @ w.R.T + w.bR)
    return h, c, dict(h=h)


def _rnn_backward(w, d, a, x, h, hr, c, s, dh, dc):
    da = dh * a.act.slope(s["h"])
    return _product_back(w.W, d.W, d.bW, x, da), 0, _product_back(w.R, d.R, d.bR, hr, da), dc


class Cell(NamedTuple):
    """One cell: its two steps and the names of its gates, in the order of the weights' rows."""

    forward: Callable
    backward: Callable
    gates: tuple[str, ...]
    states: str = "h"


CELLS = {
    "lstm": Cell(_lstm_forward, _lstm_backward, ("i", "f", "g", "o"), "hc"),
    "lstm_peephole": Cell(_lstm_peephole_forward, _lstm_peephole_backward, ("i", "f", "g", "o"), "hc"),
    "lstm_coupled": Cell(_lstm_coupled_forward, _lstm_coupled_backward, ("f", "g", "o"), "hc"),
    "lstm_norm": Cell(_lstm_norm_forward, _lstm_norm_backward, ("i", "f", "g", "o"), "hc"),
    "slstm": Cell(_slstm_forward, _slstm_backward, ("i", "f", "z", "o"), "hcnm"),
    "gru": Cell(_gru_forward, _gru_backward, ("r", "z", "n")),
    "gru_reset_before": Cell(_gru_reset_before_forward, _gru_reset_before_backward, ("r", "z", "n")),
    "rnn": Cell(_rnn_forward, _rnn_backward, ("h",)),
}
