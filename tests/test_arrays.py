"""Any array: whatever its order, strides, type and place, a call answers as for a plain copy, or with a clear error.

Inputs keep their bytes, outputs own their data, sizes whose products overflow end in an error before memory is taken.
"""

import tracemalloc

import numpy as np
import pytest
from conftest import make, same
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import fastlstm

REAL = ("f2", "f4", "f8", ">f4", ">f8", "<f2", "g", "i1", "u1", "i2", ">i4", "u4", "i8", ">u8", "?")
REFUSED = ("F", "D", ">c8", "O", "U3", "S3", "M8[s]", "m8[s]", "V4")
LAYOUTS = ("C", "F", "reversed", "stepped", "repeated", "misaligned", "read-only", "big", "part", "memmap", "moved")
SPECIAL = (np.nan, np.inf, -np.inf, -0.0, 1e-42, 3e38, 1e-300)

quick = settings(max_examples=150, deadline=None, database=None, derandomize=True, phases=[Phase.generate])


def plain(shape, dtype, seed, special):
    """Values that the type can hold; a few of a floating type are special."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape) if np.dtype(dtype).kind == "f" else rng.integers(0, 3, shape)
    values = np.asarray(values)
    if special and np.dtype(dtype).kind == "f":
        values[rng.random(shape) < 0.1] = SPECIAL[seed % len(SPECIAL)]
    with np.errstate(over="ignore"):
        return values.astype(dtype)


def laid_out(values, layout, folder):
    """An array of these values in a layout (but for "repeated"), and the memory under it."""
    dtype, shape = values.dtype, values.shape
    if layout == "F":
        base = view = np.asfortranarray(values)
    elif layout == "reversed":
        base = np.ascontiguousarray(values[(slice(None, None, -1),) * values.ndim])
        view = base[(slice(None, None, -1),) * values.ndim]
    elif layout == "stepped":
        base = np.ones([2 * n + 1 for n in shape], dtype)
        view = base[tuple(slice(0, 2 * n, 2) for n in shape)]
        view[...] = values
    elif layout == "repeated":  # stride 0 along the first axis
        base = values[:1].copy()
        view = np.broadcast_to(base, shape) if shape[0] else base[:0]
    elif layout == "misaligned":
        base = np.zeros(values.nbytes + 1, np.uint8)
        view = base[1:].view(dtype).reshape(shape) if values.size else values
        view[...] = values
    elif layout == "read-only":
        base = view = values.copy()
        view.flags.writeable = False
    elif layout == "big":
        base = view = values.astype(dtype.newbyteorder(">"))
    elif layout == "part":
        base = np.ones([n + 2 for n in shape], dtype)
        view = base[tuple(slice(1, n + 1) for n in shape)]
        view[...] = values
    elif layout == "memmap" and values.size:
        path = folder / str(len(list(folder.iterdir())))
        path.write_bytes(values.tobytes())
        base = view = np.memmap(path, dtype, "r", shape=shape)
    elif layout == "moved":
        base = np.moveaxis(values, 0, -1).copy()
        view = np.moveaxis(base, -1, 0)
    else:
        base = view = values.copy()
    assert view.shape == shape
    return view, base


forms = st.tuples(st.sampled_from(REAL), st.sampled_from(LAYOUTS))
sizes = st.tuples(st.sampled_from([1, 5, 0, 2]), st.sampled_from([3, 1, 0, 4, 9]))


def cell_options():
    return st.sampled_from([
        ("lstm", {}), ("gru", {"batch_first": True}), ("rnn", {"bidirectional": True}),
        ("lstm", {"proj_size": 2, "num_layers": 2, "batch_first": True}), ("lstm_peephole", {}),
    ])  # fmt: skip


def arguments(data, layer, T, N, folder):
    """x, states and gradients in drawn forms, by name: (view, memory, plain copy)."""
    dirs, width = 1 + layer.bidirectional, layer.proj_size or layer.hidden_size
    outer = (N, T) if layer.batch_first else (T, N)
    state = (layer.num_layers * dirs, N)
    shapes = {"x": (*outer, 3), "dy": (*outer, dirs * width), "h": (*state, width), "dh": (*state, width)}
    if "c" in layer._descriptor.states:
        shapes |= {"c": (*state, layer.hidden_size), "dc": (*state, layer.hidden_size)}
    found = {}
    for name, shape in shapes.items():
        dtype, layout = data.draw(forms, label=name)
        values = plain(shape, dtype, data.draw(st.integers(0, 999), label="seed"), data.draw(st.booleans()))
        if layout == "repeated" and shape[0]:
            values = np.repeat(values[:1], shape[0], axis=0)
        view, base = laid_out(values, layout, folder)
        with np.errstate(over="ignore"):
            found[name] = view, base, np.array(view, layer.dtype, order="C")
    return found


def everything(layer, x, dy, h, dh, c=None, dc=None, lengths=None):
    """What inference, forward, backward and a stream give."""
    state, dstate = (h, dh) if c is None else ((h, c), (dh, dc))
    layer.zero_grad()
    with np.errstate(over="ignore"):  # of a cast to float32: the values become infinite, as in a plain copy
        first = layer(x, state, lengths)
        y, last, tape = layer.forward(x, state, lengths)
        kept = np.array(y)
        back = layer.backward(tape, dy, dstate)
        out = [*_flat(first), *_flat((y, last)), *_flat(back)]
        steps = []
        if not layer.bidirectional and np.shape(h)[1]:
            stream = layer.stream(np.shape(h)[1])
            stream.state = state
            for t in range(x.shape[1 if layer.batch_first else 0]):
                steps.append(stream.step(x[:, t] if layer.batch_first else x[t]))
            steps += _flat(stream.state)
    return out + steps, [kept, layer.flat_grads.copy()]


def _flat(value):
    return [part for item in value for part in _flat(item)] if isinstance(value, tuple) else [value]


@quick
@given(data=st.data())
def test_any_layout_and_type(data, tmp_path_factory):
    """The bits of a plain copy; the memory of the inputs is as it was, and no output lies in it."""
    folder = tmp_path_factory.mktemp("arrays")
    cell, options = data.draw(cell_options())
    T, N = data.draw(sizes)
    layer = make(cell, 3, 5, dtype=data.draw(st.sampled_from([np.float32, np.float64])), **options)
    args = arguments(data, layer, T, N, folder)
    lengths, known = None, None
    if data.draw(st.booleans()):
        known = np.random.default_rng(T).integers(0, T + 1, N)
        dtype = data.draw(st.sampled_from(["i1", "u1", ">i4", "i8", ">u8"]))
        lengths, base = laid_out(known.astype(dtype), data.draw(st.sampled_from(LAYOUTS[:4])), folder)
        args["lengths"] = lengths, base, known
    before = {name: base.tobytes() for name, (_, base, _) in args.items()}
    params = layer.flat_params.copy()
    got, kept = everything(layer, **{name: view for name, (view, _, _) in args.items()})
    for name, (_, base, _) in args.items():
        assert base.tobytes() == before[name], f"{name} was written to"
        for out in got:
            assert not np.may_share_memory(out, base), f"an output lies in {name}"
    for i, out in enumerate(got):
        assert out.flags.writeable and not np.may_share_memory(out, layer.flat_params)
        assert not any(np.may_share_memory(out, other) for other in got[:i])
    same(params, layer.flat_params)
    snapshot = [out.copy() for out in got]
    want, want_kept = everything(layer, **{name: copy for name, (_, _, copy) in args.items()})
    same(got, snapshot)  # a later call wrote nothing there
    same(got, want)
    same(kept, want_kept)


@quick
@given(data=st.data())
def test_masks_and_resets_in_any_layout(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("arrays")
    layer = make("lstm", 3, 5)
    T, N = data.draw(sizes)
    x = plain((T, N, 3), "f4", 5, False)
    given_, copies, bases = {}, {}, {}
    for seed, name in enumerate(("mask", "resets")):
        values = (np.random.default_rng(seed).random((T, N)) < 0.7).astype(data.draw(st.sampled_from("?bBil")))
        layout = data.draw(st.sampled_from(LAYOUTS))
        if layout == "repeated" and T:
            values = np.repeat(values[:1], T, axis=0)
        given_[name], bases[name] = laid_out(values, layout, folder)
        copies[name] = given_[name].astype(bool)
    before = {name: base.tobytes() for name, base in bases.items()}
    got = layer(x, **given_)
    assert before == {name: base.tobytes() for name, base in bases.items()}
    same(_flat(got), _flat(layer(x, **copies)))


@pytest.mark.parametrize("dtype", REFUSED)
def test_types_without_real_numbers(dtype):
    layer = make("lstm", 3, 5)
    good = {"x": np.ones((2, 4, 3), "f4"), "h_0": np.ones((1, 4, 5), "f4"), "c_0": np.ones((1, 4, 5), "f4"),
            "dy": np.ones((2, 4, 5), "f4")}  # fmt: skip
    for name, array in good.items():
        args = good | {name: np.zeros(array.shape, dtype)}
        y, state, tape = layer.forward(good["x"])
        with pytest.raises(TypeError, match=f"^{name}: expected an array of (real )?numbers"):
            if name == "dy":
                layer.backward(tape, args["dy"])
            else:
                layer(args["x"], (args["h_0"], args["c_0"]))
        assert not layer.flat_grads.any()
        layer.backward(tape, good["dy"])  # the tape is still good
        layer.zero_grad()
    stream = layer.stream(4)
    with pytest.raises(TypeError, match="^x: expected an array of (real )?numbers"):
        stream.step(np.zeros((4, 3), dtype))


def test_masked_arrays():
    """Refused with a hidden value, wherever they come in; taken without one."""
    layer = make("lstm", 3, 5)
    x, s, dy = np.ones((2, 4, 3), "f4"), np.ones((1, 4, 5), "f4"), np.ones((2, 4, 5), "f4")

    def hidden(a):
        return np.ma.masked_array(a, np.arange(a.size).reshape(a.shape) == 1)

    for name, call in {
        "x": lambda: layer(hidden(x)),
        "h_0": lambda: layer(x, (hidden(s), s)),
        "c_0": lambda: layer.forward(x, (s, hidden(s))),
        "dy": lambda: layer.backward(layer.forward(x)[2], hidden(dy)),
        "dh_n": lambda: layer.backward(layer.forward(x)[2], dy, (hidden(s), None)),
        "lengths": lambda: layer(x, lengths=hidden(np.ones(4, int))),
        "mask": lambda: layer(x, mask=hidden(np.ones((2, 4), bool))),
        "resets": lambda: layer(x, resets=hidden(np.ones((2, 4), bool))),
    }.items():
        with pytest.raises(TypeError, match=f"^{name}: expected an array without a mask"):
            call()
    with pytest.raises(TypeError, match="^x: expected an array without a mask"):
        layer.stream(4).step(hidden(x[0]))
    with pytest.raises(TypeError, match="weight_ih_l0: expected an array without a mask"):
        layer.load_state_dict(layer.state_dict() | {"weight_ih_l0": hidden(layer.params["weight_ih_l0"])})
    same(_flat(layer(np.ma.masked_array(x))), _flat(layer(x)))


BEYOND = 1e300  # more than float32 holds


def overflowing():
    """Calls that convert a number to float32, what they may change, and a layer that they are of."""
    layer, linear = make("lstm", 3, 5), fastlstm.nn.Linear(3, 5)
    optimiser, stream = fastlstm.nn.SGD([layer], momentum=0.5), layer.stream(4)
    x, s, dy = np.full((2, 4, 3), BEYOND), np.full((1, 4, 5), BEYOND), np.full((2, 4, 5), BEYOND)
    tape, other = layer.forward(np.ones((2, 4, 3), "f4"))[2], linear.forward(np.ones((2, 4, 3), "f4"))[1]
    state = {name: np.full(value.shape, BEYOND) for name, value in layer.state_dict().items()}
    slots = optimiser.state_dict()
    return layer, {
        "x": lambda: layer(x),
        "x of forward": lambda: layer.forward(x, lengths=[2, 1, 0, 2]),
        "x as a list": lambda: layer([x[:, 0], x[:1, 1]]),
        "h_0": lambda: layer(np.ones((2, 4, 3)), (s, None)),
        "dy": lambda: layer.backward(tape, dy),
        "dh_n": lambda: layer.backward(tape, None, (s, None)),
        "x of a stream": lambda: stream.step(x[0]),
        "state of a stream": lambda: setattr(stream, "state", (s, s)),
        "params": lambda: layer.params.update(weight_ih_l0=state["weight_ih_l0"]),
        "load_state_dict": lambda: layer.load_state_dict(state),
        "of an optimiser": lambda: optimiser.load_state_dict(slots | {"v.0": np.full(slots["v.0"].shape, BEYOND)}),
        "x of Linear": lambda: linear(x),
        "dy of Linear": lambda: linear.backward(other, dy),
        "pad": lambda: fastlstm.pad([x], dtype="f4"),
    }  # fmt: skip


@pytest.mark.parametrize("name", overflowing()[1])
def test_an_overflow_is_what_errstate_says(name):
    layer, calls = overflowing()
    before = [a.copy() for a in (layer.flat_params, layer.flat_grads)]
    with np.errstate(all="raise"), pytest.raises(FloatingPointError, match="overflow"):
        calls[name]()
    with np.errstate(all="warn"), pytest.raises(RuntimeWarning, match="overflow"):
        calls[name]()
    same(before, [layer.flat_params, layer.flat_grads])
    with np.errstate(all="ignore"):
        calls[name]()


def test_arrays_of_other_libraries():
    torch, pandas = pytest.importorskip("torch"), pytest.importorskip("pandas")
    layer = make("gru", 3, 5)
    x = plain((6, 3), "f8", 1, False)
    want = _flat(layer(x))
    tensor, frame = torch.from_numpy(x), pandas.DataFrame(x)
    frame.index += 5
    for given_ in (tensor, tensor.T.contiguous().T, tensor.flip(0).flip(0), frame, x.tolist()):
        same(_flat(layer(given_)), want)
    same(_flat(layer(torch.from_numpy(x.astype("f2")))), _flat(layer(x.astype("f2"))))
    with pytest.warns(UserWarning, match="^x: the gradient of this tensor stops here; .* fastlstm.torch") as told:
        same(_flat(layer(tensor.clone().requires_grad_())), want)
    assert told[0].filename == __file__
    with torch.no_grad():
        same(_flat(layer(tensor.clone().requires_grad_())), want)
    narrow = tensor.bfloat16()
    same(_flat(layer(narrow)), _flat(layer(narrow.float().numpy())))
    missing = frame.copy()
    missing.iloc[2, 1] = np.nan  # a missing value is NaN, and goes through as one
    y, _ = layer(missing)
    assert np.isfinite(y[:2]).all() and np.isnan(y[2:]).all()
    for no_numbers in (frame.astype(object), frame.astype("string")):
        with pytest.raises(TypeError, match="^x: expected an array of real numbers, got dtype object"):
            layer(no_numbers)
    lengths = pandas.Series([2, 0, 3], index=[7, 8, 9])
    same(_flat(layer(np.ones((3, 3, 3)), lengths=lengths)), _flat(layer(np.ones((3, 3, 3)), lengths=[2, 0, 3])))


def test_results_as_arguments():
    """What a call returned, or parts of it, go into the next: states over each other, y as x, dy in y's memory."""
    layer = make("lstm", 5, 5)
    x = plain((4, 3, 5), "f4", 2, False)
    y, (h, c) = layer(x)
    copies = y.copy(), h.copy(), c.copy()
    both = np.concatenate([h, c])
    same(_flat(layer(y, (both[:1], both[1:]))), _flat(layer(copies[0], copies[1:])))
    same(_flat(layer(y, (h, h))), _flat(layer(copies[0], (copies[1], copies[1].copy()))))
    same((y, h, c), copies)
    z, state, tape = layer.forward(y, (h, c))
    dx, _ = layer.backward(tape, z, state)
    grads = layer.flat_grads.copy()
    layer.zero_grad()
    again, state, tape = layer.forward(copies[0], copies[1:])
    same(dx, layer.backward(tape, again.copy(), tuple(s.copy() for s in state))[0])
    same(grads, layer.flat_grads)
    stream, other = layer.stream(3), layer.stream(3)
    for x_t in x:  # the result over the argument
        want, over = stream.step(x_t), x_t.copy()
        same(other.step(over, out=over), want)
        same(over, want)
    weights = layer.params["weight_hh_l0"].reshape(-1, 2, 5)  # the layer's own memory as an input
    before = layer.flat_params.copy()
    same(_flat(layer(weights)), _flat(layer(weights.copy())))
    same(before, layer.flat_params)


