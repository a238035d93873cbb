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


@pytest.mark.parametrize("linear_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("lengths", [None, [3, 7, 0, 5]])
def test_gradients(lengths, batch_first, linear_first):
    """By central differences in one random direction of all parameters, the input and the states."""
    stack = stack_of(batch_first=batch_first, linear_first=linear_first)
    x, dy = inputs(stack)
    rng = np.random.default_rng(3)
    clean = x.copy()
    if lengths is not None:
        for n, length in enumerate(lengths):
            padding = (n, slice(length, None)) if batch_first else (slice(length, None), n)
            x[padding] = dy[padding] = np.nan
            clean[padding] = 0
    _, zero = stack(clean, lengths=lengths)
    random = [None if s is None else [rng.standard_normal(p.shape) for p in (s if isinstance(s, tuple) else [s])]
              for s in zero]  # fmt: skip
    state = tuple(s if s is None else (tuple(s) if len(s) == 2 else s[0]) for s in random)
    y, end, tape = stack.forward(x, state, lengths)
    if lengths is not None:
        for n, length in enumerate(lengths):
            assert not (y[n, length:] if batch_first else y[length:, n]).any()
    dx, dstate = stack.backward(tape, dy, tuple(None if e is None else tuple(np.ones_like(p) for p in e)
                                                if isinstance(e, tuple) else np.ones_like(e) for e in end))  # fmt: skip
    assert np.isfinite(dx).all()

    def value(eps):
        moved = fastlstm.Stack(list(stack))
        for name, view in moved.params.items():
            view += eps * directions[name]
        try:
            y, end = moved(clean + eps * directions["x"], lift(state, eps), lengths)
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
    lengths = [3, 7, 0, 5]
    for n, length in enumerate(lengths):
        x[length:, n] = np.nan
    y, _ = stack(x, lengths=lengths)
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
    single = stack.stream()
    assert single.step(x[0, 0]).shape == (3,)
    with pytest.raises(ValueError, match="bidirectional"):
        stack_of().stream()


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
