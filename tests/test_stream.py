"""Streams and frozen layers."""

import copy
import gc
import pickle
import tracemalloc

import numpy as np
import pytest
from conftest import CELLS, STATES, WITH_C, expected, make, problem, same, same_bits, teams

import fastlstm
from fastlstm import reference
from fastlstm import threads as threads_module

T, D, H = 9, 7, 37


def rounded(layer):
    """The layer with its matrices (not biases and peepholes) rounded to the nearest bfloat16, ties to even."""
    for view in layer.params.values():
        if view.ndim == 2:
            bits = view.view(np.uint32)
            bits[:] = (bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)
    return layer


@pytest.mark.own
@pytest.mark.parametrize("batch", (1, 5))
@pytest.mark.parametrize(
    "options", ({}, {"num_layers": 3}, {"bias": False}, {"zoneout": True, "recurrent_dropout": 0.3})
)
@pytest.mark.parametrize("cell", CELLS)
def test_steps_are_the_sequence(isa, cell, options, batch):
    options = dict(options)
    if options.pop("zoneout", False):
        options["zoneout"] = (0.2, 0.3) if cell in WITH_C else 0.3
    for dtype in (np.float32, np.float64):
        layer = make(cell, D, H, dtype=dtype, **options)
        p = problem(layer, T, batch)
        y, last = layer(p.x, p.state)
        stream = layer.stream(batch)
        stream.state = p.state
        out = np.empty((batch, H), dtype)
        for t in range(T):
            got = stream.step(p.x[t], out) if t % 2 else stream.step(p.x[t])
            assert (got is out) == bool(t % 2)
            same(got, y[t])
        same(stream.state, last)
        if dtype == np.float64:
            np.testing.assert_allclose(y, expected(layer, p)["y"], rtol=0, atol=1e-12)


@pytest.mark.own
@pytest.mark.parametrize("by_units", (False, True))
@pytest.mark.parametrize(
    "weights, options",
    (
        (None, {}),
        (None, {"zoneout": True, "dtype": np.float64}),
        (None, {"proj_size": 45, "num_layers": 2}),
        ("bfloat16", {}),
        ("int8", {"num_layers": 2}),
    ),
)
@pytest.mark.parametrize("cell", CELLS)
def test_large_steps_by_a_team(isa, cell, weights, options, by_units):
    """The bits of one thread, for every way to share a step, and on as many threads as a call may use."""
    options = dict(options)
    if "proj_size" in options and (cell not in WITH_C or cell == "lstm_norm"):
        options["num_layers"] = 3
        del options["proj_size"]
    if options.pop("zoneout", False):
        options["zoneout"] = (0.2, 0.3) if cell in WITH_C else 0.3
    layer = make(cell, 270, 270, **options)
    batch = 353  # RNN, one layer: 2 * 353 * 270 * 540 operations, from 1e8 on there is a team
    x = np.random.default_rng(0).standard_normal((3, batch, 270)).astype(layer.dtype)
    reset = np.arange(batch) % 3 == 0
    asked, steps = [], []
    for threads in (1, 2, 3):
        fastlstm.set_num_threads(threads)
        stream = layer.stream(batch, weights=weights)
        with teams(by_units), pytest.MonkeyPatch.context() as patch:
            patch.setattr(threads_module, "get_num_threads", lambda n=threads: asked.append(n) or n)
            steps.append([stream.step(x[0]).copy(), stream.step(x[1], reset=reset), stream.step(x[2]), *stream.state])
    assert len(asked) == 9
    same(steps[1], steps[0])
    same(steps[2], steps[0])


@pytest.mark.own
def test_projection(isa):
    layer = make("lstm", D, H, proj_size=21, num_layers=2)
    p = problem(layer, T, 5)
    y, last = layer(p.x, p.state)
    stream = layer.stream(5)
    stream.state = p.state
    same(np.stack([stream.step(x) for x in p.x]), y)
    same(stream.state, last)


