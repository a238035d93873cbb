"""What a user has made read-only is not written to: the call is an error, and nothing has changed."""

import numpy as np
import pytest
from conftest import same_bits

import fastlstm
from fastlstm import nn

X = np.ones((7, 2, 3), np.float32)
THINGS = {
    **{kind.__name__: lambda kind=kind: kind(3, 4) for kind in (fastlstm.LSTM, fastlstm.GRU, fastlstm.SLSTM)},
    "Linear": lambda: nn.Linear(3, 2),
    "Embedding": lambda: nn.Embedding(5, 3),
    "LayerNorm": lambda: nn.LayerNorm(3),
    "Recurrent": lambda: nn.Recurrent(fastlstm.GRU(3, 4), last=True),
    "Sequential": lambda: nn.Sequential(fastlstm.GRU(3, 4), nn.Linear(4, 2)),
    "Stack": lambda: fastlstm.Stack([fastlstm.GRU(3, 4), nn.Linear(4, 2)]),
}


def protect(thing, which, whole):
    """Make the first buffer, or the first array, of params or grads read-only."""
    holder = thing.layers[0] if isinstance(thing, fastlstm.Stack) else thing
    array = getattr(holder, "flat_" + which) if whole else next(iter(getattr(holder, which).values()))
    array.setflags(write=False)


def refused(call, thing, which, match):
    before = {key: view.copy() for key, view in getattr(thing, which).items()}
    with pytest.raises(ValueError, match=match):
        call()
    assert all(same_bits(view, before[key]) for key, view in getattr(thing, which).items())


@pytest.mark.parametrize("whole", [True, False], ids=["buffer", "array"])
@pytest.mark.parametrize("name", THINGS)
def test_gradients(name, whole):
    thing = THINGS[name]()
    given = [thing] if hasattr(thing, "flat_params") else thing
    optimiser = nn.Adam(given)
    for grad in thing.grads.values():
        grad.fill(1)
    y, *_, tape = thing.forward(np.ones((7, 2), int) if name == "Embedding" else X)
    protect(thing, "grads", whole)
    for call in (
        thing.zero_grad, optimiser.zero_grad, optimiser.step, lambda: nn.clip_grad_norm(given, 0.1),
        lambda: nn.clip_grad_value(given, 0.1), lambda: thing.backward(tape, np.ones_like(y)),
    ):  # fmt: skip
        refused(call, thing, "grads", "flat_grads: .*expected a writeable .*read-only")
    assert optimiser.t == 0


@pytest.mark.parametrize("whole", [True, False], ids=["buffer", "array"])
@pytest.mark.parametrize("name", THINGS)
def test_parameters(name, whole):
    thing = THINGS[name]()
    given = [thing] if hasattr(thing, "flat_params") else thing
    optimiser, average = nn.Adam(given), nn.EMA(given)
    for a in average._state["average"]:
        a += 1
    for grad in thing.grads.values():
        grad.fill(1)
    state = {key: value + 1 for key, value in thing.state_dict().items()}
    protect(thing, "params", whole)
    for call in (optimiser.step, average.copy_to_modules, lambda: thing.load_state_dict(state)):
        refused(call, thing, "params", "flat_params: .*expected a writeable .*read-only")
    assert optimiser.t == 0


@pytest.mark.parametrize("every", [None, 3])
def test_the_tape_is_good_for_another_call(every):
    layer = fastlstm.LSTM(3, 4, num_layers=2, bidirectional=True, rng=0)
    y, _, tape = layer.forward(X, checkpoint_every=every)
    protect(layer, "grads", True)
    refused(lambda: layer.backward(tape, np.ones_like(y)), layer, "grads", "flat_grads: expected a writeable")
    layer.flat_grads.setflags(write=True)
    layer.backward(tape, np.ones_like(y))
    assert np.all(layer.flat_grads != 0)


def test_a_part_of_a_model():
    """A module's own buffer has a flag of its own: the whole model's optimiser and backward pass respect it."""
    model = nn.Sequential(fastlstm.GRU(3, 4), nn.Linear(4, 2))
    optimiser = nn.SGD([model], momentum=0.5)
    y, tape = model.forward(X)
    layer = model[0].layer
    layer.flat_grads.setflags(write=False)
    refused(lambda: model.backward(tape, np.ones_like(y)), model, "grads", "flat_grads: expected")
    refused(optimiser.step, model, "grads", r"modules\[0\]: flat_grads: expected")
    layer.flat_grads.setflags(write=True)
    model.backward(tape, np.ones_like(y))
    model.freeze()  # its packed weights would be those of before
    refused(optimiser.step, model, "params", r"modules\[0\]: flat_params: .*unfreeze\(\) where the layer is frozen")
    optimiser = model.unfreeze() and nn.SGD([model])
    optimiser.step()


def test_a_stack_changes_no_layer():
    stack = fastlstm.Stack([fastlstm.GRU(3, 4), nn.Linear(4, 2)])
    y, _, tape = stack.forward(X)
    for grad in stack.grads.values():
        grad.fill(1)
    stack[1].flat_grads.setflags(write=False)
    refused(stack.zero_grad, stack, "grads", r"layers\[1\]: flat_grads: expected")
    stack[1].flat_grads.setflags(write=True)
    stack[0].flat_grads.setflags(write=False)
    refused(lambda: stack.backward(tape, np.ones_like(y)), stack, "grads", r"layers\[0\]: flat_grads: expected")
    stack[0].flat_grads.setflags(write=True)
    stack.backward(tape, np.ones_like(y))
