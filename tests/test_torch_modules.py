"""fastlstm.torch: its modules beside torch.nn's, in eager calls and through the operator."""

import subprocess
import sys

import numpy as np
import pytest

import fastlstm

torch = pytest.importorskip("torch", reason="PyTorch is not installed: no test of fastlstm.torch")
ft = pytest.importorskip("fastlstm.torch")
recurrence, recurrence_backward = ft._ops.recurrence, ft._ops.recurrence_backward
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]

PackedSequence = torch.nn.utils.rnn.PackedSequence
pack = torch.nn.utils.rnn.pack_padded_sequence
T, N, D, H = 6, 5, 3, 7
LENGTHS = torch.tensor([4, 6, 1, 3, 6])
KINDS = ("LSTM", "GRU", "RNN")
PLAIN = {"num_layers": 1, "bidirectional": False}
DEEP = {"num_layers": 2, "bidirectional": True}


def pair(kind, seed=0, **options):
    """Ours and torch.nn's, drawn from the same seed."""
    options = {"dtype": torch.float64} | options
    made = []
    for module in (ft, torch.nn):
        torch.manual_seed(seed)
        made.append(getattr(module, kind)(D, H, **options))
    return made


def states_of(module, single=False):
    """A random state, requiring gradients."""
    depth = module.num_layers * (2 if module.bidirectional else 1)
    batch = () if single else (N,)
    widths = [getattr(module, "proj_size", 0) or H] + [H] * isinstance(module, ft.LSTM)
    found = [torch.randn(depth, *batch, w, dtype=torch.get_default_dtype()).requires_grad_() for w in widths]
    return found


def as_state(parts):
    return tuple(parts) if len(parts) == 2 else parts[0]


def flat(*values):
    """Tensors of nested results."""
    for value in values:
        if isinstance(value, PackedSequence):
            yield value.data
        elif isinstance(value, (tuple, list)):
            yield from flat(*value)
        else:
            yield value


def run(module, x, state=None, **options):
    """Results and all gradients of one call."""
    leaves = [x, *(state or []), *module.parameters()]
    for leaf in leaves:
        leaf.grad = None
    entered = options.pop("enter", lambda x: x)(x)
    found = list(flat(module(entered, None if state is None else as_state(state), **options)))
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(f.shape, generator=generator, dtype=f.dtype) for f in found]
    sum((f * w).sum() for f, w in zip(found, weights, strict=True)).backward()
    return [f.detach() for f in found] + [leaf.grad.clone() for leaf in leaves]


def close(ours, theirs, tolerance=1e-12, telling=True):
    assert len(ours) == len(theirs)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype, i
        assert not telling or (b != 0).double().mean() > 0.3, f"{i}: expected results are mostly zeros"
        error, norm = (a - b).double().norm(), b.double().norm()
        assert error <= tolerance * norm, f"{i}: error {error:.3g} of norm {norm:.3g}"


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# ---- beside torch.nn ----


