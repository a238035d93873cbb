"""The same bits: for any thread count, batch, window of steps, checkpoint, and from a stream."""

import numpy as np
import pytest
from conftest import CELLS, COLUMNS, STATES, caches, make, named, problem, same, same_bits, teams, train

import fastlstm
from fastlstm import engine

pytestmark = pytest.mark.own

THREADS = (1, 2, 3, 5)
DTYPES = (np.float32, np.float64)
ACROSS_SEQUENCES = ("batch", "stacked")
# name: (T, N, D, H), options. In teams of the kind that the name says.
SHAPES = {
    "batch": ((13, 11, 5, 69), {}),
    "units": ((11, 3, 17, 133), {}),
    "one": ((29, 1, 21, 131), {}),
    "stacked": ((9, 10, 5, 67), {"num_layers": 2, "bidirectional": True}),
    "stacked units": ((7, 2, 18, 129), {"num_layers": 2, "bidirectional": True}),
}
# Every shape in float32, both modes and a stack in float64.
CASES = [(np.float32, shape) for shape in SHAPES] + [(np.float64, shape) for shape in ("batch", "units", "stacked")]
IDS = [f"{np.dtype(dtype).name}-{shape}" for dtype, shape in CASES]


@pytest.fixture(autouse=True)
def team(request):
    """The shapes run in teams, as their names say; what has no shape as plan() has it."""
    shape = request.node.callspec.params.get("shape") if hasattr(request.node, "callspec") else None
    if shape is None:
        yield
    else:
        with teams(shape not in ACROSS_SEQUENCES):
            yield


def every(test):
    return pytest.mark.parametrize("cell", CELLS)(pytest.mark.parametrize("dtype, shape", CASES, ids=IDS)(test))


def build(cell, shape, dtype, **options):
    (T, N, D, H), more = SHAPES[shape]
    return make(cell, D, H, dtype=dtype, **more, **options), T, N


def ragged(T, N):
    lengths = np.random.default_rng(5).integers(0, T + 1, N)
    lengths[-1] = T - 1
    if N > 2:
        lengths[:2] = 0, T
    return lengths


def columns(state, index):
    return tuple(s[:, index] for s in state) if isinstance(state, tuple) else state[:, index]