@pytest.mark.parametrize("cell", CELLS)
def test_state(isa, cell):
    layer = make(cell, D, H, num_layers=2)
    p = problem(layer, T, 3)
    stream = layer.stream(3)
    fresh = stream.state
    for part in fresh if len(STATES[cell]) > 1 else (fresh,):
        assert part.shape == (2, 3, H) and part.dtype == np.float32 and not part.any()
    first = stream.step(p.x[0])
    kept = stream.state
    second = stream.step(p.x[1])
    assert not same_bits(first, second)
    stream.state = kept
    same(stream.step(p.x[1]), second)
    same(first, layer(p.x[:1])[0][0])  # what a step returned is not overwritten by the next
    stream.reset()
    same(stream.state, fresh)
    same(stream.step(p.x[0]), first)
    stream.state = None
    same(stream.step(p.x[0]), first)
    copies = stream.state  # copies: writing to them changes nothing
    for part in copies if len(STATES[cell]) > 1 else (copies,):
        part[:] = 99
    same(stream.step(p.x[1]), second)
    before = stream.state
    bad = p.state[0] if len(STATES[cell]) > 1 else p.state[:1]
    with pytest.raises((ValueError, TypeError), match="state|h_0"):
        stream.state = bad
    same(stream.state, before)


@pytest.mark.parametrize("cell", CELLS)
def test_one_sequence(isa, cell):
    layer = make(cell, D, H)
    x = problem(layer, T, 1).x
    flat, batched, listed = layer.stream(), layer.stream(1), layer.stream()
    out = np.empty(H, np.float32)
    for t in range(T):
        a = flat.step(x[t, 0], out)
        assert a is out and a.shape == (H,)
        b = batched.step(x[t])
        assert b.shape == (1, H)
        same(a, b[0])
        same(listed.step(x[t, 0].tolist()), a)  # anything that asarray accepts
    same(layer(x[:, 0])[0][-1], out)


def test_arguments(isa):
    layer = make("lstm", D, H)
    p = problem(layer, T, 5)
    stream = layer.stream(5)
    want = stream.step(p.x[0])
    stream.reset()
    same(stream.step(np.asfortranarray(p.x[0])), want)
    stream.reset()
    same(stream.step(p.x[0].astype(np.float64)), want)
    state = stream.state
    good = np.empty((5, H), np.float32)
    frozen = good.copy()
    frozen.flags.writeable = False
    outs = [
        good[:4],
        good.astype(float),
        np.empty((H, 5), np.float32).T,
        frozen,
        good[0],
        "no",
        np.empty((5, H + 1), "f"),
    ]
    for out in outs:
        with pytest.raises(ValueError, match="out"):
            stream.step(p.x[0], out)
    for x in (p.x[0][:4], p.x[0][:, :-1], p.x[0][0], p.x, np.zeros((5, 0), np.float32)):
        with pytest.raises(ValueError, match="x: expected shape"):
            stream.step(x)
    for x in ("no", None, p.x[0].astype(complex)):
        with pytest.raises(TypeError, match="x"):
            stream.step(x)
    same(stream.state, state)
    with pytest.raises(RuntimeError, match="made without __init__"):
        type(stream).__new__(type(stream)).step(np.zeros((0, 0), bool))
    with pytest.raises(ValueError, match="bidirectional"):
        make("lstm", D, H, bidirectional=True).stream()
    for size in (0, -1):
        with pytest.raises(ValueError, match="batch_size"):
            layer.stream(size)
    with pytest.raises(ValueError, match="weights"):
        layer.stream(weights="int4")
    for weights in ("bfloat16", "int8"):
        with pytest.raises(ValueError, match=weights):
            make("lstm", D, H, dtype=np.float64).stream(weights=weights)


