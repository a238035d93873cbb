"""fastlstm.torch among PyTorch's own tools: copies, files, optimisers, data-parallel training, workers."""

import copy
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastlstm

torch = pytest.importorskip("torch", reason="PyTorch is not installed: no test of fastlstm.torch")
ft = pytest.importorskip("fastlstm.torch")
pytestmark = pytest.mark.usefixtures("one_thread")

T, N, D, H = 6, 5, 3, 4
DEEP = {"num_layers": 2, "bidirectional": True}


def on_its_layer(module):
    """Whether the parameters are the memory of the module's layer, and the call uses them."""
    layer = module.layer
    same = all(p.data_ptr() == v.ctypes.data for p, v in zip(module.parameters(), layer.params.values(), strict=True))
    x = torch.randn(T, N, D, dtype=module.weight_ih_l0.dtype)
    return same and np.array_equal(module(x)[0].detach(), layer(x.numpy())[0])


@pytest.mark.parametrize("how", ["deepcopy", "torch.save", "state_dict", "pickle"])
def test_copies_and_files(how):
    ours = ft.LSTM(D, H, **DEEP)
    ours.weight_hh_l1.requires_grad_(False)
    ours(torch.randn(T, N, D))[0].sum().backward()
    if how == "deepcopy":
        other = copy.deepcopy(ours)
    elif how == "state_dict":
        buffer = io.BytesIO()
        torch.save(ours.state_dict(), buffer)
        assert buffer.tell() < 4 * sum(p.numel() for p in ours.parameters()) + 10_000
        buffer.seek(0)
        other = ft.LSTM(D, H, **DEEP)
        other.load_state_dict(torch.load(buffer, weights_only=True))
    else:
        buffer = io.BytesIO()
        torch.save(ours, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert list(other.state_dict()) == list(ours.state_dict()) and repr(other) == repr(ours)
    for a, b in zip(other.parameters(), ours.parameters(), strict=True):
        assert torch.equal(a, b) and a.data_ptr() != b.data_ptr()
        assert a.requires_grad == b.requires_grad or how == "state_dict"
    assert on_its_layer(other) and on_its_layer(ours)
    with torch.no_grad():
        other.weight_ih_l0.zero_()
    assert ours.weight_ih_l0.any()


def test_a_tied_parameter_stays_tied_in_a_copy():
    a, b = ft.LSTM(D, H), ft.LSTM(D, H)
    b.weight_hh_l0 = a.weight_hh_l0
    model = copy.deepcopy(torch.nn.ModuleList([a, b]))
    a, b = model
    assert a.weight_hh_l0 is b.weight_hh_l0
    model.double()
    assert a.weight_hh_l0 is b.weight_hh_l0 and a.weight_hh_l0.dtype == torch.float64
    x = torch.randn(T, N, D, dtype=torch.float64)
    for module in (a, b):
        assert on_its_layer(module)
    (a(x)[0].sum() + b(x)[0].sum()).backward()
    both = a.weight_hh_l0.grad.clone()
    model.zero_grad()
    a(x)[0].sum().backward()
    assert not torch.equal(a.weight_hh_l0.grad, both)


def test_conversion():
    ours = ft.LSTM(D, H, **DEEP)
    x = torch.randn(T, N, D)
    before, params = ours(x)[0].detach(), list(ours.parameters())
    ours.double()
    assert all(p is q for p, q in zip(ours.parameters(), params, strict=True)) and on_its_layer(ours)
    assert torch.allclose(ours(x.double())[0], before.double(), atol=1e-6)
    ours.to(torch.float32)
    assert on_its_layer(ours) and torch.equal(ours(x)[0], before)
    ours.half()
    with pytest.raises(RuntimeError, match="layer: "):
        ours.layer  # noqa: B018
    ours.float()
    assert on_its_layer(ours)


def test_made_on_no_device_and_filled_later():
    ours = ft.LSTM(D, H, device="meta")
    assert ours(torch.empty(T, N, D, device="meta"))[0].shape == (T, N, H)
    ours.to_empty(device="cpu").reset_parameters()
    assert on_its_layer(ours)
    other = ft.LSTM(D, H, device="meta")
    other.load_state_dict(ours.state_dict(), assign=True)
    x = torch.randn(T, N, D)
    assert torch.equal(other(x)[0], ours(x)[0])


def test_shared_memory_stays_shared():
    ours = ft.LSTM(D, H)
    x = torch.randn(T, N, D)
    before = ours(x)[0]
    ours.share_memory()
    assert all(p.is_shared() for p in ours.parameters())
    with pytest.raises(RuntimeError, match="unshared"):
        ours.layer  # noqa: B018
    assert torch.equal(ours(x)[0], before)
    with torch.no_grad():
        assert torch.equal(ours(x)[0], before)
        for p in ours.parameters():
            p.data.mul_(2)  # as another process would
        assert torch.equal(ours(x)[0], ours.train()(x)[0]) and not torch.equal(ours(x)[0], before)


def test_made_in_inference_mode():
    with torch.inference_mode():
        ours = ft.LSTM(D, H)
        x = torch.randn(T, N, D)
        before = ours(x)[0]
        ours.weight_hh_l0.mul_(2)
        assert not torch.equal(ours(x)[0], before)


@pytest.mark.parametrize("shape", [(T, 0, D), (0, N, D), (0, 0, D)])
def test_nothing_to_do(shape):
    ours = ft.LSTM(D, H, **DEEP)
    x = torch.randn(*shape, requires_grad=True)
    h, c = (torch.randn(4, shape[1], H, requires_grad=True) for _ in range(2))
    y, (h_n, c_n) = ours(x, (h, c))
    assert y.shape == (*shape[:2], 2 * H)
    (y.sum() + h_n.sum() + c_n.sum()).backward()
    assert x.grad.shape == shape and not ours.weight_hh_l0.grad.any()
    assert torch.equal(h.grad, torch.ones_like(h)) or shape[0] > 0
    with torch.no_grad():
        assert ours(x)[0].shape == y.shape


def test_vectors_and_clipping():
    ours, theirs = ft.LSTM(D, H), torch.nn.LSTM(D, H)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(T, N, D)
    norms = []
    for module in (ours, theirs):
        module(x)[0].square().sum().backward()
        norms.append(torch.nn.utils.clip_grad_norm_(module.parameters(), 0.1))
    torch.testing.assert_close(*norms)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-7)
    vector = torch.nn.utils.parameters_to_vector(ours.parameters())
    assert np.array_equal(vector.detach(), ours.layer.flat_params)
    torch.nn.utils.vector_to_parameters(vector * 2, ours.parameters())
    with torch.no_grad():
        assert np.array_equal(ours(x)[0], ours.layer(x.numpy())[0])
    assert np.array_equal(ours.layer.flat_params, (vector * 2).detach())


