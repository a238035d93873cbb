"""What the tests of the engine share: instruction sets, layers with inputs, comparisons that can fail."""

import os
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

import fastlstm
from fastlstm import engine, reference

GATES = {"lstm": 4, "lstm_peephole": 4, "lstm_coupled": 3, "lstm_norm": 4, "slstm": 4, "gru": 3, "gru_reset_before": 3,
         "rnn": 1}  # fmt: skip
CELLS = tuple(GATES)
COLUMNS = GATES | {"lstm_peephole": 5, "lstm_norm": 14, "slstm": 5, "gru": 4, "gru_reset_before": 4}  # of the tape
WITH_C = ("lstm", "lstm_peephole", "lstm_coupled", "lstm_norm")  # the class LSTM
STATES = {cell: "hc" if cell in WITH_C else "hcnm" if cell == "slstm" else "h" for cell in CELLS}
VECTOR_BYTES = {"baseline": 16, "avx2": 32, "avx512": 64}
TILE_ROWS = {"baseline": 3, "avx2": 3, "avx512": 6}
_DEFAULT_ISA = engine.isa()
# A team stays a team, however busy the machine is, and small layers have one more often than it pays.
engine.tune(crowd=0, start=2e4, meet=2e4)
_DEFAULT_PRODUCTS = engine.products()


@contextmanager
def teams(by_units):
    """The largest team, across the units or across the sequences, whatever it costs."""
    before = engine.tune()
    engine.tune(start=-1e30, meet=-1e15 if by_units else 1e15)
    try:
        yield
    finally:
        engine.tune(**before)


@contextmanager
def caches(l1, l2, l2_feeds=0):
    """Caches of so many bytes, as far as passes cut their panels for them."""
    before = engine.tune()
    engine.tune(l1=l1, l2=l2, l2_feeds=l2_feeds)
    try:
        yield
    finally:
        engine.tune(**before)


def _isas():
    forced = os.environ.get("FASTLSTM_ISA")
    return [forced] if forced else engine.available_isas()


def pytest_collection_modifyitems(items):
    if os.environ.get("FASTLSTM_PRODUCTS") == "blas":
        for item in items:
            if item.get_closest_marker("own"):
                item.add_marker(pytest.mark.skip(reason="a promise of our own products alone"))


def pytest_generate_tests(metafunc):
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", _isas(), indirect=True)


@pytest.fixture
def isa(request):
    """The instruction set that the test runs on: each that the machine has, or the one that is forced."""
    engine.use_isa(request.param)
    return request.param


@pytest.fixture(autouse=True)
def _as_found():
    yield
    engine.use_isa(_DEFAULT_ISA)
    fastlstm.set_products(_DEFAULT_PRODUCTS)
    fastlstm.set_num_threads(None)


def make(cell, D, H, **options):
    """A layer of a cell named as in the reference, its biases spread, relu pushed to its open side."""
    options.setdefault("rng", 1)
    relu = "relu" in (options.get("activation"), options.get("nonlinearity"))
    if cell in WITH_C:
        variant = {"lstm_peephole": "peepholes", "lstm_coupled": "coupled", "lstm_norm": "layer_norm"}.get(cell)
        layer = fastlstm.LSTM(D, H, **options | ({variant: True} if variant else {}))
    elif cell == "slstm":
        layer = fastlstm.SLSTM(D, H, **options)
    elif cell == "rnn":
        layer = fastlstm.RNN(D, H, **options)
    else:
        layer = fastlstm.GRU(D, H, reset_after=cell == "gru", **options)
    rng = np.random.default_rng(77)
    for name, view in layer.params.items():
        if name.startswith("bias"):
            view[:] = rng.uniform(-0.5, 0.5, view.shape) + (0.4 if relu else 0)
        elif name.startswith("weight_ln"):
            view[:] = rng.uniform(0.7, 1.3, view.shape)
    return layer


def problem(layer, T, N, lengths=None, seed=0, single=False, poison=True):
    """Inputs, states and gradients for a layer; what stands past a length is NaN."""
    rng = np.random.default_rng(seed)
    dirs = 2 if layer.bidirectional else 1
    width, dtype = layer.proj_size or layer.hidden_size, layer.dtype
    x, dy = rng.standard_normal((T, N, layer.input_size)), rng.standard_normal((T, N, dirs * width))
    if lengths is not None and poison:
        for n, length in enumerate(lengths):
            x[length:, n] = dy[length:, n] = np.nan
    states = []
    for _ in range(2):  # the state and its gradient
        h, c = (0.7 * rng.standard_normal((layer.num_layers * dirs, N, w)) for w in (width, layer.hidden_size))
        if not states and layer.activation == "relu":
            h, c = abs(h), abs(c)
        states.append((h, c) if len(STATES[cell_of(layer)]) > 1 else (h,))
        if cell_of(layer) == "slstm":
            n, m = rng.uniform(0.5, 1.5, c.shape), 0.7 * rng.standard_normal(c.shape)
            states[-1] += (n, m) if len(states) == 1 else (n - 1, m)

    def enter(a, time_major=True):
        a = a.astype(dtype)
        if single:
            return a[:, 0]
        return np.ascontiguousarray(a.swapaxes(0, 1)) if time_major and layer.batch_first else a

    state, dstate = (tuple(enter(a, False) for a in s) for s in states)
    if len(state) == 1:
        state, dstate = state[0], dstate[0]
    return SimpleNamespace(x=enter(x), dy=enter(dy), state=state, dstate=dstate, lengths=lengths, T=T, N=N)


