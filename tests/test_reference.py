"""Rung 1: the NumPy reference against scalar arithmetic (forward) and complex-step derivatives (backward)."""

import math

import numpy as np
import pytest

from fastlstm import reference
from fastlstm.gradcheck import GradientError, gradcheck

T, N, D, H, P = 5, 4, 3, 6, 2
LENGTHS = (3, 5, 0, 4)
GATES = {"lstm": 4, "lstm_peephole": 4, "lstm_coupled": 3, "lstm_norm": 4, "slstm": 4, "gru": 3, "gru_reset_before": 3,
         "rnn": 1}  # fmt: skip
CELLS = list(GATES)
WITH_C = ("lstm", "lstm_peephole", "lstm_coupled", "lstm_norm")  # a projection, zoneout of the cell
STATES = {cell: "hc" if cell in WITH_C else "hcnm" if cell == "slstm" else "h" for cell in CELLS}
VECTORS = {
    "lstm_peephole": ("weight_ci", "weight_cf", "weight_co"),
    "lstm_norm": tuple(f"{kind}_ln_{gate}" for kind in ("weight", "bias") for gate in "ifgoc"),
}


def make_params(rng, cell, num_layers=1, bidirectional=False, bias=True, proj=0, scale=0.6, heads=1):
    """Weights large enough that every gate moves, small enough that none saturates."""
    G, out, dirs = GATES[cell], proj or H, 2 if bidirectional else 1
    params = {}
    for layer in range(num_layers):
        for suffix in (f"_l{layer}", f"_l{layer}_reverse")[:dirs]:
            shapes = {"weight_ih": (G * H, D if layer == 0 else dirs * out), "weight_hh": (G * H, out // heads)}
            shapes |= {"bias_ih": (G * H,), "bias_hh": (G * H,)} if bias else {}
            shapes |= {"weight_hr": (proj, H)} if proj else {}
            shapes |= {name: (H,) for name in VECTORS.get(cell, ())}
            for name, shape in shapes.items():
                params[name + suffix] = scale * rng.standard_normal(shape) + ("weight_ln" in name)
    return params


def make_masks(rng, cell, num_layers, dirs, out):
    """One of each kind of mask, as a layer draws them."""
    keys = [(layer, direction) for layer in range(num_layers) for direction in range(dirs)]

    def keep(shape, p):
        return (rng.random(shape) < p).astype(float)

    return {
        "dropout": [keep((T, N, dirs * out), 0.7) / 0.7 for _ in range(num_layers - 1)],
        "recurrent": {key: keep((N, out), 0.6) / 0.6 for key in keys},
        "zoneout_h": {key: keep((T, N, out), 0.4) for key in keys},
        "zoneout_c": {key: keep((T, N, H), 0.3) for key in keys} if cell in WITH_C else {},
    }


def make_state(rng, cell, num_layers=1, dirs=1, out=H, n=N):
    h, c = (rng.standard_normal((num_layers * dirs, n, size)) for size in (out, H))
    if cell == "slstm":
        return h, c, rng.uniform(0.5, 1.5, c.shape), 0.7 * rng.standard_normal(c.shape)
    return (h, c) if cell in WITH_C else h


def h_and_others(cell, state):
    """h, and the other states side by side."""
    if len(STATES[cell]) == 1:
        return state, np.zeros((*state.shape[:2], H))
    return state[0], np.concatenate(state[1:], axis=2)


def parts(state):
    """A state as a dict."""
    return dict(zip(("h_0", "c_0", "n_0", "m_0"), state if isinstance(state, tuple) else (state,), strict=False))


def whole(values):
    """The state back from that dict."""
    found = tuple(values[name] for name in ("h_0", "c_0", "n_0", "m_0") if name in values)
    return found if len(found) > 1 else found[0]


# ---- forward: plain floats, one sequence, one unit at a time


def sig(a):
    return 1 / (1 + math.exp(-a))


def scalar_step(cell, W, R, bW, bR, P, looks, x, h, c, mask, act, gate):
    """One step of one sequence on lists of floats -> h~, c~."""

    def dot(w, v):
        return sum(a * b for a, b in zip(w, v, strict=True))

    n, hm = len(W) // GATES[cell], [a * m for a, m in zip(h, mask, strict=True)]
    ax = [dot(W[j], x) + bW[j] for j in range(len(W))]
    ah = [dot(R[j], hm) + bR[j] for j in range(len(W))]
    if cell == "lstm_coupled":
        f, o = ([gate(ax[k * n + j] + ah[k * n + j]) for j in range(n)] for k in (0, 2))
        c = [f[j] * c[j] + (1 - f[j]) * act(ax[n + j] + ah[n + j]) for j in range(n)]
        m = [o[j] * act(c[j]) for j in range(n)]
        return (m if P is None else [dot(row, m) for row in P]), c
    if cell == "lstm_norm":
        gains, biases = looks[:5], looks[5:]
        sums = [scalar_norm([ax[k * n + j] + ah[k * n + j] for j in range(n)], gains[k], biases[k]) for k in range(4)]
        i, f, o = ([gate(v) for v in sums[k]] for k in (0, 1, 3))
        c = [f[j] * c[j] + i[j] * act(sums[2][j]) for j in range(n)]
        m = [o[j] * act(v) for j, v in enumerate(scalar_norm(c, gains[4], biases[4]))]
        return (m if P is None else [dot(row, m) for row in P]), c
    if cell == "slstm":  # the paper's sums, without a stabiliser: c and n times exp(m)
        ai, af, az, ao = ([ax[k * n + j] + ah[k * n + j] for j in range(n)] for k in range(4))
        new, h = [], []
        for j in range(n):
            big = [v * math.exp(c[2 * n + j]) for v in (c[j], c[n + j])]
            big = [gate(af[j]) * big[0] + math.exp(ai[j]) * act(az[j]), gate(af[j]) * big[1] + math.exp(ai[j])]
            m = max(math.log(gate(af[j])) + c[2 * n + j], ai[j]) if c[n + j] else ai[j]
            new.append((big[0] / math.exp(m), big[1] / math.exp(m), m))
            h.append(gate(ao[j]) * big[0] / big[1])
        return h, [v for part in zip(*new, strict=True) for v in part]
    if cell in WITH_C:
        pi, pf, po = looks or [[0.0] * n] * 3
        i, f = ([gate(ax[k * n + j] + ah[k * n + j] + p[j] * c[j]) for j in range(n)] for k, p in ((0, pi), (1, pf)))
        c = [f[j] * c[j] + i[j] * act(ax[2 * n + j] + ah[2 * n + j]) for j in range(n)]
        o = [gate(ax[3 * n + j] + ah[3 * n + j] + po[j] * c[j]) for j in range(n)]
        m = [o[j] * act(c[j]) for j in range(n)]
        return (m if P is None else [dot(row, m) for row in P]), c
    if cell == "rnn":
        return [act(ax[j] + ah[j]) for j in range(n)], c
    r, z = ([gate(ax[k * n + j] + ah[k * n + j]) for j in range(n)] for k in (0, 1))
    if cell == "gru":
        new = [act(ax[2 * n + j] + r[j] * ah[2 * n + j]) for j in range(n)]
    else:
        rh = [a * b for a, b in zip(r, hm, strict=True)]
        new = [act(ax[2 * n + j] + bR[2 * n + j] + dot(R[2 * n + j], rh)) for j in range(n)]
    return [(1 - z[j]) * new[j] + z[j] * h[j] for j in range(n)], c


def scalar_norm(v, gain, bias):
    mean = sum(v) / len(v)
    variance = sum((a - mean) ** 2 for a in v) / len(v)
    return [g * (a - mean) / math.sqrt(variance + 1e-5) + b for a, g, b in zip(v, gain, bias, strict=True)]


def scalar_layer(params, suffix, cell, xs, h, c, mask=None, zh=None, zc=None, act=math.tanh, gate=sig):
    """One layer in one direction over one sequence xs: list of T lists. zh, zc: per step a list."""
    G = params["weight_ih" + suffix].shape[0]
    given = {name.removesuffix(suffix): p.tolist() for name, p in params.items() if name.endswith(suffix)}
    W, R, proj = given["weight_ih"], given["weight_hh"], given.get("weight_hr")
    bW, bR = (given.get(name, [0.0] * G) for name in ("bias_ih", "bias_hh"))
    looks = [given[name] for name in VECTORS.get(cell, ())]
    out, mask = [], [1.0] * len(h) if mask is None else mask
    for t, x in enumerate(xs):
        h_new, c_new = scalar_step(cell, W, R, bW, bR, proj, looks, x, h, c, mask, act, gate)
        h = [z * a + (1 - z) * b for z, a, b in zip(zh[t] if zh else [0.0] * len(h), h, h_new, strict=True)]
        c = [z * a + (1 - z) * b for z, a, b in zip(zc[t] if zc else [0.0] * len(c), c, c_new, strict=True)]
        out.append(h)
    return out, h, c


SCALAR = {
    "tanh": math.tanh,
    "relu": lambda a: max(a, 0.0),
    "softsign": lambda a: a / (1 + abs(a)),
    "hard_tanh": lambda a: min(max(a, -1.0), 1.0),
    "identity": lambda a: a,
    "sigmoid": sig,
    "hard_sigmoid": lambda a: min(max(a + 3.0, 0.0), 6.0) / 6,
    ("hard_sigmoid", 0.2, 0.5): lambda a: min(max(0.2 * a + 0.5, 0.0), 1.0),
    "elu": lambda a: a if a > 0 else math.exp(a) - 1,
    ("elu", 0.3): lambda a: a if a > 0 else 0.3 * (math.exp(a) - 1),
    "leaky_relu": lambda a: a if a > 0 else 0.01 * a,
    ("leaky_relu", 0.2): lambda a: a if a > 0 else 0.2 * a,
    "softplus": lambda a: math.log(1 + math.exp(a)),
    ("scaled_tanh", 1.7, 0.6): lambda a: 1.7 * math.tanh(0.6 * a),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cell,proj", [(cell, 0) for cell in CELLS] + [(cell, P) for cell in WITH_C])
def test_forward_is_the_scalar_cell(cell, proj, bias):
    rng = np.random.default_rng(1)
    params = make_params(rng, cell, bias=bias, proj=proj)
    x, state = rng.standard_normal((T, N, D)), make_state(rng, cell, out=proj or H)
    y, end, tape = reference.forward(params, x, state, cell=cell)
    h_0, c_0 = h_and_others(cell, state)
    _, c_n = h_and_others(cell, end)
    for n in range(N):
        start = h_0[0, n].tolist(), c_0[0, n].tolist()
        out, h, c = scalar_layer(params, "_l0", cell, x[:, n].tolist(), *start)
        np.testing.assert_allclose(y[:, n], out, rtol=0, atol=1e-14)
        np.testing.assert_allclose(parts(end)["h_0"][0, n], h, rtol=0, atol=1e-14)
        if len(STATES[cell]) > 1:
            np.testing.assert_allclose(c_n[0, n], c, rtol=1e-13, atol=1e-14)
    assert_lively(y, tape)


@pytest.mark.parametrize("act", [name for name in SCALAR if name != "tanh"], ids=str)
@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell != "slstm"])
def test_activations_are_the_scalar_ones(cell, act):
    rng = np.random.default_rng(2)
    params, x = make_params(rng, cell), rng.standard_normal((T, N, D))
    y, _, tape = reference.forward(params, x, cell=cell, activation=act, recurrent_activation="hard_sigmoid")
    for n in range(N):
        out, _, _ = scalar_layer(
            params, "_l0", cell, x[:, n].tolist(), [0.0] * H, [0.0] * H, act=SCALAR[act], gate=SCALAR["hard_sigmoid"]
        )
        np.testing.assert_allclose(y[:, n], out, rtol=1e-13, atol=1e-14)
    line = ("hard_sigmoid", 0.2, 0.5)
    y, *_ = reference.forward(params, x, cell=cell, recurrent_activation=line)
    out, _, _ = scalar_layer(params, "_l0", cell, x[:, 0].tolist(), [0.0] * H, [0.0] * H, gate=SCALAR[line])
    np.testing.assert_allclose(y[:, 0], out, rtol=1e-13, atol=1e-14)
    if act == "hard_tanh":  # both of its pieces are met
        gate = tape.gates(0)["g" if cell in WITH_C else "h" if cell == "rnn" else "n"]
        assert 0.02 < np.mean(np.abs(gate) == 1) < 0.6


@pytest.mark.parametrize("masked", [False, True], ids=["zoneout_expectation", "masks"])
@pytest.mark.parametrize("cell,proj", [(cell, 0) for cell in CELLS] + [(cell, P) for cell in WITH_C])
def test_layers_directions_lengths_and_masks(cell, proj, masked):
    """Two bidirectional layers over a ragged batch, put together from the scalar cell row by row."""
    rng = np.random.default_rng(3)
    out = proj or H
    params = make_params(rng, cell, 2, True, proj=proj)
    x, state = rng.standard_normal((T, N, D)), make_state(rng, cell, 2, 2, out)
    zoneout = (0.2, 0.1 if cell in WITH_C else 0.0)
    masks = make_masks(rng, cell, 2, 2, out) if masked else None
    y, end, tape = reference.forward(
        params, x, state, LENGTHS, cell=cell, num_layers=2, bidirectional=True, zoneout=zoneout, masks=masks
    )
    (h_0, c_0), (h_n, c_n) = h_and_others(cell, state), h_and_others(cell, end)
    for n, length in enumerate(LENGTHS):
        u = x[:length, n].tolist()
        for layer in range(2):
            halves = []
            for direction, suffix in enumerate((f"_l{layer}", f"_l{layer}_reverse")):
                key, k = (layer, direction), 2 * layer + direction
                turn = slice(None, None, -1 if direction else 1)
                zh, zc = ([[z] * size] * length for z, size in zip(zoneout, (out, c_0.shape[2]), strict=True))
                if masked:
                    zh = masks["zoneout_h"][key][:length, n][turn].tolist()
                    zc = masks["zoneout_c"][key][:length, n][turn].tolist() if cell in WITH_C else None
                hs, h, c = scalar_layer(
                    params,
                    suffix,
                    cell,
                    u[turn],
                    h_0[k, n].tolist(),
                    c_0[k, n].tolist(),
                    masks["recurrent"][key][n].tolist() if masked else None,
                    zh,
                    zc,
                )
                halves.append(hs[turn])
                np.testing.assert_allclose(h_n[k, n], h, rtol=0, atol=1e-14)
                np.testing.assert_allclose(
                    tape.hidden(layer, bool(direction))[:length, n],
                    np.reshape(hs[turn], (length, out)),
                    rtol=0,
                    atol=1e-14,
                )
                if len(STATES[cell]) > 1:
                    np.testing.assert_allclose(c_n[k, n], c, rtol=1e-12, atol=1e-14)
            u = [a + b for a, b in zip(*halves, strict=True)]
            if masked and layer == 0:
                u = (np.reshape(u, (length, 2 * out)) * masks["dropout"][0][:length, n]).tolist()
        np.testing.assert_allclose(y[:length, n], np.reshape(u, (length, 2 * out)), rtol=0, atol=1e-14)
        assert not y[length:, n].any()
    np.testing.assert_array_equal(h_n[:, 2], h_0[:, 2])  # length 0 gives back the initial state
    assert_lively(y, tape)


def assert_lively(y, tape):
    """What was compared is neither mostly zero nor saturated."""
    valid = np.zeros(y.shape[:2], bool)
    for t, rows, *_ in tape.tracks[-1][0].steps:
        valid[t, rows] = True
    assert valid.mean() > 0.5
    assert np.mean(np.abs(y[valid]) > 1e-3) > 0.95 and np.std(y[valid]) > 0.1
    for layer, tracks in enumerate(tape.tracks):
        for direction in range(len(tracks)):
            for name, gate in tape.gates(layer, bool(direction)).items():
                if tape.cell == "slstm" and name in "if":  # one of the two is 1
                    continue
                inside = (np.abs(gate[valid]) > 1e-3) & (np.abs(gate[valid]) < 1 - 1e-3)
                assert inside.mean() > 0.75, (layer, direction, name)


@pytest.mark.parametrize("a", [-800.0, -40.0, -1e-9, 0.0, 1e-9, 40.0, 800.0])
def test_sigmoid_is_stable(a):
    s = reference.cells.ACTIVATIONS["sigmoid"]
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        y = s.value(np.array([a]))[0]
        z = s.value(np.array([a + 1e-100j]))[0]
    expected = 1 / (1 + math.exp(-a)) if a > -700 else 0.0
    assert y == pytest.approx(expected, rel=1e-15, abs=1e-300)
    assert z.imag / 1e-100 == pytest.approx(y * (1 - y), rel=1e-14, abs=1e-17)  # 1 - y is 0 at 40


@pytest.mark.parametrize("proj", [0, P])
@pytest.mark.parametrize("cell", WITH_C)
def test_limits_hold_and_cut(cell, proj):
    """What the steps give is what a step gives whose inputs were cut by hand."""
    rng = np.random.default_rng(6)
    params, x = make_params(rng, cell, proj=proj), rng.standard_normal((T, N, D))
    limit = 0.6 if cell == "lstm_norm" else 0.2
    limits = dict(cell_clip=0.3, proj_clip=limit if proj else None)
    y, (_, c_n), tape = reference.forward(params, x, cell=cell, **limits)
    assert np.max(abs(tape.cells(0))) == 0.3 and 0.1 < np.mean(abs(tape.cells(0)) == 0.3) < 0.9
    if proj:
        assert np.max(abs(y)) == limit and 0.1 < np.mean(abs(y) == limit) < 0.9
    free, (_, c), _ = reference.forward(params, x[:1], cell=cell)
    np.testing.assert_array_equal(tape.cells(0)[0], np.clip(c[0], -0.3, 0.3))
    clip = 1.0 if cell == "lstm_norm" else 0.5
    y, _, tape = reference.forward(params, x, cell=cell, clip=clip)
    for name, gate in tape.gates(0).items():
        low, high = np.tanh((-clip, clip)) if name == "g" else (sig(-clip), sig(clip))
        assert low - 1e-15 <= gate.min() and gate.max() <= high + 1e-15
        assert 0.1 < np.mean(np.isclose(gate, low, 1e-15) | np.isclose(gate, high, 1e-15)) < 0.9


# ---- backward: complex steps


def relative_errors(params, x, state, lengths, dy, dstate, options, backward=reference.backward):
    """By quantity: |Im f(p + ihv) / h - sum(grad * v)|, relative to its usual size over all directions v."""
    _, _, tape = reference.forward(params, x, state, lengths, **options)
    dx, dstate0, grads = backward(tape, dy, dstate)
    assert grads.keys() == params.keys()
    inputs = params | {"x": x} | parts(state)
    gradients = grads | {"x": dx} | parts(dstate0)
    rng, step, errors = np.random.default_rng(99), 1e-100, {}
    for name, p in inputs.items():
        assert gradients[name].shape == p.shape
        v = rng.standard_normal(p.shape)
        moved = inputs | {name: p + 1j * step * v}
        weights = {k: moved[k] for k in params}
        y, end, _ = reference.forward(weights, moved["x"], whole(moved), lengths, **options)
        assert y.dtype == np.complex128
        f = np.sum(dy * y) + sum(np.sum(d * parts(end)[k]) for k, d in parts(dstate).items())
        norm = np.sqrt(np.sum((gradients[name] * v) ** 2))
        expected, found = f.imag / step, np.sum(gradients[name] * v)
        errors[name] = abs(expected - found) / max(norm, abs(expected))
        assert np.mean(gradients[name] != 0) > 0.3, f"the gradient of {name} is mostly zero"
    return errors


def configurations():
    for cell in CELLS:
        yield pytest.param(cell, {}, id=f"{cell}")
        yield pytest.param(cell, dict(layers=2, bi=True, ragged=True), id=f"{cell}-2-bi-ragged")
        yield pytest.param(cell, dict(layers=2, bi=True, ragged=True, masks=True), id=f"{cell}-2-bi-masks")
        yield pytest.param(cell, dict(layers=2, masks=True), id=f"{cell}-2-masks")
        yield pytest.param(cell, dict(ragged=True, zoneout=True, bias=False), id=f"{cell}-zoneout-nobias")
        yield pytest.param(cell, dict(bi=True, ragged=True, batch_first=True), id=f"{cell}-bi-batch_first")
        yield pytest.param(cell, dict(layers=2, bi=True, unbatched=True), id=f"{cell}-2-bi-unbatched")
        if cell == "slstm":
            for heads, gate in ((2, "sigmoid"), (3, "exponential"), (6, "exponential")):
                chosen = dict(num_heads=heads, forget_gate=gate, layers=2, bi=True, ragged=True, masks=True)
                yield pytest.param(cell, chosen, id=f"{cell}-{heads}-{gate}")
            continue
        for act in ("relu", "softsign", "hard_tanh", "identity"):
            yield pytest.param(cell, dict(act=act, layers=2, ragged=True), id=f"{cell}-{act}")
        if cell != "rnn":
            yield pytest.param(cell, dict(gate="hard_sigmoid", bi=True), id=f"{cell}-hard_sigmoid")
            hard = dict(gate="hard_sigmoid", act="hard_tanh", masks=True)
            yield pytest.param(cell, hard, id=f"{cell}-hard")
            options = dict(gate=("hard_sigmoid", 0.2, 0.5), act="sigmoid", clip=1.5, bi=True)
            yield pytest.param(cell, options, id=f"{cell}-line")
        for act in (
            ("elu", 0.3),
            ("leaky_relu", 0.2),
            "softplus",
            ("scaled_tanh", 1.7, 0.6),
            ("hard_sigmoid", 0.2, 0.5),
        ):
            chosen = dict(act=act, clip=1.0, layers=2, ragged=True, masks=True)
            yield pytest.param(cell, chosen, id=f"{cell}-{act}-clip")
        if cell in WITH_C:
            limits = dict(output_activation="softplus", cell_clip=0.8, proj=P, proj_clip=0.5)
            yield pytest.param(cell, limits | dict(layers=2, bi=True, masks=True), id=f"{cell}-limits")
            yield pytest.param(cell, dict(cell_clip=0.8, zoneout=True), id=f"{cell}-cell_clip")
    options = {
        "": {},
        "-ragged-masks": dict(ragged=True, masks=True),
        "-zoneout": dict(zoneout=True),
        "-softsign": dict(act="softsign"),
        "-nobias": dict(bias=False),
    }
    for name, option in options.items():
        for cell in WITH_C:
            yield pytest.param(cell, dict(proj=P, layers=2, bi=True, **option), id=f"{cell}-proj-2-bi{name}")


def problem(
    cell,
    layers=1,
    bi=False,
    ragged=False,
    masks=False,
    zoneout=False,
    bias=True,
    batch_first=False,
    unbatched=False,
    act="tanh",
    gate="sigmoid",
    proj=0,
    seed=7,
    **limits,
):
    """A whole problem with random gradients at every output."""
    rng = np.random.default_rng(seed)
    dirs, out, n = 2 if bi else 1, proj or H, 1 if unbatched else N
    params = make_params(rng, cell, layers, bi, bias, proj, heads=limits.get("num_heads", 1))
    x, dy = rng.standard_normal((T, n, D)), rng.standard_normal((T, n, dirs * out))
    state, dstate = (make_state(rng, cell, layers, dirs, out, n) for _ in range(2))
    if unbatched:
        x, dy = x[:, 0], dy[:, 0]
        state, dstate = (whole({k: a[:, 0] for k, a in parts(s).items()}) for s in (state, dstate))
    if batch_first:
        x, dy = x.swapaxes(0, 1).copy(), dy.swapaxes(0, 1).copy()
    options = dict(
        cell=cell,
        num_layers=layers,
        bidirectional=bi,
        batch_first=batch_first,
        activation=act,
        recurrent_activation=gate,
        masks=make_masks(rng, cell, layers, dirs, out) if masks else None,
        zoneout=(0.2, 0.1 if cell in WITH_C else 0.0) if zoneout else (0.0, 0.0),
        **limits,
    )
    return params, x, state, LENGTHS if ragged else None, dy, dstate, options


@pytest.mark.parametrize("cell,config", list(configurations()))
def test_backward_is_the_complex_step(cell, config):
    errors = relative_errors(*problem(cell, **config))
    assert max(errors.values()) < 1e-13, errors


@pytest.mark.parametrize("fault", ["gates_swapped", "bias_dropped", "recurrent_scaled"])
@pytest.mark.parametrize("cell", CELLS)
def test_a_planted_fault_is_found(cell, fault, monkeypatch):
    right = reference.CELLS[cell]

    def wrong(w, d, a, x, h, hr, c, s, dh, dc):
        if fault == "gates_swapped":
            first, last = right.gates[0], right.gates[-1]
            s = s | ({first: s[last], last: s[first]} if first != last else {"h": 0.9 * s["h"]})
        kept = d.bR.copy()
        dx, dh, dhr, dc = right.backward(w, d, a, x, h, hr, c, s, dh, dc)
        if fault == "bias_dropped":
            d.bR[...] = kept
        return dx, dh, dhr * (1 + 1e-9 * (fault == "recurrent_scaled")), dc

    monkeypatch.setitem(reference.CELLS, cell, right._replace(backward=wrong))
    params, *rest = problem(cell)
    if fault == "bias_dropped":
        with pytest.raises(AssertionError, match="bias_hh_l0 is mostly zero"):
            relative_errors(params, *rest)
    else:
        assert max(relative_errors(params, *rest).values()) > 1e-11


# ---- layout, lengths and padding


def assert_same(a, b):
    for key in parts(a):
        np.testing.assert_array_equal(parts(a)[key], parts(b)[key])


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_padding_is_never_read(cell, masks):
    config = dict(layers=2, bi=True, ragged=True, masks=masks)
    params, x, state, lengths, dy, dstate, options = problem(cell, **config)
    y, end, tape = reference.forward(params, x, state, lengths, **options)
    dx, dstart, grads = reference.backward(tape, dy, dstate)
    past = np.arange(T)[:, None] >= np.array(LENGTHS)
    x[past] = dy[past] = np.nan
    if masks:
        options["masks"]["dropout"][0][past] = np.nan
    y2, end2, tape2 = reference.forward(params, x, state, lengths, **options)
    dx2, dstart2, grads2 = reference.backward(tape2, dy, dstate)
    for a, b in ((y, y2), (end, end2), (dx, dx2), (dstart, dstart2)):
        assert_same(a, b)
    for name in grads:
        np.testing.assert_array_equal(grads[name], grads2[name])
    assert not y[past].any() and not dx[past].any() and y[~past].all() and dx[~past].all()
    for gate in tape2.gates(1, reverse=True).values():
        assert not gate[past].any() and np.mean(gate[~past] != 0) > 0.9
    for key in parts(state):  # the row of length 0
        np.testing.assert_array_equal(parts(end)[key][:, 2], parts(state)[key][:, 2])
        np.testing.assert_array_equal(parts(dstart)[key][:, 2], parts(dstate)[key][:, 2])


@pytest.mark.parametrize("cell", CELLS)
def test_layouts_agree(cell):
    params, x, state, lengths, dy, dstate, options = problem(cell, layers=2, bi=True, ragged=True)
    y, end, tape = reference.forward(params, x, state, lengths, **options)
    dx, dstart, grads = reference.backward(tape, dy, dstate)
    options["batch_first"] = True
    y2, end2, tape2 = reference.forward(params, x.swapaxes(0, 1), state, lengths, **options)
    dx2, dstart2, grads2 = reference.backward(tape2, dy.swapaxes(0, 1), dstate)
    for a, b in ((y, y2.swapaxes(0, 1)), (end, end2), (dx, dx2.swapaxes(0, 1)), (dstart, dstart2)):
        assert_same(a, b)
    assert all(np.array_equal(grads[name], grads2[name]) for name in grads)
    one, done = (whole({k: a[:, 1] for k, a in parts(s).items()}) for s in (state, dstate))
    y3, end3, tape3 = reference.forward(params, x[:, 1], one, **options)  # a full-length row on its own
    dx3, _, _ = reference.backward(tape3, dy[:, 1], done)
    np.testing.assert_allclose(y3, y[:, 1], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(dx3, dx[:, 1], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(parts(end3)["h_0"], parts(end)["h_0"][:, 1], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("cell", CELLS)
def test_windows_add_up(cell):
    """Two windows with the state carried forward and its gradient carried back give one long pass."""
    params, x, state, _, dy, dstate, options = problem(cell, layers=2)
    y, end, tape = reference.forward(params, x, state, **options)
    dx, dstart, grads = reference.backward(tape, dy, dstate)
    y1, middle, tape1 = reference.forward(params, x[:2], state, **options)
    y2, end2, tape2 = reference.forward(params, x[2:], middle, **options)
    dx2, dmiddle, grads2 = reference.backward(tape2, dy[2:], dstate)
    dx1, dstart1, grads1 = reference.backward(tape1, dy[:2], dmiddle)
    np.testing.assert_array_equal(np.concatenate([y1, y2]), y)
    np.testing.assert_allclose(np.concatenate([dx1, dx2]), dx, rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(parts(dstart1)["h_0"], parts(dstart)["h_0"], rtol=1e-13, atol=1e-15)
    for name in grads:
        np.testing.assert_allclose(grads1[name] + grads2[name], grads[name], rtol=1e-12, atol=1e-14)


def test_tape_shows_the_gates_and_cells():
    params, x, state, lengths, _, _, options = problem("lstm", layers=2, bi=True, ragged=True, proj=P)
    y, (h_n, c_n), tape = reference.forward(params, x, state, lengths, **options)
    gates, c = tape.gates(1), tape.cells(1)
    assert list(gates) == ["i", "f", "g", "o"] and c.shape == (T, N, H)
    previous = np.concatenate([state[1][2][None], c[:-1]])
    valid = (np.arange(T)[:, None] < np.array(lengths))[:, :, None]
    expected = np.where(valid, gates["f"] * previous + gates["i"] * gates["g"], 0)
    np.testing.assert_allclose(c, expected, rtol=1e-14, atol=1e-15)
    m = gates["o"] * np.tanh(c)
    np.testing.assert_allclose(m @ params["weight_hr_l1"].T, tape.hidden(1), rtol=1e-12, atol=1e-15)
    np.testing.assert_array_equal(np.concatenate([tape.hidden(1), tape.hidden(1, reverse=True)], axis=2), y)
    np.testing.assert_array_equal(tape.cells(1, reverse=True)[0, 1], c_n[3, 1])
    *_, tape = reference.forward(*problem("gru")[:2], cell="gru")
    assert list(tape.gates(0)) == ["r", "z", "n"]
    with pytest.raises(ValueError, match="gru layer has no cell state"):
        tape.cells(0)


def test_absent_gradients_and_states_are_zeros():
    params, x, _, lengths, dy, _, options = problem("lstm", layers=2, ragged=True)
    zeros = (np.zeros((2, N, H)),) * 2
    y, end, tape = reference.forward(params, x, None, lengths, **options)
    y2, end2, tape2 = reference.forward(params, x, zeros, lengths, **options)
    assert_same(y, y2)
    assert_same(end, end2)
    assert_same(reference.backward(tape, dy)[0], reference.backward(tape2, dy, zeros)[0])
    assert_same(reference.backward(tape, None, end)[0], reference.backward(tape, 0 * y, end)[0])


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(lengths=[1, 2, 3]), "lengths: expected shape"),
        (dict(lengths=[1, 2, 3, T + 1]), "lengths: expected integers"),
        (dict(lengths=[1, 2, 3, -1]), "lengths: expected integers"),
        (dict(lengths=[1.0] * N), "lengths: expected integers"),
        (dict(state=(np.zeros((1, 1, H)), np.zeros((1, N, H)))), "state: expected shape"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    params, x, *_ = problem("lstm")
    with pytest.raises(ValueError, match=message):
        reference.forward(params, x, **change)
    with pytest.raises(ValueError, match="dy: expected shape"):
        reference.backward(reference.forward(params, x)[2], np.zeros((T, N, 1)))


# ---- gradcheck, on a layer made of the reference


class Layer:
    """The layers' protocol over the reference, with recurrent dropout and zoneout from its own generator."""

    def __init__(self, cell, masked=False, dtype=np.float64, fault=None):
        self.config = dict(cell=cell, num_layers=2, bidirectional=True)
        self.masked, self.fault, self.rng = masked, fault, np.random.default_rng(5)
        params = make_params(np.random.default_rng(4), cell, 2, True)
        self.params = {name: p.astype(dtype) for name, p in params.items()}
        self.grads = {name: np.full_like(p, 0.5) for name, p in self.params.items()}

    def zero_grad(self):
        for g in self.grads.values():
            g[...] = 0

    def forward(self, x, state=None, lengths=None):
        masks = make_masks(self.rng, self.config["cell"], 2, 2, H) if self.masked else None
        return reference.forward(self.params, x, state, lengths, masks=masks, **self.config)

    def backward(self, tape, dy, dstate=None):
        dx, dstate0, grads = reference.backward(tape, dy, dstate)
        for name, g in grads.items():
            self.grads[name] += g * (1 + 1e-4 * (name == self.fault))
        if self.fault == "error":
            raise RuntimeError("backward fails")
        return dx * (1 + 1e-4 * (self.fault == "x")), dstate0


def snapshot(layer):
    return [a.copy() for a in (*layer.params.values(), *layer.grads.values())], layer.rng.bit_generator.state


def assert_unchanged(layer, before):
    assert all(np.array_equal(a, b) for a, b in zip(snapshot(layer)[0], before[0], strict=True))
    assert layer.rng.bit_generator.state == before[1]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_gradcheck_passes(cell, masked):
    rng, layer = np.random.default_rng(8), Layer(cell, masked)
    x, state = rng.standard_normal((T, N, D)), make_state(rng, cell, 2, 2)
    x[3:, 0] = np.nan
    before = snapshot(layer)
    result = gradcheck(layer, x, state, LENGTHS)
    assert set(result.errors) == {*layer.params, "x", *parts(state)}
    assert result.max_error == max(result.errors.values()) < 1e-7
    assert min(abs(value) for value in result.found.values()) > 1e-3
    assert_unchanged(layer, before)


def test_gradcheck_without_a_state_checks_it_all_the_same():
    layer = Layer("lstm")
    assert {"h_0", "c_0"} < set(gradcheck(layer, np.ones((T, N, D))).errors)
    assert {"h_0", "c_0"} < set(gradcheck(layer, np.ones((T, D)), rng=np.random.default_rng(1)).errors)


@pytest.mark.parametrize("fault", ["x", "weight_hh_l1_reverse", "bias_ih_l0"])
def test_gradcheck_names_the_wrong_gradient(fault):
    layer, x = Layer("gru", fault=fault), np.random.default_rng(9).standard_normal((T, N, D))
    before = snapshot(layer)
    with pytest.raises(GradientError, match=rf"gradient of {fault}, .*expected .*found .*tol") as caught:
        gradcheck(layer, x)
    assert caught.value.quantity == fault and isinstance(caught.value, AssertionError)
    assert caught.value.found == pytest.approx(caught.value.expected * 1.0001, rel=1e-6)
    assert_unchanged(layer, before)


def test_gradcheck_restores_after_an_error():
    layer = Layer("rnn", masked=True, fault="error")
    before = snapshot(layer)
    with pytest.raises(RuntimeError, match="backward fails"):
        gradcheck(layer, np.ones((T, N, D)))
    assert_unchanged(layer, before)


@pytest.mark.parametrize(
    "layer,x,options,error,message",
    [
        (Layer("rnn", dtype=np.float32), np.ones((T, N, D)), {}, TypeError, "float64.*float32"),
        (object(), np.ones((T, N, D)), {}, TypeError, "layer: expected .*forward.*object"),
        (Layer("rnn"), np.ones((T, N, D), complex), {}, TypeError, "x: .*complex128"),
        (Layer("rnn"), np.ones((T, N, D)), {"eps": 0.0}, ValueError, "eps: .*0.0"),
        (Layer("rnn"), np.ones((T, N, D)), {"tol": math.nan}, ValueError, "tol: .*nan"),
        (Layer("rnn"), np.ones((T, N, D)), {"tol": "small"}, TypeError, "tol: expected a number, got str"),
    ],
)
def test_gradcheck_refuses(layer, x, options, error, message):
    with pytest.raises(error, match=message):
        gradcheck(layer, x, **options)