def test_computed_parameters():
    ours, theirs = ft.LSTM(D, H), torch.nn.LSTM(D, H)
    theirs.load_state_dict(ours.state_dict())

    class Half(torch.nn.Module):
        def forward(self, w):
            return w / 2

    torch.nn.utils.parametrize.register_parametrization(ours, "weight_hh_l0", Half())
    with torch.no_grad():
        theirs.weight_hh_l0.div_(2)
    x = torch.randn(T, N, D)
    y, _ = ours(x)
    torch.testing.assert_close(y, theirs(x)[0])
    y.sum().backward()
    theirs(x)[0].sum().backward()
    original = ours.parametrizations.weight_hh_l0.original
    torch.testing.assert_close(original.grad, theirs.weight_hh_l0.grad / 2, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(ours(x)[0], y)
        original.zero_()
        assert not torch.equal(ours(x)[0], y)


OPTIMISERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2),
    "fused": lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
    "foreach": lambda p: torch.optim.RMSprop(p, 1e-3, foreach=True),
    "lbfgs": lambda p: torch.optim.LBFGS(p, 0.1, max_iter=3),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_optimisers_move_the_layer(name):
    ours, theirs = ft.GRU(D, H, dtype=torch.float64), torch.nn.GRU(D, H, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    x, layer = torch.randn(T, N, D, dtype=torch.float64), ours.layer
    for module in (ours, theirs):
        optimiser = OPTIMISERS[name](module.parameters())

        def closure(module=module, optimiser=optimiser):
            optimiser.zero_grad()
            loss = module(x)[0].square().mean()
            loss.backward()
            return loss

        for _ in range(3):
            optimiser.step(closure)
            with torch.no_grad():
                module.eval()
                y = module(x)[0]
                module.train()
            if module is ours:  # packed weights are never those of the step before
                assert np.array_equal(y, layer(x.numpy())[0])
    assert ours.layer is layer
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_training_follows_the_curve_of_torch():
    """200 steps: embedding, LSTM, linear, cross-entropy, AdamW, schedule, clipping; packed sequences."""
    words, classes, steps = 12, 4, 200

    class Tagger(torch.nn.Module):
        def __init__(self, lstm):
            super().__init__()
            self.embedding, self.out = torch.nn.Embedding(words, 16), torch.nn.Linear(48, classes)
            self.lstm = lstm(16, 24, num_layers=2, bidirectional=True)

        def forward(self, x, lengths):
            packed = torch.nn.utils.rnn.pack_padded_sequence(self.embedding(x), lengths, enforce_sorted=False)
            return self.out(torch.nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0])[0])

    curves = []
    for lstm in (ft.LSTM, torch.nn.LSTM):
        torch.manual_seed(0)
        model = Tagger(lstm)
        optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 5e-3, total_steps=steps)
        draw = torch.Generator().manual_seed(1)
        curve = []
        for _ in range(steps):
            x = torch.randint(words, (12, 8), generator=draw)
            lengths = torch.randint(1, 13, (8,), generator=draw)
            lengths[0] = 12
            labels = x.roll(1, 0) % classes
            labels[torch.arange(12)[:, None] >= lengths] = -100
            loss = torch.nn.functional.cross_entropy(model(x, lengths).flatten(0, 1), labels.flatten())
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            curve.append(loss.item())
        curves.append(curve)
    assert curves[1][-1] < 0.5 * curves[1][0]  # it learns
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*use_reentrant:UserWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_of_torch(reentrant):
    ours = ft.LSTM(D, H, num_layers=2, dropout=0.3)
    x = torch.randn(T, N, D, requires_grad=True)
    found = []
    for checkpoint in (True, False):
        torch.manual_seed(0)
        if checkpoint:
            y = torch.utils.checkpoint.checkpoint(lambda x: ours(x)[0], x, use_reentrant=reentrant)
        else:
            y = ours(x)[0]
        found.append(torch.autograd.grad(y.sum(), x)[0] if not (checkpoint and reentrant) else grad_by_backward(y, x))
    assert torch.equal(*found)