HUGE = 2**31 - 1


def zeros(*shape):
    return np.broadcast_to(np.float32(0), shape)


@pytest.mark.parametrize("make_it", [
    lambda: fastlstm.LSTM(HUGE, HUGE),
    lambda: fastlstm.GRU(1, HUGE),
    lambda: fastlstm.RNN(2**30, 2**30),
    lambda: fastlstm.LSTM(HUGE, HUGE, proj_size=HUGE - 1),
    lambda: fastlstm.nn.Linear(HUGE, HUGE),
    lambda: fastlstm.nn.Embedding(HUGE, HUGE),
    lambda: fastlstm.LSTM(3, 4)(zeros(2**39, 2**20, 3)),
    lambda: fastlstm.LSTM(3, 4)(zeros(2**20, 2**39, 3)),
    lambda: fastlstm.LSTM(3, 4)(zeros(2**39, 0, 3)),
    lambda: fastlstm.LSTM(3, 4)(zeros(0, 2**39, 3)),
    lambda: fastlstm.GRU(3, 4).forward(zeros(2**38, 2**21, 3)),
    lambda: fastlstm.GRU(3, 4).forward(zeros(2**33, 2**25, 3), checkpoint_every=7),
    lambda: fastlstm.LSTM(3, 4)(zeros(2**50, 4, 3), lengths=[1, 2, 3, 4]),
])  # fmt: skip
def test_sizes_whose_products_overflow(make_it):
    """An error before anything large is taken: the products of sizes are computed, not wrapped round."""
    tracemalloc.start()
    try:
        with pytest.raises((MemoryError, ValueError), match="(?i)memory|allocate|fewer than"):
            make_it()
        assert tracemalloc.get_traced_memory()[1] < 400e6
    finally:
        tracemalloc.stop()
