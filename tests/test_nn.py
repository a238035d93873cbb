"""Linear, losses, optimisers: gradients by central differences, updates by scalar formulas and by PyTorch."""

import copy
import math
import pickle

import numpy as np
import pytest
from conftest import numeric_gradient

import fastlstm
from fastlstm import nn
from fastlstm._parameters import Parameters

F32, F64 = np.float32, np.float64


@pytest.fixture
def rng():
    return np.random.default_rng(7)


# ---------------------------------------------------------------- Parameters


def test_parameters_are_views_into_one_aligned_buffer():
    p = Parameters({"a": (2, 3), "b": (4,), "none": (0, 5)}, F32)
    assert p.flat.shape == (10,) and p.flat.dtype == F32 and p.flat.ctypes.data % 64 == 0
    assert not p.flat.any()
    p.views["b"][1] = 5
    assert p.flat[7] == 5 and p.views["none"].shape == (0, 5)


@pytest.mark.parametrize(
    ("d", "error", "text"),
    [
        ({"a": np.ones((2, 3))}, ValueError, r"load_state_dict: missing keys \['b'\]$"),
        ({"a": np.ones((2, 3)), "b": np.ones(4), "c": 1}, ValueError, r"unexpected keys \['c'\]"),
        ({"a": np.ones((2, 3)), "c": 1}, ValueError, r"missing keys \['b'\], unexpected keys \['c'\]"),
        ({"a": np.ones((2, 3)), "b": np.ones(5)}, ValueError, r"b: expected shape \(4,\), got \(5,\)"),
        ({"a": np.ones((2, 3)), "b": ["x"] * 4}, TypeError, "b: expected an array of real numbers"),
        ({"a": np.ones((2, 3)), "b": np.ones(4, complex)}, TypeError, "b: expected an array of real numbers"),
        ({"a": np.ones((2, 3)), "b": [[1], [2, 3]]}, TypeError, "b: expected an array"),
        ([1, 2], TypeError, "expected a mapping"),
    ],
)
def test_parameters_load_changes_nothing_on_error(d, error, text):
    p = Parameters({"a": (2, 3), "b": (4,)}, F32)
    p.flat[:] = np.arange(10)
    with pytest.raises(error, match=text):
        p.load(d)
    np.testing.assert_array_equal(p.flat, np.arange(10))


def test_parameters_load_casts_and_takes_own_views():
    p = Parameters({"a": (2,), "b": (2,)}, F32)
    with np.errstate(over="ignore"):
        p.load({"b": [3, np.nan], "a": np.array([1, 1e300])})
    np.testing.assert_array_equal(p.flat, np.array([1, np.inf, 3, np.nan], F32))
    p.load({"a": p.views["b"], "b": p.views["a"]})
    np.testing.assert_array_equal(p.flat, np.array([3, np.nan, 1, np.inf], F32))
    state = p.copy()
    state["a"][0] = 9
    assert p.flat[0] == 3


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_keep_one_buffer(clone):
    layer = nn.Linear(2, 3, rng=0)
    other = clone(layer)
    np.testing.assert_array_equal(other.flat_params, layer.flat_params)
    other.params["weight"][0, 0] = 42
    assert other.flat_params[0] == 42 and layer.flat_params[0] != 42
    assert other.flat_params.ctypes.data % 64 == 0


def test_parameters_load_takes_torch_tensors():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    p = Parameters({"weight": (3, 2), "bias": (3,)}, F64)
    module = torch.nn.Linear(2, 3)
    p.load(dict(module.named_parameters()))
    np.testing.assert_array_equal(p.views["weight"], module.weight.detach().numpy())


# -------------------------------------------------------------------- Linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_linear_gradients(rng, bias, lead):
    layer = nn.Linear(4, 5, bias, dtype=F64, rng=1)
    x, weights = rng.normal(size=(*lead, 4)), rng.normal(size=(*lead, 5))
    y, tape = layer.forward(x)
    np.testing.assert_allclose(y, x @ layer.params["weight"].T + layer.params.get("bias", 0.0), rtol=1e-14)
    np.testing.assert_array_equal(layer(x), y)
    dx = layer.backward(tape, weights)
    loss = lambda: float((layer(x) * weights).sum())  # noqa: E731
    np.testing.assert_allclose(dx, numeric_gradient(loss, x), atol=1e-8)
    numeric = numeric_gradient(loss, layer.flat_params)
    np.testing.assert_allclose(layer.flat_grads, numeric, atol=1e-8)
    layer.backward(tape, weights)  # gradients add up
    np.testing.assert_allclose(layer.flat_grads, 2 * numeric, atol=1e-7)
    layer.zero_grad()
    assert not layer.flat_grads.any()


