"""Threads, processes, and the state of the process around a call."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import CELLS, make, problem, same, same_bits, train

import fastlstm
from fastlstm import engine

ROOT = str(Path(fastlstm.__file__).resolve().parents[1])


def python(code, *, timeout=60, **environment):
    """Standard output of a fresh process."""
    keep = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    path = os.pathsep.join([ROOT, keep.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    run = subprocess.run([sys.executable, "-c", code], env=keep | {"PYTHONPATH": path} | environment,
                         capture_output=True, text=True, timeout=timeout)  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


GET = "import fastlstm; print(fastlstm.get_num_threads())"
openmp = pytest.mark.skipif(not engine.has_openmp(), reason="built without OpenMP")


@openmp
def test_set_and_get():
    default = fastlstm.get_num_threads()
    assert default >= 1
    for n in (1, 2, 7, np.int64(3)):
        fastlstm.set_num_threads(n)
        assert fastlstm.get_num_threads() == n
    fastlstm.set_num_threads(None)
    assert fastlstm.get_num_threads() == default
    fastlstm.set_num_threads(4)
    for wrong, error in (
        (0, ValueError),
        (-1, ValueError),
        (1.5, TypeError),
        ("2", TypeError),
        (True, TypeError),
    ):
        with pytest.raises(error, match="n: expected"):
            fastlstm.set_num_threads(wrong)
    assert fastlstm.get_num_threads() == 4


def test_a_build_without_openmp_says_so_once(monkeypatch):
    monkeypatch.setattr(engine, "has_openmp", lambda: False)
    monkeypatch.setattr(fastlstm.threads, "_told", False)
    fastlstm.set_num_threads(1)
    assert fastlstm.get_num_threads() == 1  # which is what was asked for
    fastlstm.set_num_threads(2)
    with pytest.warns(RuntimeWarning, match="built without OpenMP"):
        assert fastlstm.get_num_threads() == 1
    assert fastlstm.get_num_threads() == 1  # no second warning, which would be an error


def test_openmp_can_be_required(tmp_path):
    """A compiler that fails with -fopenmp ends such a build, before anything is translated."""
    if not Path(ROOT, "setup.py").is_file():
        pytest.skip("needs the sources")
    pytest.importorskip("Cython", reason="needs what builds the package")
    compiler = tmp_path / "cc"
    compiler.write_text('#!/bin/sh\ncase "$*" in *-fopenmp*) exit 1;; esac\nexec gcc "$@"\n', encoding="utf-8")
    compiler.chmod(0o755)
    environment = os.environ | {"CC": str(compiler), "FASTLSTM_REQUIRE_OPENMP": "1"}
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-lib",
        str(tmp_path),
        "--build-temp",
        str(tmp_path),
    ]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert run.returncode != 0 and "FASTLSTM_REQUIRE_OPENMP asks for it" in run.stderr, run.stderr
    assert not list(tmp_path.rglob("*.so"))


@openmp
def test_environment():
    default = python(GET)
    assert python(GET, OMP_NUM_THREADS="1") == "1"
    assert python(GET, OMP_NUM_THREADS="2,1") == str(min(2, int(default)))
    assert python(GET, OMP_NUM_THREADS="10000") == default  # never more than processors unless they are asked for
    assert (
        1 <= int(default) <= len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else [0] * os.cpu_count())
    )
    for useless in ("", "0", "-4", "many"):
        assert python(GET, OMP_NUM_THREADS=useless) == default
    assert python("import fastlstm; fastlstm.set_num_threads(5);" + GET, OMP_NUM_THREADS="3") == "5"


@openmp
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_affinity():
    assert python("import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]);" + GET) == "1"


def test_forced_instruction_set():
    show = "from fastlstm import engine; print(engine.isa())"
    for name in engine.available_isas():
        assert python(show, FASTLSTM_ISA=name) == name
    assert python(show, FASTLSTM_ISA="") == engine.available_isas()[-1]
    with pytest.raises(AssertionError, match="FASTLSTM_ISA: expected one of"):
        python(show, FASTLSTM_ISA="mmx")


FORK = """
import os, sys
import numpy as np, fastlstm
layer = fastlstm.{cell}(18, 131, 2, bidirectional=True, rng=0)
x = np.random.default_rng(0).standard_normal((9, 3, 18)).astype(np.float32)

