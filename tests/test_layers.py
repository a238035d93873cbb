"""The layers as their users see them: initialisation, buffers, copies, options, streams, gradient check."""

import ast
import copy
import pickle
from pathlib import Path

import numpy as np
import pytest

import fastlstm
from fastlstm import GRU, LSTM, RNN, reference

CLASSES = (LSTM, GRU, RNN)
T, N, D, H = 5, 4, 3, 6


@pytest.fixture(autouse=True)
def threads_as_before():
    yield
    fastlstm.set_num_threads(None)


def listed(state):
    return list(state) if isinstance(state, tuple) else [state]


def batch(dtype=np.float32, shape=(T, N, D), seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def gradients(layer, x, zeros=False, **kwargs):
    """Bytes of everything that one training step gives; zeros: those of -0.0 are taken for 0.0."""
    layer.zero_grad()
    y, state, tape = layer.forward(x, **kwargs)
    y_bytes = y.tobytes()
    dx, dstate = layer.backward(tape, np.ones_like(y), state)
    arrays = [*listed(state), dx, *listed(dstate), layer.flat_grads]
    return [y_bytes, *((a + 0.0 if zeros else a).tobytes() for a in arrays)]


# ---- parameters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CLASSES)
def test_pytorch_initialisation_is_uniform(kind):
    layer = kind(40, 64, 2, rng=0)
    p = layer.flat_params
    assert np.abs(p).max() <= 1 / 8
    assert np.abs(p).max() > 0.999 / 8 and abs(p.mean()) < 1e-3
    assert abs(p.std() - 1 / 8 / 3**0.5) < 1e-3
    assert not layer.flat_grads.any()


@pytest.mark.parametrize("kind, gates", [(LSTM, 4), (GRU, 3), (RNN, 1)])
def test_orthogonal_initialisation(kind, gates):
    layer = kind(10, 16, 2, bidirectional=True, init="orthogonal", dtype=np.float64, rng=0)
    for name, w in layer.params.items():
        if name.startswith("weight_hh"):
            assert w.shape == (gates * 16, 16)
            np.testing.assert_allclose(w.T @ w, np.eye(16), atol=1e-13)
        elif name.startswith("bias"):
            assert not w.any()
        else:
            bound = (6 / sum(w.shape)) ** 0.5
            assert 0.95 * bound < np.abs(w).max() <= bound


@pytest.mark.parametrize("init", ["pytorch", "orthogonal"])
def test_forget_bias_moves_the_forget_gate_alone(init):
    options = {
        "num_layers": 2,
        "bidirectional": True,
        "proj_size": 2,
        "init": init,
        "dtype": np.float64,
        "rng": 3,
    }
    plain, moved = LSTM(D, H, **options), LSTM(D, H, forget_bias=1.5, **options)
    for name, p in plain.params.items():
        expected = p.copy()
        if name.startswith("bias_ih"):
            expected[H : 2 * H] += 1.5
        assert np.array_equal(moved.params[name], expected), name


@pytest.mark.parametrize("kind", CLASSES)
def test_seeds(kind):
    a, b, c = kind(D, H, rng=5), kind(D, H, rng=np.random.default_rng(5)), kind(D, H, rng=6)
    assert a.flat_params.tobytes() == b.flat_params.tobytes() != c.flat_params.tobytes()
    assert kind(D, H).flat_params.tobytes() != kind(D, H).flat_params.tobytes()
    shared = np.random.default_rng(5)  # one generator for a whole model
    first, second = kind(D, H, rng=shared), kind(D, H, rng=shared)
    assert first.flat_params.tobytes() == a.flat_params.tobytes() != second.flat_params.tobytes()
    assert kind(D, H, dtype=np.float64, rng=5).flat_params.astype("f4").tobytes() == a.flat_params.tobytes()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", CLASSES)
def test_named_arrays_and_flat_buffers_are_the_same_memory(kind, dtype):
    layer = kind(D, H, 2, bidirectional=True, dtype=dtype, rng=0)
    for flat, views in ((layer.flat_params, layer.params), (layer.flat_grads, layer.grads)):
        assert flat.dtype == dtype and flat.ndim == 1 and flat.flags.c_contiguous
        assert flat.ctypes.data % 64 == 0
        assert sum(v.size for v in views.values()) == flat.size
        for i, view in enumerate(views.values()):
            assert np.shares_memory(view, flat) and view.flags.c_contiguous
            view[...] = i
        assert np.array_equal(flat, np.concatenate([v.ravel() for v in views.values()]))
        flat[:] = 7
        assert all((v == 7).all() for v in views.values())
    assert not np.shares_memory(layer.flat_params, layer.flat_grads)
    assert list(layer.params) == list(layer.grads)
    layer.params.clear()  # the dict is the caller's, the arrays are the layer's
    assert layer.params


def test_names_and_shapes_are_pytorchs():
    layer = LSTM(D, H, 2, bidirectional=True, proj_size=2)
    shapes = {name: p.shape for name, p in layer.params.items()}
    one = {"weight_ih_l0": (4 * H, D), "weight_hh_l0": (4 * H, 2)}
    one |= {"bias_ih_l0": (4 * H,), "bias_hh_l0": (4 * H,), "weight_hr_l0": (2, H)}
    assert dict(list(shapes.items())[:5]) == one
    assert list(shapes)[5:10] == [name + "_reverse" for name in one]
    assert shapes["weight_ih_l1"] == (4 * H, 4) and len(shapes) == 20
    assert list(GRU(D, H, bias=False).params) == ["weight_ih_l0", "weight_hh_l0"]


def test_state_dict_is_a_copy():
    layer = GRU(D, H, rng=0)
    before, d = layer.flat_params.copy(), layer.state_dict()
    for value in d.values():
        assert not np.shares_memory(value, layer.flat_params)
        value[...] = 1
    assert np.array_equal(layer.flat_params, before)
    layer.load_state_dict(d)
    assert (layer.flat_params == 1).all()
    d["bias_ih_l0"][...] = 2
    assert (layer.flat_params == 1).all()


def test_gradients_add_up_until_zero_grad():
    layer, x = LSTM(D, H, 2, dtype=np.float64, rng=0), batch(np.float64)
    gradients(layer, x)
    once = layer.flat_grads.copy()
    y, state, tape = layer.forward(x)
    layer.backward(tape, np.ones_like(y), state)
    np.testing.assert_allclose(layer.flat_grads, 2 * once, rtol=1e-12, atol=1e-12)
    assert once.any()
    layer.zero_grad()
    assert not layer.flat_grads.any()


def test_repr():
    assert repr(LSTM(3, 5)) == "LSTM(3, 5, dtype=float32)"
    shown = repr(LSTM(3, 5, 2, dropout=0.5, proj_size=2, zoneout=(0.1, 0), activation="relu", dtype=np.float64))
    assert shown == (
        "LSTM(3, 5, num_layers=2, dropout=0.5, proj_size=2, activation='relu', zoneout=(0.1, 0.0), dtype=float64)"
    )
    assert repr(GRU(3, 5, reset_after=False, bias=False)) == "GRU(3, 5, bias=False, reset_after=False, dtype=float32)"
    assert repr(RNN(3, 5, nonlinearity="relu")) == "RNN(3, 5, nonlinearity='relu', dtype=float32)"


# ---- copies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@pytest.mark.parametrize("kind", CLASSES)
def test_copies_are_whole_and_apart(kind, copied):
    layer = kind(D, H, 2, bidirectional=True, dropout=0.3, recurrent_dropout=0.2, rng=0)
    x = batch()
    gradients(layer, x)
    other = copied(layer)
    assert repr(other) == repr(layer) and other.config == layer.config
    assert other.flat_params.tobytes() == layer.flat_params.tobytes()
    assert other.flat_grads.tobytes() == layer.flat_grads.tobytes() != bytes(layer.flat_grads.nbytes)
    for mine, theirs in ((other.flat_params, layer.flat_params), (other.flat_grads, layer.flat_grads)):
        assert not np.shares_memory(mine, theirs)
    for flat, views in ((other.flat_params, other.params), (other.flat_grads, other.grads)):
        assert all(np.shares_memory(flat, v) for v in views.values())
    assert other(x)[0].tobytes() == layer(x)[0].tobytes()
    assert gradients(other, x) == gradients(layer, x)  # the generator was copied as it was: the same masks
    other.flat_params[:] = 0
    assert layer.flat_params.any() and not other(x)[0].any()


@pytest.mark.own
@pytest.mark.parametrize("weights", [None, "bfloat16"])
def test_copies_of_frozen_layers(weights):
    layer, x = LSTM(D, H, rng=0).freeze(weights), batch()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other(x)[0].tobytes() == layer(x)[0].tobytes()
        with pytest.raises(RuntimeError, match="frozen"):
            other.forward(x)
        with pytest.raises(ValueError, match="read-only"):
            other.flat_params[0] = 1
        other.unfreeze()
        other.flat_params[:] = 0
        assert not other(x)[0].any()
    assert layer(x)[0].any()


def test_streams_and_tapes_are_not_copied():
    layer = LSTM(D, H, rng=0)
    for thing in (layer.stream(), layer.forward(batch())[2]):
        for copied in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError):
                copied(thing)


