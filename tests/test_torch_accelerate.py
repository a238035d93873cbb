"""fastlstm.torch.accelerate and restore on models as people write them."""

import copy

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed: no test of fastlstm.torch")
ft = pytest.importorskip("fastlstm.torch")
pytest.importorskip("torch.nn.utils.prune")
pytestmark = pytest.mark.usefixtures("one_thread")
nn = torch.nn
rnn_utils = torch.nn.utils.rnn

OURS = (ft.LSTM, ft.GRU, ft.RNN, ft.LSTMCell, ft.GRUCell, ft.RNNCell)


class Seq2Seq(nn.Module):
    """Encoder, and a decoder of cells that attends to it."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.encoder = nn.GRU(8, 6, bidirectional=True, batch_first=True)
        self.bridge, self.decoder = nn.Linear(12, 12), nn.LSTMCell(8 + 12, 12)
        self.out = nn.Linear(24, 20)

    def forward(self, source, target):
        keys, h = self.encoder(self.embedding(source))
        h = self.bridge(torch.cat(list(h), 1))
        c, context, outputs = torch.zeros_like(h), keys.mean(1), []
        for word in self.embedding(target).unbind(1):
            h, c = self.decoder(torch.cat([word, context], 1), (h, c))
            weights = torch.softmax((keys @ h[:, :, None]).squeeze(2), 1)
            context = (weights[:, :, None] * keys).sum(1)
            outputs.append(self.out(torch.cat([h, context], 1)))
        return torch.stack(outputs, 1)


class Half(nn.Module):
    """A recurrent layer whose states are dropped, for use in a Sequential."""

    def __init__(self, size_in, size_out):
        super().__init__()
        self.rnn = nn.LSTM(size_in, size_out, bidirectional=True)
        self.embedding = nn.Linear(2 * size_out, size_out)

    def forward(self, x):
        y, _ = self.rnn(x)
        return self.embedding(y)


class CRNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.cnn = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d((8, 1)))
        self.rnn = nn.Sequential(Half(4, 8), nn.Sequential(Half(8, 5)))

    def forward(self, x):
        return self.rnn(self.cnn(x).squeeze(2).permute(2, 0, 1)).log_softmax(2)


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 6)
        self.lstm = nn.LSTM(6, 7, num_layers=2, bidirectional=True, batch_first=True, dropout=0.2)
        self.out = nn.Linear(14, 4)

    def forward(self, x, lengths):
        packed = rnn_utils.pack_padded_sequence(self.embedding(x), lengths, batch_first=True, enforce_sorted=False)
        self.lstm.flatten_parameters()
        y, (h_n, _) = self.lstm(packed)
        return self.out(rnn_utils.pad_packed_sequence(y, batch_first=True)[0]), h_n


class Tied(nn.Module):
    """One layer in two places, two layers with one recurrent matrix, an output tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.embedding, self.out = nn.Embedding(20, 6), nn.Linear(6, 20, bias=False)
        self.out.weight = self.embedding.weight
        self.first = nn.RNN(6, 6, nonlinearity="relu")
        self.again = nn.ModuleDict({"first": self.first, "other": nn.RNN(6, 6)})
        self.again["other"].weight_hh_l0 = self.first.weight_hh_l0
        self.first.bias_hh_l0.requires_grad_(False)

    def forward(self, x):
        x = self.embedding(x)
        for rnn in (self.first, self.again["first"], self.again["other"]):
            x = rnn(x)[0]
        return self.out(x)