def test_linear_state_and_type(rng):
    layer = nn.Linear(4, 5, rng=3)
    other = nn.Linear(4, 5, rng=4)
    assert list(layer.params) == ["weight", "bias"] and layer.params["weight"].shape == (5, 4)
    assert np.abs(layer.flat_params).max() <= 0.5 and layer.flat_params.std() > 0.1
    other.load_state_dict(layer.state_dict())
    np.testing.assert_array_equal(layer.flat_params, other.flat_params)
    y, tape = layer.forward(rng.normal(size=(3, 4)))
    assert y.dtype == F32 and layer.backward(tape, np.ones((3, 5))).dtype == F32
    empty, tape = layer.forward(np.zeros((0, 4)))
    assert empty.shape == (0, 5) and layer.backward(tape, empty).shape == (0, 4)
    assert "Linear(4, 5" in repr(layer)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: nn.Linear(0, 5), ValueError, "in_features: expected an integer from 1"),
        (lambda: nn.Linear(4, 2.0), TypeError, "out_features: expected an integer"),
        (lambda: nn.Linear(True, 2), TypeError, "in_features"),
        (lambda: nn.Linear(4, 5, dtype=np.float16), TypeError, "dtype: expected float32 or float64"),
        (lambda: nn.Linear(4, 5)(np.ones((2, 3))), ValueError, r"x: expected shape \(..., 4\), got \(2, 3\)"),
        (lambda: nn.Linear(4, 5)(1.0), ValueError, "x: expected shape"),
        (lambda: nn.Linear(4, 5)(np.ones(4, complex)), TypeError, "x: expected an array of real numbers"),
        (lambda: nn.Linear(4, 5).backward(None, np.ones(5)), TypeError, "tape: expected"),
        (
            lambda: nn.Linear(4, 5).backward(np.ones((2, 4), F32), np.ones((3, 5))),
            ValueError,
            "dy: expected shape",
        ),
    ],
)
def test_linear_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()


# -------------------------------------------------------------------- losses


def test_softmax_cross_entropy_gradient(rng):
    z, labels = rng.normal(size=(5, 4)) * 3, np.array([0, 3, 1, 1, 2])
    loss, dz = nn.softmax_cross_entropy(z, labels)
    by_hand = sum(math.log(sum(math.exp(v) for v in row)) - row[k] for row, k in zip(z, labels, strict=True)) / 5
    assert loss == pytest.approx(by_hand, rel=1e-14)
    numeric = numeric_gradient(lambda: nn.softmax_cross_entropy(z, labels)[0], z)
    np.testing.assert_allclose(dz, numeric, atol=1e-9)


def test_softmax_cross_entropy_extremes():
    loss, dz = nn.softmax_cross_entropy(np.array([[1e30, -1e30], [1e4, 0]], F32), [0, 1])
    assert loss == 5000 and dz.dtype == F32
    np.testing.assert_array_equal(dz, [[0, 0], [0.5, -0.5]])


@pytest.mark.parametrize(
    ("logits", "labels", "error", "text"),
    [
        (np.ones((2, 3)), [0, 3], ValueError, r"labels: expected values 0..2, got 3"),
        (np.ones((2, 3)), [-1, 0], ValueError, r"labels: expected values 0..2, got -1"),
        (np.ones((2, 3)), [0, 1, 2], ValueError, r"labels: expected shape \(2,\), got \(3,\)"),
        (np.ones((2, 3)), [0.0, 1.0], TypeError, "labels: expected integers"),
        (np.ones((2, 3), int), [0, 1], TypeError, "logits: expected float32 or float64"),
        (np.ones(3), [0, 1, 2], ValueError, r"labels: expected shape \(\), got \(3,\)"),
        (np.ones((0, 3)), [], ValueError, r"logits: expected shape"),
    ],
)
def test_softmax_cross_entropy_errors(logits, labels, error, text):
    with pytest.raises(error, match=text):
        nn.softmax_cross_entropy(logits, labels)


