"""Memory: what is kept between calls, what a call keeps, and what is left when there is not enough."""

import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from conftest import CELLS, make, problem, same, same_bits, train

import fastlstm
from fastlstm import engine

pytestmark = pytest.mark.own
ROOT = Path(fastlstm.__file__).resolve().parents[1]
MB = 1 << 20
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

PREPARE = """
import numpy as np, fastlstm, os

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

small = fastlstm.LSTM(3, 5, rng=0)
x = np.ones((4, 2, 3), np.float32)
small.backward(small.forward(x)[2], None)
fastlstm.LSTM(3, 256, rng=0)(x)
begin = resident()
"""
TRAINING = """
layer = fastlstm.LSTM(64, 256, rng=0)
y, _, tape = layer.forward(np.ones((2000, 64, 64), np.float32))
layer.backward(tape, y)
del y, tape
"""
INFERENCE = """
layer = fastlstm.LSTM(64, 256, rng=0)
for T in range(1000, 1601, 20):
    layer(np.ones((T, 25, 64), np.float32))
"""


@linux
@pytest.mark.parametrize("work", [TRAINING, INFERENCE], ids=["one training call", "31 inference calls"])
def test_memory_goes_back(work):
    """After large calls and 32 small ones the process keeps at most 64 MB more than before."""
    code = PREPARE + work + "print(resident() - begin)\nfor _ in range(32): small(x)\nprint(resident() - begin)"
    path = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | path, timeout=120)
    assert run.returncode == 0, run.stderr
    held, kept = map(float, run.stdout.split())
    assert held > 64, "nothing was kept after the large calls, so nothing is shown"
    assert kept <= 64


def test_limit_of_what_is_kept():
    layer, x = fastlstm.LSTM(8, 32, rng=0), np.ones((500, 16, 8), np.float32)
    try:
        fastlstm.release_memory()
        assert engine.memory_kept() == 0
        layer(x)
        assert engine.memory_kept() > 100_000
        fastlstm.set_memory_kept(50_000)
        assert engine.memory_kept() <= 50_000
        layer(x)
        assert engine.memory_kept() <= 50_000
        fastlstm.set_memory_kept(0)
        layer(x)
        assert engine.memory_kept() == 0
        for wrong, error in ((-1, ValueError), (1.5, TypeError), (True, TypeError), ("1 GB", TypeError)):
            with pytest.raises(error, match="nbytes: expected"):
                fastlstm.set_memory_kept(wrong)
    finally:
        fastlstm.set_memory_kept(None)
    layer(x)
    assert engine.memory_kept() > 100_000


def test_a_training_loop_keeps_its_blocks():
    """Sixteen calls long; a loop's own are used at every turn, so they stay, and no block is fetched anew."""
    layer = fastlstm.LSTM(8, 32, rng=0)
    p = problem(layer, 300, 16)
    for _ in range(3):
        train(layer, p)
    kept = engine.memory_kept()
    for _ in range(30):
        train(layer, p)
    assert engine.memory_kept() == kept > MB


@linux
def test_narrow_weights_keep_no_full_panels():
    """A frozen layer's weights in half or a quarter of the memory, not in so much more."""
    code = PREPARE + "l = fastlstm.LSTM(512, 512, rng=0)\nfastlstm.set_memory_kept(0)\nbegin = resident()\n"
    sizes = {}
    for weights in (None, "bfloat16", "int8"):
        run = f"l.freeze({weights!r})\nprint(resident() - begin)"
        path = {"PYTHONPATH": str(ROOT)}
        sizes[weights] = float(subprocess.check_output([sys.executable, "-c", code + run], env=os.environ | path))
    assert sizes[None] > 7 and 0.4 < sizes["bfloat16"] / sizes[None] < 0.7, sizes
    assert 0.05 < sizes["int8"] / sizes[None] < 0.4, sizes  # some of it lies where the wide ones were


def test_a_ragged_batch_keeps_no_index():
    """Beside x itself a few numbers a sequence and a step, not two a row."""
    layer = fastlstm.LSTM(1, 2, rng=0)
    lengths = np.random.default_rng(0).integers(1, 2001, 600)
    x = np.ones((2000, 600, 1), np.float32)
    layer(x[:3], lengths=np.minimum(lengths, 2))
    tracemalloc.start()
    try:
        batch = fastlstm._batch.Batch(layer, x, None, lengths)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert batch.rows.R == lengths.sum()
    assert peak < 100_000 and kept < 50_000, (kept, peak)


@pytest.mark.parametrize("size", [2**64 - 1, 2**64 - 10, 2**63, 2**62 + 1])
def test_impossible_sizes(size):
    with pytest.raises(MemoryError):
        engine.Buffer(size)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("every", [None, 3])
