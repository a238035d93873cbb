"""What a layer's attributes allow: sizes stay, weights are written through, nothing is lost in silence."""

import copy
import pickle

import numpy as np
import pytest
from conftest import CELLS, make, problem, same_bits, train

import fastlstm
from fastlstm import engine

FIXED = {
    "input_size": 7, "hidden_size": 7, "num_layers": 3, "bias": False, "bidirectional": True, "proj_size": 0,
    "activation": "relu", "recurrent_activation": "hard_sigmoid", "dtype": np.dtype(np.float64), "direction": "reverse",
    "forget_bias": 1.0,
}  # fmt: skip


@pytest.mark.parametrize("name", FIXED)
def test_what_the_memory_hangs_on_cannot_change(name):
    layer = fastlstm.LSTM(3, 64, proj_size=2, rng=0)
    x = problem(layer, 4, 2).x
    before = layer(x)[0]
    with pytest.raises(AttributeError, match=f"{name}: cannot change"):
        setattr(layer, name, FIXED[name])
    assert same_bits(layer(x)[0], before)


def test_the_engine_asks_for_the_projection_s_memory():
    """Behind the attributes: what was a crash."""
    layer = fastlstm.LSTM(3, 64, proj_size=2, rng=0)
    layer.__dict__["proj_size"] = 0
    assert layer(np.ones((4, 2, 3)))[0].shape == (4, 2, 2)
    panels = layer._pack()[0, 0, 0]
    h = np.zeros((2, 2), np.float32)
    c = np.zeros((2, 64), np.float32)
    with pytest.raises(AssertionError, match="projection"):
        engine.Run(engine.Rows(1, 2), panels, False, np.ones((2, 3), np.float32), h, h, h.copy(), c, c.copy())


def test_a_stream_keeps_its_size():
    layer = fastlstm.LSTM(3, 4, rng=0)
    stream = layer.stream(1000)
    with pytest.raises(AttributeError):
        stream.batch_size = 1
    with pytest.raises(ValueError, match="x: expected shape"):
        stream.step(np.ones(3))
    stream._convert = lambda x: np.ones((1, 3), np.float32)
    with pytest.raises(AssertionError, match="1000 rows"):
        stream.step(np.ones(3))


@pytest.mark.parametrize("cell", CELLS)
def test_what_acts_in_training_alone_may_change(cell):
    layer = make(cell, 3, 5, num_layers=2)
    p = problem(layer, 6, 4)
    layer.dropout, layer.recurrent_dropout, layer.rng = 0.5, 0.25, 3
    other = make(cell, 3, 5, num_layers=2, dropout=0.5, recurrent_dropout=0.25)
    other.rng = np.random.default_rng(3)
    got, want = train(layer, p)[0], train(other, p)[0]
    assert all(same_bits(got[name], want[name]) for name in want)
    for name, value, error in (("dropout", 2, ValueError), ("recurrent_dropout", "a lot", TypeError),
                               ("zoneout", (2, 2), (TypeError, ValueError)), ("rng", "seed", TypeError)):  # fmt: skip
        before = getattr(layer, name)
        with pytest.raises(error, match=name):
            setattr(layer, name, value)
        assert getattr(layer, name) is before
    with pytest.raises(ValueError, match="dropout: acts between layers"):
        make(cell, 3, 5).dropout = 0.5


def test_weights_are_written_through():
    layer = fastlstm.LSTM(3, 5, rng=0)
    w = np.ones((20, 3))
    layer.params["weight_ih_l0"] = w
    assert (layer.params["weight_ih_l0"] == 1).all() and (layer.flat_params[:60] == 1).all()
    layer.params["weight_ih_l0"] -= 1
    assert not layer.flat_params[:60].any()
    layer.grads.update(weight_ih_l0=w)
    assert (layer.flat_grads[:60] == 1).all()
    for error, text, act in (
        (ValueError, "expected shape", lambda: layer.params.__setitem__("weight_ih_l0", w[:1])),
        (KeyError, "weight", lambda: layer.params.__setitem__("weight_ih_l1", w)),
        (AttributeError, r"params\['weight_ih_l0'\]", lambda: setattr(layer, "weight_ih_l0", w)),
        (AttributeError, r"params\['weight_ih_l0'\]", lambda: layer.weight_ih_l0),
    ):
        with pytest.raises(error, match=text):
            act()
    for twin in (copy.deepcopy(layer.params), pickle.loads(pickle.dumps(layer.params))):
        assert list(twin) == list(layer.params) and twin["weight_ih_l0"] is not layer.params["weight_ih_l0"]


@pytest.mark.parametrize("name, text", [("eval", "inference"), ("parameters", "flat_params"), ("to", "astype")])
def test_what_stands_for_pytorch_s_words(name, text):
    with pytest.raises(AttributeError, match=text):
        getattr(fastlstm.GRU(2, 3), name)()
    assert not hasattr(fastlstm.GRU(2, 3), "no_such_thing")


def test_masked_arrays_are_refused():
    layer = fastlstm.GRU(2, 3, rng=0)
    x = np.ma.masked_greater(np.arange(12.0).reshape(3, 2, 2), 10)
    with pytest.raises(TypeError, match="x: expected an array without a mask.*mask"):
        layer(x)
    weights = layer.state_dict()
    weights["weight_ih_l0"] = np.ma.masked_greater(weights["weight_ih_l0"], 0)
    with pytest.raises(TypeError, match="weight_ih_l0: expected an array without a mask"):
        layer.load_state_dict(weights)
    assert same_bits(layer(np.ma.array(np.ones((3, 2, 2))))[0], layer(np.ones((3, 2, 2)))[0])  # nothing masked