# ---- calls ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CLASSES)
def test_layouts_of_the_same_batch(kind):
    options = {"num_layers": 2, "bidirectional": True, "rng": 0}
    major, first = kind(D, H, **options), kind(D, H, batch_first=True, **options)
    x, lengths = batch(), [5, 0, 3, 1]
    y, end, tape = major.forward(x, lengths=lengths)
    y_first, end_first, tape_first = first.forward(x.swapaxes(0, 1), lengths=lengths)
    assert y_first.shape == (N, T, 2 * H)
    assert np.array_equal(y, y_first.swapaxes(0, 1))
    for a, b in zip(listed(end), listed(end_first), strict=True):
        assert a.shape == (4, N, H) and np.array_equal(a, b)
    dx, _ = major.backward(tape, y)
    dx_first, _ = first.backward(tape_first, y_first)
    assert dx_first.shape == (N, T, D) and np.array_equal(dx, dx_first.swapaxes(0, 1))
    assert np.array_equal(major.flat_grads, first.flat_grads)

    for layer in (major, first):  # one sequence without a batch axis, the same with either layout
        alone, end_alone = layer(x[:, 0])
        assert np.array_equal(alone, y[:, 0])
        for a, b in zip(listed(end_alone), listed(end), strict=True):
            assert a.shape == (4, H) and np.array_equal(a, b[:, 0])


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_comes_back(kind, dtype):
    """Fresh arrays of the layer's dtype, contiguous with time first; batch_first is a transposed view."""
    for batch_first in (False, True):
        layer = kind(D, H, batch_first=batch_first, dtype=dtype)
        x = batch(np.float64)
        for lengths in (None, [1, 2, 3, 4]):
            y, end = layer(x.swapaxes(0, 1) if batch_first else x, lengths=lengths)
            assert (y.swapaxes(0, 1) if batch_first else y).flags.c_contiguous
            for array in (y, *listed(end)):
                assert array.dtype == dtype and array.flags.writeable and not np.shares_memory(array, x)
            assert all(s.flags.c_contiguous for s in listed(end))
            y_2, end_2 = layer(x.swapaxes(0, 1) if batch_first else x, lengths=lengths)
            assert not np.shares_memory(y, y_2)
            y[...] = 0
            assert y_2.any()


