"""Keras: its recurrent layers as ours and back, and its files without Keras.

Keras keeps kernels of shape (D, gates*H) with the gates in the order i, f, c, o and z, r, h, and one bias, or for the
GRU with ``reset_after`` two. Reading files needs h5py, `to_keras` needs Keras.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from . import nn
from ._layer import Layer
from ._types import Array
from .files import ORDERS, reorder
from .layers import GRU, LSTM, RNN
from .stack import Stack

__all__ = ["from_keras", "from_tf1", "load", "to_keras"]

_KINDS: dict[str, Any] = {"LSTM": LSTM, "GRU": GRU, "SimpleRNN": RNN, "CuDNNLSTM": LSTM, "CuDNNGRU": GRU}
# Keras's names of activations where they are not ours.
_ACTIVATIONS: dict[str, Any] = {"linear": "identity", "leaky_relu": ("leaky_relu", 0.2)}
_KERAS_2 = ("hard_sigmoid", 0.2, 0.5)  # the hard_sigmoid before Keras 3
_IGNORED = {"InputLayer", "Dropout", "SpatialDropout1D", "GaussianNoise", "GaussianDropout", "Identity"}


def from_keras(layer: Any) -> Layer | nn.Linear | Stack:
    """Make a layer of ours with the weights of a layer of Keras.

    Parameters
    ----------
    layer : keras.layers.LSTM, GRU, SimpleRNN, RNN of their cells, Bidirectional, or several
        Built. A list of layers or a `keras.Sequential` becomes one layer where the kind and the sizes allow, else a
        `Stack`; there, Dense with a linear activation becomes `nn.Linear`, and what does nothing at inference
        (Dropout, for example) is left out.

    Returns
    -------
    LSTM, GRU, RNN, nn.Linear or Stack
        With ``batch_first``. It returns all steps and the last state, whatever ``return_sequences`` and
        ``return_state`` say, and both directions side by side. Keras's dropout on the input is not carried over,
        ``recurrent_dropout`` is.

    Raises
    ------
    ValueError, TypeError
        Something that the layers do not do; it is named.
    """
    layers = layer if isinstance(layer, list | tuple) else [layer]
    if len(layers) == 1 and type(layers[0]).__name__ == "Sequential":
        layers = layers[0].layers
    layers = [one for one in layers if type(one).__name__ not in _IGNORED]
    modules: list[Any] = []
    for one in layers:
        name = type(one).__name__
        if not all(hasattr(one, what) for what in ("get_config", "get_weights", "built")):
            raise TypeError(f"layer: expected layers of Keras, got {name}")
        if not one.built:
            raise ValueError(f"layer {one.name!r}: expected a layer with weights: call or build it first")
        if name == "Bidirectional" and not one.return_sequences and one is not layers[-1]:
            raise ValueError(f"layer {one.name!r} (Bidirectional): return_sequences=False: the next layer reads the "
                             "end of one direction and the beginning of the other, which is no step of a Stack's; "
                             "convert the layers one by one")  # fmt: skip
        modules += convert(one.name, name, one.get_config(), one.get_weights())
    return _together(modules)


def load(path: str | os.PathLike[str], config: Any = None) -> dict[str, Layer | nn.Linear | Stack]:
    """Read the recurrent layers in a file of Keras, without Keras or TensorFlow.

    Parameters
    ----------
    path : path-like
        ``.keras``, ``.weights.h5`` (Keras 3), or ``.h5`` of a model or of weights (Keras 2, tf.keras, Keras 3).
        CuDNNLSTM and CuDNNGRU become LSTM and GRU.
    config : None, dict, str or path-like
        For files that hold weights only: what ``model.to_json()`` gave, or the path of such a file. Without it, kinds
        and sizes are taken from the shapes, and the activations to be tanh and sigmoid.

    Returns
    -------
    dict of str to LSTM, GRU, RNN or Stack
        By the layers' names in Keras (those of models within models with the outer name and a slash before); see
        `from_keras`. A stack of cells of unequal sizes is a `Stack`.

    Raises
    ------
    ValueError
        The file is damaged or of another kind, or a layer does something that ours do not; it is named.
    OSError
        It cannot be read.
    """
    from ._keras_files import read

    found = read(path, config)
    if not found:
        raise ValueError(f"{os.fspath(path)}: expected recurrent layers, found none")
    return {found_[0]: _together(convert(*found_)) for found_ in found}


def convert(
    name: str, kind: str, config: Mapping[str, Any], weights: Sequence[Array], version: str = "3"
) -> list[Layer | nn.Linear]:
    """Our layers for one of Keras's, given by class name, configuration and weights.

    Parameters
    ----------
    name : str
        For errors.
    kind : str
        Name of its class.
    config : mapping
        What ``get_config`` returns.
    weights : sequence of ndarray
        In the order of ``get_weights``.
    version : str
        Of Keras; before 3, hard_sigmoid was another line.
    """
    where = f"layer {name!r} ({kind})"
    if kind in ("Dense", "TimeDistributed"):
        return [_linear(where, kind, config, weights)]
    both = kind == "Bidirectional"
    if both and config.get("merge_mode", "concat") != "concat":
        raise ValueError(f"{where}: merge_mode={config['merge_mode']!r}: expected 'concat', both side by side")
    inner: Mapping[str, Any] = config["layer"] if both else {"class_name": kind, "config": config}
    cells = _cells(where, inner["class_name"], inner["config"], backwards=False)
    if both:
        back = config.get("backward_layer") or inner
        if _cells(where, back["class_name"], back["config"], None) != cells:
            raise ValueError(f"{where}: backward_layer: expected the options of the layer that reads forward")
    counts = [2 + bool(options["bias"]) for _, options, _ in cells]
    if len(weights) != sum(counts) * (1 + both):
        raise ValueError(f"{where}: expected {sum(counts) * (1 + both)} weights, found {len(weights)}")
    if both and len(cells) > 1:
        raise ValueError(f"{where}: a stack of cells in both directions: expected one cell; its upper cells read one "
                         "direction only")  # fmt: skip
    layers: list[Layer | nn.Linear] = []
    position = 0
    for (cell, options, version_2), count in zip(cells, counts, strict=True):
        if version_2 and not version.startswith("3"):
            options = {key: _KERAS_2 if value == "hard_sigmoid" else value for key, value in options.items()}
        parts = [weights[position : position + count]]
        parts += [weights[position + count :][:count]] * both
        layers.append(_layer(where, cell, options, parts))
        position += count
    return layers


def _cells(
    where: str, kind: str, config: Mapping[str, Any], backwards: bool | None
) -> list[tuple[str, dict[str, Any], bool]]:
    """(class, our options, whether hard_sigmoid is among them) of each cell of a layer."""
    if backwards is not None and bool(config.get("go_backwards", False)) != backwards:
        raise ValueError(
            f"{where}: go_backwards={config['go_backwards']}: its outputs stand in reverse; take direction='reverse', "
            "whose y is in the order of x"
        )
    time_major = bool(config.get("time_major", False))
    if kind == "RNN":
        cell = config["cell"]
        listed = cell["config"]["cells"] if cell["class_name"] == "StackedRNNCells" else [cell]
        named = [(c["class_name"].removesuffix("Cell"), c["config"]) for c in listed]
    else:
        named = [(kind, config)]
    cells = []
    for cell_kind, options in named:
        if cell_kind not in _KINDS:
            raise ValueError(f"{where}: expected {', '.join(_KINDS)}, RNN of such cells or Bidirectional, "
                             f"got {cell_kind}")  # fmt: skip
        ours = _KINDS[cell_kind]
        made: dict[str, Any] = {"hidden_size": options["units"], "bias": bool(options.get("use_bias", True)),
                                "batch_first": not time_major}  # fmt: skip
        made["recurrent_dropout"] = float(options.get("recurrent_dropout", 0.0))
        made["nonlinearity" if ours is RNN else "activation"] = _activation(options.get("activation", "tanh"))
        if ours is not RNN:
            made["recurrent_activation"] = _activation(options.get("recurrent_activation", "sigmoid"))
        if ours is GRU:
            made["reset_after"] = cell_kind == "CuDNNGRU" or bool(options.get("reset_after", False))
        cells.append((cell_kind, made, "hard_sigmoid" in made.values()))
    return cells


def _activation(name: Any) -> Any:
    return _ACTIVATIONS.get(name, name) if isinstance(name, str) else repr(name)


def _layer(where: str, kind: str, options: Mapping[str, Any], parts: Sequence[Sequence[Array]]) -> Layer:
    """One layer; parts are the weights of each direction."""
    ours, H = _KINDS[kind], options["hidden_size"]
    rows = len(ORDERS["keras"][ours.__name__]) * H
    params: dict[str, Array] = {}
    D = parts[0][0].shape[0] if parts[0][0].ndim == 2 else 0
    for d, (kernel, recurrent, *rest) in enumerate(parts):
        if kernel.shape != (D, rows) or recurrent.shape != (H, rows):
            raise ValueError(f"{where}: expected kernels of shapes (input size, {rows}) and ({H}, {rows}), found "
                             f"{kernel.shape} and {recurrent.shape}")  # fmt: skip
        biases = _biases(where, kind, options, rest[0], rows) if options["bias"] else ()
        if kind.startswith("CuDNN"):  # each gate's array has a kernel's shape, and in memory is cuDNN's (H, D) matrix
            kernel, recurrent = (
                np.hstack([gate.reshape(-1).reshape(H, -1).T for gate in np.hsplit(array, rows // H)])
                for array in (kernel, recurrent)
            )
        suffix = "_l0" + "_reverse" * d
        named = {"weight_ih": kernel.T, "weight_hh": recurrent.T}
        named |= dict(zip(("bias_ih", "bias_hh"), biases, strict=False))
        params |= {key + suffix: reorder(array, ours.__name__, "keras") for key, array in named.items()}
    dtype = np.float64 if parts[0][0].dtype == np.float64 else np.float32
    try:
        layer: Layer = ours(D, bidirectional=len(parts) == 2, dtype=dtype, init="zeros", **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None
    layer.load_state_dict(params)
    return layer


def _biases(where: str, kind: str, options: Mapping[str, Any], bias: Array, rows: int) -> tuple[Array, ...]:
    """(bias_ih, bias_hh) of one that Keras keeps; its second is zero where there is one."""
    if kind.startswith("CuDNN"):
        shape: tuple[int, ...] = (2 * rows,)
    else:
        shape = (2, rows) if options.get("reset_after") else (rows,)
    if bias.shape != shape:
        raise ValueError(f"{where}: expected a bias of shape {shape}, found {bias.shape}")
    halves = bias.reshape(-1, rows)
    return (halves[0], halves[1] if len(halves) == 2 else np.zeros_like(halves[0]))


def _linear(where: str, kind: str, config: Mapping[str, Any], weights: Sequence[Array]) -> nn.Linear:
    if kind == "TimeDistributed":
        inner = config["layer"]
        if inner["class_name"] != "Dense":
            raise ValueError(f"{where}: expected a Dense layer in it, got {inner['class_name']}")
        config = inner["config"]
    if config.get("activation", "linear") != "linear":
        raise ValueError(f"{where}: activation={config['activation']!r}: expected 'linear'")
    size, units = weights[0].shape
    linear = nn.Linear(size, units, bias=len(weights) == 2, dtype=weights[0].dtype)
    linear.load_state_dict(dict(zip(("weight", "bias"), (weights[0].T, *weights[1:]), strict=False)))
    return linear


def _together(modules: list[Layer | nn.Linear]) -> Layer | nn.Linear | Stack:
    """One layer for those that can be one, or a Stack."""
    merged: list[Any] = []
    groups: list[list[Any]] = []
    for module in modules:
        last = groups[-1][0] if groups else None
        if isinstance(module, Layer) and last is not None and type(last) is type(module):
            width = last.hidden_size * (2 if last.bidirectional else 1)
            same = {**last.options, "input_size": 0} == {**module.options, "input_size": 0}
            if same and module.input_size == width:
                groups[-1].append(module)
                continue
        groups.append([module])
    for group in groups:
        first = group[0]
        if len(group) > 1:
            whole = type(first)(**first.options | {"num_layers": len(group), "init": "zeros"})
            whole.load_state_dict({
                name.replace("_l0", f"_l{i}"): array
                for i, layer in enumerate(group) for name, array in layer.params.items()
            })  # fmt: skip
            first = whole
        merged.append(first)
    return merged[0] if len(merged) == 1 else Stack(merged)


def to_keras(module: Layer | nn.Linear | Stack, **options: Any) -> Any:
    """Make a layer of Keras with the weights of one of ours.

    Parameters
    ----------
    module : LSTM, GRU, RNN, nn.Linear or Stack
    **options
        Further arguments of the Keras layers, for example ``return_sequences=False`` or ``stateful=True`` for the
        last one, ``name=``. By default all steps are returned.

    Returns
    -------
    keras.layers.Layer
        Built, a `keras.Sequential` for more than one layer, with Dropout between them where the layer has ``dropout``.
        Keras reads (N, T, D) whatever ``batch_first`` says. Two biases become their sum where Keras has one.

    Raises
    ------
    ValueError
        The layer has ``proj_size`` or zoneout, or an activation that Keras's layer lacks.
    """
    import keras

    modules = list(module.layers) if isinstance(module, Stack) else [module]
    made: list[Any] = []
    for one in modules:
        if isinstance(one, nn.Linear):
            dense = keras.layers.Dense(one.out_features, use_bias="bias" in one.params, dtype=one.dtype.name)
            dense.build((None, one.in_features))
            dense.set_weights([one.params["weight"].T, *[one.params[key] for key in ("bias",) if key in one.params]])
            made.append(dense)
            continue
        if not isinstance(one, Layer):
            raise TypeError(f"module: expected a layer, an nn.Linear or a Stack, got {type(one).__name__}")
        for i in range(one.num_layers):
            last = one is modules[-1] and i == one.num_layers - 1
            made.append(_keras_layer(keras, one, i, options if last else {}))
            if one.dropout and i < one.num_layers - 1:
                made.append(keras.layers.Dropout(one.dropout, dtype=one.dtype.name))
    if len(made) == 1:
        return made[0]
    model = keras.Sequential(made)
    first = modules[0]
    size = first.in_features if isinstance(first, nn.Linear) else first.input_size
    model.build((None, None, size))
    return model


def _keras_layer(keras: Any, layer: Layer, i: int, options: Mapping[str, Any]) -> Any:
    """Layer i of ours as one of Keras's, built, with its weights."""
    if layer.proj_size or any(layer._zoneout) or layer._cell not in ("lstm", "gru", "gru_reset_before", "rnn"):
        lacks = "no proj_size, zoneout, peepholes, coupled or layer_norm, and none is an sLSTM"
        raise ValueError(f"module: Keras's layers have {lacks}, got {layer!r}")
    if layer.direction == "reverse":
        raise ValueError("module: direction='reverse': Keras's go_backwards gives the outputs in reverse")
    theirs = {ours: name for name, ours in _ACTIVATIONS.items()}
    for option in ("output_activation", "clip", "cell_clip"):
        if (value := getattr(layer, option)) is not None:
            raise ValueError(f"module: {option}={value!r}: Keras's layers have none")
    for option in ("activation", "recurrent_activation"):
        value = getattr(layer, option)
        if value not in theirs and (value in ("leaky_relu", "scaled_tanh") or not isinstance(value, str)):
            raise ValueError(f"module: {option}={value!r}: Keras has no such name")
    kind = type(layer)
    arguments: dict[str, Any] = {
        "units": layer.hidden_size, "use_bias": layer.bias, "return_sequences": True, "dtype": layer.dtype.name,
        "activation": theirs.get(layer.activation, layer.activation), "recurrent_dropout": layer.recurrent_dropout,
    }  # fmt: skip
    if kind is not RNN:
        arguments["recurrent_activation"] = layer.recurrent_activation
    if isinstance(layer, GRU):
        arguments["reset_after"] = layer.reset_after
    outer = {"name": options["name"]} if "name" in options and layer.bidirectional else {}
    arguments |= {key: value for key, value in options.items() if key not in outer}
    made = {LSTM: keras.layers.LSTM, GRU: keras.layers.GRU, RNN: keras.layers.SimpleRNN}[kind](**arguments)
    if layer.bidirectional:
        made = keras.layers.Bidirectional(made, dtype=layer.dtype.name, **outer)
    width = layer.hidden_size * (2 if layer.bidirectional else 1)
    made.build((None, None, layer.input_size if i == 0 else width))
    weights = []
    for d in range(2 if layer.bidirectional else 1):
        suffix = f"_l{i}" + "_reverse" * d
        keys = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if layer.bias else 2]
        kernel, recurrent, *pair = [reorder(layer.params[key + suffix], kind.__name__, to="keras") for key in keys]
        weights += [kernel.T, recurrent.T]
        if layer.bias:
            both = np.stack(pair)
            weights.append(both if isinstance(layer, GRU) and layer.reset_after else both.sum(axis=0))
    made.set_weights(weights)
    return made