CALLS = {
    "plain": {},
    "state": {"state": True},
    "batch_first": {"state": True, "batch_first": True},
    "one sequence": {"state": True, "single": True},
    "packed": {"state": True, "packed": True},
    "packed, sorted": {"packed": True, "sorted": True, "batch_first": True},
    "no bias": {"bias": False},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("shape", [PLAIN, DEEP], ids=["one", "deep"])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_torch(kind, shape, call, double):
    c = dict(CALLS[call])
    options = {name: c.pop(name) for name in ("bias", "batch_first") if name in c}
    ours, theirs = pair(kind, **shape, **options)
    single = c.get("single", False)
    x = torch.randn(T, D) if single else torch.randn(*((N, T) if options.get("batch_first") else (T, N)), D)
    x.requires_grad_()
    state = states_of(ours, single) if c.get("state") else None
    enter = {}
    if c.get("packed"):
        lengths = LENGTHS.sort(descending=True).values if c.get("sorted") else LENGTHS
        enter["enter"] = lambda x: pack(x, lengths, bool(options.get("batch_first")), bool(c.get("sorted")))
    close(run(ours, x, state, **enter), run(theirs, x, state, **enter))


@pytest.mark.parametrize(
    "kind, options",
    [
        ("LSTM", {"proj_size": 2} | DEEP),
        ("LSTM", {"num_layers": 3}),
        ("RNN", {"nonlinearity": "relu"} | DEEP),
        ("GRU", DEEP),
    ],
)
def test_float32_and_options_of_torch(kind, options):
    ours, theirs = pair(kind, dtype=torch.float32, **options)
    assert all(p.dtype == torch.float32 for p in ours.parameters())
    x = torch.randn(T, N, D, requires_grad=True)
    state = states_of(ours)
    close(run(ours, x, state), run(theirs, x, state), 2e-6)


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells(kind, double):
    ours, theirs = pair(kind)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for shape in ((N,), ()):
        x = torch.randn(*shape, D, requires_grad=True)
        state = [torch.randn(*shape, H, requires_grad=True) for _ in range(1 + (kind == "LSTMCell"))]
        close(run(ours, x, state), run(theirs, x, state))
        close(run(ours, x), run(theirs, x), telling=False)  # without a state dW_hh is zero


@pytest.mark.parametrize("options", [{}, DEEP, {"proj_size": 2}, {"bias": False, "num_layers": 2}])
@pytest.mark.parametrize("kind", KINDS)
def test_state_dicts_go_both_ways(kind, options):
    if "proj_size" in options and kind != "LSTM":
        options = {"batch_first": True}
    ours, theirs = pair(kind, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():  # the same seed draws the same parameters
        assert torch.equal(ours.state_dict()[name], value), name
    other = getattr(ft, kind)(D, H, dtype=torch.float64, **options)
    other.load_state_dict(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), theirs.parameters(), strict=True))
    assert all(
        np.array_equal(p.detach(), v) for p, v in zip(other.parameters(), other.layer.params.values(), strict=True)
    )
    theirs.load_state_dict(other.state_dict())