@pytest.mark.parametrize("kind", CLASSES)
def test_call_and_forward_agree_to_the_bit(kind):
    layer, x = kind(D, H, 3, bidirectional=True, rng=0), batch()
    y, end = layer(x, lengths=[5, 0, 3, 1])
    y_2, end_2, _ = layer.forward(x, lengths=[5, 0, 3, 1])
    assert y.tobytes() == y_2.tobytes()
    assert [s.tobytes() for s in listed(end)] == [s.tobytes() for s in listed(end_2)]


@pytest.mark.parametrize(
    "lengths",
    [[5, 0, 3, 1], (5, 0, 3, 1),
     *(np.array([5, 0, 3, 1], t) for t in ("i1", "u1", "i2", "u4", "i8", "u8", ">i4")),
     [np.int8(5), np.int64(0), 3, 1], np.array([5, 9, 0, 9, 3, 9, 1])[::2], range(5, 1, -1)],
    ids=str,
)  # fmt: skip
def test_lengths_of_any_kind(lengths):
    layer, x = LSTM(D, H, bidirectional=True, rng=0), batch()
    y, (h_n, c_n) = layer(x, lengths=lengths)
    for n, length in enumerate(lengths):
        length = int(length)
        alone, (h, c) = layer(x[:length, n])
        assert np.array_equal(y[:length, n], alone) and not y[length:, n].any()
        assert np.array_equal(h_n[:, n], h) and np.array_equal(c_n[:, n], c)