def holders():
    """Whatever else has parameters by name."""
    yield fastlstm.nn.Linear(3, 2, rng=0), "weight"
    yield fastlstm.Stack([fastlstm.GRU(3, 4, rng=0), fastlstm.nn.Linear(4, 2, rng=0)]), "1.weight"
    yield fastlstm.nn.Sequential(fastlstm.RNN(3, 5, rng=0), fastlstm.nn.Linear(5, 2, rng=0)), "1.weight"


@pytest.mark.parametrize("holder, name", list(holders()), ids=["linear", "stack", "sequential"])
def test_the_others_write_through_too(holder, name):
    for views in (lambda: holder.params, lambda: holder.grads):
        views()[name] = np.full(views()[name].shape, 7)
        assert (views()[name] == 7).all()
        with pytest.raises(KeyError, match="expected one of"):
            views()["nothing"] = 1


@pytest.mark.parametrize("hidden", (4, 5))
def test_changed_parameters_are_noticed_in_a_common_buffer(hidden):
    model = fastlstm.nn.Sequential(fastlstm.RNN(3, hidden, rng=0), fastlstm.nn.Linear(hidden, 2, rng=0))
    x = np.ones((4, 2, 3), np.float32)
    y, tape = model.forward(x)
    model.flat_params[1] += 1
    with pytest.raises(RuntimeError, match="the parameters have changed since forward"):
        model.backward(tape, np.ones_like(y))


def test_what_is_not_there_is_not_shown():
    layer = fastlstm.LSTM(3, 4, rng=0)
    for name in ("train", "to", "weight_ih_l0"):
        assert not hasattr(layer, name) and name not in dir(layer)
    assert "forward" in dir(layer) and "train" not in dir(fastlstm.LSTM(3, 4))
    with pytest.raises(AttributeError, match="LSTM has no attribute 'train'; forward"):
        layer.train()


@pytest.mark.parametrize("cell", CELLS)
def test_how_weights_are_packed_follows_the_parameters_and_the_instruction_set(cell):
    """It is kept between calls while nothing of it changes."""
    layer = make(cell, 3, 20, rng=1)
    p = problem(layer, 4, 2)
    before = engine.isa()

    def as_a_new_layer():
        other = make(cell, 3, 20, init="zeros")
        other.load_state_dict(layer.state_dict())
        return same_bits(layer(p.x)[0], other(p.x)[0])

    try:
        for isa in engine.available_isas():
            engine.use_isa(isa)
            assert as_a_new_layer()
        layer._parameters.move(np.empty_like(layer.flat_params))
        layer.flat_params[:] *= np.float32(0.5)
        assert as_a_new_layer()
        layer._parameters.move(np.empty_like(layer.flat_params))
        layer.params["weight_hh_l0"][...] *= np.float32(2)
        assert as_a_new_layer()
    finally:
        engine.use_isa(before)


def test_threads_are_asked_for_where_the_work_may_want_a_team():
    layer = fastlstm.LSTM(4, 8, rng=0)
    asked = []
    layer.__dict__["_threads"] = lambda: asked.append(1) or 1
    layer(np.zeros((1, 1, 4), np.float32))
    y, _, tape = layer.forward(np.zeros((1, 1, 4), np.float32))
    layer.backward(tape, y)
    assert not asked
    layer(np.zeros((50, 8, 4), np.float32))
    assert len(asked) == 1 - engine.forked()


@pytest.mark.parametrize("cell", CELLS)
def test_a_layer_loads_its_own_arrays_in_another_order(cell):
    layer = make(cell, 3, 5)
    ih, hh = layer.params["bias_ih_l0"].copy(), layer.params["bias_hh_l0"].copy()
    assert np.any(ih != hh)
    layer.load_state_dict(
        {**layer.params, "bias_ih_l0": layer.params["bias_hh_l0"], "bias_hh_l0": layer.params["bias_ih_l0"]}
    )
    assert np.array_equal(layer.params["bias_ih_l0"], hh) and np.array_equal(layer.params["bias_hh_l0"], ih)


@pytest.mark.parametrize("name, value", [("num_heads", 2), ("forget_gate", "exponential")])
def test_options_of_another_kind_of_layer_cannot_be_set(name, value):
    layer = fastlstm.LSTM(3, 4, rng=0)
    with pytest.raises(AttributeError, match=f"{name}: cannot change"):
        setattr(layer, name, value)
    layer(np.ones((4, 2, 3)))


def test_a_mask_is_not_lost_on_the_way_into_weights():
    layer = fastlstm.LSTM(3, 4, rng=0)
    before = layer.flat_params.copy()
    masked = np.ma.masked_greater(np.ones((16, 3)), 0)
    with pytest.raises(TypeError, match="weight_ih_l0: expected an array without a mask"):
        layer.params["weight_ih_l0"] = masked
    assert same_bits(layer.flat_params, before)
    with pytest.raises(TypeError, match="array: expected an array without a mask"):
        fastlstm.gate_order(masked, "ifgo", "iofc")


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_stream_says_that_it_cannot_be_copied(copied):
    layer = fastlstm.LSTM(3, 4, rng=0)
    with pytest.raises(TypeError, match=r"stream: .*make another by layer.stream"):
        copied((layer, layer.stream(2))[1])


def test_a_tape_keeps_its_windows():
    layer = fastlstm.LSTM(3, 4, rng=0)
    y, _, tape = layer.forward(np.ones((6, 2, 3)), checkpoint_every=2)
    with pytest.raises(AttributeError):
        tape.checkpoint_every = None
    layer.backward(tape, y)
