"""Malformed calls, files and options: each a clear error that names the argument and changes nothing."""

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import fastlstm
from fastlstm import GRU, LSTM, RNN

T, N, D, H, L = 4, 3, 2, 5, 2
P_SHAPE = (L, N, H)


def make():
    """A layer with every random option on, gradients that are not zero, and good arguments for it."""
    k = SimpleNamespace()
    k.layer = LSTM(D, H, L, dropout=0.3, recurrent_dropout=0.2, zoneout=(0.1, 0.2), rng=1)
    k.x = np.random.default_rng(0).standard_normal((T, N, D)).astype(np.float32)
    y, _, tape = k.layer.forward(k.x)
    k.layer.backward(tape, np.ones_like(y))
    k.y, _, k.tape = k.layer.forward(k.x)
    k.h = k.c = np.zeros(P_SHAPE, np.float32)
    k.dy = np.ones_like(k.y)
    return k


def fingerprint(layer):
    """Everything that a failed call must not change."""
    return (
        layer.flat_params.tobytes(),
        layer.flat_grads.tobytes(),
        repr(layer.rng.bit_generator.state),
        repr(layer),
    )


def other(k):
    return LSTM(D, H, L, rng=2)


def used(k):
    k.layer.backward(k.tape, k.dy)
    k.before = fingerprint(k.layer)
    return k.tape


def sd(k, **changes):
    """The state dict with some entries changed; None takes one out."""
    return {name: v for name, v in (k.layer.state_dict() | changes).items() if v is not None}


def load(k, **changes):
    k.layer.load_state_dict(sd(k, **changes))


def wide():
    return LSTM(D, H, dtype=np.float64)


def saved(k, tmp_path, **arrays):
    np.savez(tmp_path / "weights.npz", **arrays)
    return np.load(tmp_path / "weights.npz")


def f4(*shape):
    return np.zeros(shape, np.float32)


def read_only(a):
    a.flags.writeable = False
    return a


class Rude:
    def __array__(self, *args, **kwargs):
        raise RuntimeError("no array today")