def test_mse_gradient(rng):
    p, t = rng.normal(size=(3, 4)), rng.normal(size=(3, 4))
    loss, dp = nn.mse(p, t)
    assert loss == pytest.approx(sum((a - b) ** 2 for a, b in zip(p.flat, t.flat, strict=True)) / 12, rel=1e-14)
    np.testing.assert_allclose(dp, numeric_gradient(lambda: nn.mse(p, t)[0], p), atol=1e-9)
    assert nn.mse(p.astype(F32), t)[1].dtype == F32
    scalar_loss, scalar_gradient = nn.mse(np.float64(3), 1)
    assert scalar_loss == 4 and scalar_gradient == 4


@pytest.mark.parametrize(
    ("pred", "target", "error", "text"),
    [
        (np.ones((3, 1)), np.ones(3), ValueError, r"target: expected shape \(3, 1\), as pred, got \(3,\)"),
        ([1, 2], [1, 2], TypeError, "pred: expected float32 or float64"),
        (np.ones(2), ["a", "b"], TypeError, "target: expected an array of real numbers"),
        (np.ones(0), np.ones(0), ValueError, "pred: expected at least one element"),
    ],
)
def test_mse_errors(pred, target, error, text):
    with pytest.raises(error, match=text):
        nn.mse(pred, target)


# ---------------------------------------------------------------- optimisers

SIZES = (3, nn.optimisers.BLOCK + 5)  # the second needs two blocks


def pairs(dtype, rng):
    return [(rng.normal(size=n).astype(dtype), np.empty(n, dtype)) for n in SIZES]


@pytest.mark.parametrize("dtype", [F32, F64])
def test_adam_scalar_formula(rng, dtype):
    buffers = pairs(dtype, rng)
    optimiser = nn.Adam(buffers, lr=0.01, betas=(0.8, 0.95), eps=1e-6)
    watched = [(0, 1), (1, 0), (1, nn.optimisers.BLOCK - 1), (1, nn.optimisers.BLOCK), (1, nn.optimisers.BLOCK + 4)]
    state = {w: [float(buffers[w[0]][0][w[1]]), 0.0, 0.0] for w in watched}
    for t in range(1, 6):
        optimiser.lr = 0.01 * t
        for _, g in buffers:
            g[:] = rng.normal(size=g.size)
        optimiser.step()
        for (b, i), s in state.items():
            g = float(buffers[b][1][i])
            s[1] = 0.8 * s[1] + 0.2 * g
            s[2] = 0.95 * s[2] + 0.05 * g * g
            m_hat, v_hat = s[1] / (1 - 0.8**t), s[2] / (1 - 0.95**t)
            s[0] -= 0.01 * t * m_hat / (math.sqrt(v_hat) + 1e-6)
    for (b, i), s in state.items():
        assert buffers[b][0][i] == pytest.approx(s[0], rel=1e-12 if dtype is F64 else 2e-6)
    optimiser.zero_grad()
    assert not any(g.any() for _, g in buffers)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_sgd_scalar_formula(rng, dtype):
    buffers = pairs(dtype, rng)
    optimiser = nn.SGD(buffers, lr=0.1, momentum=0.9)
    p, v = float(buffers[1][0][-1]), 0.0
    for t in range(1, 6):
        optimiser.lr = 0.1 / t
        for _, g in buffers:
            g[:] = rng.normal(size=g.size)
        optimiser.step()
        v = 0.9 * v + float(buffers[1][1][-1])
        p -= 0.1 / t * v
    assert buffers[1][0][-1] == pytest.approx(p, rel=1e-12 if dtype is F64 else 2e-6)