def cell_of(layer):
    return layer.config["cell"]


def named(layer, y, state, dx=None, dstate=None, grads=None):
    """Results under names."""
    out = {"y": y}
    for prefix, value in (("", state), ("d", dstate)):
        if value is not None:
            parts = value if isinstance(value, tuple) else (value,)
            out |= {prefix + name: part for name, part in zip("hcnm", parts, strict=False)}
    if dx is not None:
        out["dx"] = dx
    return out | {"d" + name: np.array(grad) for name, grad in (grads or {}).items()}


def train(layer, p, **options):
    """One forward and backward; the masks that were drawn are in result["masks"]."""
    layer.zero_grad()
    y, state, tape = layer.forward(p.x, p.state, p.lengths, **options)
    masks, y = tape.masks, y.copy()
    dx, dstate = layer.backward(tape, p.dy, p.dstate)
    return named(layer, y, state, dx, dstate, layer.grads), masks


def expected(layer, p, masks=None):
    """The reference's results in float64 (its forward alone if masks is None: inference)."""
    params = {name: v.astype(np.float64) for name, v in layer.params.items()}
    y, state, tape = reference.forward(params, p.x, p.state, p.lengths, **layer.config, masks=masks)
    if masks is None:
        return named(layer, y, state)
    return named(layer, y, state, *reference.backward(tape, p.dy, p.dstate))


def valid(layer, p, array):
    """The elements of y or dx that stand before the lengths."""
    if p.lengths is None or array.ndim == 2:
        return array
    array = array.swapaxes(0, 1) if layer.batch_first else array
    return array[np.arange(p.T)[:, None] < np.asarray(p.lengths)]


def telling(layer, p, want):
    """Fails where the expected results could not tell a right kernel from a wrong one."""
    for name, array in want.items():
        if name in ("y", "dx"):
            array = valid(layer, p, array)
        assert array.size == 0 or np.isfinite(array).all(), name
        if array.size > 8 and name.removeprefix("d") in (*"yxhcnm",):
            assert (array != 0).mean() > 0.5, f"{name}: expected results are mostly zeros"
        assert array.size == 0 or np.any(array), f"{name}: expected results are zeros"
    y = valid(layer, p, want["y"])
    if layer.activation not in ("relu", "identity") and y.size > 8:
        assert (abs(y) > 0.999).mean() < 0.5, "y: expected results are saturated"


def close(got, want, tolerance=1e-12):
    """Largest difference, relative to the largest expected element."""
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].shape == want[name].shape, name
        scale = abs(want[name]).max(initial=0)
        error = abs(got[name] - want[name]).max(initial=0)
        assert error <= tolerance * scale, f"{name}: differs by {error:.3g}, largest element {scale:.3g}"


def same(got, want):
    """Equal to the bit."""
    if isinstance(got, dict):
        assert got.keys() == want.keys()
        for name in want:
            assert same_bits(got[name], want[name]), name
    elif isinstance(got, (tuple, list)):
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            same(a, b)
    else:
        assert same_bits(got, want)


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def numeric_gradient(f, x, eps=1e-6):
    """Central differences of the scalar f() in each element of x, which f reads."""
    result = np.empty_like(x)
    for i in np.ndindex(x.shape):
        keep = x[i]
        x[i] = keep + eps
        plus = f()
        x[i] = keep - eps
        minus = f()
        x[i] = keep
        result[i] = (plus - minus) / (2 * eps)
    return result


@pytest.fixture(scope="module")
def one_thread():
    """PyTorch on one thread, as the tests of its layers and ours want it."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def keras():
    os.environ.setdefault("KERAS_BACKEND", "torch")
    if os.environ["KERAS_BACKEND"] == "torch":
        pytest.importorskip("torch", reason="PyTorch is not installed: Keras would run on it")
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Keras and its backend about themselves
        return pytest.importorskip("keras", reason="Keras is not installed: nothing to compare with")