def work():
    layer.zero_grad()
    y, state, tape = layer.forward(x)
    dx, dstate = layer.backward(tape, np.ones_like(y))
    return y.tobytes() + dx.tobytes() + layer.flat_grads.tobytes() + layer(x)[0].tobytes()

fastlstm.set_num_threads(2)
want = work()
for _ in range(3):
    pid = os.fork()
    if pid == 0:
        good = fastlstm.get_num_threads() == 1 and work() == want
        os._exit(0 if good else 3)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert fastlstm.get_num_threads() == 2 and work() == want
print("same")
"""


@pytest.mark.own
@openmp
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("cell", ("LSTM", "GRU"))
def test_fork(cell):
    """A child of a process that has run a team goes on alone, with the same bits; so does the parent."""
    assert python(FORK.format(cell=cell), timeout=30) == "same"


def together(count, function):
    """The results of function(0) .. function(count - 1), each in a thread of its own, all started at once."""
    results, barrier = [None] * count, threading.Barrier(count)

    def run(i):
        barrier.wait(30)
        try:
            results[i] = function(i)
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


@pytest.mark.own
@pytest.mark.parametrize("frozen", (False, True))
@pytest.mark.parametrize("cell", CELLS)
def test_threads_share_a_layer_for_inference(cell, frozen):
    layer = make(cell, 5, 67, num_layers=2)
    problems = [problem(layer, 9, 6 + i, seed=i) for i in range(8)]
    fastlstm.set_num_threads(2)
    want = [layer(p.x, p.state) for p in problems]
    if frozen:
        layer.freeze()
    for i, results in enumerate(together(8, lambda i: [layer(problems[i].x, problems[i].state) for _ in range(10)])):
        for result in results:
            same(result, want[i])


@pytest.mark.own
@pytest.mark.parametrize("cell", CELLS)
def test_threads_train_layers_of_their_own(cell):
    layers = [make(cell, 17, 131 if i % 2 else 37, dropout=0.3, num_layers=2, rng=i) for i in range(8)]
    problems = [problem(layer, 7, 2 + i % 2, seed=i) for i, layer in enumerate(layers)]
    fastlstm.set_num_threads(2)
    starts = [layer.rng.bit_generator.state for layer in layers]
    want = [[train(layer, p)[0] for _ in range(3)] for layer, p in zip(layers, problems, strict=True)]
    for layer, start in zip(layers, starts, strict=True):
        layer.rng.bit_generator.state = start
    for got, wanted in zip(
        together(8, lambda i: [train(layers[i], problems[i])[0] for _ in range(3)]), want, strict=True
    ):
        same(got, wanted)


def test_threads_step_streams_that_share_weights():
    layer = make("lstm", 5, 67)
    p = problem(layer, 50, 1)
    want = layer(p.x)[0]
    first = layer.stream()
    streams = [layer.stream(share=first) for _ in range(8)]
    for got in together(8, lambda i: np.stack([streams[i].step(x) for x in p.x])):
        same(got, want)


def test_layers_are_not_changed_by_inference():
    layer = make("lstm", 5, 19, num_layers=2, dropout=0.5, zoneout=(0.2, 0.2), recurrent_dropout=0.3)
    p = problem(layer, 7, 3)
    x, params, draws = p.x.copy(), layer.flat_params.copy(), layer.rng.bit_generator.state
    layer(p.x, p.state)
    same(p.x, x)
    same(layer.flat_params, params)
    assert layer.rng.bit_generator.state == draws and not layer.flat_grads.any()


def test_arguments_are_not_changed():
    layer = make("lstm", 5, 19, num_layers=2, bidirectional=True)
    for lengths in (None, np.array([7, 2, 0])):
        p, q = (problem(layer, 7, 3, lengths) for _ in range(2))
        train(layer, p)
        layer(p.x, p.state, lengths)
        for name in ("x", "dy", "state", "dstate"):
            same(getattr(p, name), getattr(q, name))


def test_process_is_left_as_it_was():
    from threadpoolctl import threadpool_info

    def subnormals():
        x = np.full(64, np.finfo(np.float32).tiny, np.float32)
        y = np.full(64, np.finfo(np.float64).tiny)
        return bool((x / 2 > 0).all() and (x / 2 * 2 == x).all() and (y / 4 > 0).all())

    def limits():
        return [(i["filepath"], i["num_threads"]) for i in threadpool_info()]

    environment, errors, draws = dict(os.environ), np.geterr(), np.random.get_state()[1].copy()  # noqa: NPY002
    pools, layer = limits(), make("lstm", 17, 131)
    p = problem(layer, 9, 2)
    fastlstm.set_num_threads(3)
    train(layer, p)
    layer(p.x)
    assert subnormals()
    assert together(2, lambda i: train(make("lstm", 17, 131), p) and subnormals()) == [True, True]
    assert dict(os.environ) == environment and np.geterr() == errors
    assert same_bits(np.random.get_state()[1], draws)  # noqa: NPY002
    assert limits() == pools


IMPORT = """
import sys, time
begin = time.thread_time()
import numpy
middle = time.thread_time()
import fastlstm
end = time.thread_time()
print(1e3 * (middle - begin), 1e3 * (end - middle))
"""


@pytest.mark.own
def test_import_time(tmp_path):
    """At most 12 ms beyond NumPy, or a tenth of what NumPy takes where the machine is slow, once the bytecode is there.

    The thread's processor time: other work adds to the wall's, the spinning of BLAS threads to the process's.
    """
    keep = {"PYTHONPYCACHEPREFIX": str(tmp_path), "PYTHONDONTWRITEBYTECODE": ""}
    found = [[float(word) for word in python(IMPORT, **keep).split()] for _ in range(9)]
    numpy, extra = (min(times) for times in zip(*found[1:], strict=True))
    assert extra <= max(12, 0.1 * numpy), f"{extra:.1f} ms, NumPy {numpy:.1f} ms"


HEAVY = {
    "h5py", "joblib", "keras", "matplotlib", "numba", "onnx", "onnxruntime", "pandas", "platformdirs", "safetensors",
    "scipy", "sklearn", "tensorflow", "threadpoolctl", "torch", "tqdm",
}  # fmt: skip


@pytest.mark.own
def test_import_brings_no_heavy_module():
    loaded = python("import sys, fastlstm; print(*{name.split('.')[0] for name in sys.modules})").split()
    assert "numpy" in loaded
    assert not HEAVY & set(loaded)


@pytest.mark.own
def test_inference_and_training_need_no_heavy_module():
    code = """
