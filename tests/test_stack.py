"""Stack: what it computes, trains and streams is what its layers do one after the other."""

import numpy as np
import pytest
from conftest import make, same, same_bits

import fastlstm
from fastlstm import nn


def stack_of(dtype=np.float64, batch_first=False, both=True, linear_first=False):
    options = {"dtype": dtype, "batch_first": batch_first}
    layers = [nn.Linear(3, 4, dtype=dtype, rng=5)] if linear_first else []
    layers += [
        make("lstm", 4 if linear_first else 3, 5, bidirectional=both, num_layers=2, **options),
        nn.Linear(10 if both else 5, 4, dtype=dtype, rng=1),
        make("gru", 4, 6, **options),
        make("rnn", 6, 2, **options),
        nn.Linear(2, 3, dtype=dtype, rng=2),
    ]
    return fastlstm.Stack(layers)


def inputs(stack, T=7, N=4, seed=0):
    rng = np.random.default_rng(seed)
    shape = (N, T) if stack.batch_first else (T, N)
    return rng.standard_normal((*shape, 3)), rng.standard_normal((*shape, 3))


def test_it_is_its_layers_one_after_the_other():
    stack = stack_of()
    x, _ = inputs(stack)
    y, state = stack(x)
    want, states = x, []
    for layer in stack:
        want = layer(want)
        if isinstance(want, tuple):
            states.append(want[1])
            want = want[0]
        else:
            states.append(None)
    assert same_bits(y, want)
    for got, expected in zip(state, states, strict=True):
        assert got is None if expected is None else same(got, expected) is None
    again, _ = stack(x, state)
    assert not np.array_equal(again, y)
    train, end, _ = stack.forward(x)
    assert same_bits(train, y)


LENGTHS = [3, 7, 0, 5]
STEPS = {
    "all": {},
    "lengths": {"lengths": LENGTHS},
    "mask": {"mask": np.random.default_rng(8).random((7, 4)) < 0.6},
    "resets": {"resets": np.random.default_rng(9).random((7, 4)) < 0.3},
    "both": {"lengths": LENGTHS, "mask": np.arange(28).reshape(7, 4) % 3 > 0,
             "resets": np.arange(28).reshape(7, 4) % 5 == 2},
    "last": {"mask": np.random.default_rng(8).random((7, 4)) < 0.6, "masked_output": "last"},
}  # fmt: skip
STEPS["mask"]["mask"][:, 2] = False
STEPS["last"]["mask"][:2, 1], STEPS["last"]["mask"][:, 2] = False, False


def steps_of(name, batch_first):
    """The arguments of a call, and which steps (T, N) are valid."""
    steps = STEPS[name]
    valid = np.ones((7, 4), bool) & steps.get("mask", True)
    if "lengths" in steps:
        valid &= np.arange(7)[:, None] < np.array(steps["lengths"])
    turned = {key: steps[key].T for key in ("mask", "resets") if key in steps and batch_first}
    return steps | turned, valid


def held_by(layer, valid):
    """Where a layer with masked_output="last" has something to give."""
    seen = np.maximum.accumulate(valid, axis=0)
    return seen | np.maximum.accumulate(valid[::-1], axis=0)[::-1] if layer.bidirectional else seen


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("last", ["linear", "both", "one"])
@pytest.mark.own  # to the bit
def test_steps_reach_every_layer(last, name, batch_first):
    """To the bit the layers one after the other, in both directions of a call; a Linear after zeros gives zeros."""
    stack = stack_of(batch_first=batch_first, linear_first=True)
    if last != "linear":  # what holds its output: a layer of two directions under a Linear; a layer at the end
        stack = fastlstm.Stack(list(stack)[: 3 if last == "both" else 4])
    steps, valid = steps_of(name, batch_first)
    x, _ = inputs(stack)
    x.swapaxes(0, batch_first)[~valid] = [np.inf, -np.inf, np.nan]  # a product of them is a warning
    kind = steps.pop("masked_output", "zero")
    recurrent = [i for i, layer in enumerate(stack) if isinstance(layer, fastlstm.Layer)]
    y, undo, there = x, [], valid
    for i, layer in enumerate(stack):
        if isinstance(layer, fastlstm.Layer):
            here = kind if i == recurrent[-1] else "zero"
            there = held_by(layer, valid) if here == "last" else valid
            y, end, tape = layer.forward(y, **steps, masked_output=here)
            undo.append((layer, tape, None))
        else:
            outside = ~there.T if batch_first else ~there
            y = y.copy()
            y[outside] = 0
            y, tape = layer.forward(y)
            y[outside] = 0
            undo.append((layer, tape, outside))
    got, ends = stack(x, **steps, masked_output=kind)
    assert same_bits(got, y) and np.isfinite(got).all() and same(ends[recurrent[-1]], end) is None
    if name == "last":
        assert got.swapaxes(0, batch_first)[~valid & there].any(axis=-1).all()
    dy = np.random.default_rng(4).standard_normal(y.shape)
    want = dy
    for layer, tape, outside in reversed(undo):
        if outside is not None:
            want = want.copy()
            want[outside] = 0
        want = layer.backward(tape, want)
        want = want[0] if isinstance(want, tuple) else want
        if outside is not None:
            want[outside] = 0
    grads = {key: view.copy() for key, view in stack.grads.items()}
    stack.zero_grad()
    train, _, tape = stack.forward(x, **steps, masked_output=kind, checkpoint_every=3)
    dx, _ = stack.backward(tape, dy)
    assert same_bits(train, y) and same_bits(dx, want)
    assert all(view.any() and same_bits(view, grads[key]) for key, view in stack.grads.items())


