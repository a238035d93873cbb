"""Optimisers by PyTorch, their state and copies, schedules, moving average, batches, early stopping, the loop."""

import copy
import io
import math
import pickle
import sys

import numpy as np
import pytest

import fastlstm
from fastlstm import nn

F32, F64 = np.float32, np.float64


@pytest.fixture
def rng():
    return np.random.default_rng(3)


OPTIMISERS = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
    "nesterov": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
    "RMSprop": {"lr": 0.01, "alpha": 0.9, "eps": 1e-6},
    "RMSprop with momentum": {"lr": 0.01, "momentum": 0.8},
    "Adam": {"lr": 0.01, "betas": (0.8, 0.95)},
    "AdamW": {"lr": 0.01, "weight_decay": 0.3},
}


def make(name, buffers):
    return getattr(nn, "SGD" if name == "nesterov" else name.split()[0])(buffers, **OPTIMISERS[name])


@pytest.mark.parametrize("name", OPTIMISERS)
def test_optimisers_match_torch(rng, name):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    buffers = [(rng.normal(size=7), np.empty(7)), (rng.normal(size=3), np.empty(3))]
    theirs = [torch.tensor(p, requires_grad=True) for p, _ in buffers]
    peer = getattr(torch.optim, "SGD" if name == "nesterov" else name.split()[0])(theirs, **OPTIMISERS[name])
    ours = make(name, buffers)
    for _ in range(8):
        for (_, g), tensor in zip(buffers, theirs, strict=True):
            g[:] = rng.normal(size=g.size)
            tensor.grad = torch.tensor(g)
        ours.step()
        peer.step()
    for (p, _), tensor in zip(buffers, theirs, strict=True):
        np.testing.assert_allclose(p, tensor.detach().numpy(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
def test_a_run_goes_on_to_the_bit(rng, name, how):
    gradients = rng.normal(size=(6, 6))
    layer = nn.Linear(2, 2, dtype=F64, rng=0)
    optimiser = make(name, [layer])

    def steps(layer, optimiser, part):
        for g in part:
            layer.flat_grads[:] = g
            optimiser.step()

    steps(layer, optimiser, gradients[:3])
    if how == "state_dict":
        other_layer = copy.deepcopy(layer)
        other = type(optimiser)([other_layer], 123.0)
        file = io.BytesIO()
        np.savez(file, **optimiser.state_dict())
        file.seek(0)
        with np.load(file) as state:
            other.load_state_dict(state)
    elif how == "deepcopy":
        other_layer, other = copy.deepcopy((layer, optimiser))
    else:
        other_layer, other = pickle.loads(pickle.dumps((layer, optimiser)))
    steps(layer, optimiser, gradients[3:])
    assert not np.array_equal(other_layer.flat_params, layer.flat_params)
    steps(other_layer, other, gradients[3:])
    np.testing.assert_array_equal(other_layer.flat_params, layer.flat_params)


def test_a_wrong_state_changes_nothing():
    layer = nn.Linear(2, 2, rng=0)
    adam = nn.Adam([layer])
    layer.flat_grads[:] = 1
    adam.step()
    before = adam.state_dict()
    for change, error in (({"m.0": np.ones(3)}, ValueError), ({"m.0": "x"}, TypeError), ({"what": 1}, ValueError)):
        with pytest.raises(error, match="load_state_dict"):
            adam.load_state_dict({**before, "t": 9, **change})
        after = adam.state_dict()
        assert all(np.array_equal(after[name], before[name]) for name in before)


def test_clip_grad_value():
    pair = (np.zeros(3), np.array([-5.0, 0.5, 2.0]))
    nn.clip_grad_value([pair], 1)
    np.testing.assert_array_equal(pair[1], [-1, 0.5, 1])
    with pytest.raises(ValueError, match="max_value: expected a number >= 0"):
        nn.clip_grad_value([pair], -1)


def test_moving_average():
    p = np.array([1.0])
    ema = nn.EMA([(p, np.zeros(1))], decay=0.5)
    by_hand = 1.0
    for t in range(1, 20):
        p[0] = t * t
        ema.update()
        d = min(0.5, (1 + t) / (10 + t))
        by_hand = d * by_hand + (1 - d) * t * t
    with ema.applied():
        assert p[0] == pytest.approx(by_hand, rel=1e-14)
    assert p[0] == 361
    ema.copy_to_modules()
    assert p[0] == pytest.approx(by_hand, rel=1e-14)


def test_schedules():
    progress = np.linspace(0, 1, 101)
    values = {name: [nn.schedule(name)(x) for x in progress] for name in ("constant", "linear", "cosine", "one_cycle")}
    assert set(values["constant"]) == {1.0}
    np.testing.assert_allclose(values["linear"], 1 - progress, atol=1e-15)
    np.testing.assert_allclose(values["cosine"], 0.5 * (1 + np.cos(np.pi * progress)), atol=1e-15)
    one = np.array(values["one_cycle"])
    assert one.argmax() == 10 and one[10] == 1 and one[0] == pytest.approx(0.01) and one[-1] == pytest.approx(0)
    assert (np.diff(one[:11]) > 0).all() and (np.diff(one[10:]) < 0).all()
    assert nn.schedule(math.sqrt) is math.sqrt
    with pytest.raises(ValueError, match="schedule: expected one of 'constant'"):
        nn.schedule("cyclic")


def ragged(rng, n=60):
    """Sequences of one feature that holds the sequence's number."""
    return [np.full((rng.integers(1, 9), 1), i, F32) for i in range(n)]


def test_batches_hold_each_sequence_once(rng):
    rows = ragged(rng)
    batches = nn.Batches(rows, np.arange(60), 16, rng=0)
    orders = []
    for _ in range(2):
        parts = list(batches)
        assert len(parts) == len(batches) == 4
        for x, target, lengths, weight in parts:
            assert weight is None and x.shape == (lengths.max(), len(target), 1)
            for i, (k, length) in enumerate(zip(target, lengths, strict=True)):
                np.testing.assert_array_equal(x[:length, i, 0], k)
                assert length == len(rows[k]) and not x[length:, i].any()
        orders.append(np.concatenate([target for _, target, _, _ in parts]))
        assert sorted(orders[-1]) == list(range(60))
        padding = sum(x.shape[0] * x.shape[1] - lengths.sum() for x, _, lengths, _ in parts)
        assert padding < 0.25 * sum(map(len, rows))
    assert not np.array_equal(*orders)


def test_batches_of_equal_lengths_and_targets_per_step(rng):
    x, target = rng.normal(size=(5, 4, 2)), rng.normal(size=(5, 4))
    (batch,) = nn.Batches(x, target, 8, per_step=True, weight=np.arange(5))
    np.testing.assert_array_equal(batch.x, x.swapaxes(0, 1))
    np.testing.assert_array_equal(batch.target, target.T)
    np.testing.assert_array_equal(batch.weight, np.broadcast_to(np.arange(5), (4, 5)))
    rows = [np.ones((n, 1)) for n in (3, 1, 2)]
    (batch,) = nn.Batches(rows, [row[:, 0] for row in rows], 3, per_step=True, shuffle=False)
    np.testing.assert_array_equal(batch.weight, [[1, 1, 1], [1, 0, 1], [1, 0, 0]])
    (batch,) = nn.Batches(rows, [row[:, 0] for row in rows], 3, per_step=True, shuffle=False, weight=[2, 3, 4])
    np.testing.assert_array_equal(batch.weight, [[2, 3, 4], [2, 0, 4], [2, 0, 0]])
    with pytest.raises(ValueError, match="target: expected 3, one for each sequence"):
        nn.Batches(rows, [1, 2])
    with pytest.raises(ValueError, match="x: expected at least one sequence"):
        nn.Batches([], [])


def task(rng, n=256):
    """Which of two halves of a noisy sequence has the greater sum; sequences of different lengths."""
    rows = [rng.normal(size=(rng.integers(5, 12), 1)).astype(F32) for _ in range(n)]
    return rows, np.array([int(row.sum() > 0) for row in rows])


def net(seed=0):
    rng = np.random.default_rng(seed)
    return nn.Sequential(nn.Recurrent(fastlstm.GRU(1, 12, rng=rng), last=True), nn.Linear(12, 2, rng=rng))


def test_fit_learns_and_tells(rng, capsys):
    rows, labels = task(rng)
    model = net()
    adam = nn.Adam([model], 0.02)
    seen = []
    history = nn.fit(
        model, nn.Batches(rows, labels, 32, rng=1), adam, epochs=8, schedule="one_cycle", grad_clip=1.0,
        ema=nn.EMA([model], 0.9), callbacks=[lambda m, record: seen.append(record["epoch"])], verbose=1,
    )  # fmt: skip
    assert seen == [1, 2, 3, 4, 5, 6, 7, 8] and adam.lr == 0.02
    assert history[-1]["loss"] < 0.3 * history[0]["loss"] and 0 < history[-1]["lr"] < 0.002
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 8 and out.startswith("epoch 1/8: loss ") and err == ""  # no bar: no terminal
    new, truth = task(np.random.default_rng(77))
    (x, _, lengths, _) = next(iter(nn.Batches(new, truth, 256)))
    assert (model(x, lengths).argmax(axis=1) == truth).mean() > 0.9


def test_a_resumed_fit_is_the_same_to_the_bit(rng):
    rows, labels = task(rng, 96)

    def run(until):
        model = net()
        batches = nn.Batches(rows, labels, 32, rng=1)
        adam = nn.Adam([model], 0.02)
        done = 0
        for epochs in until:
            stop = lambda _, record, at=epochs: record["epoch"] == at  # noqa: E731
            nn.fit(model, batches, adam, epochs=4, start=done, schedule="cosine", callbacks=[stop])
            done = epochs
        return model.flat_params

    np.testing.assert_array_equal(run([4]), run([1, 3, 4]))


def test_early_stopping_keeps_the_best(rng):
    rows, labels = task(rng, 64)
    scores = iter([1.0, 3.0, 2.0, 2.5, 9.0])
    model, kept = net(), []
    stopping = nn.EarlyStopping(lambda m: next(scores), patience=2)
    keep = lambda m, record: kept.append(m.flat_params.copy())  # noqa: E731
    history = nn.fit(model, nn.Batches(rows, labels), nn.Adam([model]), epochs=9, callbacks=[keep, stopping])
    assert [record["validation_score"] for record in history] == [1.0, 3.0, 2.0, 2.5]
    assert stopping.best_epoch == 2 and not np.array_equal(model.flat_params, kept[1])
    stopping.restore(model)
    np.testing.assert_array_equal(model.flat_params, kept[1])


def test_any_score_is_better_than_a_nan(rng):
    scores = iter([np.nan, -2.0, -1.0, np.nan])
    stopping = nn.EarlyStopping(lambda m: next(scores), patience=9)
    nn.fit(model := net(), nn.Batches(*task(rng, 64)), nn.Adam([model]), epochs=4, callbacks=[stopping])
    assert (stopping.best_score, stopping.best_epoch) == (-1.0, 3)
    stopping = nn.EarlyStopping(lambda m: np.nan, patience=2)
    history = nn.fit(model, nn.Batches(*task(rng, 64)), nn.Adam([model]), epochs=9, callbacks=[stopping])
    assert len(history) == 3 and stopping.best_params is not None


def test_fit_wants_a_batch():
    model = net()
    with pytest.raises(ValueError, match="batches: expected at least one batch, got none"):
        nn.fit(model, [], nn.Adam([model]))


def test_fit_says_where_the_loss_is_lost(rng):
    rows, labels = task(rng, 8)
    model = net()
    adam = nn.Adam([model], 0.01)
    lost = lambda z, t: (math.nan, np.zeros_like(z))  # noqa: E731
    before = model.flat_params.copy()
    with pytest.raises(FloatingPointError, match="the loss is nan in epoch 1: try a smaller"):
        nn.fit(model, nn.Batches(rows, labels), adam, lost, schedule="linear")
    np.testing.assert_array_equal(model.flat_params, before)
    assert adam.lr == 0.01


def test_fit_without_tqdm(rng, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    rows, labels = task(rng, 8)
    model = net()
    nn.fit(model, nn.Batches(rows, labels), nn.Adam([model]), verbose=1)
    assert capsys.readouterr().out.startswith("epoch 1/1: loss")