def test_one_length_for_one_sequence():
    layer, x = LSTM(D, H, rng=0), batch()[:, 0]
    for lengths in (3, [3], np.int8(3)):
        assert np.array_equal(layer(x, lengths=lengths)[0][:3], layer(x[:3])[0])


@pytest.mark.parametrize("kind", [LSTM, GRU])
@pytest.mark.parametrize("n", range(1, 8))
@pytest.mark.parametrize("D", [1, 20])
def test_lengths_that_all_end_early(kind, n, D):
    """The reverse direction finds nobody at the last steps."""
    fastlstm.set_num_threads(1)  # BLAS rounds by how many rows a thread gives it
    layer, x = kind(D, 9, bidirectional=True, rng=0), batch(shape=(7, n, D))
    lengths = [3] * (n - 1) + [2]
    y, end, tape = layer.forward(x, lengths=lengths)
    short, end_short, tape_short = layer.forward(x[:3], lengths=lengths)
    assert np.array_equal(y[:3], short) and not y[3:].any()
    assert np.array_equal(layer(x, lengths=lengths)[0], y)
    for a, b in zip(listed(end), listed(end_short), strict=True):
        assert np.array_equal(a, b)
    dx, _ = layer.backward(tape, y)
    dx_short, _ = layer.backward(tape_short, short)
    assert np.array_equal(dx[:3], dx_short) and not dx[3:].any()


# ---- dropout and other masks ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", CLASSES)
def test_masks_are_drawn_in_forward_alone(kind):
    options = {"num_layers": 3, "bidirectional": True}
    plain = kind(D, H, **options, rng=0)
    layer, x = kind(D, H, **options, dropout=0.5, recurrent_dropout=0.4, rng=0), batch()
    before = repr(layer.rng.bit_generator.state)
    assert layer(x)[0].tobytes() == plain(x)[0].tobytes()
    assert repr(layer.rng.bit_generator.state) == before
    first, second = layer.forward(x)[0], layer.forward(x)[0]
    assert repr(layer.rng.bit_generator.state) != before
    assert first.tobytes() != second.tobytes() != plain(x)[0].tobytes()


@pytest.mark.own
@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("checkpoint_every", [None, 2])
def test_masks_depend_on_the_seed_alone(kind, checkpoint_every):
    def run(seed, threads, every=checkpoint_every, zeros=False):
        fastlstm.set_num_threads(threads)
        zoneout = (0.2, 0.3) if kind is LSTM else 0.2
        layer = kind(D, H, 3, bidirectional=True, dropout=0.5, recurrent_dropout=0.4, zoneout=zoneout, rng=seed)
        return gradients(layer, batch(), zeros, lengths=[5, 0, 3, 1], checkpoint_every=every)

    first = run(0, 1)
    assert run(0, 2) == run(0, 3) == first
    assert run(0, 1, zeros=True) == run(0, 1, None, zeros=True)  # both masks at 0: a window's edge adds 0 to -0
    assert run(1, 1) != first


def test_shares_of_the_masks():
    layer = LSTM(2, 40, 2, dropout=0.3, recurrent_dropout=0.4, zoneout=(0.2, 0.6), rng=0)
    masks = layer.forward(np.ones((50, 30, 2), np.float32))[2].masks
    (dropped,) = masks["dropout"]
    assert dropped.shape == (50, 30, 40)
    for mask, p in ((dropped, 0.3), (masks["recurrent"][1, 0], 0.4)):
        assert set(np.unique(mask)) == {np.float32(0), np.float32(1 / (1 - p))}
        assert abs(np.mean(mask == 0) - p) < 0.05
    assert abs(masks["zoneout_h"][0, 0].mean() - 0.2) < 0.02
    assert abs(masks["zoneout_c"][1, 0].mean() - 0.6) < 0.02


