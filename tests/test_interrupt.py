"""Signals amid a call: it ends soon where the handler raises, else it goes on. Nothing is left half done."""

import signal
import threading
import time

import numpy as np
import pytest
from conftest import make, problem, same, same_bits, teams, train

import fastlstm
from fastlstm import engine

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers here")


@pytest.fixture
def alarm():
    """alarm(seconds): a KeyboardInterrupt by then, as Ctrl-C makes one."""
    sent = []

    def stop(*_):
        sent.append(time.perf_counter())
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def interrupted(alarm, call, prepare=lambda: None):
    """What `prepare` gave for the last attempt. Other work delays a call, so the best of three attempts counts."""
    waits = []
    for _ in range(3):
        given = prepare()
        due = time.perf_counter() + 0.15
        alarm(0.15)
        try:
            call(given)
        except KeyboardInterrupt:
            waits.append(time.perf_counter() - due)
        else:
            raise AssertionError("the call ended before the signal came, or did not look")
        if waits[-1] < 0.3:
            break
    assert engine.calls() == 0
    assert min(waits) < 0.3, f"went on for {waits} s"
    return given


KINDS = {
    "plain": {},
    "reverse": {"direction": "reverse"},
    "two layers": {"num_layers": 2},
    "bidirectional": {"bidirectional": True},
    "two layers, bidirectional": {"num_layers": 2, "bidirectional": True},
}


@pytest.mark.parametrize("threads", (1, 2))
@pytest.mark.parametrize("kind", KINDS)
def test_inference(kind, threads, alarm):
    layer = fastlstm.LSTM(512, 512, rng=0, **KINDS[kind]).freeze()
    x = np.random.default_rng(0).standard_normal((8000, 4, 512)).astype(np.float32)
    fastlstm.set_num_threads(threads)
    want = layer(x[:20])
    interrupted(alarm, lambda _: layer(x))
    same(layer(x[:20]), want)


@pytest.mark.parametrize("threads", (1, 2))
@pytest.mark.parametrize("kind", ("plain", "two layers", "bidirectional"))
def test_training(kind, threads, alarm):
    """Forward and backward end; the gradients are as they were, and the next pass has the right bits."""
    layer = fastlstm.LSTM(512, 768, rng=0, **KINDS[kind])
    x = np.random.default_rng(0).standard_normal((600, 12, 512)).astype(np.float32)
    small = problem(layer, 5, 3)
    fastlstm.set_num_threads(threads)
    want = train(layer, small)[0]
    layer.flat_grads[:] = np.random.default_rng(1).standard_normal(layer.flat_grads.size)
    held = layer.flat_grads.copy()
    interrupted(alarm, lambda _: layer.forward(x))

    def backward(given):
        y, _, tape = given
        layer.backward(tape, y)

    _, _, tape = interrupted(alarm, backward, lambda: layer.forward(x))
    assert same_bits(layer.flat_grads, held)
    if tape._used:  # it is not, where the signal came before the first product
        with pytest.raises(RuntimeError, match="already used"):
            layer.backward(tape, None)
    same(train(layer, small)[0], want)


def test_checkpoints(alarm):
    """What is computed again in backward can be computed once more: the tape serves another pass."""
    layer = fastlstm.GRU(512, 768, 2, rng=0)
    x = np.random.default_rng(0).standard_normal((400, 12, 512)).astype(np.float32)
    y, _, tape = layer.forward(x, checkpoint_every=200)
    dx, _ = layer.backward(tape, y)
    grads, dy = layer.flat_grads.copy(), y.copy()
    layer.zero_grad()
    _, _, tape = interrupted(
        alarm, lambda given: layer.backward(given[2], dy), lambda: layer.forward(x, checkpoint_every=200)
    )
    assert not layer.flat_grads.any()
    again, _ = layer.backward(tape, dy)
    assert same_bits(again, dx) and same_bits(layer.flat_grads, grads)


@pytest.mark.own  # by BLAS a product is not parted
@pytest.mark.parametrize("team", ("one", "by rows", "by units"))
@pytest.mark.parametrize("cell", ("lstm", "lstm_norm", "slstm", "gru"))
def test_long_steps(cell, team, alarm):
    """A stream whose step takes a second: no step was made, and the next one has the right bits."""
    fastlstm.set_num_threads(1 if team == "one" else 2)
    with teams(by_units=team == "by units"):
        interrupt_steps(cell, alarm)


