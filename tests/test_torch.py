"""PyTorch as the second opinion: outputs, final states and every gradient over random configurations."""

import numpy as np
import pytest

import fastlstm
from fastlstm import nn

torch = pytest.importorskip("torch", reason="PyTorch is not installed: no parity test with it")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]

# 160 random configurations, a seed each, 16 where two threads share the units, and 12 with dropout: 188.
CONFIGURATIONS = 160
LARGE = 16
DROPOUT = 12
CELLS = ("lstm", "gru", "tanh", "relu")


def configuration(seed):
    """What is tried under a seed; cells, types and lengths take turns so that all of them meet."""
    rng = np.random.default_rng(seed)
    cell = CELLS[seed % 4]
    hidden = int(rng.integers(2, 40))
    return {
        "cell": cell,
        "dtype": np.dtype(("f8", "f4")[seed // 4 % 2]),
        "packed": seed // 8 % 2 == 1,
        "input_size": int(rng.integers(1, 24)),
        "hidden_size": hidden,
        "num_layers": int(rng.integers(1, 4)),
        "bias": bool(rng.random() < 0.8),
        "batch_first": bool(rng.random() < 0.5),
        "bidirectional": bool(rng.random() < 0.5),
        "proj_size": int(rng.integers(1, hidden)) if cell == "lstm" and rng.random() < 0.4 else 0,
        "with_state": bool(rng.random() < 0.6),
        "unbatched": bool(seed // 8 % 2 == 0 and rng.random() < 0.2),
        "T": int(rng.integers(1, 14)),
        "N": int(rng.integers(1, 12)),
    }


def pair(c, seed, num_layers=None, dropout=0.0):
    """Our layer and PyTorch's, with the same weights; ours loads PyTorch's state dict as it is."""
    sizes = (c["input_size"], c["hidden_size"], num_layers or c["num_layers"])
    options = {k: c[k] for k in ("bias", "batch_first", "bidirectional")}
    dtype = torch.float64 if c["dtype"] == np.float64 else torch.float32
    torch.manual_seed(seed)
    if c["cell"] == "lstm":
        theirs = torch.nn.LSTM(*sizes, proj_size=c["proj_size"], dtype=dtype, **options)
        ours = fastlstm.LSTM(*sizes, proj_size=c["proj_size"], dropout=dropout, dtype=c["dtype"], rng=seed, **options)
    elif c["cell"] == "gru":
        theirs = torch.nn.GRU(*sizes, dtype=dtype, **options)
        ours = fastlstm.GRU(*sizes, dropout=dropout, dtype=c["dtype"], rng=seed, **options)
    else:
        theirs = torch.nn.RNN(*sizes, nonlinearity=c["cell"], dtype=dtype, **options)
        ours = fastlstm.RNN(*sizes, nonlinearity=c["cell"], dropout=dropout, dtype=c["dtype"], rng=seed, **options)
    return ours, theirs


def same(ours, theirs, name):
    """Equal in norm, and no element further off than rounding allows."""
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape, name
    assert ours.dtype == theirs.dtype, name
    wide = theirs.astype(np.float64)
    tolerance = 1e-12 if theirs.dtype == np.float64 else 2e-5
    error, norm = np.linalg.norm(ours - wide), np.linalg.norm(wide)
    assert error <= tolerance * norm, f"{name}: error {error:.3g} of norm {norm:.3g}"
    limit = 1e-11 if theirs.dtype == np.float64 else 2e-4
    assert np.abs(ours - wide).max(initial=0) <= limit * np.abs(wide).max(initial=0), name


def telling(y, cell):
    """An output of zeros, or at the ends of tanh, would prove nothing."""
    assert np.mean(y != 0) > (0.15 if cell == "relu" else 0.99)
    assert cell == "relu" or np.mean(np.abs(y) > 0.99) < 0.2


def draw(rng, shape, dtype):
    return rng.standard_normal(shape).astype(dtype)


def leaf(array):
    return torch.from_numpy(array.copy()).requires_grad_()


def pack(x, lengths, batch_first):
    return torch.nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False)


def unpack(y, T, batch_first):
    return torch.nn.utils.rnn.pad_packed_sequence(y, batch_first, total_length=T)[0]


def problem(c, seed):
    """x, initial states (as a list, or None), lengths and the padding's place in x."""
    rng = np.random.default_rng((seed, 1))
    T, N, H = c["T"], c["N"], c["hidden_size"]
    P, L = c["proj_size"] or H, c["num_layers"] * (1 + c["bidirectional"])
    lead = (N, T) if c["batch_first"] else (T, N)
    widths = (P, H) if c["cell"] == "lstm" else (P,)
    if c["unbatched"]:
        lead, states = (T,), [(L, width) for width in widths]
    else:
        states = [(L, N, width) for width in widths]
    x = draw(rng, (*lead, c["input_size"]), c["dtype"])
    start = [draw(rng, shape, c["dtype"]) for shape in states] if c["with_state"] else None
    lengths = padding = None
    if c["packed"]:
        lengths = rng.integers(1, T + 1, N)
        lengths[rng.integers(N)] = 1
        steps = np.arange(T)[:, None] >= lengths
        padding = steps.T if c["batch_first"] else steps
    dy = draw(rng, (*lead, P * (1 + c["bidirectional"])), c["dtype"])
    dend = [draw(rng, shape, c["dtype"]) for shape in states]
    return x, start, lengths, padding, dy, dend


def shaped(states, cell):
    """A state as the layers take it."""
    return None if states is None else tuple(states) if cell == "lstm" else states[0]


def flat(state):
    return list(state) if isinstance(state, tuple) else [state]


@pytest.mark.parametrize("seed", range(CONFIGURATIONS))
def test_outputs_and_gradients(seed):
    compare(configuration(seed), seed)


@pytest.mark.parametrize("seed", range(LARGE))
def test_threads_that_share_the_units(seed):
    """Few long sequences in a wide layer."""
    rng = np.random.default_rng(seed)
    c = configuration(seed) | {"hidden_size": int(rng.integers(128, 200)), "N": int(rng.integers(1, 5))}
    c |= {
        "T": int(rng.integers(6, 14)),
        "num_layers": 1 + seed % 2,
        "proj_size": c["proj_size"] and 130 - seed,
    }
    for threads in (2, 3):
        fastlstm.set_num_threads(threads)
        compare(c, seed)


def compare(c, seed):
    ours, theirs = pair(c, seed)
    ours.load_state_dict(theirs.state_dict())
    x, start, lengths, padding, dy, dend = problem(c, seed)

    x_t, start_t = leaf(x), None if start is None else [leaf(s) for s in start]
    fed = x_t if lengths is None else pack(x_t, torch.from_numpy(lengths), c["batch_first"])
    y_t, end_t = theirs(fed, shaped(start_t, c["cell"]))
    y_t = y_t if lengths is None else unpack(y_t, c["T"], c["batch_first"])
    torch.autograd.backward([y_t, *flat(end_t)], [torch.from_numpy(d) for d in (dy, *dend)])

    if padding is not None:
        x[padding] = dy[padding] = np.nan  # padding is never read
    y, end, tape = ours.forward(x, shaped(start, c["cell"]), lengths)
    valid = y if padding is None else y[~padding]
    telling(valid, c["cell"])
    assert padding is None or not y[padding].any()
    y_call, end_call = ours(x, shaped(start, c["cell"]), lengths)
    assert y_call.tobytes() == y.tobytes()
    same(y, y_t, "y")
    for name, a, b, t in zip("hc", flat(end), flat(end_call), flat(end_t), strict=False):
        assert a.tobytes() == b.tobytes()
        same(a, t, name + "_n")

    dx, dstart = ours.backward(tape, dy, shaped(dend, c["cell"]))
    same(dx, x_t.grad, "dx")
    if start is not None:
        for name, a, t in zip("hc", flat(dstart), start_t, strict=False):
            same(a, t.grad, f"d{name}_0")
    gradients = dict(theirs.named_parameters())
    assert list(gradients) == list(ours.grads)
    for name, gradient in ours.grads.items():
        same(gradient, gradients[name].grad, "d" + name)


def test_the_configurations_cover_the_options():
    assert CONFIGURATIONS + LARGE + DROPOUT == 188
    tried = [configuration(seed) for seed in range(CONFIGURATIONS)]
    assert len({tuple(c.values()) for c in tried}) == CONFIGURATIONS
    for name in ("bias", "batch_first", "bidirectional", "with_state", "unbatched", "packed"):
        assert min(sum(c[name] for c in tried), sum(not c[name] for c in tried)) >= 10, name
    for cell in CELLS:
        for dtype in (np.float32, np.float64):
            for packed in (False, True):
                assert sum((c["cell"], c["dtype"], c["packed"]) == (cell, dtype, packed) for c in tried) >= 8
    assert sum(c["proj_size"] > 0 for c in tried) >= 10
    assert {c["num_layers"] for c in tried} == {1, 2, 3}


@pytest.mark.parametrize("seed", range(1000, 1000 + DROPOUT))
def test_dropout_with_the_same_masks(seed):
    """Single layers of PyTorch in a chain, our masks between them."""
    c = configuration(seed) | {"num_layers": 3, "batch_first": False, "unbatched": False, "with_state": True}
    c["packed"] = seed % 3 == 0
    ours, _ = pair(c, seed, dropout=0.4)
    x, start, lengths, padding, dy, dend = problem(c, seed)
    y, end, tape = ours.forward(x, shaped(start, c["cell"]), lengths)
    masks = tape.masks["dropout"]
    assert len(masks) == 2
    assert all(0 < np.mean(m == 0) < 1 for m in masks if m.size > 30)

    dirs = 1 + c["bidirectional"]
    width = dirs * (c["proj_size"] or c["hidden_size"])
    x_t, start_t = leaf(x), [leaf(s) for s in start]
    fed, ends, chain = x_t, [], []
    for layer in range(3):
        _, theirs = pair(c | {"input_size": width if layer else c["input_size"]}, seed, num_layers=1)
        part = {
            name.replace(f"_l{layer}", "_l0"): torch.from_numpy(value)
            for name, value in ours.state_dict().items()
            if f"_l{layer}" in name
        }
        theirs.load_state_dict(part)
        chain.append(theirs)
        if layer:
            fed = fed * torch.from_numpy(masks[layer - 1])
        state = shaped([s[layer * dirs : (layer + 1) * dirs] for s in start_t], c["cell"])
        if lengths is None:
            fed, end_t = theirs(fed, state)
        else:
            fed, end_t = theirs(pack(fed, torch.from_numpy(lengths), False), state)
            fed = unpack(fed, c["T"], False)
        ends.append(flat(end_t))
    end_t = [torch.cat(parts) for parts in zip(*ends, strict=True)]
    torch.autograd.backward([fed, *end_t], [torch.from_numpy(d) for d in (dy, *dend)])

    same(y, fed, "y")
    dx, dstart = ours.backward(tape, dy, shaped(dend, c["cell"]))
    same(dx, x_t.grad, "dx")
    for name, a, e, t, s in zip("hc", flat(end), flat(dstart), end_t, start_t, strict=False):
        same(a, t, name + "_n")
        same(e, s.grad, f"d{name}_0")
    for layer, theirs in enumerate(chain):
        for name, value in theirs.named_parameters():
            name = name.replace("_l0", f"_l{layer}")
            same(ours.grads[name], value.grad, "d" + name)


@pytest.mark.parametrize("cell, proj_size", [*((cell, 0) for cell in CELLS), ("lstm", 3)])
def test_state_dicts_go_both_ways(cell, proj_size):
    c = configuration(CELLS.index(cell)) | {"num_layers": 2, "bidirectional": True, "bias": True}
    c |= {"hidden_size": 7, "proj_size": proj_size}
    ours, theirs = pair(c, 3)
    before = {name: value.numpy().copy() for name, value in theirs.state_dict().items()}
    ours.load_state_dict(theirs.state_dict())
    for name, value in before.items():
        assert np.array_equal(ours.params[name], value)
    ours.load_state_dict(dict(theirs.named_parameters()))  # parameters that require a gradient, too

    ours.flat_params[:] = np.random.default_rng(5).standard_normal(ours.flat_params.size)
    theirs.load_state_dict({name: torch.from_numpy(value) for name, value in ours.state_dict().items()})
    for name, value in theirs.state_dict().items():
        assert np.array_equal(ours.params[name], value.numpy())


def test_float32_layer_loads_a_float64_state_dict():
    ours, theirs = fastlstm.LSTM(3, 4), torch.nn.LSTM(3, 4, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    assert np.array_equal(ours.params["weight_hh_l0"], theirs.weight_hh_l0.detach().float().numpy())


def test_tensors_are_taken_as_they_are():
    ours, theirs = fastlstm.GRU(3, 4, dtype=np.float64), torch.nn.GRU(3, 4, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    x, h = torch.randn(5, 2, 3, dtype=torch.float64), torch.randn(1, 2, 4, dtype=torch.float64)
    y, h_n = ours(x, h, torch.tensor([5, 5]))
    y_t, h_t = theirs(x, h)
    same(y, y_t, "y")
    same(h_n, h_t, "h_n")
    with pytest.warns(UserWarning, match="x: the gradient of this tensor stops here"):
        ours(x.requires_grad_())


def test_training_follows_the_same_loss_curve():
    """100 steps of LSTM + linear + cross entropy + Adam on the same batches.

    The rate keeps training out of chaos: at 5e-3 float32 leaves float64 by 5 % here, in PyTorch as well.
    """
    T, N, D, H, K, steps = 20, 16, 6, 32, 5, 100
    torch.manual_seed(0)
    lstm_t, linear_t = torch.nn.LSTM(D, H), torch.nn.Linear(H, K)
    lstm, linear = fastlstm.LSTM(D, H), nn.Linear(H, K)
    lstm.load_state_dict(lstm_t.state_dict())
    linear.load_state_dict(linear_t.state_dict())
    adam_t = torch.optim.Adam([*lstm_t.parameters(), *linear_t.parameters()], lr=2e-3)
    adam = nn.Adam([lstm, linear], lr=2e-3)

    rng = np.random.default_rng(0)
    centres = rng.standard_normal((K, D))
    curve, curve_t = [], []
    for _ in range(steps):
        labels = rng.integers(0, K, N)
        x = (centres[labels] * 0.5 + rng.standard_normal((T, N, D))).astype(np.float32)

        y, _, tape = lstm.forward(x)
        logits, kept = linear.forward(y[-1])
        loss, dlogits = nn.softmax_cross_entropy(logits, labels)
        adam.zero_grad()
        dy = np.zeros_like(y)
        dy[-1] = linear.backward(kept, dlogits)
        lstm.backward(tape, dy)
        adam.step()
        curve.append(loss)

        adam_t.zero_grad()
        loss_t = torch.nn.functional.cross_entropy(
            linear_t(lstm_t(torch.from_numpy(x))[0][-1]), torch.from_numpy(labels)
        )
        loss_t.backward()
        adam_t.step()
        curve_t.append(loss_t.item())
    assert curve_t[-1] < 0.4 * curve_t[0]  # it learns
    np.testing.assert_allclose(curve, curve_t, rtol=1e-4)