@pytest.mark.parametrize("shape", SHAPES)
def test_modes(shape):
    """The shapes above run as they are called."""
    (T, N, D, H), more = SHAPES[shape]
    for cell in CELLS:
        for threads in (2, 3):
            team, by_units, _ = engine.plan(T, N, D, H, COLUMNS[cell], 4, 2 if more else 1, threads, -(-H // 64))
            assert team == threads
            assert by_units == (shape not in ACROSS_SEQUENCES)


@every
def test_threads(isa, cell, dtype, shape):
    layer, T, N = build(cell, shape, dtype)
    for lengths, team in ((None, THREADS), (ragged(T, N), (1, 3))):
        p = problem(layer, T, N, lengths)
        results = []
        for threads in team:
            fastlstm.set_num_threads(threads)
            results.append((named(layer, *layer(p.x, p.state, lengths)), train(layer, p)[0]))
        for result in results[1:]:
            same(result, results[0])
        same({k: results[0][1][k] for k in results[0][0]}, results[0][0])  # training == inference


@pytest.mark.parametrize("cell, options", [
    ("lstm", {"dropout": 0.3, "recurrent_dropout": 0.3, "zoneout": (0.2, 0.2), "proj_size": 33}),
    ("gru", {"dropout": 0.3, "recurrent_dropout": 0.3, "zoneout": 0.2}),
    ("gru_reset_before", {"dropout": 0.3, "recurrent_dropout": 0.3, "zoneout": 0.2}),
    ("rnn", {"dropout": 0.3, "recurrent_dropout": 0.3, "zoneout": 0.2}),
])  # fmt: skip
@pytest.mark.parametrize("shape", ("stacked", "stacked units"))
def test_threads_and_masks(isa, cell, options, shape):
    """Masks come from the layer's generator in the same order for any thread count and with checkpoints."""
    results = []
    for threads, every_ in ((1, None), (2, None), (3, None), (2, 3)):
        layer, T, N = build(cell, shape, np.float32, **options)
        fastlstm.set_num_threads(threads)
        results.append(train(layer, problem(layer, T, N, ragged(T, N)), checkpoint_every=every_)[0])
    for result in results[1:]:
        same(result, results[0])


@every
def test_batch(isa, cell, dtype, shape):
    """A row does not depend on the rows beside it: whole, split, alone, permuted."""
    layer, T, N = build(cell, shape, dtype)
    N = max(N, 4)
    p = problem(layer, T, N)
    whole = layer(p.x, p.state)
    parts = [np.arange(N)[s] for s in (slice(0, 1), slice(1, N // 2 + 1), slice(N // 2 + 1, N))]
    parts += [np.random.default_rng(2).permutation(N), np.array([N - 1])]
    for threads in (1, 2):
        fastlstm.set_num_threads(threads)
        for part in parts:
            y, state = layer(p.x[:, part], columns(p.state, part))
            same(y, whole[0][:, part])
            same(state, columns(whole[1], part))


@every
def test_backward_of_a_row(isa, cell, dtype, shape):
    """Neither does its gradient."""
    layer, T, N = build(cell, shape, dtype)
    N = max(N, 4)
    p = problem(layer, T, N)
    whole, _ = train(layer, p)
    fastlstm.set_num_threads(1)
    for part in (np.array([2]), np.arange(N)[::-1][: N // 2 + 1]):
        q = problem(layer, T, N)
        q.x, q.dy, q.state, q.dstate = (
            p.x[:, part],
            p.dy[:, part],
            columns(p.state, part),
            columns(p.dstate, part),
        )
        got, _ = train(layer, q)
        for name in ("dx", "dh", "dc"):
            if name in whole:
                same(got[name], whole[name][:, part])


@every
def test_ragged_row_is_the_sequence_alone(isa, cell, dtype, shape):
    layer, T, N = build(cell, shape, dtype)
    lengths = ragged(T, N)
    p = problem(layer, T, N, lengths)
    y, state = layer(p.x, p.state, lengths)
    got, _ = train(layer, p)
    fastlstm.set_num_threads(1)
    same(got["y"], y)
    for n in range(N):
        one, length = slice(n, n + 1), lengths[n]
        y_n, state_n = layer(p.x[:length, one], columns(p.state, one))
        same(y[:length, one], y_n)
        same(columns(state, one), state_n)
        assert not y[length:, n].any() and not got["dx"][length:, n].any()


@pytest.mark.parametrize("cell", CELLS)
def test_padding_changes_no_bit(isa, cell):
    layer, T, N = build(cell, "stacked", np.float32)
    lengths = ragged(T, N)
    dirty, clean = (problem(layer, T, N, lengths, poison=poison) for poison in (True, False))
    assert np.isnan(dirty.x).any() and np.isnan(dirty.dy).any() and not np.isnan(clean.x).any()
    same(train(layer, dirty)[0], train(layer, clean)[0])
    longer = problem(layer, T, N, lengths)  # more padding at the end
    for name in ("x", "dy"):
        a = getattr(longer, name)
        setattr(longer, name, np.concatenate([a, np.full_like(a[:5], np.nan)]))
    result, _ = train(layer, longer)
    result["y"], result["dx"] = result["y"][:T], result["dx"][:T]
    same(result, train(layer, dirty)[0])


one_way = pytest.mark.parametrize("shape", ("batch", "units", "one"))


@one_way
@pytest.mark.parametrize("dtype", DTYPES, ids=("f32", "f64"))
@pytest.mark.parametrize("cell", CELLS)
def test_windows(isa, cell, dtype, shape, monkeypatch):
    """The sequence whole, and in windows of steps down to one with the state carried, two layers."""
    layer, T, N = build(cell, shape, dtype, num_layers=2)
    p = problem(layer, T, N)
    for threads, more in ((1, range(T + 1)), (2, [0, 1, T - 1, T])):
        fastlstm.set_num_threads(threads)
        y, last = layer(p.x, p.state)
        for cuts in ([0, 4, 5, T], more):
            state, parts = p.state, []
            for begin, end in zip(cuts, list(cuts)[1:], strict=False):
                part, state = layer(p.x[begin:end], state)
                parts.append(part)
            same(np.concatenate(parts), y)
            same(state, last)
    monkeypatch.setattr(fastlstm._weights, "_WINDOW", 3 * N)  # the layer's own windows
    for lengths in (None, ragged(T, N)):
        same(
            named(layer, *layer(p.x, p.state, lengths)),
            {k: train(layer, problem(layer, T, N, lengths))[0][k] for k in ("y", *STATES[cell])},
        )


@one_way
@pytest.mark.parametrize("dtype", DTYPES, ids=("f32", "f64"))
@pytest.mark.parametrize("cell", CELLS)
def test_stream(isa, cell, dtype, shape):
    layer, T, N = build(cell, shape, dtype, num_layers=2)
    p = problem(layer, T, N)
    y, last = layer(p.x, p.state)
    stream = layer.stream(N)
    stream.state = p.state
    for t in range(T):
        same(stream.step(p.x[t]), y[t])
    same(stream.state, last)


@every
def test_checkpoints(isa, cell, dtype, shape):
    layer, T, N = build(cell, shape, dtype)
    for lengths, sizes in ((None, (1, 7)), (ragged(T, N), (3, 100))):
        p = problem(layer, T, N, lengths)
        fastlstm.set_num_threads(1)
        want, _ = train(layer, p)
        for threads, size in enumerate(sizes, 1):
            fastlstm.set_num_threads(threads)
            same(train(layer, p, checkpoint_every=size)[0], want)


@one_way
@pytest.mark.parametrize("dtype", DTYPES, ids=("f32", "f64"))
@pytest.mark.parametrize("cell", CELLS)
def test_backpropagation_in_windows(isa, cell, dtype, shape):
    """State gradients handed from window to window: the gradients of one long pass."""
    layer, T, N = build(cell, shape, dtype, num_layers=2)
    p = problem(layer, T, N)
    want, _ = train(layer, p)
    for cuts, threads in (([0, 4, 5, T], 2), (range(T + 1), 1)):
        fastlstm.set_num_threads(threads)
        layer.zero_grad()
        state, tapes, dxs, dstate = p.state, [], [], p.dstate
        windows = list(zip(cuts, list(cuts)[1:], strict=False))
        for begin, end in windows:
            _, state, tape = layer.forward(p.x[begin:end], state)
            tapes.append(tape)
        for (begin, end), tape in zip(windows[::-1], tapes[::-1], strict=True):
            dx, dstate = layer.backward(tape, p.dy[begin:end], dstate)
            dxs.insert(0, dx)
        got = named(layer, want["y"], state, np.concatenate(dxs), dstate, layer.grads)
        same(got, want)


@pytest.mark.parametrize("cell", CELLS)
def test_many_rows(isa, cell):
    """More rows than the products over all rows take at a time, also in one step, and more sequences than a block."""
    layer = make(cell, 4, 19, dtype=np.float32)
    p = problem(layer, 6, 203)
    before = engine.tune()
    results = []
    try:
        for threads, size, chunk in (
            (1, None, 512),
            (2, None, 512),
            (5, None, 512),
            (2, 2, 512),
            (1, None, 64),
            (2, 2, 64),
        ):
            fastlstm.set_num_threads(threads)
            engine.tune(chunk=chunk)
            results.append(train(layer, p, checkpoint_every=size or None)[0])
    finally:
        engine.tune(**before)
    for result in results[1:]:
        same(result, results[0])
    part = np.r_[3, 95:99, 202]
    same(layer(p.x[:, part], columns(p.state, part))[0], results[0]["y"][:, part])


@pytest.mark.parametrize("dtype", DTYPES, ids=("f32", "f64"))
@pytest.mark.parametrize("cell, options", [
    *((cell, options) for cell in CELLS for options in ({}, {"num_layers": 2, "bidirectional": True})),
    ("lstm", {"proj_size": 19}), ("lstm_peephole", {"proj_size": 19}),
])  # fmt: skip
def test_panels_in_stretches(isa, cell, options, dtype):
    """However a cache cuts the panels of weights: at most 8, 300 and 3000 bytes of a panel at a time, for few tiles of
    rows and for more than go through them together."""
    layer = make(cell, 21, 37, dtype=dtype, **options)
    for N in (7, 20, 203):
        p = problem(layer, 3, N, 3 - np.arange(N) % 4)
        with caches(1 << 30, 1 << 30):
            want = train(layer, p)[0], named(layer, *layer(p.x, p.state, p.lengths))
            if dtype == np.float32:
                rounded = layer.freeze("bfloat16")(p.x, lengths=p.lengths)[0]
                layer.unfreeze()
        for size, l2_feeds in ((8, 0), (300, 1), (300, 0), (3000, 1)):
            with caches(size * 16 // 7, size * 4, l2_feeds), teams(by_units=N > 96):
                same((train(layer, p)[0], named(layer, *layer(p.x, p.state, p.lengths))), want)
                if dtype == np.float32:
                    same(layer.freeze("bfloat16")(p.x, lengths=p.lengths)[0], rounded)
                    layer.unfreeze()


@pytest.mark.parametrize("dtype", DTYPES, ids=("f32", "f64"))
@pytest.mark.parametrize("cell", CELLS)
def test_layout_of_the_arguments(isa, cell, dtype):
    """Strided, unaligned, byte-swapped, big and read-only arrays give the bits of their plain copies."""
    layer = make(cell, 5, 19, dtype=dtype)
    p = problem(layer, 6, 4)
    want, _ = train(layer, p)

    def forms(a):
        wide = np.empty((*a.shape[:-1], 2 * a.shape[-1]), a.dtype)
        wide[..., ::2] = a
        yield wide[..., ::2]
        raw = np.empty(a.nbytes + 1, np.uint8)[1:].view(a.dtype).reshape(a.shape)
        raw[...] = a
        yield raw
        yield a.astype(a.dtype.newbyteorder())
        yield np.asfortranarray(a)
        frozen = a.copy()
        frozen.flags.writeable = False
        yield frozen

    for x, dy in zip(forms(p.x), forms(p.dy), strict=True):
        q = problem(layer, 6, 4)
        q.x, q.dy = x, dy
        same(train(layer, q)[0], want)


def test_same_bits_sees_one_bit():
    a = np.ones(3)
    b = a.copy()
    b[1] = np.nextafter(1, 2)
    assert same_bits(a, a.copy()) and not same_bits(a, b) and not same_bits(np.zeros(1), -np.zeros(1))


@pytest.mark.parametrize("cell", CELLS)
def test_directions_side_by_side_share_no_memory(cell):
    options = {"proj_size": 16} if cell == "lstm" else {}
    layer = make(cell, 7, 40, bidirectional=True, rng=0, **options)
    x = np.random.default_rng(1).standard_normal((13, 8, 7), dtype=np.float32)
    fastlstm.set_num_threads(1)
    expected = layer(x)[0]
    fastlstm.set_num_threads(2)
    try:
        assert all(same_bits(layer(x)[0], expected) for _ in range(100))
    finally:
        fastlstm.set_num_threads(None)