def interrupt_steps(cell, alarm):
    layer = make(cell, 512, 1024, num_layers=2)
    x = np.random.default_rng(0).standard_normal((4000, 512)).astype(np.float32)
    stream, other = layer.stream(4000), layer.stream(7)
    first = [s.step(x[: s.batch_size]) for s in (stream, other)]
    assert same_bits(first[0][:7], first[1])
    reset = np.arange(4000) % 2 == 0
    states = [stream.state]

    def steps(_):
        while True:
            stream.step(x, reset=reset)
            states.append(stream.state)

    interrupted(alarm, steps)
    assert any(all(map(same_bits, listed(stream.state), listed(state))) for state in states)
    stream.reset(), other.reset()
    assert same_bits(stream.step(x)[:7], other.step(x[:7]))


@pytest.mark.own
def test_a_handler_amid_a_step_leaves_the_states_alone():
    """It is told that a step is under way, and the step ends with the bits of one alone."""
    layer = fastlstm.LSTM(256, 1024, rng=0)
    x = np.random.default_rng(0).standard_normal((4000, 256)).astype(np.float32)
    stream, other = layer.stream(4000), layer.stream(4000)
    told = []

    def tick(*_):
        for call in (lambda: stream.state, lambda: stream.step(x), stream.reset):
            try:
                call()
            except RuntimeError as error:
                told.append(str(error))

    before = signal.signal(signal.SIGALRM, tick)
    try:
        for _ in range(5):  # a signal before the step, or after it, is answered
            if len(told) == 3:
                break
            told.clear()
            stream.reset()
            signal.setitimer(signal.ITIMER_REAL, 0.06)
            y = stream.step(x)
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert told == ["stream: a step is under way"] * 3
    assert same_bits(y, other.step(x)) and all(map(same_bits, stream.state, other.state))


def listed(state):
    return state if isinstance(state, tuple) else (state,)


def test_handlers_that_return():
    """A handler runs amid a call, which goes on to the same bits; so does a call of another thread beside it."""
    layer = fastlstm.LSTM(256, 512, 2, rng=0)
    x = np.random.default_rng(0).standard_normal((2000, 4, 256)).astype(np.float32)
    fastlstm.set_num_threads(2)
    want, ticks, inside = layer(x), [], []

    def tick(*_):
        ticks.append(threading.current_thread() is threading.main_thread())
        inside.append(engine.calls())

    before = signal.signal(signal.SIGALRM, tick)
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    try:
        got = layer(x)
        others = []
        thread = threading.Thread(target=lambda: others.append(layer(x)))
        thread.start()
        thread.join()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    same(got, want)
    same(others[0], want)
    assert all(ticks) and any(inside)


@pytest.mark.own  # by BLAS its threads are held from Python, between passes
@pytest.mark.parametrize("options", ({}, {"checkpoint_every": 9}))
def test_a_short_pass_is_whole(options, alarm):
    """A signal amid a backward pass of a millisecond: all layers have their gradients, or none; there are no others."""
    layer = fastlstm.LSTM(16, 48, 3, rng=0)
    x = np.random.default_rng(0).standard_normal((40, 8, 16)).astype(np.float32)
    y = layer(x)[0]
    layer.backward(layer.forward(x, **options)[2], y)
    want, found, times = layer.flat_grads.copy(), {"none": 0, "all": 0}, []
    for i in range(5000):  # until enough signals came before the end of a call, however busy the machine is
        if sum(found.values()) == 150:
            break
        layer.zero_grad()
        tape = layer.forward(x, **options)[2]
        try:
            begin = time.perf_counter()
            if i >= 10:
                # Every other one early: in Python, before the first pass.
                alarm(np.median(times[-50:]) * (i % 48 + 1) / (40 if i % 2 else 400))
            layer.backward(tape, y)
            times.append(time.perf_counter() - begin)
            alarm(0)
        except KeyboardInterrupt:
            whole = same_bits(layer.flat_grads, want)
            assert whole or not layer.flat_grads.any(), "some gradients are added, some not"
            found["all" if whole else "none"] += 1
    assert sum(found.values()) == 150 and found["none"] > 5, found