@pytest.mark.own
@pytest.mark.parametrize("cell", CELLS)
def test_share(isa, cell):
    layer = make(cell, D, H, num_layers=2)
    p = problem(layer, T, 3)
    y = layer(p.x)[0]
    one = layer.stream(3)
    layer.flat_params[:] = 0
    two, other = layer.stream(3, share=one), layer.stream(share=one)
    for t in range(T):  # their states are their own
        same(one.step(p.x[t]), y[t])
        same(two.step(p.x[t]), y[t])
        same(other.step(p.x[t, :1]), y[t, :1])
    del one
    gc.collect()
    two.reset()
    same(two.step(p.x[0]), y[0])
    with pytest.raises(ValueError, match="share"):
        make(cell, D, H, num_layers=2).stream(share=two)
    with pytest.raises(ValueError, match="weights"):
        layer.stream(weights="bfloat16", share=two)


@pytest.mark.parametrize("cell", CELLS)
def test_weights_are_those_of_its_making(isa, cell):
    layer = make(cell, D, H)
    p = problem(layer, T, 2)
    y = layer(p.x)[0]
    stream = layer.stream(2)
    layer.flat_params[:] += 0.25
    same(np.stack([stream.step(x) for x in p.x]), y)
    stream = layer.stream(2)
    same(np.stack([stream.step(x) for x in p.x]), layer(p.x)[0])


# ---- bfloat16


@pytest.mark.own
@pytest.mark.parametrize("batch", (1, 5))
@pytest.mark.parametrize("cell", CELLS)
def test_bfloat16(isa, cell, batch):
    """bfloat16 weights: the bits of a float32 layer whose weights were rounded, near the unrounded one."""
    options = {"num_layers": 2} | ({"proj_size": 21} if cell in WITH_C else {})
    layer = make(cell, D, H, **options)
    p = problem(layer, T, batch)
    full = layer(p.x, p.state)
    stream = layer.stream(batch, weights="bfloat16")
    stream.state = p.state
    steps = np.stack([stream.step(x) for x in p.x])
    layer.freeze("bfloat16")
    whole = layer(p.x, p.state)
    layer.unfreeze()
    same(whole[0], steps)
    same(whole[1], stream.state)
    same(layer(p.x, p.state), full)
    same(rounded(layer)(p.x, p.state), whole)
    # A weight is off by 2^-9 of itself at most; errors of independent signs stay near that.
    error = np.linalg.norm(whole[0] - full[0]) / np.linalg.norm(full[0])
    assert 1e-5 < error < 2.0**-8
    assert abs(whole[0] - full[0]).max() < 2.0**-6


@pytest.mark.own
@pytest.mark.parametrize("cell", CELLS)
def test_bfloat16_with_many_units_and_threads(isa, cell):
    layer = make(cell, 18, 131)
    p = problem(layer, 70, 2)
    fastlstm.set_num_threads(2)
    layer.freeze("bfloat16")
    got = layer(p.x, p.state)
    layer.unfreeze()
    same(got, rounded(layer)(p.x, p.state))


# ---- int8


def from_int8(layer):
    """A float64 layer with the weights that int8 stands for: of each row the nearest multiples of its largest / 127."""
    other = layer.astype(np.float64)
    for name, view in layer.params.items():
        if view.ndim == 2:
            scale = abs(view).max(axis=1, keepdims=True) / np.float32(127)
            other.params[name][:] = np.round(view / np.where(scale, scale, 1)) * scale.astype(np.float64)
    return other


@pytest.mark.own
@pytest.mark.parametrize("batch", (1, 5))
@pytest.mark.parametrize("cell", CELLS)
def test_int8(isa, cell, batch):
    """int8 weights: near a layer of weights rounded so, not far from the unrounded one; streams have the same bits."""
    options = {"num_layers": 2} | ({"proj_size": 21} if cell in WITH_C else {})
    layer = make(cell, D, H, **options)
    layer.params["weight_ih_l0"][3] = 0  # a row of zeros has no largest
    p = problem(layer, T, batch)
    full = layer(p.x, p.state)
    stream = layer.stream(batch, weights="int8")
    stream.state = p.state
    steps = np.stack([stream.step(x) for x in p.x])
    layer.freeze("int8")
    whole = layer(p.x, p.state)
    alone = layer(p.x[:, -1:], tuple(s[:, -1:] for s in p.state) if isinstance(p.state, tuple) else p.state[:, -1:])
    layer.unfreeze()
    same(whole[0], steps)
    same(whole[1], stream.state)
    same(alone[0], whole[0][:, -1:])
    same(layer(p.x, p.state), full)
    want, _ = from_int8(layer)(p.x, p.state)
    assert np.linalg.norm(whole[0] - want) < 2e-6 * np.linalg.norm(want)
    # A weight is off by 1/254 of its row's largest at most; errors of independent signs stay near that.
    error = np.linalg.norm(whole[0] - full[0]) / np.linalg.norm(full[0])
    assert 1e-4 < error < 2.0**-6


