"""Sequences as they come: lists, masks with holes, resets; against the reference, and against the parts run alone."""

import numpy as np
import pytest
from conftest import CELLS, WITH_C, close, make, named, problem, same, same_bits

import fastlstm
from fastlstm import reference

T, N, D, H = 13, 7, 3, 11
THREADS = (1, 2)


def pattern(seed, holes=0.3, cuts=0.2):
    rng = np.random.default_rng(seed)
    mask = rng.random((T, N)) > holes
    mask[:4, 0] = False  # padded on the left
    mask[:, 1] = False
    mask[:, 2] = True
    resets = rng.random((T, N)) < cuts
    resets[:, 1] = [False] * 6 + [True] + [False] * 6
    resets[:, 3] = False
    resets[0, 4] = True
    mask[-3:, 5], resets[-2, 5] = False, True  # cut off after its last valid step
    return mask, resets


def pairs():
    mask, resets = pattern(3)
    lengths = np.array([13, 4, 9, 0, 13, 12, 7])
    return {
        "mask": {"mask": mask},
        "resets": {"resets": resets},
        "both": {"mask": mask, "resets": resets},
        "all": {"mask": mask, "resets": resets, "lengths": lengths},
        "lengths and resets": {"resets": resets, "lengths": lengths},
        "right": {"mask": np.arange(T)[:, None] < lengths},
    }


def run(layer, p, given, **options):
    layer.zero_grad()
    y, state, tape = layer.forward(p.x, p.state, **given, **options)
    masks, y = tape.masks, y.copy()
    dx, dstate = layer.backward(tape, p.dy, p.dstate)
    return named(layer, y, state, dx, dstate, layer.grads), masks


def wanted(layer, p, given, masks):
    params = {name: v.astype(np.float64) for name, v in layer.params.items()}
    y, state, tape = reference.forward(params, p.x, p.state, **given, **layer.config, masks=masks)
    return named(layer, y, state, *reference.backward(tape, p.dy, p.dstate))


def poisoned(p, given):
    """What is not valid holds NaN."""
    valid = np.ones((T, N), bool)
    if "mask" in given:
        valid &= given["mask"]
    if "lengths" in given:
        valid &= np.arange(T)[:, None] < given["lengths"]
    for array in (p.x, p.dy):
        array[~valid] = np.nan
    return p


OPTIONS = {
    "plain": {},
    "deep": {"num_layers": 2, "bidirectional": True, "dropout": 0.3, "recurrent_dropout": 0.3},
    "zoneout": {"zoneout": True, "bidirectional": True},
    "reverse": {"direction": "reverse", "num_layers": 2},
}


def build(cell, name, dtype=np.float64):
    options = dict(OPTIONS[name])
    if "zoneout" in options:
        options["zoneout"] = (0.2, 0.3) if cell in WITH_C else 0.2
    if name == "deep" and cell in WITH_C:
        options["proj_size"] = 5
    return make(cell, D, H, dtype=dtype, **options)


@pytest.mark.parametrize("which", pairs())
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_are_the_reference_s(isa, cell, options, which):
    layer, given = build(cell, options), pairs()[which]
    p = poisoned(problem(layer, T, N), given)
    got, masks = run(layer, p, given)
    close(got, wanted(layer, p, given, masks))
    params = dict(layer.params)
    y, state = layer(p.x, p.state, **given)
    want = reference.forward(params, p.x, p.state, **given, **layer.config)
    close(named(layer, y, state), named(layer, *want[:2]))


@pytest.mark.parametrize("cell", CELLS)
def test_the_reference_is_the_complex_step(cell):
    layer, given = build(cell, "deep"), pairs()["all"]
    p = problem(layer, T, N)
    _, masks = run(layer, p, given)
    want = wanted(layer, p, given, masks)
    params = dict(layer.params)
    rng = np.random.default_rng(5)

    def loss(x, state, params):
        y, end, _ = reference.forward(params, x, state, **given, **layer.config, masks=masks)
        ends, dends = (s if isinstance(s, tuple) else (s,) for s in (end, p.dstate))
        valid = given["mask"] & (np.arange(T)[:, None] < given["lengths"])
        return (p.dy[valid] * y[valid]).sum() + sum((d * e).sum() for d, e in zip(dends, ends, strict=True))

    v = rng.standard_normal(p.x.shape)
    slope = loss(p.x + 1e-100j * v, p.state, params).imag / 1e-100
    assert abs(slope - (v * want["dx"]).sum()) < 1e-13 * abs(slope) * 100
    states = p.state if isinstance(p.state, tuple) else (p.state,)
    for i, name in enumerate(("dh", "dc")[: len(states)]):
        v = rng.standard_normal(states[i].shape)
        moved = [s + 1e-100j * v if j == i else s for j, s in enumerate(states)]
        slope = loss(p.x, tuple(moved) if len(moved) > 1 else moved[0], params).imag / 1e-100
        assert abs(slope - (v * want[name]).sum()) < 1e-11 * abs(slope)


