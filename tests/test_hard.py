"""Hard cases: poisoned rows, whole training runs, calls amid others, processes of every kind."""

import hashlib
import multiprocessing
import os
import pickle
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import CELLS, make, problem, same, same_bits, train
from test_threads import openmp, python, together

import fastlstm
from fastlstm import engine, nn

THREADS = (1, 2, 3, 7)
TESTS = str(Path(__file__).parent)


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=("f32", "f64"))
@pytest.mark.parametrize("cell", CELLS)
def test_a_poisoned_row_stays_alone(isa, cell, dtype):
    """NaN, infinities, 1e38 in one row of x, state or dy leave all other rows of y and dx as they were, to the bit.

    For every number of threads, but by BLAS, which rounds by how many rows it is given.
    """
    numbers = THREADS if engine.products() == "own" else (1,)
    fastlstm.set_num_threads(1)
    layer = make(cell, 5, 19, dtype=dtype, num_layers=2, bidirectional=True)
    clean = problem(layer, 6, 9)
    want, _ = train(layer, clean)
    answer = layer(clean.x, clean.state)[0]
    rows = np.array([n for n in range(9) if n != 4])
    for i, value in enumerate((np.nan, np.inf, -np.inf, 1e38, -1e38)):
        for where in ("x", "dy", "state"):
            fastlstm.set_num_threads(numbers[i % len(numbers)])
            p = problem(layer, 6, 9)
            if where == "state":
                for part in p.state if isinstance(p.state, tuple) else (p.state,):
                    part[:, 4] = value
            else:
                getattr(p, where)[2, 4, ::2] = value
            with np.errstate(all="ignore"):
                got, _ = train(layer, p)
                same(layer(p.x, p.state)[0][:, rows], answer[:, rows])
            for name in ("y", "dx", "h", "dh", "c", "dc"):
                if name in want:
                    same(got[name][:, rows], want[name][:, rows])
            if np.isnan(value):  # the poison was taken
                assert np.isnan(got["dx" if where == "dy" else "y"][:, 4]).any()


def model():
    lstm = fastlstm.LSTM(3, 37, num_layers=2, dropout=0.2, recurrent_dropout=0.1, rng=5)
    head = nn.Linear(37, 2, rng=6)
    return {"lstm": lstm, "head": head, "adam": nn.Adam([lstm, head], 1e-2)}


def steps(run, begin, end):
    lstm, head, adam = run["lstm"], run["head"], run["adam"]
    for step in range(begin, end):
        rng = np.random.default_rng(step)
        x = rng.standard_normal((11, 7, 3)).astype(np.float32)
        lengths = rng.integers(1, 12, 7)
        adam.zero_grad()
        _, (h, _), tape = lstm.forward(x, lengths=lengths)
        error = head(h[-1]) - x.sum(axis=0)[:, :2] / 5
        dh = np.zeros_like(h)
        dh[-1] = head.backward(head.forward(h[-1])[1], error)
        lstm.backward(tape, None, (dh, None))
        adam.step()
    return float((error**2).mean())


def fingerprint(run):
    found = hashlib.sha256()
    for part in (run["lstm"].flat_params, run["head"].flat_params, run["lstm"].flat_grads):
        found.update(part.tobytes())
    return found.hexdigest()


@pytest.mark.own
def test_a_training_run_has_one_hash():
    """200 steps with dropout and Adam: the same bits for any number of threads, and resumed at step 100."""
    hashes = set()
    for threads in THREADS:
        fastlstm.set_num_threads(threads)
        run = model()
        first = steps(run, 0, 1)
        steps(run, 1, 100)
        saved = pickle.dumps(run)
        states = {name: part.state_dict() for name, part in run.items()}
        rng = run["lstm"].rng.bit_generator.state
        assert steps(run, 100, 200) < first / 2
        hashes.add(fingerprint(run))
        if threads % 2:
            resumed = pickle.loads(saved)
        else:
            resumed = model()
            for name, state in states.items():
                resumed[name].load_state_dict(state)
            resumed["lstm"].rng.bit_generator.state = rng
        steps(resumed, 100, 200)
        hashes.add(fingerprint(resumed))
    assert len(hashes) == 1