def test_dropout_of_everything():
    """With p = 1 the second layer sees zeros, not NaN."""
    layer = GRU(D, H, 2, dropout=1.0, rng=0)
    y, _, tape = layer.forward(batch())
    second = GRU(H, H)
    second.load_state_dict({n.replace("l1", "l0"): v for n, v in layer.params.items() if n.endswith("l1")})
    assert np.array_equal(y, second(np.zeros((T, N, H), np.float32))[0])
    dx, _ = layer.backward(tape, np.ones_like(y))
    assert not dx.any()


@pytest.mark.parametrize("kind", CLASSES)
def test_config_and_masks_make_the_reference_do_the_same(kind):
    zoneout = (0.2, 0.3) if kind is LSTM else 0.2
    options = {"bidirectional": True, "batch_first": True, "dtype": np.float64, "rng": 0}
    layer = kind(D, H, 2, dropout=0.5, recurrent_dropout=0.4, zoneout=zoneout, **options)
    x = batch(np.float64, (N, T, D))
    y, _, tape = layer.forward(x, lengths=[5, 0, 3, 1])
    expected = reference.forward(layer.params, x, lengths=[5, 0, 3, 1], masks=tape.masks, **layer.config)[0]
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-13)
    expected = reference.forward(layer.params, x, **layer.config)[0]
    np.testing.assert_allclose(layer(x)[0], expected, rtol=0, atol=1e-13)


# ---- a look inside -------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [None, [5, 0, 3, 1]])
def test_gates_cells_and_hidden_states_fit_together(lengths):
    layer, x = LSTM(D, H, 2, bidirectional=True, dtype=np.float64, rng=0), batch(np.float64)
    y, (h_n, c_n), tape = layer.forward(x, lengths=lengths)
    for index in range(2):
        for reverse in (False, True):
            g, c, h = tape.gates(index, reverse), tape.cells(index, reverse), tape.hidden(index, reverse)
            assert list(g) == ["i", "f", "g", "o"] and {v.shape for v in g.values()} == {(T, N, H)}
            np.testing.assert_allclose(h, g["o"] * np.tanh(c), atol=1e-14)
            previous = np.zeros_like(c)
            if reverse:
                previous[:-1] = c[1:]
            else:
                previous[1:] = c[:-1]
            valid = np.arange(T)[:, None] < (np.full(N, T) if lengths is None else np.array(lengths))
            np.testing.assert_allclose(
                c, np.where(valid[..., None], g["f"] * previous + g["i"] * g["g"], 0), atol=1e-14
            )
            if index == 1:
                assert np.array_equal(h, y[..., H:] if reverse else y[..., :H])
    g["i"][:] = 0  # copies: a look changes nothing
    assert tape.gates(1, True)["i"].any()


def test_gates_of_the_gru_and_the_rnn():
    x = batch(np.float64)
    layer = GRU(D, H, dtype=np.float64, rng=0)
    y, _, tape = layer.forward(x)
    g = tape.gates()
    assert list(g) == ["r", "z", "n"]
    previous = np.concatenate([np.zeros((1, N, H)), y[:-1]])
    np.testing.assert_allclose(y, (1 - g["z"]) * g["n"] + g["z"] * previous, atol=1e-14)
    layer = RNN(D, H, dtype=np.float64, rng=0)
    y, _, tape = layer.forward(x)
    assert list(tape.gates()) == ["h"] and np.array_equal(tape.gates()["h"], y)