CALLS = {
    # x
    "x None": (TypeError, "x", lambda k: k.layer(None)),
    "x text": (TypeError, "x", lambda k: k.layer("some text")),
    "x ragged list": (TypeError, "x", lambda k: k.layer([[1, 2], [3]])),
    "x refuses": (TypeError, "x", lambda k: k.layer(Rude())),
    "x scalar": (ValueError, "x", lambda k: k.layer(1.0)),
    "x 1-D": (ValueError, "x", lambda k: k.layer(f4(D))),
    "x 4-D": (ValueError, "x", lambda k: k.layer(f4(1, T, N, D))),
    "x too wide": (ValueError, "x", lambda k: k.layer(f4(T, N, D + 1))),
    "x width 0": (ValueError, "x", lambda k: k.layer(f4(T, N, 0))),
    "x complex": (TypeError, "x", lambda k: k.layer(k.x.astype(complex))),
    "x object": (TypeError, "x", lambda k: k.layer(k.x.astype(object))),
    "x strings": (TypeError, "x", lambda k: k.layer(k.x.astype(str))),
    "x dates": (TypeError, "x", lambda k: k.layer(np.zeros((T, N, D), "M8[s]"))),
    "x record": (TypeError, "x", lambda k: k.layer(np.zeros((T, N), [("a", "f4"), ("b", "f4")]))),
    "x more steps than memory": (ValueError, "x", lambda k: k.layer(np.empty((2**41, 0, D), np.int8))),
    "forward x None": (TypeError, "x", lambda k: k.layer.forward(None)),
    "forward x too wide": (ValueError, "x", lambda k: k.layer.forward(f4(T, N, D + 1))),
    "forward x complex": (TypeError, "x", lambda k: k.layer.forward(k.x.astype(complex))),
    # state
    "state one array": (TypeError, "state", lambda k: k.layer(k.x, k.h)),
    "state three": (TypeError, "state", lambda k: k.layer(k.x, (k.h, k.c, k.c))),
    "state one in a tuple": (TypeError, "state", lambda k: k.layer.forward(k.x, (k.h,))),
    "state number": (TypeError, "state", lambda k: k.layer(k.x, 0)),
    "h_0 one layer": (ValueError, "h_0", lambda k: k.layer(k.x, (k.h[:1], k.c))),
    "h_0 batch": (ValueError, "h_0", lambda k: k.layer.forward(k.x, (f4(L, N + 1, H), k.c))),
    "h_0 unbatched": (ValueError, "h_0", lambda k: k.layer(k.x, (f4(L, H), f4(L, H)))),
    "c_0 width": (ValueError, "c_0", lambda k: k.layer(k.x, (k.h, f4(L, N, H + 1)))),
    "c_0 complex": (TypeError, "c_0", lambda k: k.layer.forward(k.x, (k.h, k.c.astype(complex)))),
    "h_0 object": (TypeError, "h_0", lambda k: k.layer(k.x, (k.h.astype(object), k.c))),
    "gru state pair": (TypeError, "state", lambda k: GRU(D, H)(k.x, (f4(1, N, H), f4(1, N, H)))),
    "rnn state shape": (ValueError, "h_0", lambda k: RNN(D, H)(k.x, f4(N, H))),
    # lengths
    "lengths negative": (ValueError, "lengths", lambda k: k.layer(k.x, lengths=[1, -1, 2])),
    "lengths beyond T": (ValueError, "lengths", lambda k: k.layer.forward(k.x, lengths=[1, T + 1, 2])),
    "lengths far beyond": (ValueError, "lengths", lambda k: k.layer(k.x, lengths=np.uint64([1, 1, 2**63]))),
    "lengths float": (TypeError, "lengths", lambda k: k.layer(k.x, lengths=[1.0, 2.0, 3.0])),
    "lengths NaN": (TypeError, "lengths", lambda k: k.layer.forward(k.x, lengths=[1, 2, np.nan])),
    "lengths bool": (TypeError, "lengths", lambda k: k.layer(k.x, lengths=[True, False, True])),
    "lengths text": (TypeError, "lengths", lambda k: k.layer(k.x, lengths="123")),
    "lengths object": (TypeError, "lengths", lambda k: k.layer(k.x, lengths=[1, None, 2])),
    "lengths too few": (ValueError, "lengths", lambda k: k.layer(k.x, lengths=[1, 2])),
    "lengths number": (ValueError, "lengths", lambda k: k.layer(k.x, lengths=2)),
    "lengths 2-D": (ValueError, "lengths", lambda k: k.layer.forward(k.x, lengths=np.ones((N, 2), int))),
    "lengths ragged": (TypeError, "lengths", lambda k: k.layer(k.x, lengths=[[1], [2, 3], 4])),
    # checkpoint_every
    "checkpoint 0": (ValueError, "checkpoint_every", lambda k: k.layer.forward(k.x, checkpoint_every=0)),
    "checkpoint 1.5": (TypeError, "checkpoint_every", lambda k: k.layer.forward(k.x, checkpoint_every=1.5)),
    "checkpoint True": (TypeError, "checkpoint_every", lambda k: k.layer.forward(k.x, checkpoint_every=True)),
    # backward
    "tape None": (TypeError, "tape", lambda k: k.layer.backward(None, k.dy)),
    "tape of arrays": (TypeError, "tape", lambda k: k.layer.backward(k.y, k.dy)),
    "tape used": (RuntimeError, "tape", lambda k: k.layer.backward(used(k), k.dy)),
    "tape of another layer": (ValueError, "tape", lambda k: k.layer.backward(other(k).forward(k.x)[2], k.dy)),
    "dy shape": (ValueError, "dy", lambda k: k.layer.backward(k.tape, f4(T, N, H + 1))),
    "dy one step": (ValueError, "dy", lambda k: k.layer.backward(k.tape, f4(N, H))),
    "dy scalar": (ValueError, "dy", lambda k: k.layer.backward(k.tape, 1.0)),
    "dy complex": (TypeError, "dy", lambda k: k.layer.backward(k.tape, k.dy.astype(complex))),
    "dy text": (TypeError, "dy", lambda k: k.layer.backward(k.tape, "dy")),
    "dstate one array": (TypeError, "dstate", lambda k: k.layer.backward(k.tape, k.dy, k.h)),
    "dh_n shape": (ValueError, "dh_n", lambda k: k.layer.backward(k.tape, k.dy, (k.h[:1], None))),
    "dc_n shape": (ValueError, "dc_n", lambda k: k.layer.backward(k.tape, None, (None, f4(L, N, H + 1)))),
    "dc_n object": (TypeError, "dc_n", lambda k: k.layer.backward(k.tape, None, (None, [[None]]))),
    # what a tape shows
    "gates of no layer": (ValueError, "layer", lambda k: k.tape.gates(L)),
    "gates of layer -1": (ValueError, "layer", lambda k: k.tape.gates(-1)),
    "gates of layer 'a'": (TypeError, "layer", lambda k: k.tape.gates("a")),
    "no reverse": (ValueError, "reverse", lambda k: k.tape.cells(0, reverse=True)),
    "gates of a used tape": (RuntimeError, "tape", lambda k: used(k).gates()),
    "masks of a used tape": (RuntimeError, "tape", lambda k: used(k).masks),
    "cells of a GRU": (ValueError, "GRU", lambda k: GRU(D, H).forward(k.x)[2].cells()),
    "gates of a checkpointed tape": (
        RuntimeError, "checkpoint_every", lambda k: other(k).forward(k.x, checkpoint_every=2)[2].gates(),
    ),
    # state dicts
    "state dict None": (TypeError, "load_state_dict", lambda k: k.layer.load_state_dict(None)),
    "state dict of pairs": (TypeError, "load_state_dict", lambda k: k.layer.load_state_dict([*sd(k)])),
    "state dict empty": (ValueError, "weight_ih_l0", lambda k: k.layer.load_state_dict({})),
    "state dict lacks one": (
        ValueError, "bias_hh_l1", lambda k: load(k, bias_hh_l1=None),
    ),
    "state dict has one more": (ValueError, "extra", lambda k: load(k, extra=f4(1))),
    "state dict of a projection": (
        ValueError, "weight_hr_l0", lambda k: k.layer.load_state_dict(LSTM(D, H, L, proj_size=2).params),
    ),
    "state dict wrong shape": (
        ValueError, "bias_hh_l1", lambda k: load(k, weight_ih_l0=f4(4 * H, D) + 7, bias_hh_l1=f4(1)),
    ),
    "state dict transposed": (
        ValueError, "weight_ih_l0", lambda k: load(k, weight_ih_l0=f4(D, 4 * H)),
    ),
    "state dict complex": (
        TypeError, "weight_ih_l0", lambda k: load(k, weight_ih_l0=f4(4 * H, D) + 0j),
    ),
    "state dict text": (TypeError, "bias_ih_l0", lambda k: load(k, bias_ih_l0="ones")),
    "state dict ragged": (TypeError, "bias_ih_l0", lambda k: load(k, bias_ih_l0=[1, [2]])),
    # threads
    "threads 0": (ValueError, "n", lambda k: fastlstm.set_num_threads(0)),
    "threads -1": (ValueError, "n", lambda k: fastlstm.set_num_threads(-1)),
    "threads 1.5": (TypeError, "n", lambda k: fastlstm.set_num_threads(1.5)),
    "threads '2'": (TypeError, "n", lambda k: fastlstm.set_num_threads("2")),
    "threads True": (TypeError, "n", lambda k: fastlstm.set_num_threads(True)),
    "threads 2**40": (ValueError, "n", lambda k: fastlstm.set_num_threads(2**40)),
    # streams
    "stream batch 0": (ValueError, "batch_size", lambda k: k.layer.stream(0)),
    "stream batch 1.0": (TypeError, "batch_size", lambda k: k.layer.stream(1.0)),
    "stream of a bidirectional layer": (
        ValueError, "stream.*bidirectional", lambda k: LSTM(D, H, bidirectional=True).stream(),
    ),
    "stream of float16 weights": (ValueError, "weights", lambda k: k.layer.stream(weights="float16")),
    "bfloat16 of a float64 layer": (
        ValueError, "weights", lambda k: wide().stream(weights="bfloat16"),
    ),
    "freeze float64 as bfloat16": (
        ValueError, "weights", lambda k: wide().freeze("bfloat16"),
    ),
    "freeze as int4": (ValueError, "weights", lambda k: k.layer.freeze("int4")),
    "share a layer": (ValueError, "share", lambda k: k.layer.stream(share=k.layer)),
    "share with another layer": (ValueError, "share", lambda k: k.layer.stream(share=other(k).stream())),
    "share other weights": (
        ValueError, "weights", lambda k: k.layer.stream(weights="bfloat16", share=k.layer.stream()),
    ),
    # frozen layers
    "forward when frozen": (RuntimeError, "forward.*frozen", lambda k: other(k).freeze().forward(k.x)),
    "backward when frozen": (RuntimeError, "backward", lambda k: k.layer.freeze().backward(k.tape, 0)),
    "load when frozen": (RuntimeError, "frozen", lambda k: k.layer.freeze().load_state_dict(sd(k))),
    "write when frozen": (ValueError, "read-only", lambda k: k.layer.freeze().params["weight_ih_l0"].fill(0)),
    "write flat when frozen": (ValueError, "read-only", lambda k: k.layer.freeze().flat_params.fill(0)),
    # gradcheck
    "gradcheck float32": (TypeError, "layer.*float64", lambda k: fastlstm.gradcheck(k.layer, k.x)),
    "gradcheck of no layer": (TypeError, "layer", lambda k: fastlstm.gradcheck(3, k.x)),
    "gradcheck x": (ValueError, "x", lambda k: fastlstm.gradcheck(wide(), f4(T, N, D + 1))),
    "gradcheck eps 0": (
        ValueError, "eps", lambda k: fastlstm.gradcheck(wide(), k.x, eps=0),
    ),
    "gradcheck tol -1": (
        ValueError, "tol", lambda k: fastlstm.gradcheck(wide(), k.x, tol=-1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_a_wrong_call_is_an_error_that_changes_nothing(call):
    error, name, run = CALLS[call]
    k = make()
    threads = fastlstm.get_num_threads()
    k.before = fingerprint(k.layer)
    with pytest.raises(error, match=rf"\b{name}\b") as caught:
        run(k)
    assert type(caught.value) is error
    assert len(str(caught.value)) < 400
    assert fingerprint(k.layer) == k.before
    assert fastlstm.get_num_threads() == threads
    k.layer.unfreeze()
    assert np.isfinite(k.layer(k.x)[0]).all()
    if "used" not in call:  # a refused call does not use the tape up
        k.layer.backward(k.tape, k.dy)


CONSTRUCTORS = {
    "input_size 0": (ValueError, "input_size", lambda: LSTM(0, 5)),
    "input_size -3": (ValueError, "input_size", lambda: GRU(-3, 5)),
    "input_size 2.0": (TypeError, "input_size", lambda: RNN(2.0, 5)),
    "input_size True": (TypeError, "input_size", lambda: LSTM(True, 5)),
    "hidden_size 0": (ValueError, "hidden_size", lambda: LSTM(2, 0)),
    "hidden_size '5'": (TypeError, "hidden_size", lambda: LSTM(2, "5")),
    "hidden_size None": (TypeError, "hidden_size", lambda: GRU(2, None)),
    "hidden_size 2**40": (ValueError, "hidden_size", lambda: LSTM(2, 2**40)),
    "hidden_size 2**70": (ValueError, "hidden_size", lambda: LSTM(2, 2**70)),
    "hidden_size 2**31 - 1": (MemoryError, "hidden_size", lambda: LSTM(2, 2**31 - 1)),
    "hidden_size 2**24": (MemoryError, "hidden_size", lambda: GRU(2, 2**24)),
    "both sizes large": (MemoryError, "input_size", lambda: RNN(2**31 - 1, 2**31 - 1)),
    "num_layers 0": (ValueError, "num_layers", lambda: LSTM(2, 5, 0)),
    "num_layers 2.5": (TypeError, "num_layers", lambda: LSTM(2, 5, 2.5)),
    "num_layers 2**30": (ValueError, "num_layers", lambda: LSTM(2, 5, 2**30)),
    "bias 1": (TypeError, "bias", lambda: LSTM(2, 5, bias=1)),
    "bias None": (TypeError, "bias", lambda: GRU(2, 5, bias=None)),
    "batch_first 'yes'": (TypeError, "batch_first", lambda: LSTM(2, 5, batch_first="yes")),
    "bidirectional 2": (TypeError, "bidirectional", lambda: RNN(2, 5, bidirectional=2)),
    "reset_after 0": (TypeError, "reset_after", lambda: GRU(2, 5, reset_after=0)),
    "dropout 1.5": (ValueError, "dropout", lambda: LSTM(2, 5, 2, dropout=1.5)),
    "dropout -0.1": (ValueError, "dropout", lambda: LSTM(2, 5, 2, dropout=-0.1)),
    "dropout NaN": (ValueError, "dropout", lambda: LSTM(2, 5, 2, dropout=float("nan"))),
    "dropout '0.5'": (TypeError, "dropout", lambda: LSTM(2, 5, 2, dropout="0.5")),
    "dropout b'1'": (TypeError, "dropout", lambda: LSTM(2, 5, 2, dropout=b"1")),
    "dropout True": (TypeError, "dropout", lambda: LSTM(2, 5, 2, dropout=True)),
    "dropout array": (TypeError, "dropout", lambda: LSTM(2, 5, 2, dropout=np.array([0.5]))),
    "dropout complex": (TypeError, "dropout", lambda: LSTM(2, 5, 2, dropout=np.complex64(0.5))),
    "dropout in one layer": (ValueError, "dropout", lambda: LSTM(2, 5, dropout=0.5)),
    "recurrent_dropout 2": (ValueError, "recurrent_dropout", lambda: GRU(2, 5, recurrent_dropout=2)),
    "zoneout one number": (TypeError, "zoneout", lambda: LSTM(2, 5, zoneout=0.1)),
    "zoneout three": (TypeError, "zoneout", lambda: LSTM(2, 5, zoneout=(0.1, 0.1, 0.1))),
    "zoneout (0.1, 2)": (ValueError, "zoneout", lambda: LSTM(2, 5, zoneout=(0.1, 2))),
    "zoneout pair of a GRU": (TypeError, "zoneout", lambda: GRU(2, 5, zoneout=(0.1, 0.1))),
    "proj_size -1": (ValueError, "proj_size", lambda: LSTM(2, 5, proj_size=-1)),
    "proj_size H": (ValueError, "proj_size", lambda: LSTM(2, 5, proj_size=5)),
    "proj_size None": (TypeError, "proj_size", lambda: LSTM(2, 5, proj_size=None)),
    "proj_size of a GRU": (TypeError, "proj_size", lambda: GRU(2, 5, proj_size=2)),
    "activation 'Tanh'": (ValueError, "activation", lambda: LSTM(2, 5, activation="Tanh")),
    "activation function": (ValueError, "activation", lambda: GRU(2, 5, activation=np.tanh)),
    "activation array": (ValueError, "activation", lambda: GRU(2, 5, activation=np.zeros(3))),
    "recurrent_activation tanh": (
        ValueError, "recurrent_activation", lambda: LSTM(2, 5, recurrent_activation="tanh"),
    ),
    "nonlinearity swish": (ValueError, "nonlinearity", lambda: RNN(2, 5, nonlinearity="swish")),
    "gate that cannot gate": (
        ValueError, "recurrent_activation", lambda: LSTM(2, 5, recurrent_activation=("leaky_relu", 0.1)),
    ),
    "activation of 3": (ValueError, "activation", lambda: LSTM(2, 5, activation=("elu", 1.0, 2.0))),
    "activation that falls": (ValueError, "activation", lambda: GRU(2, 5, activation=("elu", -1.0))),
    "activation without numbers": (ValueError, "activation", lambda: GRU(2, 5, activation="scaled_tanh")),
    "activation with numbers": (ValueError, "activation", lambda: GRU(2, 5, activation=("tanh", 2.0))),
    "activation of text": (TypeError, "activation", lambda: GRU(2, 5, activation=("elu", "1"))),
    "activation ()": (ValueError, "activation", lambda: LSTM(2, 5, activation=())),
    "activation None": (ValueError, "activation", lambda: LSTM(2, 5, activation=None)),
    "output_activation": (ValueError, "output_activation", lambda: LSTM(2, 5, output_activation="gelu")),
    "clip 0": (ValueError, "clip", lambda: LSTM(2, 5, clip=0)),
    "clip nan": (ValueError, "clip", lambda: RNN(2, 5, clip=float("nan"))),
    "clip '1'": (TypeError, "clip", lambda: GRU(2, 5, clip="1")),
    "cell_clip -1": (ValueError, "cell_clip", lambda: LSTM(2, 5, cell_clip=-1)),
    "layer_norm_eps 0": (ValueError, "layer_norm_eps", lambda: LSTM(2, 5, layer_norm=True, layer_norm_eps=0)),
    "layer_norm_eps below any float": (
        ValueError, "layer_norm_eps", lambda: LSTM(2, 5, layer_norm=True, layer_norm_eps=1e-50),
    ),
    "layer_norm_eps without layer_norm": (ValueError, "layer_norm_eps", lambda: LSTM(2, 5, layer_norm_eps=1e-3)),
    "layer_norm with peepholes": (ValueError, "layer_norm", lambda: LSTM(2, 5, layer_norm=True, peepholes=True)),
    "proj_clip without proj_size": (ValueError, "proj_clip", lambda: LSTM(2, 5, proj_clip=1.0)),
    "init 'ones'": (ValueError, "init", lambda: LSTM(2, 5, init="ones")),
    "init list": (ValueError, "init", lambda: LSTM(2, 5, init=["pytorch"])),
    "forget_bias '1'": (TypeError, "forget_bias", lambda: LSTM(2, 5, forget_bias="1")),
    "forget_bias inf": (ValueError, "forget_bias", lambda: LSTM(2, 5, forget_bias=float("inf"))),
    "forget_bias without bias": (ValueError, "forget_bias", lambda: LSTM(2, 5, bias=False, forget_bias=1)),
    "dtype float16": (TypeError, "dtype", lambda: LSTM(2, 5, dtype=np.float16)),
    "dtype int": (TypeError, "dtype", lambda: LSTM(2, 5, dtype=int)),
    "dtype complex": (TypeError, "dtype", lambda: GRU(2, 5, dtype=complex)),
    "dtype swapped": (TypeError, "dtype", lambda: LSTM(2, 5, dtype=np.dtype("f4").newbyteorder())),
    "dtype 'floaty'": (TypeError, "dtype", lambda: LSTM(2, 5, dtype="floaty")),
    "dtype None": (TypeError, "dtype", lambda: LSTM(2, 5, dtype=None)),
    "rng -1": (TypeError, "rng", lambda: LSTM(2, 5, rng=-1)),
    "rng 1.5": (TypeError, "rng", lambda: LSTM(2, 5, rng=1.5)),
    "rng 'seed'": (TypeError, "rng", lambda: LSTM(2, 5, rng="seed")),
}  # fmt: skip


@pytest.mark.parametrize("case", CONSTRUCTORS)
def test_a_wrong_option_is_an_error(case):
    error, name, make_layer = CONSTRUCTORS[case]
    with pytest.raises(error, match=rf"\b{name}\b") as caught:
        make_layer()
    assert issubclass(type(caught.value), error)
    assert len(str(caught.value)) < 400


STEPS = {
    "x None": (TypeError, "x", lambda s, x: s.step(None)),
    "x complex": (TypeError, "x", lambda s, x: s.step(x + 0j)),
    "x one row": (ValueError, "x", lambda s, x: s.step(x[0])),
    "x too wide": (ValueError, "x", lambda s, x: s.step(f4(N, D + 1))),
    "x more rows": (ValueError, "x", lambda s, x: s.step(f4(N + 1, D))),
    "x 3-D": (ValueError, "x", lambda s, x: s.step(x[None])),
    "out float64": (ValueError, "out", lambda s, x: s.step(x, np.zeros((N, H)))),
    "out shape": (ValueError, "out", lambda s, x: s.step(x, f4(N, H + 1))),
    "out 1-D": (ValueError, "out", lambda s, x: s.step(x, f4(N * H))),
    "out Fortran": (ValueError, "out", lambda s, x: s.step(x, f4(H, N).T)),
    "out strided": (ValueError, "out", lambda s, x: s.step(x, f4(N, 2 * H)[:, ::2])),
    "out read-only": (ValueError, "out", lambda s, x: s.step(x, read_only(f4(N, H)))),
    "out list": (ValueError, "out", lambda s, x: s.step(x, [[0.0] * H] * N)),
    "out misaligned": (
        ValueError, "out", lambda s, x: s.step(x, np.zeros(4 * N * H + 1, "u1")[1:].view("f4").reshape(N, H)),
    ),
    "state array": (TypeError, "state", lambda s, x: setattr(s, "state", f4(*P_SHAPE))),
    "state shape": (ValueError, "c_0", lambda s, x: setattr(s, "state", (f4(*P_SHAPE), f4(1, N, H)))),
}  # fmt: skip


@pytest.mark.parametrize("case", STEPS)
def test_a_wrong_step_leaves_the_stream_as_it_was(case):
    error, name, run = STEPS[case]
    k = make()
    stream, x = k.layer.stream(N), k.x[0]
    stream.step(x)
    before, state = fingerprint(k.layer), [s.tobytes() for s in stream.state]
    with pytest.raises(error, match=rf"\b{name}\b"):
        run(stream, x)
    assert fingerprint(k.layer) == before
    assert [s.tobytes() for s in stream.state] == state
    stream.step(x)


def test_files_with_other_weights(tmp_path):
    """A file of arrays is a mapping like any other."""
    k = make()
    before = fingerprint(k.layer)
    good = k.layer.state_dict()
    for arrays, error, name in (
        ({}, ValueError, "weight_ih_l0"),
        (good | {"bias_ih_l0": np.zeros(3)}, ValueError, "bias_ih_l0"),
        (good | {"bias_ih_l0": np.array(["a"] * 4 * H)}, TypeError, "bias_ih_l0"),
        (good | {"optimizer": np.zeros(3)}, ValueError, "optimizer"),
    ):
        with saved(k, tmp_path, **arrays) as file, pytest.raises(error, match=rf"\b{name}\b"):
            k.layer.load_state_dict(file)
        assert fingerprint(k.layer) == before
    with saved(k, tmp_path, **good) as file:
        k.layer.load_state_dict(file)
    assert fingerprint(k.layer) == before


def test_enough_is_tried():
    assert len(CALLS) + len(CONSTRUCTORS) + len(STEPS) >= 160
    assert not re.search(r"\bTODO\b", " ".join([*CALLS, *CONSTRUCTORS, *STEPS]))


def run_python(program, **environment):
    return subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | environment,
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["avx1024", "none", "avx2,avx512"])
def test_an_unknown_isa_is_a_loud_error(name):
    done = run_python("import fastlstm", FASTLSTM_ISA=name)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: FASTLSTM_ISA: expected one of ['baseline'") and name in last


def test_the_isa_may_be_in_capitals():
    name = fastlstm.engine.available_isas()[0]
    done = run_python("import fastlstm; print(fastlstm.engine.isa())", FASTLSTM_ISA=name.upper())
    assert done.stdout.split() == [name], done.stderr


def test_an_empty_isa_is_none():
    done = run_python("import fastlstm; print(fastlstm.engine.isa())", FASTLSTM_ISA="")
    assert done.stdout.split() == [fastlstm.engine.available_isas()[-1]], done.stderr


@pytest.mark.parametrize("value", ["0", "-1", "two", "\u00b2", "", "1e3", "99999999999999999999", " 3 , 2"])
def test_any_omp_num_threads(value):
    """An environment variable of OpenMP is not ours to complain about."""
    program = (
        "import numpy as np, fastlstm; fastlstm.LSTM(2, 3)(np.ones((1, 1, 2)));assert fastlstm.get_num_threads() >= 1"
    )
    done = run_python(program, OMP_NUM_THREADS=value)
    assert done.returncode == 0, done.stderr


HUGE = {
    "steps": "LSTM(1, 2)(np.broadcast_to(np.float32(0), (2**60, 1, 1)))",
    "empty steps": "GRU(1, 2)(np.empty((2**62, 0, 1), np.float32))",
    "sequences": "RNN(1, 2).forward(np.broadcast_to(np.float32(0), (1, 2**60, 1)))",
    "no steps": "LSTM(1, 2)(np.empty((0, 2**61, 1), np.float32))",
    "steps and lengths": "LSTM(1, 2)(np.broadcast_to(np.float32(0), (2**60, 1, 1)), lengths=[1])",
    "steps of the largest size": "LSTM(1, 2)(np.broadcast_to(np.int8(0), (2**63 - 1, 1, 1)))",
    "sizes": "LSTM(2**31 - 1, 2**31 - 1, 2**16)",
}


@pytest.mark.parametrize("case", HUGE)
def test_huge_sizes_end_in_an_error(case):
    program = (
        "import numpy as np\nfrom fastlstm import *\n"
        f"try:\n    {HUGE[case]}\nexcept (ValueError, MemoryError) as error:\n    print(type(error).__name__)"
    )
    done = run_python(program)
    assert done.returncode == 0, (done.returncode, done.stderr[-500:])
    assert done.stdout.split()[0] in ("ValueError", "MemoryError", "_ArrayMemoryError")


# ---- strange but right ---------------------------------------------------------------------------


def misaligned(a):
    raw = np.zeros(a.nbytes + 1, np.uint8)
    out = raw[1:].view(a.dtype).reshape(a.shape)
    out[...] = a
    assert not out.flags.aligned
    return out


STRANGE = {
    "other byte order": lambda a: a.astype(a.dtype.newbyteorder()),
    "Fortran order": np.asfortranarray,
    "negative strides": lambda a: np.ascontiguousarray(a[::-1, :, ::-1])[::-1, :, ::-1],
    "every second": lambda a: np.repeat(np.repeat(a, 2, 0), 2, 2)[::2, :, ::2],
    "misaligned": misaligned,
    "read-only": lambda a: read_only(a.copy()),
    "nested lists": lambda a: a.tolist(),
    "float64": lambda a: a.astype(np.float64),
    "long double": lambda a: a.astype(np.longdouble),
    "masked array": lambda a: np.ma.masked_array(a),
    "memoryview": memoryview,
}


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", STRANGE)
def test_any_array_of_the_same_numbers_is_as_good(kind, batch_first):
    layer = LSTM(D, H, 2, batch_first=batch_first, rng=0)
    rng = np.random.default_rng(0)
    lead = (N, T) if batch_first else (T, N)
    x, h, c, dy, dh, dc = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((*lead, D), P_SHAPE, P_SHAPE, (*lead, H), P_SHAPE, P_SHAPE)
    )

    def everything(f):
        layer.zero_grad()
        y, end = layer(f(x), (f(h), f(c)))
        y_2, end_2, tape = layer.forward(f(x), (f(h), f(c)))
        y_2 = y_2.copy()
        dx, dstart = layer.backward(tape, f(dy), (f(dh), f(dc)))
        return [np.array(a).tobytes() for a in (y, *end, y_2, *end_2, dx, *dstart, layer.flat_grads)]

    before = [a.tobytes() for a in (x, h, c, dy, dh, dc)]
    assert everything(STRANGE[kind]) == everything(lambda a: a)
    assert [a.tobytes() for a in (x, h, c, dy, dh, dc)] == before  # arguments are never written to


@pytest.mark.parametrize("dtype", ["?", "i1", "u1", "i8", "u8", "f2"])
def test_integers_are_numbers(dtype):
    layer = GRU(D, H, rng=0)
    x = np.random.default_rng(0).integers(0, 2, (T, N, D)).astype(dtype)
    assert layer(x)[0].tobytes() == layer(x.astype(np.float32))[0].tobytes()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e38, 1e-40])