# ---- our own extras ----


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_lengths_are_what_packing_is(kind, batch_first, double):
    ours, _ = pair(kind, batch_first=batch_first, **DEEP)
    x = torch.randn(*((N, T) if batch_first else (T, N)), D, requires_grad=True)
    state = states_of(ours)

    def padded(module):
        class Padded(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.rnn = module

            def forward(self, x, state):
                y, end = module(pack(x, LENGTHS, batch_first, enforce_sorted=False), state)
                return torch.nn.utils.rnn.pad_packed_sequence(y, batch_first)[0], end

        return Padded()

    close(run(ours, x, state, lengths=LENGTHS), run(padded(ours), x, state), 1e-15)


@pytest.mark.parametrize("kind", KINDS)
def test_masks_and_resets_are_those_of_the_layer(kind, double):
    ours, _ = pair(kind, **DEEP)
    rng = np.random.default_rng(0)
    mask, resets = rng.random((T, N)) < 0.7, rng.random((T, N)) < 0.3
    x, state = torch.randn(T, N, D, requires_grad=True), states_of(ours)
    options = {"mask": torch.from_numpy(mask), "resets": torch.from_numpy(resets)}
    y, end = ours(x, as_state(state), **options)
    arrays = as_state([s.detach().numpy() for s in state])
    ours.layer.zero_grad()
    want, want_end, tape = ours.layer.forward(x.detach().numpy(), arrays, mask=mask, resets=resets)
    assert np.array_equal(y.detach(), want) and all(
        np.array_equal(a.detach(), b) for a, b in zip(flat(end), flat(want_end), strict=True)
    )
    dx, _ = ours.layer.backward(tape, np.ones_like(want))
    y.sum().backward()
    assert np.array_equal(x.grad, dx)
    assert all(np.array_equal(p.grad, g) for p, g in zip(ours.parameters(), ours.layer.grads.values(), strict=True))


EXTRAS = {
    "peepholes": ("LSTM", {"peepholes": True}),
    "coupled": ("LSTM", {"coupled": True, "activation": "softsign"}),
    "layer_norm": ("LSTM", {"layer_norm": True, "layer_norm_eps": 1e-3, "cell_clip": 0.5, "proj_size": 2}),
    "numbers": (
        "LSTM",
        {"recurrent_activation": ("hard_sigmoid", 0.25, 0.5), "clip": 0.4, "output_activation": "relu"},
    ),
    "reverse": ("LSTM", {"direction": "reverse"}),
    "reset before": ("GRU", {"reset_after": False, "recurrent_activation": "hard_sigmoid"}),
}


@pytest.mark.parametrize("name", EXTRAS)
def test_options_of_the_layer(name):
    kind, options = EXTRAS[name]
    ours = getattr(ft, kind)(D, H, **options)
    x, layer = torch.randn(T, N, D, requires_grad=True), ours.layer
    assert all(getattr(layer, key) == value for key, value in options.items())
    y, _ = ours(x)
    want, _, tape = layer.forward(x.detach().numpy())
    assert np.array_equal(y.detach(), want) and want.any()
    assert all(f"{key}={value!r}" in repr(ours) for key, value in options.items())
    y.sum().backward()
    dx, _ = layer.backward(tape, np.ones_like(want))
    assert np.array_equal(x.grad, dx)
    assert all(np.array_equal(p.grad, g) for p, g in zip(ours.parameters(), layer.grads.values(), strict=True))
    gains = [p for key, p in ours.named_parameters() if key.startswith("weight_ln")]
    assert len(gains) == (5 if name == "layer_norm" else 0) and all((p == 1).all() for p in gains)


def test_initialisation():
    torch.manual_seed(0)
    a = ft.LSTM(D, H, init="orthogonal", forget_bias=1)
    torch.manual_seed(0)
    b = ft.LSTM(D, H, init="orthogonal", forget_bias=1)
    w = a.weight_hh_l0.detach()
    assert torch.allclose(w.T @ w, torch.eye(H) * (w.T @ w)[0, 0], atol=1e-5)
    assert torch.equal(a.bias_ih_l0[H : 2 * H], torch.ones(H)) and not a.bias_ih_l0[:H].any()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


DRAWN = {
    "dropout": {"dropout": 0.4, "num_layers": 2},
    "recurrent_dropout": {"recurrent_dropout": 0.4, "bidirectional": True},
    "zoneout": {"zoneout": (0.3, 0.2)},
    "all": {"dropout": 0.3, "recurrent_dropout": 0.4, "zoneout": (0.3, 0.2), "proj_size": 2} | DEEP,
}


@pytest.mark.parametrize("name", DRAWN)
def test_what_is_drawn_comes_from_torch(name, double):
    ours = ft.LSTM(D, H, **DRAWN[name])
    x = torch.randn(T, N, D, requires_grad=True)

    def call(seed, lengths=None):
        torch.manual_seed(seed)
        return ours(x, lengths=lengths)[0]

    assert torch.equal(call(1), call(1)) and not torch.equal(call(1), call(2))
    with torch.no_grad():
        assert torch.equal(call(1), call(1).detach())
    kept = call(1).detach()
    ours.eval()
    expected = call(1)
    assert torch.equal(expected, call(2)) and not torch.equal(expected, kept)
    assert np.array_equal(expected.detach(), ours.layer(x.detach().numpy())[0])
    for mode, lengths in ((True, None), (True, LENGTHS), (False, None)):
        ours.train(mode)
        torch.autograd.gradcheck(lambda x, lengths=lengths: call(5, lengths), x, fast_mode=True)
        check_parameters(ours, lambda lengths=lengths: call(5, lengths))


def check_parameters(module, call):
    """The gradient along a random direction of all parameters, against a central difference."""
    params = list(module.parameters())
    ways = [torch.randn(p.shape) for p in params]
    found = torch.autograd.grad(call().sin().sum(), params)
    slope = sum((g * w).sum() for g, w in zip(found, ways, strict=True))
    values = []
    with torch.no_grad():
        for step in (1e-6, -2e-6, 1e-6):
            for p, w in zip(params, ways, strict=True):
                p.add_(step * w)
            values.append(call().sin().sum())
    assert abs((values[0] - values[1]) / 2e-6 - slope) < 1e-6 * max(1, abs(slope))


def test_dropout_can_be_changed():
    ours = ft.LSTM(D, H, num_layers=2)
    x = torch.randn(T, N, D)
    plain = ours(x)[0]
    ours.dropout = 0.5
    torch.manual_seed(0)
    assert not torch.equal(ours(x)[0], plain)
    ours.dropout = 0
    assert torch.equal(ours(x)[0], plain)
    ours.zoneout = (0.5, 0.0)
    assert not torch.equal(ours(x)[0], plain) and "zoneout=(0.5, 0.0)" in repr(ours)
    with pytest.raises(ValueError, match="zoneout"):
        ours.zoneout = (2.0, 0.0)
    assert ours.zoneout == (0.5, 0.0)
    ours.zoneout = (0.0, 0.0)
    assert torch.equal(ours(x)[0], plain)


# ---- memory ----


def test_parameters_stand_on_the_layers_buffer():
    ours = ft.LSTM(D, H, **DEEP)
    layer = ours.layer
    for p, view in zip(ours.parameters(), layer.params.values(), strict=True):
        assert isinstance(p, torch.nn.Parameter) and p.data_ptr() == view.ctypes.data and p.is_leaf
    layer.flat_params[:] = 0.25
    assert all((p == 0.25).all() for p in ours.parameters())
    with torch.no_grad():
        ours.weight_hh_l1.fill_(3)
    assert (layer.params["weight_hh_l1"] == 3).all() and ours.layer is layer


def test_gradients_stand_side_by_side():
    ours = ft.LSTM(D, H)
    ours(torch.randn(T, N, D))[0].sum().backward()
    first, *rest = ours.parameters()
    end = first.grad.data_ptr() + first.grad.numel() * 4
    for p in rest:
        assert p.grad.data_ptr() == end
        end += p.grad.numel() * 4


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_keeps_packed_weights_until_a_parameter_changes(mode, monkeypatch):
    ours = ft.LSTM(D, H)
    x = torch.randn(T, N, D)
    packs = []
    plain = type(ours.layer)._pack
    monkeypatch.setattr(fastlstm.LSTM, "_pack", lambda self, *a: packs.append(1) or plain(self, *a))
    writes = [
        lambda: ours.weight_ih_l0.mul_(2),
        lambda: ours.bias_hh_l0.data.fill_(1.5),
        lambda: ours.layer.flat_params.fill(0.2),
        lambda: ours.load_state_dict(torch.nn.LSTM(D, H).state_dict()),
        lambda: setattr(ours, "weight_hh_l0", torch.nn.Parameter(torch.ones(4 * H, H))),
    ]
    with mode():
        y, _ = ours(x)
        assert y.grad_fn is None and not y.requires_grad
        packs.clear()
        before = ours(x)[0]
        assert torch.equal(before, y) and not packs
    for write in writes:
        with torch.no_grad():
            write()
        with mode():
            after = ours(x)[0]
        packs.clear()
        assert np.array_equal(after, ours.layer(x.numpy())[0])
        assert not torch.equal(after, before), write
        before = after


def test_a_parameter_that_is_not_contiguous_is_looked_at_in_every_call():
    ours = ft.LSTM(5, 7).eval()
    ours.weight_hh_l0.data = torch.randn(7, 28).t()
    x = torch.randn(3, 2, 5)
    with torch.no_grad():
        before = ours(x)[0].clone()
        ours.weight_hh_l0.data.mul_(2)
        theirs = torch.nn.LSTM(5, 7)
        theirs.load_state_dict(ours.state_dict())
        assert (before - theirs(x)[0]).abs().max() > 1e-3
        torch.testing.assert_close(ours(x)[0], theirs(x)[0])


@pytest.mark.parametrize(
    "name, value", [("hidden_size", 9), ("num_layers", 3), ("bidirectional", True), ("bias", False)]
)
def test_what_cannot_change_says_so(name, value):
    ours = ft.LSTM(5, 7)
    with pytest.raises(AttributeError, match=f"{name}: is"):
        setattr(ours, name, value)
    setattr(ours, name, getattr(ours, name))
    ours.batch_first = True
    assert ours(torch.zeros(2, 3, 5))[1][0].shape == (1, 2, 7)


@pytest.mark.parametrize("hx", [5, (1, 2), np.zeros((1, 2, 7)), (torch.zeros(1, 2, 7), None)])
def test_states_of_another_type_are_named(hx):
    with pytest.raises(TypeError, match=r"h_0: expected a Tensor"):
        ft.GRU(5, 7)(torch.zeros(3, 2, 5), hx)


@pytest.mark.own
def test_large_weights_are_watched_by_version_and_sample():
    ours = ft.LSTM(100, 100).eval()
    x = torch.randn(T, N, 100)
    with torch.no_grad():
        before = ours(x)[0]
        ours.weight_hh_l0[3, 5] += 1
        assert not torch.equal(ours(x)[0], before)
        before = ours(x)[0]
        for p in ours.parameters():
            p.data.mul_(1.01)  # no version tells
        assert not torch.equal(ours(x)[0], before)
        assert np.array_equal(ours(x)[0], ours.layer(x.numpy())[0])


def test_evaluation_keeps_nothing_and_still_has_gradients(double):
    ours, theirs = pair("LSTM", **DEEP)
    x = torch.randn(T, N, D, requires_grad=True)
    want = run(theirs, x)
    close(run(ours, x), want)
    ours.eval()
    close(run(ours, x), want)
    assert ours(x)[0].grad_fn.saved_tensors[4] is None  # no reserve


def test_only_what_is_wanted_has_a_gradient():
    ours = ft.LSTM(D, H)
    for p in ours.parameters():
        p.requires_grad_(False)
    x = torch.randn(T, N, D)
    assert not ours(x)[0].requires_grad
    x.requires_grad_()
    ours(x)[0].sum().backward()
    assert x.grad.any() and all(p.grad is None for p in ours.parameters())


def test_a_graph_can_be_used_twice():
    ours = ft.GRU(D, H, num_layers=2)
    x = torch.randn(T, N, D, requires_grad=True)
    loss = ours(x)[0].square().sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, x, retain_graph=True)[0], first)
    assert torch.equal(torch.autograd.grad(loss, x)[0], first)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_parameters_that_changed_are_noticed():
    ours = ft.LSTM(D, H)
    loss = ours(torch.randn(T, N, D))[0].sum()
    with torch.no_grad():
        ours.weight_hh_l0.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- errors ----