@pytest.mark.own
@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("cell", CELLS)
def test_segments_are_the_bits_of_segments_alone(cell, threads):
    fastlstm.set_num_threads(threads)
    layer = make(cell, D, 40, num_layers=2, bidirectional=True)
    p = problem(layer, T, N)
    mask, resets = pattern(8)
    y, end, tape = layer.forward(p.x, p.state, mask=mask, resets=resets)
    assert same_bits(layer(p.x, p.state, mask=mask, resets=resets)[0], y)
    dx, _ = layer.backward(tape, p.dy, p.dstate)
    whole = np.zeros_like(y), np.zeros_like(dx)
    for n in range(N):
        cuts = [0, *np.flatnonzero(resets[1:, n]) + 1, T]
        for begin, stop in zip(cuts[:-1], cuts[1:], strict=True):
            t = begin + np.flatnonzero(mask[begin:stop, n])
            if not len(t):
                continue
            state = [np.zeros_like(s[:, n : n + 1]) for s in (p.state if isinstance(p.state, tuple) else (p.state,))]
            dstate = [s.copy() for s in state]
            for i, (given, dgiven) in enumerate(
                zip(*(s if isinstance(s, tuple) else (s,) for s in (p.state, p.dstate)), strict=True)
            ):
                if begin == 0 and not resets[0, n]:
                    state[i][0::2, 0] = given[0::2, n]
                if stop == T:
                    state[i][1::2, 0] = given[1::2, n]
                    dstate[i][0::2, 0] = dgiven[0::2, n]
                if begin == 0:
                    dstate[i][1::2, 0] = dgiven[1::2, n]
            pack = (lambda s: tuple(s)) if len(state) > 1 else (lambda s: s[0])
            alone, _, tape = layer.forward(p.x[t, n : n + 1], pack(state))
            dalone, _ = layer.backward(tape, p.dy[t, n : n + 1], pack(dstate))
            whole[0][t, n], whole[1][t, n] = alone[:, 0], dalone[:, 0]
    assert same_bits(y, whole[0]) and same_bits(dx, whole[1])


@pytest.mark.own
@pytest.mark.parametrize("cell", CELLS)
def test_windows_carry_masks_and_resets(cell):
    layer = make(cell, D, H, num_layers=2)
    p, (mask, resets) = problem(layer, T, N), pattern(2)
    whole, end = layer(p.x, p.state, mask=mask, resets=resets)
    for cut in (1, 5, 9, 11, 12):
        first, state = layer(p.x[:cut], p.state, mask=mask[:cut], resets=resets[:cut])
        second, last = layer(p.x[cut:], state, mask=mask[cut:], resets=resets[cut:])
        assert same_bits(np.concatenate([first, second]), whole)
        same(last, end)


@pytest.mark.own
@pytest.mark.parametrize("cell", CELLS)
def test_a_stream_resets(cell):
    layer = make(cell, D, H, num_layers=2)
    p, resets = problem(layer, T, N), pattern(2)[1]
    whole = layer(p.x, resets=resets)[0]
    stream = layer.stream(N)
    for t in range(T):
        assert same_bits(stream.step(p.x[t], reset=resets[t]), whole[t])
    before = stream.state
    for bad, error in ((np.ones(N + 1, bool), ValueError), (np.ones(N), TypeError), ("yes", TypeError)):
        with pytest.raises(error, match="reset"):
            stream.step(p.x[0], reset=bad)
        same(stream.state, before)


@pytest.mark.own
@pytest.mark.parametrize("cell", CELLS)
def test_checkpoints_and_layouts_have_the_same_bits(cell):
    given = pairs()["all"]
    layer = build(cell, "zoneout", np.float32)
    p = problem(layer, T, N)
    plain = run(layer, p, given)[0]
    layer.rng = np.random.default_rng(1)
    again = build(cell, "zoneout", np.float32)
    same(run(again, p, given, checkpoint_every=3)[0], run(build(cell, "zoneout", np.float32), p, given)[0])
    first = build(cell, "plain", np.float32)
    p = problem(first, T, N)
    plain, _ = run(first, p, given)
    other = make(cell, D, H, batch_first=True)
    turned = {name: a if name == "lengths" else a.T[:, :, None] for name, a in given.items()}
    y, state = other(p.x.swapaxes(0, 1), p.state, **turned)
    assert same_bits(np.ascontiguousarray(y.swapaxes(0, 1)), plain["y"])
    ints = {name: a.astype(int).tolist() for name, a in given.items()} | {"lengths": given["lengths"][:, None]}
    assert same_bits(first(p.x, p.state, **ints)[0], plain["y"])
    one = first(p.x[:, 2], mask=given["mask"][:, 2], resets=given["resets"][:, 2])[0]
    assert same_bits(one, first(p.x[:, 2:3], mask=given["mask"][:, 2:3], resets=given["resets"][:, 2:3])[0][:, 0])