@pytest.mark.parametrize("make_layer", [LSTM, GRU, RNN])
@pytest.mark.parametrize("where", ["x", "state", "weights", "dy"])
def test_no_number_is_fatal(make_layer, value, where):
    """NaN and infinities stay within their own row and raise nothing, not even a warning."""
    layer = make_layer(D, H, 2, bidirectional=True, rng=0)
    x, h = np.ones((T, N, D), np.float32), np.zeros((4, N, H), np.float32)
    clean = layer(x)[0]
    dy = np.ones_like(clean)
    bad = np.float32(value)
    if where == "weights":
        layer.flat_params[::3] = bad
    else:
        {"x": x, "state": h, "dy": dy}[where][1, 1, 1] = bad
        if where == "state":
            h[1, 1, 1], h[1, 0, 0] = 0, 0
            h[:, 1, 1] = bad
    state = (h, h) if make_layer is LSTM else h
    y, _ = layer(x, state)
    if where != "weights":
        assert y[:, [0, 2]].tobytes() == clean[:, [0, 2]].tobytes()
    y, _, tape = layer.forward(x, state)
    dx, _ = layer.backward(tape, dy)
    assert y.shape == clean.shape and dx.shape == x.shape
    if np.isnan(value) and where != "dy":
        assert np.isnan(y[:, 1]).any()


