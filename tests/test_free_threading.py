"""What must hold where no GIL keeps threads apart. With one the same tests pass more easily."""

import sys
import sysconfig

import numpy as np
import pytest
from conftest import make, problem, same
from test_threads import python, together

import fastlstm
from fastlstm import engine

FREE = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))


@pytest.mark.skipif(not FREE, reason="a Python with a GIL")
def test_the_import_brings_no_gil():
    assert python("import sys, fastlstm.engine.probe; print(sys._is_gil_enabled())") == "False"


@pytest.mark.parametrize("hidden", (8, 300), ids=("short", "long"))
def test_threads_on_one_stream_take_turns(hidden):
    """A step beside another is an error and no step: in the end the stream has made those that gave an answer."""
    layer = fastlstm.LSTM(5, hidden, rng=0)
    stream, x = layer.stream(4), np.full((4, 5), 0.5, np.float32)

    def steps(i):
        made = 0
        for _ in range(300):
            try:
                stream.step(x)
                made += 1
            except RuntimeError as error:
                assert "a step is under way" in str(error)
        return made

    made = sum(together(4, steps))
    alone = layer.stream(4)
    for _ in range(made):
        y = alone.step(x)
    assert made >= 300 and np.array_equal(stream.h, alone.h) and np.array_equal(y, alone.h[0])


def test_an_error_in_a_step_does_not_lock_the_stream():
    stream = fastlstm.LSTM(5, 8, rng=0).stream(2)
    x = np.ones((2, 5), np.float32)
    with pytest.raises(ValueError, match="reset"):
        stream.step(x, reset=[True, False, True])
    stream.step(x)


def test_calls_and_blocks_are_counted():
    """No call is lost from the count, and no block from the pool, when threads come and go at the same time."""
    layer = make("lstm", 3, 8)
    p = problem(layer, 2, 2)
    want = layer(p.x)
    engine.set_memory_kept(200_000)
    try:

        def call(i):
            for turn in range(200):
                same(layer(p.x), want)
                if turn % 50 == i:
                    fastlstm.release_memory()
                assert 0 <= engine.memory_kept() <= 200_000

        together(8, call)
        assert engine.calls() == 0
        fastlstm.release_memory()
        assert engine.memory_kept() == 0
    finally:
        engine.set_memory_kept(None)


def test_the_gil_is_as_the_interpreter_has_it():
    assert getattr(sys, "_is_gil_enabled", lambda: True)() is not FREE