def test_no_memory_in_backward(cell, every, monkeypatch):
    """The n-th allocation fails, n = 1, 2, ... until none does: gradients, parameters and tape are as they were."""
    layer = make(cell, 3, 5, num_layers=3, bidirectional=True, dropout=0.3, rng=4)
    p = problem(layer, 8, 4, [8, 3, 0, 5])
    layer.backward(layer.forward(p.x, p.state, p.lengths)[2], p.dy)  # gradients that are not zero
    y, state, tape = layer.forward(p.x, p.state, p.lengths, checkpoint_every=every)
    params, grads = layer.flat_params.copy(), layer.flat_grads.copy()
    assert grads.any()
    real = {name: getattr(engine, name) for name in ("empty", "workspace", "Run", "forward", "backward")}
    state = {"left": 0}

    def failing(name):
        def function(*args, **options):
            state["left"] -= 1
            if state["left"] == 0:
                raise MemoryError("no memory, said the test")
            return real[name](*args, **options)

        return function

    for name in real if every else ("empty", "workspace", "Run"):
        monkeypatch.setattr(engine, name, failing(name))
    failures = 0
    while True:
        state["left"] = failures + 1
        try:
            dx, dstate = layer.backward(tape, p.dy, p.dstate)
            break
        except MemoryError as error:
            assert "said the test" in str(error)
            failures += 1
            assert same_bits(layer.flat_grads, grads) and same_bits(layer.flat_params, params)
    assert failures > 3
    found = layer.flat_grads.copy()
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="already used"):
        layer.backward(tape, p.dy)
    layer.flat_grads[:] = grads
    layer.rng = np.random.default_rng(0)
    again = make(cell, 3, 5, num_layers=3, bidirectional=True, dropout=0.3, rng=4)
    again.backward(again.forward(p.x, p.state, p.lengths)[2], p.dy)
    y, _, tape = again.forward(p.x, p.state, p.lengths)
    same((dx, dstate), again.backward(tape, p.dy, p.dstate))
    assert same_bits(found, again.flat_grads)


def test_a_state_is_not_copied_onto_itself():
    """Windows of stacked inference hand the state on in place."""
    layer = fastlstm.LSTM(3, 5, num_layers=2, rng=0)
    x = np.random.default_rng(0).standard_normal((9000, 1, 3)).astype(np.float32)
    y, state = layer(x)
    stream = layer.stream()
    steps = np.stack([stream.step(x_t) for x_t in x])
    same((y, state), (steps, stream.state))


@pytest.mark.parametrize("cell", CELLS)
def test_no_memory_in_one_pass(cell):
    """A single layer, whose backward is one pass: its tape is good until there is enough."""
    layer, failures = make(cell, 3, 5), 0
    p = problem(layer, 8, 4)
    want, _ = train(layer, p)
    tape = layer.forward(p.x, p.state)[2]
    layer.zero_grad()
    while True:
        engine.fail_block(failures + 1)
        try:
            dx, _ = layer.backward(tape, p.dy, p.dstate)
            break
        except MemoryError:
            failures += 1
            assert not layer.flat_grads.any()
        finally:
            engine.fail_block(0)
    assert failures > 2
    same(dx, want["dx"])
    same(dict(layer.grads), {name: want["d" + name] for name in layer.grads})


@pytest.mark.parametrize("what", ["inference", "forward", "checkpoints", "backward", "stream", "freeze", "bfloat16"])
@pytest.mark.parametrize("cell", CELLS)
def test_no_memory(cell, what):
    """The n-th block of memory is not to be had, n = 1, 2, ... until all are: MemoryError, and all is as it was."""
    layer = make(cell, 3, 5, num_layers=2, dropout=0.3, recurrent_dropout=0.2, rng=4)
    p = problem(layer, 8, 4, [8, 3, 0, 5])
    for name, grad in layer.grads.items():
        grad[...] = len(name)
    tape = layer.forward(p.x, p.state, p.lengths)[2] if what == "backward" else None
    calls = {
        "inference": lambda: layer(p.x, p.state, p.lengths),
        "forward": lambda: layer.forward(p.x, p.state, p.lengths)[:2],
        "checkpoints": lambda: layer.forward(p.x, p.state, p.lengths, checkpoint_every=3)[:2],
        "backward": lambda: layer.backward(tape, p.dy, p.dstate),
        "stream": lambda: layer.stream(4).step(p.x[0]),
        "freeze": lambda: layer.freeze(),
        "bfloat16": lambda: layer.freeze("bfloat16"),
    }
    rng, params, grads = layer.rng.bit_generator.state, layer.flat_params.copy(), layer.flat_grads.copy()
    failures = 0
    while True:
        engine.fail_block(failures + 1)
        layer.rng.bit_generator.state = rng  # masks were drawn before the memory ended
        try:
            got = calls[what]()
            break
        except MemoryError as error:
            assert "no memory for" in str(error)
            failures += 1
            assert same_bits(layer.flat_params, params) and same_bits(layer.flat_grads, grads)
            assert layer.flat_params.flags.writeable and layer._frozen is None
        finally:
            engine.fail_block(0)
    assert failures > 1
    if got is layer:  # frozen
        y = layer(p.x)
        same(y, layer.unfreeze().freeze(layer._frozen_weights)(p.x))
        return
    layer.rng.bit_generator.state = rng
    if what == "backward":
        found, layer.flat_grads[:] = layer.flat_grads.copy(), grads
        layer.rng = np.random.default_rng(4)
        with pytest.raises(RuntimeError, match="already used"):
            layer.backward(tape, p.dy)
        assert not same_bits(found, grads)
        return
    same(got, calls[what]())


CYCLES = """
def cycle():
    layer = fastlstm.LSTM(3, 5, rng=0)
    y, state, tape = layer.forward(x, lengths=[4, 2])
    layer.backward(tape, y, state)
    layer.freeze()(x)
    layer.stream(2).step(x[0])
    layer.unfreeze()
    try:
        layer(x[0, 0])
    except ValueError:
        pass

for _ in range(500): cycle()
begin = resident()
for _ in range(5000): cycle()
print(resident() - begin)
"""


@linux
def test_cycles_do_not_grow():
    """5,000 layers made, trained, frozen, streamed and dropped: the process grows by less than 2 MB."""
    path = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", PREPARE + CYCLES]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | path, timeout=120)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 2
