"""sLSTM: heads on every road through the layer, ranges that only the stabiliser survives, an implementation by hand."""

import copy
import pickle

import numpy as np
import pytest
from conftest import close, expected, make, named, problem, same, train

import fastlstm
from fastlstm import reference

GATES = ("sigmoid", "exponential")
T, N, D, H = 9, 5, 7, 36


def build(heads=3, dtype=np.float64, **options):
    return make("slstm", D, H, num_heads=heads, dtype=dtype, **options)


@pytest.mark.parametrize("lengths", (None, (3, 9, 0, 1, 5)), ids=("whole", "ragged"))
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("heads", (1, 2, 4, 36))
def test_heads(isa, heads, gate, lengths):
    options = {"forget_gate": gate, "num_layers": 2, "bidirectional": True, "dropout": 0.2, "recurrent_dropout": 0.3}
    layer = build(heads, zoneout=0.2, **options)
    p = problem(layer, T, N, lengths)
    got, masks = train(layer, p)
    close(got, expected(layer, p, masks))
    close(named(layer, *layer(p.x, p.state, p.lengths)), expected(layer, p))


@pytest.mark.own
def test_bits(isa):
    """Threads, batches, windows of the state, checkpoints, streams, frozen weights."""
    layer = build(dtype=np.float32, num_layers=2, forget_gate="exponential")
    p = problem(layer, T, N)
    want = train(layer, p)[0]
    for threads in (1, 2, 3):
        fastlstm.set_num_threads(threads)
        same(train(layer, p)[0], want)
    same(train(layer, p, checkpoint_every=2)[0], want)
    y, state = layer(p.x, p.state)
    same((y, state), (want["y"], tuple(want[name] for name in "hcnm")))
    for n in range(N):
        same(layer(p.x[:, n : n + 1], tuple(s[:, n : n + 1] for s in p.state))[0], y[:, n : n + 1])
    first, middle = layer(p.x[:4], p.state)
    second, last = layer(p.x[4:], middle)
    same((np.concatenate([first, second]), last), (y, state))
    for stream in (layer.stream(N), layer.freeze().stream(N)):
        stream.state = p.state
        same(np.stack([stream.step(x) for x in p.x]), y)
        same(stream.state, state)