def test_last_outputs_stand_in():
    for options in ({}, {"bidirectional": True}):
        layer, given = make("lstm", D, H, dtype=np.float64, **options), pairs()["all"]
        p = problem(layer, T, N)
        zero, state = layer(p.x, p.state, **given)
        last, end = layer(p.x, p.state, **given, masked_output="last")
        same(end, state)
        valid = given["mask"] & (np.arange(T)[:, None] < given["lengths"])
        want, source = np.zeros_like(zero), np.full((*zero.shape[:2], 1 + layer.bidirectional), -1)
        for n in range(N):
            for d in range(1 + layer.bidirectional):
                found = -1
                for t in range(T)[:: -1 if d else 1]:
                    found = t if valid[t, n] else found
                    source[t, n, d] = found
                    if found >= 0:
                        want[t, n, d * H : (d + 1) * H] = zero[found, n, d * H : (d + 1) * H]
        assert same_bits(last, want)
        dy = np.zeros_like(p.dy)
        for t, n, d in np.argwhere(source >= 0):
            dy[source[t, n, d], n, d * H : (d + 1) * H] += p.dy[t, n, d * H : (d + 1) * H]
        _, _, tape = layer.forward(p.x, p.state, **given, masked_output="last")
        dx = layer.backward(tape, p.dy)[0]
        np.testing.assert_allclose(dx, layer.backward(layer.forward(p.x, p.state, **given)[2], dy)[0], atol=1e-13)


@pytest.mark.own
@pytest.mark.parametrize("batch_first", (False, True))
@pytest.mark.parametrize("cell", CELLS)
def test_lists(cell, batch_first):
    layer = make(cell, D, H, bidirectional=True, batch_first=batch_first)
    rng = np.random.default_rng(4)
    xs = [rng.standard_normal((length, D)).astype(np.float32) for length in (5, 1, 9, 0, 9)]
    dys = [rng.standard_normal((len(x), 2 * H)).astype(np.float32) for x in xs]
    x, lengths = fastlstm.pad(xs, batch_first=batch_first)
    assert x.shape == ((5, 9, D) if batch_first else (9, 5, D)) and lengths.tolist() == [5, 1, 9, 0, 9]
    y, state = layer(x, lengths=lengths)
    ys, states = layer(xs)
    same(states, state)
    same(ys, fastlstm.unpad(y, lengths, batch_first=batch_first))
    assert [part.shape for part in ys] == [(len(part), 2 * H) for part in xs]
    layer.zero_grad()
    dx = layer.backward(layer.forward(x, lengths=lengths)[2], fastlstm.pad(dys, batch_first=batch_first)[0])[0]
    grads = layer.flat_grads.copy()
    layer.zero_grad()
    dxs, _ = layer.backward(layer.forward(tuple(xs))[2], dys)
    same(dxs, fastlstm.unpad(dx, lengths, batch_first=batch_first))
    assert same_bits(layer.flat_grads, grads)
    with pytest.raises(ValueError, match="dy: expected a list"):
        layer.backward(layer.forward(xs)[2], dys[:-1])


@pytest.mark.parametrize(
    "given, error, text",
    [
        ({"mask": np.ones((N, T), bool)}, ValueError, "mask: expected shape"),
        ({"mask": np.ones((T, N))}, TypeError, "mask: expected True and False, got dtype float64"),
        ({"mask": np.full((T, N), 2)}, ValueError, "mask: expected 0 and 1, got 2 to 2"),
        ({"resets": np.ones(T, bool)}, ValueError, "resets: expected shape"),
        ({"resets": "yes"}, TypeError, "resets: expected True and False"),
        ({"masked_output": "mean"}, ValueError, "masked_output: expected one of 'zero', 'last'"),
    ],
)
def test_errors(given, error, text):
    layer = make("gru", D, H)
    for call in (layer, layer.forward):
        with pytest.raises(error, match=text):
            call(np.ones((T, N, D)), **given)


def test_errors_of_lists():
    layer = make("gru", D, H)
    xs = [np.ones((3, D)), np.ones((2, D))]
    for name, value in (("lengths", [3, 2]), ("mask", np.ones((3, 2), bool)), ("resets", np.ones((3, 2), bool))):
        with pytest.raises(ValueError, match=f"{name}: expected None with a list"):
            layer(xs, **{name: value})
    with pytest.raises(ValueError, match=r"x\[1\]: expected shape"):
        layer([np.ones((3, D)), np.ones((2, D + 1))])
    with pytest.raises(TypeError, match="sequences: expected a list"):
        fastlstm.pad([])
    with pytest.raises(ValueError, match="lengths: expected values"):
        fastlstm.unpad(np.ones((3, 2, 1)), [4, 0])


def test_states_of_sequences_without_steps():
    """Where no step is valid the state goes past, unless a reset lies on its way: at step 0 only forward in time."""
    layer = make("gru", 3, 5, bidirectional=True)
    p = problem(layer, 4, 4)
    mask, resets = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    mask[:, 3] = True
    resets[0, 1] = resets[2, 2] = True
    y, h_n, tape = layer.forward(p.x, p.state, mask=mask, resets=resets)
    _, dh_0 = layer.backward(tape, p.dy, p.dstate)
    for out, into in ((h_n, p.state), (dh_0, p.dstate)):
        same(out[:, 0], into[:, 0])
        same(out[1, 1], into[1, 1])
        assert not out[0, 1].any() and not out[:, 2].any()
    assert not y[:, :3].any() and y[:, 3].any()