@pytest.mark.parametrize("linear_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_list_of_sequences(batch_first, linear_first):
    stack = stack_of(batch_first=batch_first, linear_first=linear_first)
    rng = np.random.default_rng(2)
    listed = [rng.standard_normal((length, 3)) for length in LENGTHS]
    x, _ = fastlstm.pad(listed, batch_first=batch_first)
    y, state, tape = stack.forward(x, lengths=LENGTHS)
    dy = [rng.standard_normal((length, 3)) for length in LENGTHS]
    dx, dstate = stack.backward(tape, fastlstm.pad(dy, batch_first=batch_first)[0])
    grads = {key: view.copy() for key, view in stack.grads.items()}
    stack.zero_grad()
    called, ends = stack(listed)
    trained, _, tape = stack.forward(listed)
    ours, starts = stack.backward(tape, dy)
    for got, want in ((called, y), (trained, y), (ours, dx)):
        assert isinstance(got, list)
        want = fastlstm.unpad(want, LENGTHS, batch_first=batch_first)
        assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))
    same(stack.grads, grads)
    for got, want in ((ends, state), (starts, dstate)):
        for a, b in zip(got, want, strict=True):
            assert b is None if a is None else same(a, b) is None
    alone, _ = stack(listed[3])
    np.testing.assert_allclose(called[3], alone, rtol=1e-12)
    assert stack.backward(stack.forward(listed)[2], None, need_dx=False)[0] is None
    for name, value in (("lengths", LENGTHS), ("mask", np.ones((7, 4), bool)), ("resets", np.zeros((7, 4), bool))):
        with pytest.raises(ValueError, match=f"{name}: expected None with a list"):
            stack(listed, **{name: value})
    tape = stack.forward(listed)[2]
    with pytest.raises(ValueError, match="dy: expected a list of arrays"):
        stack.backward(tape, dy[::-1])
    stack.backward(tape, dy)  # it is good for another call
    with pytest.raises(ValueError, match=r"x\[1\]"):
        stack([listed[0], np.ones((2, 4))])


def test_one_sequence():
    stack = stack_of(linear_first=True)
    x, dy = (array[:, 1] for array in inputs(stack))
    mask, resets = np.array([1, 1, 0, 1, 1, 1, 0]), np.array([0, 0, 0, 0, 1, 0, 0])
    for kind in ("zero", "last"):
        y, _, tape = stack.forward(x, lengths=6, mask=mask, resets=resets, masked_output=kind)
        dx, _ = stack.backward(tape, dy)
        steps = {"lengths": [6], "mask": mask[:, None], "resets": resets[:, None], "masked_output": kind}
        want, _, tape = stack.forward(x[:, None], **steps)
        assert same_bits(y, want[:, 0]) and same_bits(dx, stack.backward(tape, dy[:, None])[0][:, 0])