# ---- streams -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_stream_gives_the_whole_sequence_step_by_step(kind, batch_first):
    layer, x = kind(D, H, 2, batch_first=batch_first, rng=0), batch()
    y, end = layer(x.swapaxes(0, 1) if batch_first else x)
    y = y.swapaxes(0, 1) if batch_first else y
    stream = layer.stream(N)
    shared = layer.stream(N, share=stream)
    for t in range(T):
        out = np.empty((N, H), np.float32)
        assert np.array_equal(stream.step(x[t]), y[t])
        assert shared.step(x[t].tolist(), out) is out
        assert np.array_equal(out, y[t])
        if t == 2:
            kept = stream.state
    for a, b in zip(listed(stream.state), listed(end), strict=True):
        assert np.array_equal(a, b)
    stream.state = kept
    assert np.array_equal(stream.step(x[3]), y[3])
    stream.reset()
    assert np.array_equal(stream.step(x[0]), y[0])
    assert not np.array_equal(shared.step(x[0]), y[0])
    one = layer.stream()
    assert np.array_equal(one.step(x[0, 0]), y[0, 0]) and np.array_equal(one.step(x[1, :1]), y[1, :1])


@pytest.mark.own
def test_bfloat16_weights_round_the_weights_alone():
    layer, x = LSTM(D, H, 2, rng=0), batch()
    exact = layer(x)[0]
    rounded = LSTM(D, H, 2)
    rounded.flat_params[:] = layer.flat_params
    for name, p in rounded.params.items():
        if name.startswith("weight"):
            bits = p.view(np.uint32)
            p[...] = ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    expected = rounded(x)[0]
    assert 1e-4 < np.abs(expected - exact).max() < 1e-1
    stream = layer.stream(N, weights="bfloat16")
    np.testing.assert_allclose([stream.step(x_t) for x_t in x], expected, rtol=1e-5, atol=1e-6)
    layer.freeze("bfloat16")
    np.testing.assert_allclose(layer(x)[0], expected, rtol=1e-5, atol=1e-6)
    layer.unfreeze()
    assert np.array_equal(layer(x)[0], exact)


# ---- the gradient check --------------------------------------------------------------------------

SMOOTH = ("tanh", "softsign", "identity")
CHECKED = [
    *((LSTM, {"activation": a, "recurrent_activation": r}) for a in SMOOTH for r in ("sigmoid", "hard_sigmoid")),
    *((LSTM, {"activation": a}) for a in ("relu", "hard_tanh")),
    *((GRU, {"activation": a, "reset_after": r}) for a in (*SMOOTH, "relu", "hard_tanh") for r in (True, False)),
    *((GRU, {"recurrent_activation": "hard_sigmoid", "reset_after": r}) for r in (True, False)),
    *((RNN, {"nonlinearity": a}) for a in ("tanh", "relu")),
    (LSTM, {"proj_size": 2}),
    (LSTM, {"proj_size": 2, "zoneout": (0.2, 0.3), "recurrent_dropout": 0.3}),
    (LSTM, {"zoneout": (0.2, 0.3), "recurrent_dropout": 0.3}),
    (LSTM, {"bias": False}),
    (GRU, {"zoneout": 0.3, "recurrent_dropout": 0.3}),
    (GRU, {"zoneout": 0.3, "recurrent_dropout": 0.3, "reset_after": False}),
    (GRU, {"bias": False, "reset_after": False}),
    (RNN, {"zoneout": 0.3, "recurrent_dropout": 0.3, "bias": False}),
]


@pytest.mark.parametrize("kind, options", CHECKED, ids=lambda v: str(getattr(v, "__name__", v)))
@pytest.mark.parametrize("lengths", [None, [5, 0, 3, 1]])
def test_gradients_of_every_option(kind, options, lengths):
    layer = kind(D, H, 2, bidirectional=True, dropout=0.3, dtype=np.float64, rng=1, **options)
    width = options.get("proj_size", H)
    state = batch(np.float64, (4, N, width), 1), batch(np.float64, (4, N, H), 2)
    result = fastlstm.gradcheck(layer, batch(np.float64), state if kind is LSTM else state[0], lengths)
    assert result.max_error < 1e-6
    assert set(result.errors) == {*layer.params, "x", "h_0"} | ({"c_0"} if kind is LSTM else set())


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("what", ["weight_ih_l0", "weight_hh_l0_reverse", "bias_hh_l0", "x", "h_0"])
def test_gradcheck_finds_a_planted_error(kind, what, monkeypatch):
    layer = kind(D, H, bidirectional=True, dtype=np.float64, rng=0)
    backward = kind.backward

    def wrong(self, tape, dy, dstate=None):
        dx, dstart = backward(self, tape, dy, dstate)
        target = {"x": dx, "h_0": listed(dstart)[0]}.get(what, self.grads.get(what))
        target.flat[1] *= 1.01
        return dx, dstart

    x = batch(np.float64)
    fastlstm.gradcheck(layer, x)
    monkeypatch.setattr(kind, "backward", wrong)
    with pytest.raises(AssertionError, match=rf"the gradient of {what}\b"):
        fastlstm.gradcheck(layer, x)


