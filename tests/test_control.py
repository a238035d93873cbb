"""The floating-point control word around a call, and states that decay through the subnormal numbers."""

import ctypes
import itertools
import platform
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import CELLS, make, problem, same, teams, train
from test_threads import openmp, together

import fastlstm

pytestmark = pytest.mark.own
SOURCES = Path(__file__).parents[1] / "src_c"
# The same libgomp as the engine's, so its threads are those of the engine's team.
PROGRAM = """
#include <omp.h>
#include "control.h"
unsigned long get(void) { return fl_get_word(); }
void set(unsigned long word) { fl_set_word((fl_word) word); }
void get_all(int n, unsigned long *words)
{
    #pragma omp parallel num_threads(n)
    words[omp_get_thread_num()] = fl_get_word();
}
void set_workers(int n, unsigned long word)
{
    #pragma omp parallel num_threads(n)
    if (omp_get_thread_num())
        fl_set_word((fl_word) word);
}
"""
DEFAULT = 0x1F80
TOWARD_ZERO, FLUSH, WHAT_HAPPENED = 0x6000, 0x8040, 0x3F  # of MXCSR


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    if platform.machine() != "x86_64" or not shutil.which("gcc") or not SOURCES.is_dir():
        pytest.skip("needs x86-64, gcc and the sources")
    folder = tmp_path_factory.mktemp("control")
    (folder / "words.c").write_text(PROGRAM, encoding="utf-8")
    command = ["gcc", "-O1", "-shared", "-fPIC", "-fopenmp", f"-I{SOURCES}", "words.c", "-o", "words.so"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    library = ctypes.CDLL(str(folder / "words.so"))
    library.get.restype = ctypes.c_ulong
    library.set.argtypes = [ctypes.c_ulong]
    library.set_workers.argtypes = [ctypes.c_int, ctypes.c_ulong]
    return library


@pytest.fixture(autouse=True)
def _word_as_found(request):
    yield
    if "words" in request.fixturenames:
        library = request.getfixturevalue("words")
        library.set(DEFAULT)
        library.set_workers(3, DEFAULT)


def of_all(words, n):
    found = (ctypes.c_ulong * n)()
    words.get_all(n, found)
    return list(found)


def decaying(cell, T=400):
    """A layer, and states that halve at every step from 1e-30 on."""
    layer = make(cell, 4, 48)
    for name, view in layer.params.items():
        view *= 0.2 if name.startswith("weight") and "_ln_" not in name else 0
    x = np.zeros((T, 8, 4), np.float32)
    states = [np.full((1, 8, 48), 1e-30, np.float32)] * (2 if isinstance(layer, fastlstm.LSTM) else 1)
    return layer, x, tuple(states) if len(states) > 1 else states[0]


@openmp
@pytest.mark.parametrize("threads", (1, 2, 3))
def test_the_word_is_as_before(words, threads):
    """In the caller and in its workers, to the last bit, whoever set what."""
    wide, narrow = make("lstm", 20, 256), make("gru", 5, 67)  # a team that shares the units, and one of rows
    problems = [problem(wide, 30, 3), problem(narrow, 60, 12)]
    stream = narrow.stream(64)
    fastlstm.set_num_threads(threads)

    def calls():
        for layer, p in zip((wide, narrow), problems, strict=True):
            with teams(layer is wide):  # a smaller team would end threads, and new ones begin with their maker's word
                layer(p.x, p.state)
                train(layer, p)
        stream.step(np.ones((64, 5), np.float32))

    calls()
    for mine, theirs in itertools.product((DEFAULT, DEFAULT | TOWARD_ZERO, DEFAULT | FLUSH), repeat=2):
        words.set_workers(threads, theirs)
        words.set(mine)
        before = of_all(words, threads)
        calls()
        after = of_all(words, threads)
        words.set(DEFAULT)
        assert before[1:] == [theirs] * (threads - 1)
        assert after[1:] == before[1:], f"a worker's word was {before}, is {after}"
        assert after[0] & ~WHAT_HAPPENED == mine, "the caller's word"


@openmp
def test_workers_compute_under_the_callers_word(words):
    """Rounding toward zero and flushed subnormals act in all threads or in none; else bits would depend on the team."""
    layer = make("lstm", 20, 131)
    p = problem(layer, 30, 8)
    found = {}
    for mine in (DEFAULT, DEFAULT | TOWARD_ZERO, DEFAULT | FLUSH):
        for threads in (1, 2, 3):
            fastlstm.set_num_threads(threads)
            words.set(mine)
            got = train(layer, p)[0]
            words.set(DEFAULT)
            same(got, found.setdefault(mine, got))
    assert np.any(found[DEFAULT]["y"] != found[DEFAULT | TOWARD_ZERO]["y"])
    same(found[DEFAULT], found[DEFAULT | FLUSH])


@openmp
@pytest.mark.parametrize("cell", ("lstm", "gru", "rnn"))
def test_flushed_subnormals_change_no_bit(words, cell):
    """States that decay to nothing: the same for any threads, with the caller's subnormals on or off."""
    layer, x, state = decaying(cell)
    seen = []
    for word in (DEFAULT, DEFAULT | FLUSH):
        for threads in (1, 2, 3):
            fastlstm.set_num_threads(threads)
            words.set(word)
            y, h = layer(x, state)
            seen.append((y, h))
            words.set(DEFAULT)
    for got in seen[1:]:
        same(got, seen[0])
    y = abs(seen[0][0])
    assert y[0].any() and not y[-1].any() and y[y > 0].min() < 1e-36


@openmp
def test_every_thread_keeps_its_own_word(words):
    fastlstm.set_num_threads(2)
    layer = make("gru", 5, 67)
    p = problem(layer, 60, 12)

    def work(i):
        words.set(DEFAULT | (0, TOWARD_ZERO, FLUSH)[i])
        got = train(layer, p)[0] if i == 0 else layer(p.x, p.state)
        assert words.get() & ~WHAT_HAPPENED == DEFAULT | (0, TOWARD_ZERO, FLUSH)[i]
        return got

    together(3, work)


@pytest.mark.parametrize("cell", CELLS)
def test_decaying_states_take_no_longer(isa, cell):
    """At most twice the time of ordinary numbers, forward and backward. Gradual underflow took 9 to 67 times."""
    fastlstm.set_num_threads(1)
    layer, x, state = decaying(cell, 120)
    lively = make(cell, 4, 48)
    p = problem(lively, 120, 8)
    dy = np.full((120, 8, 48), 1e-37, np.float32)

    def run(layer, x, state, dy):
        begin = time.thread_time()
        tape = layer.forward(x, state)[2]
        layer.backward(tape, dy)
        layer(x, state)
        return time.thread_time() - begin

    times = [(run(layer, x, state if cell != "slstm" else None, dy), run(lively, p.x, p.state, p.dy)) for _ in range(9)]
    slow, usual = (min(column) for column in zip(*times, strict=True))
    assert slow <= 2 * usual, f"{1e3 * slow:.2f} ms, ordinary numbers {1e3 * usual:.2f} ms"