@pytest.mark.parametrize("linear_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", STEPS)
def test_gradients(name, batch_first, linear_first):
    """By central differences in one random direction of all parameters, the input and the states."""
    stack = stack_of(batch_first=batch_first, linear_first=linear_first)
    x, dy = inputs(stack)
    rng = np.random.default_rng(3)
    clean = x.copy()
    steps, valid = steps_of(name, batch_first)
    padding = ~(valid.T if batch_first else valid)
    x[padding], clean[padding] = np.nan, 0
    if name != "last":
        dy[padding] = np.nan
    _, zero = stack(clean, **steps)
    random = [None if s is None else [rng.standard_normal(p.shape) for p in (s if isinstance(s, tuple) else [s])]
              for s in zero]  # fmt: skip
    state = tuple(s if s is None else (tuple(s) if len(s) == 2 else s[0]) for s in random)
    y, end, tape = stack.forward(x, state, **steps)
    assert name == "last" or not y[padding].any()
    dx, dstate = stack.backward(tape, dy, tuple(None if e is None else tuple(np.ones_like(p) for p in e)
                                                if isinstance(e, tuple) else np.ones_like(e) for e in end))  # fmt: skip
    assert np.isfinite(dx).all()

    def value(eps):
        moved = fastlstm.Stack(list(stack))
        for name, view in moved.params.items():
            view += eps * directions[name]
        try:
            y, end = moved(clean + eps * directions["x"], lift(state, eps), **steps)
        finally:
            for name, view in moved.params.items():
                view -= eps * directions[name]
        total = np.nansum(y * dy)
        return total + sum(p.sum() for e in end if e is not None for p in (e if isinstance(e, tuple) else [e]))

    def lift(state, eps):
        if state is None:
            return None
        if isinstance(state, tuple):
            return tuple(lift(s, eps) for s in state)
        return state + eps

    directions = {name: rng.standard_normal(view.shape) for name, view in stack.params.items()}
    directions["x"] = rng.standard_normal(x.shape)
    numeric = (value(1e-6) - value(-1e-6)) / 2e-6
    slope = sum(np.sum(stack.grads[name] * directions[name]) for name in stack.grads) + np.sum(dx * directions["x"])
    slope += sum(p.sum() for e in dstate if e is not None for p in (e if isinstance(e, tuple) else [e]))
    assert abs(numeric) > 1e-3
    assert abs(slope - numeric) <= 1e-7 * abs(numeric) + 1e-7


def test_padding_is_not_read():
    stack = stack_of(linear_first=True)
    x, _ = inputs(stack)
    for n, length in enumerate(LENGTHS):
        x[length:, n] = np.nan
    y, _ = stack(x, lengths=LENGTHS)
    alone, _ = stack(x[:3, 0])
    np.testing.assert_allclose(y[:3, 0], alone, rtol=1e-12)
    assert not y[3:, 0].any()


def test_it_trains_with_the_optimisers():
    stack = stack_of(np.float32)
    x, target = inputs(stack)
    adam = nn.Adam(stack, lr=0.01)
    losses = []
    for _ in range(60):
        y, _, tape = stack.forward(x)
        loss, dy = nn.mse(y, target)
        adam.zero_grad()
        stack.backward(tape, dy, need_dx=False)
        nn.clip_grad_norm(stack, 1.0)
        adam.step()
        losses.append(loss)
    assert losses[-1] < 0.7 * losses[0]
    stack.zero_grad()
    assert not any(grad.any() for grad in stack.grads.values())


def test_streams():
    stack = stack_of(both=False)
    x, _ = inputs(stack)
    y, end = stack(x)
    stream = stack.stream(batch_size=4)
    out = np.empty((4, 3))
    for t, x_t in enumerate(x):
        assert stream.step(x_t, out=out) is out
        np.testing.assert_allclose(out, y[t], rtol=1e-12)
        if t == 3:
            kept = stream.state
    same(stream.state[0], end[0])
    stream.state = kept
    np.testing.assert_allclose(stream.step(x[4]), y[4], rtol=1e-12)
    before = stream.state
    with pytest.raises(ValueError, match="h_0"):
        stream.state = (*kept[:2], np.ones((1, 9, 9)), *kept[3:])
    same(stream.state[0], before[0])
    stream.reset()
    np.testing.assert_allclose(stream.step(x[0]), y[0], rtol=1e-12)
    before = stream.state
    for wrong in (np.empty((4, 2)), np.empty((4, 3), np.float32), np.empty((3, 3)), np.empty(3)):
        with pytest.raises(ValueError, match=r"out: expected float64 of shape \(4, 3\), got"):
            stream.step(x[0], out=wrong)
    with pytest.raises(ValueError, match="reset: expected shape"):
        stream.step(x[0], reset=[True])
    for a, b in zip(stream.state, before, strict=True):  # nothing has moved
        assert a is None if b is None else same(a, b) is None
    single = stack.stream()
    assert single.step(x[0, 0]).shape == (3,) and single.step(list(x[0, 0]), out=out[0]) is not None
    with pytest.raises(ValueError, match="bidirectional"):
        stack_of().stream()


@pytest.mark.parametrize("linear_first", [False, True])
def test_resets_and_weights_of_a_stream(linear_first):
    stack = stack_of(both=False, linear_first=linear_first)
    x, _ = inputs(stack)
    resets = STEPS["resets"]["resets"]
    y, _ = stack(x, resets=resets)
    for size in (2, 3):  # with a Linear at the end, and a layer
        short = fastlstm.Stack(list(stack)[: size + linear_first])
        y, end = short(x, resets=resets)
        stream = short.stream(4)
        for t, x_t in enumerate(x):
            np.testing.assert_allclose(stream.step(x_t, reset=resets[t]), y[t], rtol=1e-12, atol=1e-14)
        same(stream.state[linear_first], end[linear_first])
    with pytest.raises(ValueError, match="x: expected shape"):
        stream.step(np.ones((4, 7)))
    plain = fastlstm.Stack([fastlstm.GRU(3, 4), nn.Linear(4, 2, bias=False)])
    np.testing.assert_allclose(plain.stream(4).step(x[0]), plain(x[:1])[0][0], rtol=1e-5)