@pytest.mark.own
@pytest.mark.parametrize("cell", CELLS)
def test_int8_with_many_units_and_threads(isa, cell):
    layer = make(cell, 18, 131)
    p = problem(layer, 70, 2)
    layer.freeze("int8")
    results = []
    for threads in (1, 2):
        fastlstm.set_num_threads(threads)
        results.append(layer(p.x, p.state))
    layer.unfreeze()
    same(*results)
    want, _ = from_int8(layer)(p.x, p.state)
    assert np.linalg.norm(results[0][0] - want) < 2e-6 * np.linalg.norm(want)


@pytest.mark.own
def test_a_frozen_layer_is_copied_with_its_products():
    """A copy packs its weights as the layer did, whatever is chosen meanwhile."""
    layer = make("lstm", D, H).freeze("int8")
    x = problem(layer, T, 3).x
    want = layer(x)
    pytest.importorskip("scipy")
    fastlstm.set_products("blas")
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        same(other(x), want)


@pytest.mark.own
def test_int8_of_the_smallest_weights(isa):
    """Weights whose scale would be subnormal, times 2^-24, are 0."""
    layer = make("rnn", 1, 1, bias=False)
    layer.params["weight_ih_l0"][:] = 2e-36
    assert layer.stream(weights="int8").step(np.full(1, 1e38, np.float32))[0] == 0


@pytest.mark.own
def test_int8_shows_weights_that_are_no_numbers(isa):
    """A NaN or an infinity among the weights of a unit is in that unit's output, as it is without int8."""
    layer = make("rnn", D, H)
    x = problem(layer, 1, 3).x
    for bad in (np.nan, np.inf):
        layer.params["weight_ih_l0"][5, 2] = bad
        found = layer.stream(3, weights="int8").step(x[0])
        assert np.isnan(found[:, 5]).all() and np.isfinite(np.delete(found, 5, axis=1)).all()


# ---- freeze


@pytest.mark.parametrize("cell", CELLS)
def test_freeze(isa, cell):
    layer = make(cell, D, H, num_layers=2, bidirectional=True)
    p = problem(layer, T, 3, (9, 0, 4))
    want = layer(p.x, p.state, p.lengths)
    _, _, tape = layer.forward(p.x, p.state, p.lengths)
    views, flat, values = layer.params, layer.flat_params, layer.state_dict()
    assert layer.freeze() is layer
    same(layer(p.x, p.state, p.lengths), want)
    for array in (flat, layer.flat_params, *views.values(), *layer.params.values()):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
    for call in (
        lambda: layer.forward(p.x),
        lambda: layer.backward(tape, p.dy),
        lambda: layer.load_state_dict(values),
    ):
        with pytest.raises(RuntimeError, match="frozen"):
            call()
    same(layer.state_dict(), values)
    layer.unfreeze()
    layer.backward(tape, p.dy, p.dstate)  # the refused call did not use the tape up
    layer.load_state_dict(values)
    layer.forward(p.x)
    layer.flat_params[:] = 0
    assert not same_bits(layer(p.x, p.state, p.lengths)[0], want[0])


