"""Embedding, LayerNorm, Dropout, Recurrent, Sequential: gradients, one flat buffer, copies, errors."""

import copy
import pickle

import numpy as np
import pytest
from conftest import numeric_gradient

import fastlstm
from fastlstm import nn

F32, F64 = np.float32, np.float64


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def check(module, x, rng, *args, wanted_dx=True):
    """Gradients of the parameters and of x against central differences of the call."""
    y, tape = module.forward(x, *args)
    weights = rng.normal(size=y.shape)
    loss = lambda: float((module.forward(x, *args)[0] * weights).sum())  # noqa: E731
    module.zero_grad()
    dx = module.backward(tape, weights)
    np.testing.assert_allclose(module.flat_grads, numeric_gradient(loss, module.flat_params), atol=1e-7)
    if wanted_dx:
        np.testing.assert_allclose(dx, numeric_gradient(loss, x), atol=1e-7)
    kept = module.flat_grads.copy()
    module.zero_grad()
    assert module.backward(module.forward(x, *args)[1], weights, need_dx=False) is None
    np.testing.assert_array_equal(module.flat_grads, kept)


def test_embedding(rng):
    table = nn.Embedding(5, 3, dtype=F64, rng=1)
    x = np.array([[0, 4, 4], [2, 4, 0]])
    check(table, x, rng, wanted_dx=False)
    np.testing.assert_array_equal(table(x), table.params["weight"][x])
    assert table(np.zeros((0,))).shape == (0, 3)
    with pytest.raises(ValueError, match=r"x: expected values 0..4, got 5"):
        table([5])
    with pytest.raises(TypeError, match="x: expected integers"):
        table([0.5])


@pytest.mark.parametrize("lead", [(), (4,), (2, 3)])
def test_layer_norm(rng, lead):
    norm = nn.LayerNorm(6, dtype=F64)
    norm.flat_params[:] = rng.normal(size=12)
    x = 3 + 2 * rng.normal(size=(*lead, 6))
    check(norm, x, rng)
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    theirs = torch.nn.functional.layer_norm(
        torch.from_numpy(x), (6,), torch.from_numpy(norm.params["weight"]), torch.from_numpy(norm.params["bias"])
    )
    np.testing.assert_allclose(norm(x), theirs.numpy(), atol=1e-12)
    assert nn.LayerNorm(6)(x).dtype == F32


def test_dropout(rng):
    x = np.ones((200, 50), F32)
    drop = nn.Dropout(0.3, rng=0)
    y, tape = drop.forward(x)
    assert set(np.unique(y)) == {F32(0), F32(1 / 0.7)}
    assert abs((y == 0).mean() - 0.3) < 0.02
    np.testing.assert_array_equal(drop.backward(tape, x), y)
    assert drop(x) is x and not np.array_equal(drop.forward(x)[0], y)
    same, none = nn.Dropout(0.0).forward(x)
    assert same is x and none is None
    with pytest.raises(ValueError, match="p: expected 0 <= p < 1"):
        nn.Dropout(1)


@pytest.mark.parametrize("kind", [fastlstm.LSTM, fastlstm.SLSTM, fastlstm.GRU, fastlstm.RNN])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}])
def test_recurrent(rng, kind, last, options):
    layer = kind(2, 3, dtype=F64, rng=0, **options)
    module = nn.Recurrent(layer, last=last)
    x = rng.normal(size=(4, 3, 2))
    lengths = [4, 2, 3]
    for n, length in enumerate(lengths):
        x[length:, n] = 0  # padding has no gradient
    check(module, x, rng, lengths)
    y, _ = layer(x, lengths=lengths)
    if last and not options:
        np.testing.assert_array_equal(module(x, lengths), y[[3, 1, 2], [0, 1, 2]])
    if last and options:  # forward direction at the last step, reverse at the first
        ends = np.concatenate([y[[3, 1, 2], [0, 1, 2], :3], y[0, :, 3:]], axis=1)
        np.testing.assert_array_equal(module(x, lengths), ends)
    if not last:
        np.testing.assert_array_equal(module(x, lengths), y)


def model(dtype=F64, tied=False):
    body = nn.Linear(4, 4, dtype=dtype, rng=2)
    return nn.Sequential(
        nn.Embedding(6, 4, dtype=dtype, rng=0), body,
        fastlstm.LSTM(4, 4, dtype=dtype, rng=1), nn.LayerNorm(4, dtype=dtype),
        body if tied else nn.Linear(4, 4, dtype=dtype, rng=3),
        nn.Recurrent(fastlstm.GRU(4, 3, dtype=dtype, rng=4), last=True),
    )  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