import sys, numpy as np, fastlstm
layer = fastlstm.LSTM(3, 5, rng=0)
y, _, tape = layer.forward(np.ones((4, 2, 3), np.float32))
layer.backward(tape, y)
print(*{name.split(".")[0] for name in sys.modules})
"""
    loaded = set(python(code).split())
    assert "fastlstm" in loaded and not HEAVY & loaded


@pytest.mark.parametrize("N", [1, 8, 20, 200])
@pytest.mark.parametrize("H", [128, 256, 1024])
@pytest.mark.parametrize("threads", [2, 4, 8, 64])
def test_a_team_is_never_larger_than_its_work(N, H, threads):
    """Every thread has blocks of units, or sequences, of its own."""
    blocks = -(-H // 64)
    team, by_units, _ = engine.plan(100, N, H, H, 4, 4, 1, threads, blocks)
    assert 1 <= team <= min(threads, blocks if by_units else N)


FORK_WITHOUT_A_TEAM = """
import os
import numpy as np, fastlstm
layer = fastlstm.LSTM(3, 5, rng=0)
layer(np.ones((4, 2, 3), np.float32))  # too small for a team
assert not fastlstm.engine.forked()
pid = os.fork()
if pid == 0:
    fastlstm.set_num_threads(2)
    large = fastlstm.LSTM(18, 131, rng=0)
    large(np.ones((9, 3, 18), np.float32))
    os._exit(0 if fastlstm.get_num_threads() == 2 and not fastlstm.engine.forked() else 3)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@openmp
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_of_a_process_without_a_team_has_threads():
    """Servers that fork their workers before the first call are not held to one thread."""
    assert python(FORK_WITHOUT_A_TEAM, timeout=30) == "0"