def twice(module):
    x = torch.ones(T, N, D, requires_grad=True)
    (dx,) = torch.autograd.grad(module(x)[0].sum(), x, create_graph=True)
    dx.sum().backward()


def forward_mode(module, gradients, which):
    """A call with a tangent on x, a state or a parameter."""
    module.requires_grad_(gradients)
    tensors = {"x": torch.ones(T, N, D), "h_0": torch.zeros(1, N, H), "weight": module.weight_hh_l0.detach().clone()}
    with torch.autograd.forward_ad.dual_level(), torch.set_grad_enabled(gradients):
        dual = torch.autograd.forward_ad.make_dual(tensors[which], torch.ones_like(tensors[which]))
        tensors |= {which: dual}
        state = (tensors["h_0"], torch.zeros(1, N, H))
        if which == "weight":
            return torch.func.functional_call(module, {"weight_hh_l0": dual}, (tensors["x"], state))
        return module(tensors["x"], state)


@pytest.mark.parametrize("which", ["x", "h_0", "weight"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("gradients", [True, False], ids=["grad", "no_grad"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_forward_mode_is_refused(gradients, training, which):
    module = ft.LSTM(D, H).train(training)
    with pytest.raises(NotImplementedError, match=r"no forward-mode derivatives \(torch.autograd.forward_ad\): take"):
        forward_mode(module, gradients, which)
    with torch.autograd.forward_ad.dual_level():  # of tensors that others have
        module(torch.ones(T, N, D))


ERRORS = {
    "float16": (TypeError, "float32", lambda m: m.half()(torch.ones(T, N, D).half())),
    "float16 input": (TypeError, "input: .*float32", lambda m: m(torch.ones(T, N, D).half())),
    "bfloat16": (TypeError, "autocast", lambda m: m.bfloat16()(torch.ones(T, N, D).bfloat16())),
    "another type": (ValueError, "input: expected torch.float32", lambda m: m(torch.ones(T, N, D).double())),
    "state's type": (
        ValueError, "c_0: ", lambda m: m(torch.ones(T, N, D), (torch.zeros(1, N, H), torch.zeros(1, N, H).double()))
    ),
    "another device": (ValueError, "CPU", lambda m: m(torch.ones(T, N, D, device="meta"))),
    "double backward": (RuntimeError, "second derivatives", twice),
    "vmap": (RuntimeError, "vmap", lambda m: torch.func.vmap(lambda x: m(x)[0])(torch.ones(2, T, N, D))),
    "func.grad": (RuntimeError, "torch.func", lambda m: torch.func.grad(lambda x: m(x)[0].sum())(torch.ones(T, N, D))),
    "script": (TypeError, "TorchScript", lambda m: torch.jit.script(m)),
    "script inside": (TypeError, "TorchScript", lambda m: torch.jit.script(torch.nn.Sequential(m))),
    "no tensor": (TypeError, "input: expected a Tensor", lambda m: m(np.ones((T, N, D), np.float32))),
    "shape": (ValueError, "input: .*dimensions", lambda m: m(torch.ones(T, N, D + 1))),
    "one axis": (ValueError, "input: .*dimensions", lambda m: m(torch.ones(D))),
    "axes": (ValueError, "input: .*dimensions", lambda m: m(torch.ones(1, T, N, D))),
    "h_0": (
        ValueError, r"h_0: expected shape \(1, 5, 7\)",
        lambda m: m(torch.ones(T, N, D), (torch.ones(1, 1, H), torch.ones(1, N, H))),
    ),
    "hx": (TypeError, "hx: expected a pair", lambda m: m(torch.ones(T, N, D), torch.ones(1, N, H))),
    "lengths": (ValueError, "lengths: ", lambda m: m(torch.ones(T, N, D), lengths=[T + 1] * N)),
    "packed and lengths": (
        ValueError, "lengths", lambda m: m(pack(torch.ones(T, N, D), LENGTHS, enforce_sorted=False), lengths=LENGTHS)
    ),
    "init": (ValueError, "init", lambda m: ft.LSTM(D, H, init="ones")),
    "zoneout": (TypeError, "zoneout", lambda m: ft.LSTM(D, H, zoneout=0.5)),
    "device": (ValueError, "CPU", lambda m: ft.LSTM(D, H, device="cuda")),
    "dtype": (TypeError, "float32", lambda m: ft.LSTM(D, H, dtype=torch.float16)),
    "unknown": (TypeError, "peephole", lambda m: ft.LSTM(D, H, peephole=True)),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_errors_say_what_to_do(name):
    kind, text, call = ERRORS[name]
    module = ft.LSTM(D, H)
    with pytest.raises(kind, match=text):
        call(module)


def test_autocast_converts():
    ours = ft.LSTM(D, H)
    x = torch.randn(T, N, D)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = ours(x.bfloat16())
    assert y.dtype == torch.float32 and torch.equal(y, ours(x.bfloat16().float())[0])


def test_the_package_does_not_import_torch():
    code = "import sys, fastlstm; assert 'torch' not in sys.modules; fastlstm.torch.LSTM; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_after_an_error_the_module_is_as_before(double):
    ours, theirs = pair("LSTM")
    x = torch.randn(T, N, D, requires_grad=True)
    with pytest.raises(ValueError):
        ours(x, lengths=[99] * N)
    close(run(ours, x), run(theirs, x))


# ---- the operator: compiled, exported, checked ----


def operands(kind, steps, seed=None, **options):
    """Arguments of the operator."""
    module = getattr(ft, kind)(D, H, dtype=torch.float64, **options)
    depth = module.num_layers * (2 if module.bidirectional else 1)
    x = torch.randn(T, N, D, dtype=torch.float64, requires_grad=True)
    h, c = (torch.randn(depth, N, H, dtype=torch.float64, requires_grad=True) for _ in range(2))
    lengths = mask = resets = sizes = None
    if steps == "lengths":
        lengths = LENGTHS
    elif steps == "masks":
        mask, resets = torch.rand(T, N) < 0.7, torch.rand(T, N) < 0.3
    elif steps == "packed":
        x = torch.randn(int(LENGTHS.sum()), D, dtype=torch.float64, requires_grad=True)
        sizes = (LENGTHS[None] > torch.arange(T)[:, None]).sum(1)
    cells = c if kind == "LSTM" else None
    return x, h, cells, lengths, mask, resets, sizes, seed, list(module.parameters()), module._text, True


CHEAP = ("test_schema", "test_autograd_registration", "test_faketensor")
SHAPES = {
    "one": {}, "deep": DEEP | {"dropout": 0.2, "recurrent_dropout": 0.3}, "layers": {"num_layers": 2},
    "both": {"bidirectional": True},
}  # fmt: skip


@pytest.mark.parametrize("steps", ["whole", "lengths", "masks", "packed"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind, shape, steps):
    seed = torch.tensor(7) if shape == "deep" else None
    torch.library.opcheck(recurrence, operands(kind, steps, seed, **SHAPES[shape]), test_utils=CHEAP)


@pytest.mark.full
@pytest.mark.parametrize("seed", [None, torch.tensor(7)], ids=["plain", "seeded"])
@pytest.mark.parametrize("steps", ["whole", "lengths", "masks", "packed"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck_in_full(kind, shape, steps, seed):
    torch.library.opcheck(recurrence, operands(kind, steps, seed, **SHAPES[shape]))


def test_opcheck_in_full_for_one():
    torch.library.opcheck(recurrence, operands("LSTM", "lengths", torch.tensor(7), **SHAPES["deep"]))


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck_of_the_gradient(kind):
    x, h, c, *rest, params, text, keep = operands(kind, "lengths", **DEEP)
    with torch.no_grad():
        y, h_n, c_n, reserve = recurrence(x, h, c, *rest, params, text, keep)
    dy, dh, dc = torch.randn_like(y), torch.randn_like(h_n), None if c is None else torch.randn_like(c_n)
    params = [p.detach() for p in params]
    states = h.detach(), None if c is None else c.detach()
    arguments = (dy, dh, dc, x.detach(), *states, *rest, params, y, reserve, text, keep, True)
    torch.library.opcheck(recurrence_backward, arguments, test_utils=CHEAP)


@pytest.mark.parametrize("fast", [True, pytest.param(False, marks=pytest.mark.full)])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_the_operator(kind, keep, fast):
    x, h, c, *rest, params, text, _ = operands(kind, "lengths", **DEEP)

    def call(x, h, *others):
        cells, params = (others[0], others[1:]) if kind == "LSTM" else (None, others)
        found = recurrence(x, h, cells, *rest, list(params), text, keep)
        return found[: 3 if kind == "LSTM" else 2]

    leaves = [x, h, *([c] if kind == "LSTM" else []), *params]
    assert torch.autograd.gradcheck(call, leaves, fast_mode=fast)


class Net(torch.nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.rnn = getattr(ft, kind)(D, H, **options)
        self.out = torch.nn.Linear(H * (2 if self.rnn.bidirectional else 1), 2)

    def forward(self, x, lengths=None):
        y, _ = self.rnn(x, lengths=lengths)
        return self.out(y.sin())


def compiled_as_eager(kind, lengths, **options):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    net = Net(kind, **options)
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend="aot_eager")
    for t, n in ((6, 5), (9, 2), (4, 7)):  # not D: equal sizes of the first call count as one
        x = torch.randn(*((n, t) if options.get("batch_first") else (t, n)), D, requires_grad=True)
        given = torch.randint(1, t + 1, (n,)) if lengths else None
        found = []
        for f in (compiled, net):
            y = f(x, given)
            found.append([y, *torch.autograd.grad(y.square().sum(), [x, *net.parameters()])])
        for a, b in zip(*found, strict=True):
            assert b.any() and torch.allclose(a, b, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    net.eval()
    with torch.no_grad():
        assert torch.equal(compiled(x, given), net(x, given))


def test_compile_traces_it_whole():
    compiled_as_eager("LSTM", True, **DEEP)


@pytest.mark.full
@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_compile_traces_all_of_it(kind, layers, both, lengths):
    compiled_as_eager(kind, lengths, num_layers=layers, bidirectional=both, batch_first=both)


def test_compile_takes_packed_sequences():
    torch._dynamo.reset()
    ours = ft.GRU(D, H, bidirectional=True)
    packed = pack(torch.randn(T, N, D), LENGTHS, enforce_sorted=False)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    for a, b in zip(flat(compiled(packed)), flat(ours(packed)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
def test_export_and_trace():
    net = Net("LSTM", batch_first=True).eval()
    lengths = torch.tensor([3, 5])
    x = torch.randn(2, 5, D)
    sizes = {0: torch.export.Dim("N", min=2), 1: torch.export.Dim("T", min=2)}
    exported = torch.export.export(net, (x, lengths), dynamic_shapes=(sizes, {0: sizes[0]})).module()
    traced = torch.jit.trace(net, (x, lengths))
    x, lengths = torch.randn(4, 9, D), torch.tensor([3, 9, 0, 5])
    for f in (exported, traced):
        assert torch.equal(f(x, lengths), net(x, lengths))


def test_functional_call():
    net, other = Net("LSTM"), Net("LSTM")
    x, params = torch.randn(T, N, D), dict(other.named_parameters())
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            before = net(x)
            assert torch.equal(torch.func.functional_call(net, params, (x,)), other(x))
            assert torch.equal(net(x), before) and not torch.equal(before, other(x))