def test_the_tape_goes_when_it_is_used_and_where_saved_tensors_go_elsewhere():
    ours = ft.LSTM(D, H, num_layers=2)
    x = torch.randn(T, N, D, requires_grad=True)
    y, _ = ours(x)
    assert y.grad_fn.tape is not None
    (want,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    assert y.grad_fn.tape is None
    moved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: moved.append(t) or t.clone(), lambda t: t):
        y, _ = ours(x)
    assert y.grad_fn.tape is None and len(moved) >= 6
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], want)


def grad_by_backward(y, x):
    y.sum().backward()
    return x.grad


DDP = """
import os
import sys
import torch
import torch.distributed as dist
import fastlstm.torch

def work(rank, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="file://" + path, rank=rank, world_size=2)
    torch.manual_seed(rank)  # DDP makes the parameters those of rank 0
    model = torch.nn.parallel.DistributedDataParallel(fastlstm.torch.LSTM(3, 4, num_layers=2))
    alone = torch.nn.LSTM(3, 4, num_layers=2)
    alone.load_state_dict(model.module.state_dict())
    ours, theirs = torch.optim.SGD(model.parameters(), 0.1), torch.optim.SGD(alone.parameters(), 0.1)
    x = torch.randn(2, 5, 6, 3, generator=torch.Generator().manual_seed(5))
    for _ in range(3):
        ours.zero_grad()
        theirs.zero_grad()
        model(x[rank])[0].square().mean().backward()
        ((alone(x[0])[0].square().mean() + alone(x[1])[0].square().mean()) / 2).backward()
        ours.step()
        theirs.step()
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    layer = model.module.layer
    assert (torch.from_numpy(layer.flat_params) == torch.nn.utils.parameters_to_vector(model.parameters())).all()
    print("trained as one", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo was once seen to end a process by std::terminate while it ended

if __name__ == "__main__":
    torch.multiprocessing.spawn(work, (sys.argv[1],), nprocs=2)
"""


def test_two_processes_train_as_one(tmp_path):
    script = tmp_path / "ddp.py"
    script.write_text(DDP)
    env = os.environ | {"PYTHONPATH": str(Path(fastlstm.__file__).parents[1])}
    command = [sys.executable, script, tmp_path / "meet"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0 and done.stdout.count("trained as one") == 2, done.stderr[-2000:]


class Features(torch.utils.data.Dataset):
    """A data set whose items come from a module of ours."""

    def __init__(self):
        self.rnn = ft.LSTM(8, 128)

    def __len__(self):
        return 4

    def __getitem__(self, i):
        with torch.no_grad():
            y = self.rnn(torch.full((20, 64, 8), i / 4))[0][-1]
        return y, torch.get_num_threads(), ft._carry.Over._threads()


@pytest.mark.own
@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_workers_of_a_data_loader(start):
    """They neither hang nor take more than one thread, also after the parent ran a team."""
    torch.set_num_threads(2)
    data = Features()
    want = [data[i][0] for i in range(4)]
    torch.set_num_threads(1)
    loader = torch.utils.data.DataLoader(data, num_workers=2, multiprocessing_context=start, timeout=100)
    for (y, theirs, ours), expected in zip(loader, want, strict=True):
        assert torch.equal(y[0], expected) and theirs == ours == 1