def test_quota_of_the_own_cgroup(tmp_path):
    """The smallest quota from the process's own group up to the root holds, in both versions of cgroups."""
    root, own = tmp_path / "cgroup", tmp_path / "own"
    quota = fastlstm.threads._cgroup_quota
    own.write_text("0::/user.slice/job\n")
    assert quota(str(root), str(own)) == float("inf")
    (root / "user.slice" / "job").mkdir(parents=True)
    (root / "cpu.max").write_text("max 100000\n")
    (root / "user.slice" / "cpu.max").write_text("400000 100000\n")
    assert quota(str(root), str(own)) == 4
    (root / "user.slice" / "job" / "cpu.max").write_text("150000 100000\n")
    assert quota(str(root), str(own)) == 1.5
    own.write_text("0::/user.slice\n")
    assert quota(str(root), str(own)) == 4
    own.write_text("12:memory:/a\n4:cpu,cpuacct:/a/b\n")
    (root / "cpu" / "a" / "b").mkdir(parents=True)
    for name, value in (("quota", -1), ("period", 100000)):
        (root / "cpu" / "a" / "b" / f"cpu.cfs_{name}_us").write_text(f"{value}\n")
    assert quota(str(root), str(own)) == float("inf")
    (root / "cpu" / "a" / "cpu.cfs_quota_us").write_text("300000\n")
    (root / "cpu" / "a" / "cpu.cfs_period_us").write_text("100000\n")
    assert quota(str(root), str(own)) == 3
    assert quota(str(tmp_path / "none"), str(tmp_path / "none")) == float("inf")


@pytest.mark.own
@pytest.mark.parametrize("options", [{}, {"direction": "reverse"}])
@pytest.mark.parametrize("cell", CELLS)
def test_windows_of_an_inference_have_the_bits_of_one(cell, options, monkeypatch):
    layer = make(cell, 7, 40, num_layers=2, **options)
    p = problem(layer, 40, 9, [40, 3, 0, 17, 40, 1, 30, 22, 39])
    whole = layer(p.x, p.state, p.lengths)
    monkeypatch.setattr(fastlstm._weights, "_WINDOW", 7 * 9)
    assert len(layer._windows(40, 9)) == 6
    same(layer(p.x, p.state, p.lengths), whole)


# ---- neighbours