_DIAGONALS = {"w_i_diag": "weight_ci", "w_f_diag": "weight_cf", "w_o_diag": "weight_co"}


def from_tf1(d: Mapping[str, ArrayLike], cell: str = "lstm", *, prefix: str = "", forget_bias: float = 1.0) -> Layer:
    """Make a layer from the weights of a cell of TensorFlow 1 (``tf.nn.rnn_cell``), kernels stacked as [x; h].

    Parameters
    ----------
    d : mapping of str to array_like
        BasicLSTMCell, LSTMCell: ``kernel`` (D + P, 4H) with gates i, j, f, o, ``bias`` (4H), and ``projection/kernel``
        (H, P) if there is one; with peepholes ``w_i_diag``, ``w_f_diag``, ``w_o_diag`` (H). GRUCell: ``gates/kernel``
        (D + H, 2H) with gates r, u, ``gates/bias``, ``candidate/kernel`` (D + H, H), ``candidate/bias``. BasicRNNCell:
        ``kernel`` (D + H, H), ``bias``.
    cell : {"lstm", "gru", "rnn"}
    prefix : str
        Of the names, for example "rnn/basic_lstm_cell/". Names with other beginnings are left alone.
    forget_bias : float
        What TensorFlow adds to the forget gate at run time; it is not in the file.

    Returns
    -------
    LSTM, GRU (``reset_after=False``) or RNN
        float32, or float64 if the kernel is.

    Raises
    ------
    ValueError
        Missing or unexpected names, or shapes that do not fit.
    """
    given = {key.removeprefix(prefix).removesuffix(":0"): np.asarray(d[key]) for key in d if key.startswith(prefix)}
    needed = {"lstm": ["kernel", "bias"], "rnn": ["kernel", "bias"],
              "gru": ["gates/kernel", "gates/bias", "candidate/kernel", "candidate/bias"]}.get(cell)  # fmt: skip
    if needed is None:
        raise ValueError(f"cell: expected 'lstm', 'gru' or 'rnn', got {cell!r}")
    unexpected = sorted(given.keys() - needed - ({"projection/kernel", *_DIAGONALS} if cell == "lstm" else set()))
    missing = [key for key in needed if key not in given]
    if missing or unexpected:
        raise ValueError(f"d: missing {missing}, unexpected {unexpected}")
    if cell == "gru":
        kernel = np.concatenate([given["gates/kernel"], given["candidate/kernel"]], axis=1)
        bias = np.concatenate([given["gates/bias"], given["candidate/bias"]])
    else:
        kernel, bias = given["kernel"], given["bias"].copy()
    gates = len(ORDERS["tf1"][cell.upper()])
    H = bias.size // gates
    projection = given.get("projection/kernel")
    P = H if projection is None else projection.shape[-1]
    if bias.shape != (gates * H,) or kernel.ndim != 2 or kernel.shape[1] != gates * H or kernel.shape[0] <= P:
        raise ValueError(f"d: expected a kernel (D + {P}, {gates * H}) for a bias ({gates * H},), got {kernel.shape} "
                         f"and {bias.shape}")  # fmt: skip
    if cell == "lstm":
        bias[2 * H : 3 * H] += forget_bias
    kernel, bias = (reorder(array, cell.upper(), "tf1") for array in (kernel.T, bias))
    D = kernel.shape[1] - P
    params = {"weight_ih_l0": kernel[:, :D], "weight_hh_l0": kernel[:, D:], "bias_ih_l0": bias}
    options: dict[str, Any] = {"dtype": np.float64 if kernel.dtype == np.float64 else np.float32, "init": "zeros"}
    if projection is not None:
        params["weight_hr_l0"], options["proj_size"] = projection.T, P
    looks = [name for name in _DIAGONALS if name in given]
    if looks:
        if len(looks) < len(_DIAGONALS):
            raise ValueError(f"d: expected {', '.join(_DIAGONALS)} or none of them, got {looks}")
        params |= {_DIAGONALS[name] + "_l0": given[name] for name in looks}
        options["peepholes"] = True
    kind: Any = {"lstm": LSTM, "gru": GRU, "rnn": RNN}[cell]
    layer: Layer = kind(D, H, **options | {"reset_after": False} if cell == "gru" else options)
    layer.load_state_dict(params | {"bias_hh_l0": np.zeros_like(bias)})
    return layer