@pytest.mark.own
def test_frozen_layer_uses_its_panels(isa, monkeypatch):
    layer = make("lstm", D, H)
    p = problem(layer, T, 3)
    want = layer(p.x, p.state)
    layer.freeze()
    monkeypatch.setattr(layer, "_pack", None)  # a call would fail here
    same(layer(p.x, p.state), want)
    monkeypatch.undo()
    layer.unfreeze()
    layer.unfreeze()  # no harm
    with pytest.raises(ValueError, match="weights"):
        layer.freeze("float16")
    with pytest.raises(ValueError, match="bfloat16"):
        make("lstm", D, H, dtype=np.float64).freeze("bfloat16")
    layer.flat_params[:] = 0  # a refused freeze leaves the layer as it was
    layer.freeze("bfloat16").freeze()  # the last one holds
    same(layer(p.x), (np.zeros((T, 3, H), np.float32), (np.zeros((1, 3, H), np.float32),) * 2))


def test_weights_are_never_stale():
    """Without freeze every call sees the parameters as they are."""
    layer = make("lstm", D, H, dtype=np.float64)
    p = problem(layer, T, 3)
    for _ in range(3):
        layer.params["weight_hh_l0"][:] *= 0.5
        y, _, _ = reference.forward(layer.params, p.x, p.state)
        np.testing.assert_allclose(layer(p.x, p.state)[0], y, rtol=0, atol=1e-12)


# ---- memory


def traced(call, times=1000):
    """The bytes that Python keeps after so many calls, and the most it held meanwhile."""
    tracemalloc.start()
    try:
        call()
        gc.collect()
        begin, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        for _ in range(times):
            call()
        end, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return end - begin, peak - begin


@pytest.mark.own
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("weights", (None, "bfloat16", "int8"))
def test_steps_allocate_nothing(cell, weights):
    """Neither of Python (tracemalloc) nor of the engine, whose memory that does not see."""
    layer = make(cell, D, H, num_layers=2)
    p = problem(layer, 1, 3)
    stream, out, x = layer.stream(3, weights=weights), np.empty((3, H), np.float32), p.x[0]
    for _ in range(10):
        stream.step(x, out)
    blocks = fastlstm.engine.blocks_taken()
    # What the interpreter keeps for itself once in a while is not there each time; what a step allocates is.
    found = [traced(lambda: stream.step(x, out)) for _ in range(3)]
    assert min(kept for kept, _ in found) < 1000 and min(peak for _, peak in found) < 2000, found
    assert fastlstm.engine.blocks_taken() == blocks
    layer(p.x)
    assert fastlstm.engine.blocks_taken() > blocks  # so a block would have been seen


@pytest.mark.parametrize("cell", CELLS)
def test_a_stream_goes_on_from_a_call_with_one_sequence(cell):
    layer = make(cell, D, H, num_layers=2)
    x = problem(layer, 6, 1).x[:, 0]
    whole, _ = layer(x)
    _, state = layer(x[:4])
    stream = layer.stream()
    stream.state = state
    np.testing.assert_allclose(stream.step(x[4]), whole[4], rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="h_0: expected shape"):
        layer.stream(2).state = state


@pytest.mark.own
@pytest.mark.parametrize("weights", (None, "bfloat16", "int8"))
@pytest.mark.parametrize("cell", CELLS)
def test_a_stream_of_a_frozen_layer_gives_its_numbers(cell, weights, monkeypatch):
    layer = make(cell, D, H, num_layers=2)
    p = problem(layer, 5, 3)
    full = layer(p.x)[0]
    whole = layer.freeze(weights)(p.x)[0]
    assert same_bits(whole, full) == (weights is None)
    with monkeypatch.context() as patch:
        patch.setattr(layer, "_pack", None)  # nothing is packed again
        stream = layer.stream(3)
        other = layer.stream(3, share=stream)
    for t in range(5):
        assert same_bits(stream.step(p.x[t]), whole[t]) and same_bits(other.step(p.x[t]), whole[t])
    rounded = layer.stream(3, weights="bfloat16")
    assert same_bits(rounded.step(p.x[0]), full[0]) is False
    layer.unfreeze()
    assert same_bits(layer.stream(3).step(p.x[0]), full[0])
    assert same_bits(stream.step(p.x[0]), other.step(p.x[0]))  # they keep what they had