@openmp
def test_calls_at_the_same_time_share_the_processors(monkeypatch):
    from fastlstm import threads

    monkeypatch.setattr(threads, "_processors", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    layer, seen = fastlstm.LSTM(64, 128, rng=0), []
    x = np.ones((3000, 8, 64), np.float32)
    other = threading.Thread(target=layer, args=(x,))
    other.start()
    while other.is_alive() and not seen:
        if engine.calls():
            seen.append(threads.threads_of_call())
            fastlstm.set_num_threads(5)  # asked for: not shared
            seen.append(threads.threads_of_call())
            fastlstm.set_num_threads(None)
    other.join()
    assert seen == [3, 5] and engine.calls() == 0 and threads.threads_of_call() == 6


@pytest.mark.own
@openmp
def test_a_team_without_processors_becomes_one_thread_for_a_while():
    """Four threads a processor that meet at every step: then one, with the same bits, and later a team again."""
    layer, x = fastlstm.LSTM(8, 256, rng=0), np.random.default_rng(0).standard_normal((150, 1, 8)).astype(np.float32)
    before = engine.tune()["crowd"]
    engine.tune(crowd=2)
    try:
        fastlstm.set_num_threads(1)
        want, _ = layer(x)
        fastlstm.set_num_threads(4 * len(os.sched_getaffinity(0)))
        for _ in range(20):
            assert np.array_equal(layer(x)[0], want)
            if engine.crowded():
                break
        assert engine.crowded()
        assert np.array_equal(layer(x)[0], want)
        fastlstm.set_num_threads(1)
        end = time.monotonic() + 5
        while engine.crowded() and time.monotonic() < end:
            time.sleep(0.05)
        assert not engine.crowded()
    finally:
        engine.tune(crowd=before)


def test_a_long_step_lets_other_threads_run():
    """The other thread counts while a stream steps; before, it waited for all of the step."""
    stream = fastlstm.LSTM(512, 512, 2, rng=0).stream(64)
    x, counts, done = np.ones((64, 512), np.float32), [], threading.Event()

    def count():
        while not done.is_set():
            counts.append(time.perf_counter())

    other = threading.Thread(target=count)
    other.start()
    begin = time.perf_counter()
    for _ in range(5):
        stream.step(x)
    end = time.perf_counter()
    done.set()
    other.join()
    meanwhile = [t for t in counts if begin < t < end]
    assert len(meanwhile) > 100 and max(np.diff(meanwhile)) < 0.5 * (end - begin)


def test_constants_of_the_plan():
    """An unknown one is refused; that of the cache is the machine's; the probes find something to measure."""
    before = engine.tune()
    with pytest.raises(TypeError, match="^tune: expected row_block, .*near, far.*, got nearest$"):
        engine.tune(nearest=3)
    assert engine.tune() == before and engine.tune(near=9)["near"] == 9
    assert engine.tune(**before) == before
    assert before["cache"] == 2 * engine.cache_size(2) and 1 << 16 <= engine.cache_size(2) <= 1 << 28
    assert 0 < engine.meet(2, 10) < 60 and 0 < engine.meet(1, 0) < 60
    for dtype in (np.float32, np.float64):
        assert engine.activation_rate("tanh", dtype, 0.001) > 0


def test_plan_of_a_large_layer_uses_what_there_is():
    """No count of threads is built in: more of them share the units, or the sequences, as long as each has enough."""
    teams = [engine.plan(100, 512, 512, 512, 4, 4, 1, threads, 32)[0] for threads in (1, 2, 4, 8, 16, 64)]
    assert teams == [1, 2, 4, 8, 16, 64]
    teams = [engine.plan(100, 1, 1024, 1024, 4, 4, 1, threads, 64)[:2] for threads in (2, 4, 8, 16)]
    assert teams == [(2, True), (4, True), (8, True), (16, True)]
    assert engine.plan(100, 1, 8, 8, 4, 4, 1, 64, 1) == (1, False, 0)


@openmp
@pytest.mark.parametrize("first", ["fastlstm", "threadpoolctl"])
def test_threadpoolctl_limits_calls(first):
    code = f"""
import {first}, fastlstm, threadpoolctl
fastlstm.set_num_threads(None if fastlstm.get_num_threads() > 1 else 2)
found = []
with threadpoolctl.threadpool_limits(1):
    found += [fastlstm.get_num_threads(), fastlstm.threads.threads_of_call()]
with threadpoolctl.threadpool_limits(1, user_api="blas"):
    found.append(fastlstm.get_num_threads())
fastlstm.set_num_threads(7)  # more than there are processors, and no limit: as it says
print(*found, fastlstm.get_num_threads())
"""
    assert python(code) == f"1 1 {max(2, fastlstm.get_num_threads())} 7"