# ---- threads and configuration -------------------------------------------------------------------


def test_threads(monkeypatch):
    if not fastlstm.engine.has_openmp():
        pytest.skip("built without OpenMP")
    monkeypatch.setattr(fastlstm.threads, "_processors", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "3,2")
    assert fastlstm.get_num_threads() == 3
    fastlstm.set_num_threads(np.int64(2))
    assert fastlstm.get_num_threads() == 2
    fastlstm.set_num_threads(None)
    assert fastlstm.get_num_threads() == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert fastlstm.get_num_threads() == 8


def test_show_config(capsys):
    fastlstm.set_num_threads(2)
    fastlstm.show_config()
    shown = capsys.readouterr().out
    assert f"fastlstm {fastlstm.__version__}" in shown
    assert f"[{fastlstm.engine.isa()}]" in shown
    assert all(name in shown for name in fastlstm.engine.available_isas())
    assert f"threads: {fastlstm.get_num_threads()}" in shown


def test_public_names():
    assert all(hasattr(fastlstm, name) for name in fastlstm.__all__)
    for name in fastlstm.__all__:
        assert getattr(fastlstm, name).__doc__, name


def test_the_stub_names_what_the_compiled_module_shows():
    def public(names):
        return {name for name in names if not name.startswith("_")}

    engine = fastlstm.engine
    stub = {}
    path = Path(fastlstm.__file__).with_name("engine") / "__init__.pyi"
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.AnnAssign):
            stub[node.target.id] = set()
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            stub[node.name] = {part.name for part in getattr(node, "body", []) if hasattr(part, "name")}
    assert set(stub) == set(engine.__all__)
    for name, members in stub.items():
        if isinstance(getattr(engine, name), type):
            assert public(members) == public(vars(getattr(engine, name))), name


def test_a_copy_of_a_frozen_layer_is_its_own():
    layer = fastlstm.LSTM(3, 5, rng=0).freeze()
    x = np.ones((4, 2, 3), np.float32)
    before = layer(x)[0].copy()
    other = copy.copy(layer).unfreeze()
    other.flat_params[:] = 0
    assert not layer.flat_params.flags.writeable and np.array_equal(layer(x)[0], before)
    assert not np.array_equal(other(x)[0], before)


def test_gradcheck_of_a_frozen_layer():
    layer = fastlstm.LSTM(3, 5, dtype=np.float64, rng=0).freeze()
    with pytest.raises(ValueError, match="unfreeze"):
        fastlstm.gradcheck(layer, np.ones((4, 2, 3)))


@pytest.mark.own
@pytest.mark.parametrize("kind", CLASSES)
def test_the_reverse_direction_alone_is_the_second_half_of_both(kind):
    both = kind(D, H, bidirectional=True, rng=0)
    alone = kind(D, H, direction="reverse")
    second = {name: view for name, view in both.params.items() if name.endswith("_reverse")}
    alone.load_state_dict({name.removesuffix("_reverse"): view for name, view in second.items()})
    x, lengths = batch(), [T, 1, 0, 3][:N] + [2] * (N - 4)
    y, state = alone(x, lengths=lengths)
    want, states = both(x, lengths=lengths)
    assert np.array_equal(y, want[:, :, H:])
    for got, part in zip(*(s if isinstance(s, tuple) else (s,) for s in (state, states)), strict=True):
        assert np.array_equal(got[0], part[1])
    with pytest.raises(ValueError, match="reverse"):
        alone.stream()
    with pytest.raises(ValueError, match="direction"):
        kind(D, H, bidirectional=True, direction="reverse")