class Cells(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells = nn.ModuleList(
            [nn.GRUCell(5, 6), nn.RNNCell(6, 6, nonlinearity="relu"), nn.LSTMCell(6, 4, bias=False)]
        )

    def forward(self, x):
        h = [None] * 3
        for step in x:
            for i, cell in enumerate(self.cells):
                h[i] = step = cell(step, h[i])
                step = step[0] if isinstance(step, tuple) else step
        return step


class Mixed(nn.Module):
    """Projection, a single sequence, float64, a state that goes on."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(5, 8, num_layers=2, proj_size=3, dtype=torch.float64)
        self.gru = nn.GRU(3, 4, dropout=0.0, bias=False, dtype=torch.float64)

    def forward(self, x):
        y, state = self.lstm(x)
        y, _ = self.lstm(x.flip(0), hx=state)
        return self.gru(y)[0]


def models():
    torch.manual_seed(0)
    words = torch.randint(20, (4, 9))
    yield "seq2seq", Seq2Seq(), (words, torch.randint(20, (4, 5))), 2
    yield "crnn", CRNN(), (torch.randn(3, 1, 8, 11),), 2
    yield "tagger", Tagger(), (words, torch.tensor([9, 2, 5, 1])), 1
    yield "tied", Tied(), (words,), 3
    yield "cells", Cells(), (torch.randn(7, 3, 5),), 3
    yield "mixed", Mixed(), (torch.randn(6, 5, dtype=torch.float64),), 2


MODELS = {name: rest for name, *rest in models()}


def tensors(found):
    return [t for part in (found if isinstance(found, tuple) else (found,)) for t in [part]]


def results(model, inputs):
    """Outputs in evaluation, and in a training step without dropout the gradients."""
    model.eval()
    with torch.no_grad():
        outputs = tensors(model(*inputs))
    model.zero_grad()
    sum(t.square().mean() for t in tensors(model(*inputs))).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return outputs, grads


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_the_same(name):
    model, inputs, places = MODELS[name]
    model = copy.deepcopy(model)
    before, grads = results(model, inputs)
    state, params = copy.deepcopy(model.state_dict()), dict(model.named_parameters())
    modes = {id(p): p.requires_grad for p in model.parameters()}
    training = [key for key, m in model.named_modules() if m.training]

    done = ft.accelerate(model)
    assert len(done.replaced) == places and not done.left
    for key, old in done.replaced.items():
        ours = model.get_submodule(key)
        assert isinstance(ours, OURS) and type(ours).__name__ == type(old).__name__
    assert not any(isinstance(m, (nn.RNNBase, nn.RNNCellBase)) for m in model.modules())
    assert list(model.state_dict()) == list(state)
    assert all(p is params[key] for key, p in model.named_parameters()) and len(params) == len(
        dict(model.named_parameters())
    )
    assert {id(p): p.requires_grad for p in model.parameters()} == modes
    assert [key for key, m in model.named_modules() if m.training] == training
    after, ours = results(model, inputs)
    assert grads.keys() == ours.keys()
    for a, b in zip([*before, *grads.values()], [*after, *ours.values()], strict=True):
        assert b.abs().max() > 0 and (a - b).abs().max() <= 1e-5 * a.abs().max()

    again = copy.deepcopy(model)
    assert sorted(ft.restore(model)) == sorted(done.replaced)
    assert ft.restore(model) == []
    for a, b in zip(before, results(model, inputs)[0], strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert all(model.get_submodule(key) is old for key, old in done.replaced.items())

    assert sorted(ft.restore(again)) == sorted(done.replaced)  # a copy has what stood before, too
    for a, b in zip(before, results(again, inputs)[0], strict=True):
        assert torch.equal(a, b)


def test_training_goes_on_with_the_same_optimiser_and_back():
    """Ours and theirs in turns, one Adam, one curve."""
    curves = []
    for turns in (False, True):
        model, inputs, _ = copy.deepcopy(MODELS["tied"])
        optimiser = torch.optim.Adam(model.parameters(), 1e-2)
        curve = []
        for step in range(20):
            if turns and step % 5 == 0:
                ft.restore(model) if step % 10 else ft.accelerate(model)
            optimiser.zero_grad()
            loss = nn.functional.cross_entropy(model(*inputs).flatten(0, 1), inputs[0].flatten())
            loss.backward()
            optimiser.step()
            curve.append(loss.item())
        curves.append(curve)
    assert curves[0][-1] < 0.7 * curves[0][0]
    torch.testing.assert_close(*map(torch.tensor, curves), rtol=1e-4, atol=0)


def test_hooks_and_attributes_stay():
    model = nn.Sequential(Half(4, 5))
    calls = []
    old = model[0].rnn
    old.note = "kept"
    old.register_buffer("steps", torch.ones(2))
    first = old.register_forward_hook(lambda module, args, output: calls.append("forward"))
    old.register_forward_pre_hook(lambda module, args: calls.append("before"))
    old.register_full_backward_hook(lambda module, dx, dy: calls.append("backward"))
    keys = list(model.state_dict())
    ft.accelerate(model)
    ours = model[0].rnn
    assert isinstance(ours, ft.LSTM) and ours.note == "kept" and list(model.state_dict()) == keys
    model(torch.randn(3, 2, 4, requires_grad=True)).sum().backward()
    assert calls == ["before", "forward", "backward"]
    first.remove()  # a handle from before works
    second = ours.register_forward_hook(lambda module, args, output: calls.append("ours"))
    calls.clear()
    model(torch.randn(3, 2, 4))
    assert calls == ["before", "ours"]
    ft.restore(model)
    calls.clear()
    model(torch.randn(3, 2, 4))
    assert calls == ["before", "ours"]
    second.remove()
    model(torch.randn(3, 2, 4))
    assert calls == ["before", "ours", "before"]


class Own(nn.LSTM):
    pass


def test_what_is_left_has_a_reason():
    model = nn.ModuleDict({
        "own": Own(3, 4), "low": nn.LSTM(3, 4).half(), "meta": nn.GRU(3, 4, device="meta"), "patched": nn.RNN(3, 4),
        "normed": nn.utils.parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0"), "fine": nn.GRU(3, 4),
    })  # fmt: skip
    model["patched"].forward = lambda *args: None
    torch.nn.utils.prune.l1_unstructured(pruned := nn.LSTMCell(3, 4), "weight_ih", 0.5)
    model["pruned"] = pruned
    kinds = {key: type(m) for key, m in model.items()}
    done = ft.accelerate(model)
    assert list(done.replaced) == ["fine"]
    words = {"own": "subclass", "low": "float16", "meta": "CPU", "patched": "forward", "normed": "subclass",
             "pruned": "computed"}  # fmt: skip
    assert done.left.keys() == words.keys()
    for key, word in words.items():
        assert word in done.left[key] and type(model[key]) is kinds[key], key


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_is_refused():
    scripted = torch.jit.script(CRNN())
    with pytest.raises(TypeError, match="TorchScript"):
        ft.accelerate(scripted)
    with pytest.raises(TypeError, match="TorchScript"):
        ft.restore(scripted)
    model = nn.Sequential(scripted, Half(5, 5))
    done = ft.accelerate(model)
    assert list(done.replaced) == ["1.rnn"] and len(done.left) == 2
    assert all("TorchScript" in reason for reason in done.left.values())
    model = CRNN()
    ft.accelerate(model)
    with pytest.raises(TypeError, match="restore"):
        torch.jit.script(model)
    ft.restore(model)
    torch.jit.script(model)


@pytest.mark.parametrize(
    "value, text", [(nn.LSTM(3, 4), "itself a LSTM"), (nn.GRUCell(3, 4), "GRUCell"), (3, "got int")]
)
def test_errors(value, text):
    with pytest.raises(TypeError, match=text):
        ft.accelerate(value)


def test_dropout_of_a_single_layer_is_what_it_was():
    with pytest.warns(UserWarning, match="dropout option"):
        model = nn.Sequential(nn.LSTM(3, 4, dropout=0.5))
    ft.accelerate(model)
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(model(x)[0], ft.restore(model) and model(x)[0])


def test_parallel_data(tmp_path):
    """DistributedDataParallel around the model, in one process: replaced inside, gradients as before."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        model, inputs, _ = copy.deepcopy(MODELS["tagger"])
        model.lstm.dropout = 0.0
        parallel = nn.parallel.DistributedDataParallel(model)
        before, grads = results(parallel, inputs)
        done = ft.accelerate(parallel)
        assert list(done.replaced) == ["module.lstm"]
        after, ours = results(parallel, inputs)
        for a, b in zip([*before, *grads.values()], [*after, *ours.values()], strict=True):
            assert (a - b).abs().max() <= 1e-5 * a.abs().max()
        ft.restore(parallel)
        assert all(torch.equal(a, b) for a, b in zip(before, results(parallel, inputs)[0], strict=True))
    finally:
        dist.destroy_process_group()


def test_restore_refuses_parameters_that_are_computed_since():
    """The module that stood there would have been given values of before the training, or half of them."""
    prune, parametrizations = torch.nn.utils.prune, torch.nn.utils.parametrizations
    for compute, undo in (
        (lambda rnn: parametrizations.weight_norm(rnn, "weight_hh_l0"),
         lambda rnn: torch.nn.utils.parametrize.remove_parametrizations(rnn, "weight_hh_l0")),
        (lambda rnn: prune.l1_unstructured(rnn, "weight_hh_l0", 0.5), lambda rnn: prune.remove(rnn, "weight_hh_l0")),
    ):  # fmt: skip
        model, x = nn.ModuleDict({"a": nn.GRU(3, 4), "b": nn.LSTM(4, 5)}), torch.randn(6, 2, 3)
        ft.accelerate(model)
        compute(model["b"])
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.5)
        want = model["b"](model["a"](x)[0])[0]
        with pytest.raises(ValueError, match="'b'.*weight_norm"):
            ft.restore(model)
        assert isinstance(model["a"], OURS)  # nothing has changed
        undo(model["b"])
        assert ft.restore(model) == ["a", "b"]
        torch.testing.assert_close(model["b"](model["a"](x)[0])[0], want)


def test_restore_keeps_what_was_assigned_meanwhile():
    model = nn.Sequential(nn.LSTM(3, 4, num_layers=2, dropout=0.5))
    ft.accelerate(model)
    model[0].dropout, model[0].batch_first = 0.0, True
    ft.restore(model)
    assert (type(model[0]), model[0].dropout, model[0].batch_first) == (nn.LSTM, 0.0, True)