def test_clip_scalar_formula():
    buffers = [(np.zeros(2, F32), np.array([3, 0], F32)), (np.zeros(1), np.array([4.0]))]
    assert nn.clip_grad_norm(buffers, 10) == 5
    assert buffers[0][1][0] == 3 and buffers[1][1][0] == 4
    assert nn.clip_grad_norm(buffers, 1) == 5
    assert buffers[1][1][0] == 4 * (1 / (5 + 1e-6))
    huge = [(np.zeros(2, F32), np.array([3e30, 4e30], F32))]
    assert nn.clip_grad_norm(huge, 1) == pytest.approx(5e30, rel=1e-6)
    np.testing.assert_allclose(huge[0][1], [0.6, 0.8], rtol=1e-6)
    bad = [(np.zeros(2), np.array([np.nan, 1.0]))]
    assert math.isnan(nn.clip_grad_norm(bad, 1)) and np.isnan(bad[0][1]).all()
    for clip in (nn.clip_grad_norm, nn.clip_grad_value):
        for limit in (math.nan, -1.0):
            with pytest.raises(ValueError, match="expected a number >= 0"):
                clip(buffers, limit)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_optimisers_match_torch(rng, dtype, name):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    buffers = pairs(dtype, rng)
    theirs = [torch.tensor(p, requires_grad=True) for p, _ in buffers]
    if name == "adam":
        ours, peer = nn.Adam(buffers, lr=0.01), torch.optim.Adam(theirs, lr=0.01)
    else:
        ours, peer = nn.SGD(buffers, 0.01, 0.9), torch.optim.SGD(theirs, lr=0.01, momentum=0.9)
    for _ in range(10):
        for (_, g), tensor in zip(buffers, theirs, strict=True):
            g[:] = rng.normal(size=g.size)
            tensor.grad = torch.tensor(g)
        norm = nn.clip_grad_norm(buffers, 20.0)
        assert norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_(theirs, 20.0)), rel=1e-6)
        ours.step()
        peer.step()
    for (p, _), tensor in zip(buffers, theirs, strict=True):
        np.testing.assert_allclose(p, tensor.detach().numpy(), rtol=0, atol=2e-6 if dtype == "float32" else 1e-13)


def test_optimisers_take_layers():
    layer = nn.Linear(2, 3, rng=0)
    before = layer.state_dict()
    layer.flat_grads.fill(1)
    nn.SGD([layer, (np.zeros(1), np.zeros(1))], lr=1).step()
    np.testing.assert_array_equal(layer.params["weight"], before["weight"] - 1)


ONE = (np.zeros(2), np.zeros(2))
STACK = fastlstm.Stack([fastlstm.GRU(3, 4), nn.Linear(4, 2)])


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: nn.Adam([]), ValueError, "modules: expected at least one layer"),
        (lambda: nn.Adam(nn.Linear(1, 1)), TypeError, "modules: expected a list of layers"),
        (lambda: nn.Adam(3), TypeError, "modules: expected a list of layers"),
        (lambda: nn.Adam([3]), TypeError, r"modules\[0\]: expected a layer or a pair"),
        *(
            (lambda use=use: use([STACK]), TypeError, r"^modules\[0\]: .*got Stack; .*\[\*stack\.layers\]")
            for use in (nn.Adam, nn.AdamW, nn.SGD, nn.RMSprop, nn.EMA, lambda m: nn.clip_grad_norm(m, 1))
        ),
        (
            lambda: nn.Adam([(np.zeros(2), np.zeros(3))]),
            ValueError,
            "flat_grads: expected float64 array of shape",
        ),
        (
            lambda: nn.Adam([(np.zeros((2, 2)), np.zeros((2, 2)))]),
            ValueError,
            "flat_params: expected a writeable 1-D",
        ),
        (
            lambda: nn.Adam([(np.zeros(2, int), np.zeros(2, int))]),
            TypeError,
            "flat_params: expected a float32",
        ),
        (lambda: nn.Adam([ONE, ONE]), ValueError, r"modules\[1\]: expected each layer once"),
        (lambda: nn.Adam([ONE], lr=-1), ValueError, "lr: expected a finite number >= 0, got -1"),
        (lambda: nn.Adam([ONE], lr=math.nan), ValueError, "lr: expected"),
        (lambda: nn.Adam([ONE], lr="fast"), TypeError, "lr: expected a number"),
        (lambda: nn.Adam([ONE], betas=(1, 0)), ValueError, r"betas\[0\]: expected 0 <="),
        (lambda: nn.Adam([ONE], betas=0.9), TypeError, "betas: expected two numbers"),
        (lambda: nn.Adam([ONE], eps=-1), ValueError, "eps: expected"),
        (lambda: nn.SGD([ONE], momentum=1), ValueError, "momentum: expected 0 <="),
        (lambda: nn.clip_grad_norm([ONE], -1), ValueError, "max_norm: expected a number >= 0, got -1"),
        (lambda: nn.clip_grad_norm([], 1), ValueError, "modules: expected at least one"),
    ],
)
def test_optimiser_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()