@pytest.mark.own
@pytest.mark.parametrize("cell", CELLS)
def test_calls_amid_changes(cell):
    """Eight threads call one layer, streams that share its weights and layers of their own, while others freeze, thaw
    and give memory back."""
    shared = make(cell, 5, 67, num_layers=2)
    own = [make(cell, 5, 35, rng=i) for i in range(8)]
    problems = [problem(shared, 3 + i, 2 + i % 5, seed=i) for i in range(8)]
    small = [problem(layer, 4, 3, seed=i) for i, layer in enumerate(own)]
    fastlstm.set_num_threads(2)
    want = [shared(p.x, p.state) for p in problems]
    trained = [train(layer, p)[0] for layer, p in zip(own, small, strict=True)]
    done = threading.Event()

    def disturb():
        turn = 0
        while not done.is_set():
            shared.freeze() if turn % 2 else shared.unfreeze()
            fastlstm.release_memory()
            fastlstm.set_memory_kept(100_000 if turn % 3 else None)
            turn += 1
        return turn

    def call(i):
        for _ in range(15):
            same(shared(problems[i].x, problems[i].state), want[i])
            same(train(own[i], small[i])[0], trained[i])
            for stream in (shared.stream(2), shared.stream(2, share=base)):
                assert same_bits(stream.step(problems[i].x[0, :2]), want_step[i])

    shared.unfreeze()
    base, interval = shared.stream(2), sys.getswitchinterval()
    want_step = [shared.stream(2).step(p.x[0, :2]) for p in problems]
    turns = []
    other = threading.Thread(target=lambda: turns.append(disturb()), daemon=True)
    other.start()
    sys.setswitchinterval(1e-5)  # what can come between two lines does
    try:
        together(8, call)
    finally:
        sys.setswitchinterval(interval)
        done.set()
        other.join(60)
        fastlstm.set_memory_kept(None)
    assert turns and turns[0] > 10


@pytest.mark.own
def test_backward_of_one_layer_in_two_threads():
    """The gradients are the sum of all passes that ended; a pass beside another one is refused and can be had again."""
    layer = make("lstm", 30, 130, num_layers=2)
    p = problem(layer, 40, 8)
    fastlstm.set_num_threads(1)
    want = train(layer, p)[0]
    alone = layer.flat_grads.copy()
    tapes = [layer.forward(p.x, p.state)[2] for _ in range(8)]
    layer.zero_grad()
    refused = []

    def work(i):
        while True:
            try:
                return layer.backward(tapes[i], p.dy, p.dstate)
            except RuntimeError as error:
                assert "another thread" in str(error)
                refused.append(i)
                time.sleep(0.001)

    for dx, _ in together(8, work):
        same(dx, want["dx"])
    assert refused, "no two passes met, so nothing is shown"
    np.testing.assert_allclose(layer.flat_grads, 8 * alone, rtol=1e-4, atol=1e-4 * abs(alone).max())


CHILD = """
import sys
sys.path.insert(0, {tests!r})
import test_hard
if __name__ == "__main__":
    test_hard.in_processes({how!r})
"""


def in_a_process(threads):
    """What a worker computes."""
    fastlstm.set_num_threads(threads)
    layer = make("gru", 18, 131, num_layers=2, bidirectional=True)
    result, _ = train(layer, problem(layer, 9, 3))
    return hashlib.sha256(b"".join(result[name].tobytes() for name in sorted(result))).hexdigest()


def in_processes(how):
    want = in_a_process(2)
    if how == "loky":
        import joblib

        got = joblib.Parallel(n_jobs=2, backend="loky")(joblib.delayed(in_a_process)(t) for t in (1, 2, 2))
    else:
        with multiprocessing.get_context(how).Pool(2) as pool:
            got = pool.map(in_a_process, (1, 2, 2))
    assert got == [want] * 3, (got, want)
    print("same")


@pytest.mark.own
@openmp
@pytest.mark.parametrize("how", [*multiprocessing.get_all_start_methods(), "loky"])
def test_processes(how, tmp_path):
    """Workers of every kind, started by a process that has run a team, compute the same bits."""
    if how == "loky":
        pytest.importorskip("joblib")
    script = tmp_path / "job.py"
    script.write_text(CHILD.format(tests=TESTS, how=how), encoding="utf-8")
    code = f"import runpy, sys; sys.argv = [{str(script)!r}]; runpy.run_path({str(script)!r}, run_name='__main__')"
    assert python(code, timeout=100, PYTHONPATH=os.pathsep.join([TESTS, str(Path(TESTS).parent)])) == "same"


@pytest.mark.own
@pytest.mark.parametrize("first", ["torch", "fastlstm"])
def test_import_orders(first):
    """With the thread pools of torch and scikit-learn in the process, started before or behind us: the same bits."""
    pytest.importorskip("torch"), pytest.importorskip("sklearn")
    code = (
        f"import {first}\nimport fastlstm, torch, sklearn.ensemble, sys\nsys.path.insert(0, {TESTS!r})\n"
        "import test_hard\ntorch.set_num_threads(2)\ntorch.ones(500, 500) @ torch.ones(500, 500)\n"
        "print(test_hard.in_a_process(2))"
    )
    assert python(code, timeout=100) == in_a_process(1)