def test_state_dict_is_that_of_a_sequential():
    stack, other = stack_of(), stack_of()
    assert list(stack.params)[0] == "0.weight_ih_l0" and "1.weight" in stack.params
    for view in other.params.values():
        view += 1
    other.load_state_dict(stack.state_dict())
    same(other.state_dict(), stack.state_dict())
    other.load_state_dict({"model." + name: value + 1 for name, value in stack.state_dict().items()}, "model.")
    before = other.state_dict()
    wrong = stack.state_dict()
    wrong["4.weight"] = np.ones((9, 9))
    for d, text in ((wrong, "weight: expected shape"), (stack.state_dict() | {"9.bias": np.ones(3)}, "unexpected keys"),
                    ({}, "no key begins")):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            other.load_state_dict(d)
        same(other.state_dict(), before)
    assert stack.num_params == sum(view.size for view in stack.params.values())


def test_freeze_and_astype():
    stack = stack_of()
    x, _ = inputs(stack)
    y, _ = stack(x)
    stack.freeze()
    assert same_bits(stack(x)[0], y)
    with pytest.raises(RuntimeError, match="frozen"):
        stack.forward(x)
    single = stack.unfreeze().astype(np.float32)
    assert single.dtype == np.float32
    np.testing.assert_allclose(single(x)[0], y, atol=1e-5)


def test_wrong_layers():
    lstm, linear = fastlstm.LSTM(3, 4), nn.Linear(4, 2)
    for layers, error, text in (
        ([], TypeError, "at least one"), (lstm, TypeError, "expected a list"), ([lstm, 3], TypeError, r"layers\[1\]"),
        ([lstm, lstm], ValueError, r"layers\[1\]: expected each layer once"),
        ([linear], ValueError, "at least one LSTM"), ([lstm, fastlstm.GRU(5, 4)], ValueError, "expected 4 inputs"),
        ([lstm, nn.Linear(4, 2, dtype="f8")], ValueError, "expected float32"),
        ([lstm, fastlstm.GRU(4, 4, batch_first=True)], ValueError, "batch_first"),
    ):  # fmt: skip
        with pytest.raises(error, match=text):
            fastlstm.Stack(layers)


def test_wrong_arguments():
    stack = fastlstm.Stack([fastlstm.GRU(3, 4), nn.Linear(4, 2)])
    x = np.ones((5, 2, 3))
    with pytest.raises(TypeError, match="state: expected a tuple of 2.*tuple of 3"):
        stack(x, (None, None, None))
    for steps, text in (
        ({"lengths": [5, 6]}, "lengths: expected values from 0 to T = 5"),
        ({"lengths": [5]}, "lengths: expected shape"),
        ({"mask": np.ones((2, 5))}, "mask"),
        ({"mask": np.ones((2, 5), bool)}, "mask: expected shape"),
        ({"resets": np.ones(5, bool)}, "resets: expected shape"),
        ({"masked_output": "hold"}, "masked_output"),
    ):
        for function in (stack, stack.forward, fastlstm.Stack([nn.Linear(3, 3), fastlstm.GRU(3, 4)])):
            with pytest.raises((ValueError, TypeError), match=text):
                function(x, **steps)
    drawing = fastlstm.Stack([fastlstm.GRU(3, 4, 2, dropout=0.5, rng=1), fastlstm.GRU(4, 4)])
    before = drawing[0].rng.bit_generator.state
    with pytest.raises(ValueError, match="masked_output"):
        drawing.forward(x, masked_output="hold")
    assert drawing[0].rng.bit_generator.state == before
    with pytest.raises(TypeError, match="hx: Stack has no such argument; write state="):
        stack(x, hx=None)
    with pytest.raises(TypeError, match="checkpoint_every: Stack has no such argument"):
        stack(x, checkpoint_every=2)
    with pytest.raises(ValueError, match=r"x: expected shape \(T, N, D\)"):
        stack(np.ones(3), lengths=[1])
    with pytest.raises(TypeError, match=r"state\[1\]: expected None"):
        stack(x, (None, np.ones(3)))
    y, _, tape = stack.forward(x)
    with pytest.raises(TypeError, match="StackTape"):
        stack.backward(None, y)
    other = fastlstm.Stack([fastlstm.GRU(3, 4), nn.Linear(4, 2)])
    with pytest.raises(ValueError, match="another stack"):
        other.backward(tape, y)
    dx, dstate = stack.backward(tape, y)
    assert dx.shape == x.shape and dstate[1] is None
    with pytest.raises(RuntimeError, match="already used"):
        stack.backward(tape, y)
