"""A user's program, for a type checker alone: what comes out of the calls has these types."""

from typing import Any, assert_type

import numpy as np
from numpy.typing import NDArray

import fastlstm
from fastlstm import nn

Array = NDArray[Any]
x = np.ones((7, 2, 3), np.float32)
lstm, gru, rnn = fastlstm.LSTM(3, 5), fastlstm.GRU(3, 5), fastlstm.RNN(3, 5)

# a call: the states by class
assert_type(lstm(x), tuple[Array, tuple[Array, Array]])
assert_type(gru(x, lengths=[7, 3]), tuple[Array, Array])
assert_type(rnn(x, gru(x)[1], mask=None), tuple[Array, Array])
assert_type(fastlstm.SLSTM(3, 8)(x)[1], tuple[Array, Array, Array, Array])
assert_type(lstm([[1.0, 2.0, 3.0]])[0], Array)  # one sequence, as numbers
assert_type(lstm([x[:, 0], x[:4, 1]]), tuple[list[Array], tuple[Array, Array]])  # a list of sequences

# training: dx by need_dx, and by what x was
y, state, tape = lstm.forward(x, (None, None), checkpoint_every=4)
assert_type((y, state), tuple[Array, tuple[Array, Array]])
assert_type(tape.gates(), dict[str, Array])
assert_type(lstm.backward(tape, y), tuple[Array, tuple[Array, Array]])
assert_type(lstm.backward(tape, y, state, need_dx=False), tuple[None, tuple[Array, Array]])
assert_type(lstm.backward(tape, y, need_dx=bool(len(y))), tuple[Array | None, tuple[Array, Array]])
assert_type(gru.backward(gru.forward(x)[2], None, gru(x)[1]), tuple[Array, Array])
listed = lstm.forward([x[:, 0]])
assert_type(lstm.backward(listed[2], listed[0])[0], list[Array])

# what stands around
assert_type(lstm.stream().step(x[0, 0]), Array)
assert_type(lstm.stream().state, tuple[Array, Array])
assert_type(gru.stream(2).state, Array)
assert_type(lstm.freeze().astype(np.float64), fastlstm.LSTM)
assert_type(lstm.params["weight_ih_l0"], Array)
assert_type(lstm.num_params, int)
stack = fastlstm.Stack([lstm, nn.Linear(5, 2)])
assert_type(stack(x, mask=None)[0], Array)
assert_type(stack([x[:, 0], x[:4, 1]])[0], list[Array])
assert_type(stack.backward(stack.forward(x, checkpoint_every=2)[2], None)[0], Array)
assert_type(stack.backward(stack.forward([x[:, 0]])[2], [x[:, 0, :2]])[0], list[Array])
assert_type(stack.backward(stack.forward(x)[2], None, need_dx=False)[0], None)
model = nn.Sequential(lstm, nn.Linear(5, 2))
assert_type(model(x), Array)
assert_type(model.forward(x)[0], Array)
layer: fastlstm.Layer = lstm
assert_type(layer(x)[0], Array)

# What is wrong: each of these lines must be an error.
lstm(x, x)  # error: the state is a pair
lstm.train()  # error: no such method
gru.backward(x, x)  # error: not a tape
nothing = lstm.backward(tape, y, need_dx=False)[0].shape  # error: no dx
fastlstm.Lstm(3, 5)  # error: no such name
fastlstm.LSTM(3, 5, bidirection=True)  # error: no such argument