def test_sequential_gradients_and_one_buffer(rng, tied):
    net = model(tied=tied)
    x, lengths = rng.integers(0, 6, (5, 3)), [5, 1, 3]
    check(net, x, rng, lengths, wanted_dx=False)
    parts = {id(m.flat_params): m for m in net}.values()
    total = sum(m.flat_params.size for m in net if m.flat_params.size) - (20 if tied else 0)
    assert net.flat_params.size == net.flat_grads.size == total
    for part in parts:
        assert np.shares_memory(part.flat_params, net.flat_params) and np.shares_memory(part.flat_grads, net.flat_grads)
    assert net.params["2.weight_ih_l0"] is not None and np.shares_memory(
        net.params["2.weight_ih_l0"], net[2].layer.params["weight_ih_l0"]
    )
    net.flat_params[:] = 0
    assert not any(p.any() for m in net for p in m.params.values())


def test_sequential_is_its_modules_one_by_one(rng):
    lstm, head = fastlstm.LSTM(3, 8, rng=0), nn.Linear(8, 2, rng=1)
    x = rng.normal(size=(6, 4, 3)).astype(F32)
    y = head(lstm(x)[0])
    net = nn.Sequential(lstm, head)
    np.testing.assert_array_equal(net(x), y)
    np.testing.assert_array_equal(net.forward(x)[0], y)
    nested = nn.Sequential(net, nn.Linear(2, 1, rng=2))
    np.testing.assert_array_equal(nested[0](x), y)
    assert len(nested) == 2 and [type(m).__name__ for m in nested] == ["Sequential", "Linear"]
    assert "0.0.weight_ih_l0" in nested.params and "Sequential(Sequential(Recurrent(LSTM(3, 8" in repr(nested)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_of_a_sequential_keep_one_buffer(rng, clone):
    net = model()
    x = rng.integers(0, 6, (5, 3))
    other = clone(net)
    np.testing.assert_array_equal(other(x), net(x))
    before = net(x)
    other.flat_params[:] = 0.5
    assert not np.array_equal(other(x), before)
    np.testing.assert_array_equal(net(x), before)
    for part in other:
        assert np.shares_memory(part.flat_params, other.flat_params)


def test_sequential_state(rng):
    net, other = model(), model()
    other.flat_params[:] += 1
    other.load_state_dict(net.state_dict())
    np.testing.assert_array_equal(other.flat_params, net.flat_params)
    with pytest.raises(ValueError, match=r"load_state_dict: missing keys"):
        other.load_state_dict({})
    x = rng.integers(0, 6, (5, 3))
    y = net(x)
    np.testing.assert_array_equal(net.freeze()(x), y)
    with pytest.raises(RuntimeError, match="frozen"):
        net.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match="frozen"):
        net.forward(x)
    net.unfreeze().forward(x)


def test_a_module_taken_over_says_so():
    head = nn.Linear(2, 2, rng=0)
    first = nn.Sequential(head)
    second = nn.Sequential(head, nn.Linear(2, 1))
    with pytest.raises(RuntimeError, match="another Sequential has taken over"):
        first.flat_params  # noqa: B018
    with pytest.raises(RuntimeError, match="another Sequential has taken over"):
        first.forward(np.ones((1, 2)))
    second.forward(np.ones((1, 2)))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: nn.Sequential(), ValueError, "modules: expected at least one, got none"),
        (lambda: nn.Sequential(3), TypeError, r"modules\[0\]: expected a Module or a recurrent layer, got int"),
        (lambda: nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1, dtype=F64)), TypeError, r"s\[1\]: expected dtype"),
        (lambda: nn.Sequential(nn.Linear(1, 1)).backward(3, 1), TypeError, "tape: expected the second result"),
        (lambda: nn.Recurrent(nn.Linear(1, 1)), TypeError, "layer: expected an LSTM, GRU or RNN"),
        (lambda: nn.Recurrent(fastlstm.LSTM(1, 1)).backward(3, 1), TypeError, "tape: expected the second result"),
        (lambda: nn.LayerNorm(0), ValueError, "features: expected an integer from 1"),
        (lambda: nn.LayerNorm(2).backward(0, 1), TypeError, "tape: expected the second result"),
        (lambda: nn.LayerNorm(2)(np.ones(3)), ValueError, r"x: expected shape \(..., 2\)"),
        (lambda: nn.Embedding(0, 1), ValueError, "num_embeddings: expected an integer from 1"),
        (lambda: nn.Embedding(2, 1).backward(0, 1), TypeError, "tape: expected the second result"),
    ],
)
def test_module_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_nothing_is_computed_before_the_first_parameters(rng, monkeypatch):
    drop, linear, last = nn.Dropout(0.5, rng=0), nn.Linear(3, 4, rng=0), nn.Linear(4, 2, rng=0)
    model = nn.Sequential(drop, linear, last)
    x, dy = rng.normal(size=(5, 3)).astype(np.float32), rng.normal(size=(5, 2)).astype(np.float32)
    tape = model.forward(x)[1]
    assert model.backward(tape, dy).shape == x.shape
    whole = model.flat_grads.copy()
    model.zero_grad()
    monkeypatch.setattr(nn.Dropout, "backward", lambda *_, **__: pytest.fail("no one wants this gradient"))
    assert model.backward(tape, dy, need_dx=False) is None
    np.testing.assert_array_equal(model.flat_grads, whole)