@pytest.mark.own
def test_head_alone(isa):
    """A head is a layer of its own: its weights in a layer of one head give its columns, to the bit."""
    layer = build(heads=3, dtype=np.float32)
    p = problem(layer, T, N)
    y, _ = layer(p.x)
    for head in range(3):
        alone = fastlstm.SLSTM(D, H // 3)
        rows = slice(head * 4 * H // 3, (head + 1) * 4 * H // 3)
        alone.load_state_dict({name: value[rows] for name, value in layer.params.items()})
        same(alone(p.x)[0], y[:, :, head * H // 3 : (head + 1) * H // 3])


def test_copies_and_files(tmp_path):
    layer = build(dtype=np.float32, forget_gate="exponential", forget_bias=1.0)
    x = problem(layer, T, N).x
    layer.save(tmp_path / "layer.safetensors")
    read = fastlstm.load(tmp_path / "layer.safetensors")
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), read, layer.astype(np.float32)):
        assert other.options == layer.options | {"init": other.init}
        same(other(x), layer(x))
    bias = fastlstm.SLSTM(D, H, num_heads=3, init="zeros", forget_bias=2.0).params["bias_ih_l0"].reshape(3, 4, 12)
    assert (bias[:, 1] == 2).all() and not np.delete(bias, 1, axis=1).any()
    assert "num_heads=3" in repr(layer) and "exponential" in repr(layer)


@pytest.mark.parametrize("dtype", (np.float32, np.float64))
@pytest.mark.parametrize("gate", GATES)
def test_the_stabiliser_holds_the_range(isa, gate, dtype):
    """Pre-activations of hundreds and thousands: exp overflows, the layer does not, nor does the sum of two steps."""
    layer = fastlstm.SLSTM(1, 8, forget_gate=gate, init="zeros", dtype=dtype)
    layer.params["weight_ih_l0"][:8] = 1000.0  # i~ = 1000 x
    layer.params["weight_ih_l0"][16:24] = 0.5  # z~
    layer.params["bias_ih_l0"][8:16] = 900.0 if gate == "exponential" else -900.0  # f~
    x = np.array([1, -1, 0.5, 2, -3, 0], dtype)[:, None, None]
    y, _, tape = layer.forward(x)
    dx, dstate = layer.backward(tape, np.ones_like(y))
    want, _, checked = reference.forward(layer.params, x.astype(float), **layer.config)
    for found in (y, dx, layer.flat_grads, *dstate):
        assert np.isfinite(found).all()
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-6 if dtype == np.float32 else 1e-12)
    assert abs(want).max() > 0.1
    # The exponential gate adds up logarithms, step by step; with float32 1 in 2000 is 1e-4.
    np.testing.assert_allclose(dx, reference.backward(checked, np.ones_like(want))[0], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("gate", GATES)
def test_log_of_a_gate_is_precise(isa, gate):
    """A forget gate near 1 and near 0 over many steps: the logarithms add up, and stay right."""
    for bias in (12.0, 0.0, -12.0):
        layer = fastlstm.SLSTM(2, 8, forget_gate=gate, rng=0)
        layer.params["bias_ih_l0"][8:16] = bias if gate == "sigmoid" else bias / 100
        x = np.random.default_rng(0).standard_normal((200, 3, 2)).astype(np.float32)
        want, _, _ = reference.forward(layer.params, x, **layer.config)
        found, _ = layer(x)
        assert np.linalg.norm(found - want) < 2e-6 * np.linalg.norm(want) * (1 if bias else 2)


def test_wrong_arguments():
    for options, text in (({"num_heads": 5}, "num_heads: expected a divisor"), ({"num_heads": 0}, "num_heads"),
                          ({"forget_gate": "relu"}, "forget_gate"), ({"dropout": 0.5}, "dropout")):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            fastlstm.SLSTM(D, H, **options)
    layer = build()
    p = problem(layer, T, N)
    with pytest.raises(TypeError, match="state: expected 4 arrays"):
        layer(p.x, p.state[:2])
    with pytest.raises(ValueError, match="n_0: expected shape"):
        layer(p.x, (*p.state[:2], p.state[2][:, :1], p.state[3]))
    with pytest.raises(AttributeError, match="num_heads: cannot change"):
        layer.num_heads = 2


def test_gradcheck_without_a_state():
    for gate in GATES:
        fastlstm.gradcheck(build(2, forget_gate=gate), problem(build(2), 2, 2).x)


def test_orthogonal_head_by_head():
    layer = fastlstm.SLSTM(3, 64, num_heads=4, init="orthogonal", rng=0)
    for head in layer.params["weight_hh_l0"].reshape(4, 64, 16):
        np.testing.assert_allclose(head.T @ head, np.eye(16), atol=1e-5)


def test_a_state_of_no_weight_with_a_large_stabiliser(isa):
    """n = c = 0 holds nothing, whatever m says: the same as zeros."""
    layer = build(2)
    p = problem(layer, T, N)
    h, c, n, m = (np.zeros_like(s) for s in p.state)
    y, _ = layer(p.x, (h, c, n, m + 800))
    np.testing.assert_allclose(y, layer(p.x)[0], rtol=0, atol=1e-14)
    want, _, _ = reference.forward(layer.params, p.x, (h, c, n, m + 800), **layer.config)
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("gate", GATES)
def test_the_gradient_of_a_state_of_zeros_may_leave_the_range(isa, gate):
    """It has the factor exp(k - i~), here up to e200: never NaN, of the right sign, and nothing else suffers."""
    single, double = (fastlstm.SLSTM(3, 8, forget_gate=gate, rng=0, dtype=dtype) for dtype in ("f4", "f8"))
    single.params["bias_ih_l0"][:8] -= np.linspace(0, 200, 8)  # i~
    double.flat_params[:] = single.flat_params
    x = np.random.default_rng(1).standard_normal((5, 6, 3)).astype(np.float32)
    dy = 10 * np.random.default_rng(2).standard_normal((5, 6, 8)).astype(np.float32)
    found, want = ((layer, *layer.backward(layer.forward(x)[2], dy)) for layer in (single, double))
    for a, b in zip(found[2][1:3], want[2][1:3], strict=True):  # of c and n
        assert not np.isnan(a).any() and np.isfinite(b).all()
        small = abs(b) < 1e35
        assert small.any() and not small.all() and np.isinf(a).any()
        np.testing.assert_allclose(a[small], b[small], rtol=1e-3)
        assert (np.sign(a) == np.sign(b)).all() and (abs(a[~small]) > 1e34).all()
    for a, b in ((found[1], want[1]), (found[2][0], want[2][0]), (single.flat_grads, double.flat_grads)):
        assert np.isfinite(a).all() and np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(b)


# ---- PyTorch, composed by hand


def in_torch(torch, params, x, heads, gate):
    """The equations of the paper's appendix, step by step, with autograd; zero states."""
    W, R, b, c_b = (params[name] for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"))
    T, N, _ = x.shape
    units = R.shape[1]
    h, c, n, m = (torch.zeros(N, heads, units, dtype=x.dtype) for _ in range(4))
    out = []
    for t in range(T):
        sums = (x[t] @ W.T + b + c_b).view(N, heads, 4, units)
        i, f, z, o = (sums + torch.einsum("nhk,hguk->nhgu", h, R.view(heads, 4, units, units))).unbind(2)
        kept = m + (torch.nn.functional.logsigmoid(f) if gate == "sigmoid" else f)
        new = i if t == 0 else torch.maximum(kept, i)
        i, f = torch.exp(i - new), torch.exp(kept - new)
        c, n, m = f * c + i * torch.tanh(z), f * n + i, new
        h = torch.sigmoid(o) * c / n
        out.append(h.reshape(N, -1))
    return torch.stack(out)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("heads", (1, 4))
def test_pytorch_by_hand(heads, gate):
    torch = pytest.importorskip("torch")
    layer = build(heads, forget_gate=gate)
    p = problem(layer, T, N)
    params = {name: torch.tensor(value, requires_grad=True) for name, value in layer.params.items()}
    x = torch.tensor(p.x, requires_grad=True)
    want = in_torch(torch, params, x, heads, gate)
    want.backward(torch.tensor(p.dy))
    y, _, tape = layer.forward(p.x)
    dx, _ = layer.backward(tape, p.dy)
    np.testing.assert_allclose(y, want.detach(), rtol=0, atol=1e-12)
    np.testing.assert_allclose(dx, x.grad, rtol=0, atol=1e-11)
    for name, grad in layer.grads.items():
        np.testing.assert_allclose(grad, params[name].grad, rtol=0, atol=1e-10, err_msg=name)