@pytest.mark.parametrize("make_layer", [LSTM, GRU, RNN])
@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (0, 0)])
@pytest.mark.parametrize("checkpoint_every", [None, 2])
def test_empty_batches_and_sequences(make_layer, shape, checkpoint_every):
    """y is empty, the states come back, and so do their gradients."""
    layer = make_layer(D, H, 2, bidirectional=True, dropout=0.5, recurrent_dropout=0.5, rng=0)
    rng = np.random.default_rng(0)
    states = [rng.standard_normal((4, shape[1], H)).astype(np.float32) for _ in range(2)]
    pairs = make_layer is LSTM
    state = tuple(states) if pairs else states[0]

    def listed(s):
        return list(s) if pairs else [s]

    x = np.zeros((*shape, D), np.float32)
    y, end = layer(x, state)
    assert y.shape == (*shape, 2 * H) and y.dtype == np.float32
    for a, b in zip(listed(end), states, strict=False):
        assert a.tobytes() == b.tobytes() and not np.shares_memory(a, b)
    y, end, tape = layer.forward(x, state, checkpoint_every=checkpoint_every)
    assert y.shape == (*shape, 2 * H)
    for a, b in zip(listed(end), states, strict=False):
        assert a.tobytes() == b.tobytes() and not np.shares_memory(a, b)
    assert tape.hidden(1).shape == (*shape, H)
    dx, dstart = layer.backward(tape, y, state)
    assert dx.shape == x.shape
    for a, b in zip(listed(dstart), states, strict=False):
        assert a.tobytes() == b.tobytes()
    assert not layer.flat_grads.any()
    if shape[1]:
        none = layer(np.zeros((2, 3, D), np.float32), state, lengths=[0, 0, 0])
        assert none[0].shape == (2, 3, 2 * H) and not none[0].any()
        assert listed(none[1])[0].tobytes() == states[0].tobytes()
    else:
        assert layer(x, state, lengths=[])[0].shape == (*shape, 2 * H)
