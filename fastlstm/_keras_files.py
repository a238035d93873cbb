"""What is in a file of Keras: class, configuration and weights of each recurrent layer. Reads with h5py alone."""

from __future__ import annotations

import io
import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ._saved import library, regular, widen_bfloat16
from ._types import Array

Found = tuple[str, str, dict[str, Any], list[Array], str]  # name, class, configuration, weights, version of Keras

_MODELS = {"Sequential", "Functional", "Model"}
_RECURRENT = {"LSTM", "GRU", "SimpleRNN", "CuDNNLSTM", "CuDNNGRU", "RNN", "Bidirectional"}
_RATIO = 1000  # a record that claims to unpack to more is not a model


def read(path: str | os.PathLike[str], config: Any = None) -> list[Found]:
    """The recurrent layers in a .keras, .weights.h5 or .h5 file. See `fastlstm.keras.load`."""
    h5py = library("h5py", "h5py")
    regular(path)
    described = _given(config)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            if file.read(4) == b"PK\x03\x04":
                with zipfile.ZipFile(file) as archive:
                    described = json.loads(_record(archive, "config.json"))
                    content: Any = io.BytesIO(_record(archive, "model.weights.h5"))
                    size = len(content.getbuffer())
            else:
                file.seek(0)
                content = file
            with h5py.File(content, "r") as h5:
                return list(_layers(_File(h5, size), described))
        except Exception as error:  # whatever the parsers make of a damaged file
            what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise ValueError(f"{os.fspath(path)}: not a whole file of Keras: {what}") from None


def _given(config: Any) -> Any:
    if config is None or isinstance(config, Mapping):
        return config
    if isinstance(config, str) and config.lstrip().startswith("{"):
        text = config
    else:
        with open(config, encoding="utf-8") as file:
            text = file.read()
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"config: expected JSON of a model: {error}") from None


def _record(archive: zipfile.ZipFile, name: str) -> bytes:
    info = archive.getinfo(name)
    if info.file_size > _RATIO * info.compress_size + 1000:
        raise ValueError(f"{name}: expected a record of {info.compress_size} bytes, it claims {info.file_size}")
    return archive.read(info)


class _File:
    """An open HDF5 file whose arrays are checked before they are read."""

    def __init__(self, h5: Any, size: int) -> None:
        self.h5, self.size = h5, size

    def array(self, dataset: Any) -> Array:
        if not hasattr(dataset, "shape"):
            raise ValueError(f"{dataset.name}: expected an array, found a group")
        if dataset.file.filename != self.h5.filename or dataset.external or dataset.is_virtual:
            raise ValueError(f"{dataset.name}: expected an array in the file itself, found a link to another")
        brain = dataset.dtype == np.dtype("V2") and _text(dataset.attrs.get("dtype", b"")) == "bfloat16"
        if dataset.dtype.kind != "f" and not brain:
            raise ValueError(f"{dataset.name}: expected floating-point numbers, found {dataset.dtype}")
        if dataset.nbytes > _RATIO * self.size:
            raise ValueError(f"{dataset.name}: claims {dataset.nbytes} bytes in a file of {self.size}")
        array = np.asarray(dataset[()])
        return widen_bfloat16(array.view(np.uint16)) if brain else array


def _layers(file: _File, described: Any) -> Iterator[Found]:
    h5 = file.h5
    version = _text(h5.attrs.get("keras_version", b""))
    if described is None and "model_config" in h5.attrs:
        described = json.loads(_text(h5.attrs["model_config"]))
    old = "layer_names" in h5.attrs or "model_weights" in h5
    group = h5["model_weights"] if "model_weights" in h5 else h5
    version = version or _text(group.attrs.get("keras_version", b"")) or ("2" if old else "3")
    if described is None:
        found = _guess_old(file, group) if old else _guess(file, h5)
    elif old:
        found = _walk_old(file, described, group)
    else:
        found = _walk(file, described, h5, "")
    for name, kind, config, weights in found:
        yield name, kind, config, weights, version


def _listed(described: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    config = described["config"]
    if "layers" not in config and not isinstance(config, list):
        raise ValueError(f"{described.get('class_name')}: expected a Sequential or a functional model, whose "
                         "configuration lists the layers; of a class of your own, the weights alone can be read "
                         "(save_weights)")  # fmt: skip
    return config if isinstance(config, list) else config["layers"]  # a list: Sequential of early Keras 2


Part = tuple[str, str, dict[str, Any], list[Array]]


def _walk(file: _File, described: Mapping[str, Any], group: Any, outer: str) -> Iterator[Part]:
    """Keras 3: groups are named by the classes, in the order of the layers."""
    used: dict[str, int] = {}
    for layer in _listed(described):
        kind, config = layer["class_name"], layer["config"]
        place = _unique(kind, used)
        name = outer + config["name"]
        if kind in _MODELS:
            yield from _walk(file, layer, group["layers"][place], name + "/")
        elif kind in _RECURRENT:
            inner = group["layers"][place]
            if kind == "Bidirectional":
                parts = [inner["forward_layer"], inner["backward_layer"]]
                cells = [one for part in parts for one in _cell_groups(part, config["layer"])]
            else:
                cells = _cell_groups(inner, layer)
            yield name, kind, config, [array for cell in cells for array in _variables(file, cell)]


def _cell_groups(group: Any, layer: Mapping[str, Any]) -> list[Any]:
    """Where the weights of a layer's cell, or stacked cells, are."""
    cell = group["cell"]
    if layer["class_name"] == "RNN" and layer["config"]["cell"]["class_name"] == "StackedRNNCells":
        used: dict[str, int] = {}
        listed = layer["config"]["cell"]["config"]["cells"]
        return [cell["cells"][_unique(one["class_name"], used)] for one in listed]
    return [cell]


def _variables(file: _File, group: Any) -> list[Array]:
    values = group["vars"]
    return [file.array(values[key]) for key in sorted(values, key=int)]


def _unique(kind: str, used: dict[str, int]) -> str:
    """The name of a group: the class's in small letters with underscores, numbered from the second on."""
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", kind))
    name = re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()
    used[name] = used.get(name, -1) + 1
    return f"{name}_{used[name]}" if used[name] else name


def _walk_old(file: _File, described: Mapping[str, Any], group: Any) -> Iterator[Part]:
    """Keras 2: groups are named by the layers, and list the names of their weights in order."""
    for layer in _listed(described):
        name: Any = layer["config"].get("name") or layer.get("name")
        if layer["class_name"] in _RECURRENT | _MODELS:
            names = [_text(n) for n in group[name].attrs["weight_names"]]
            yield from _inside_old(file, layer, name, "", group[name], names)


def _inside_old(
    file: _File, layer: Mapping[str, Any], name: str, outer: str, group: Any, names: list[str]
) -> Iterator[Part]:
    kind, config = layer["class_name"], layer["config"]
    if kind in _RECURRENT:
        yield outer + name, kind, config, [file.array(group[n]) for n in names]
        return
    for one in _listed(layer):
        if one["class_name"] in _RECURRENT | _MODELS:
            inner: Any = one["config"].get("name") or one.get("name")
            mine = [n for n in names if inner in n.split("/")]
            yield from _inside_old(file, one, inner, f"{outer}{name}/", group, mine)


def _guess_old(file: _File, group: Any) -> Iterator[Part]:
    """Weights alone: what has a recurrent kernel is recurrent."""
    for key in group.attrs["layer_names"]:
        name = _text(key)
        names = [_text(n) for n in group[name].attrs["weight_names"]]
        if any("recurrent_kernel" in n for n in names):
            weights = [file.array(group[n if n in group else f"{name}/{n}"]) for n in names]
            yield _from_shapes(name, weights, any("/backward_" in n for n in names))


def _guess(file: _File, h5: Any) -> Iterator[Part]:
    """Weights alone: cells by their place, kinds by their shapes."""
    cells: list[str] = []
    h5.visit(lambda path: cells.append(path) if re.search(r"(^|/)cell$", path) else None)
    done = set()
    for path in cells:
        place = path.removesuffix("/cell").removesuffix("cell")
        if "cells" in h5[path]:
            raise ValueError(f"{path}: a stack of cells: expected config= for weights alone")
        both = place.endswith(("/forward_layer", "/backward_layer"))
        if both:
            place = place.rsplit("/", 1)[0]
        if place in done:
            continue
        done.add(place)
        group = h5[place] if place else h5
        parts = [group["forward_layer/cell"], group["backward_layer/cell"]] if both else [group["cell"]]
        name = _text(group["vars"].attrs.get("name", b"")) if "vars" in group else ""
        shown = "/".join(step for step in place.split("/") if step != "layers")
        yield _from_shapes(name or shown or "layer", [a for part in parts for a in _variables(file, part)], both)


def _from_shapes(name: str, weights: list[Array], both: bool) -> Part:
    """A layer of default activations whose weights have these shapes."""
    mine = weights[: len(weights) // (1 + both)]
    if len(mine) not in (2, 3) or mine[1].ndim != 2 or 0 in mine[1].shape:
        raise ValueError(f"layer {name!r}: expected kernel, recurrent kernel and bias, found {len(mine)} arrays")
    H, columns = mine[1].shape
    kind = {4 * H: "LSTM", 3 * H: "GRU", H: "SimpleRNN"}.get(columns)
    if kind is None:
        raise ValueError(f"layer {name!r}: expected a recurrent kernel (H, H), (H, 3H) or (H, 4H), "
                         f"found {mine[1].shape}")  # fmt: skip
    config: dict[str, Any] = {"name": name, "units": H, "use_bias": len(mine) == 3}
    if len(mine) == 3 and kind != "SimpleRNN":
        if mine[2].shape == (2 * columns,):
            kind = "CuDNN" + kind
        config["reset_after"] = mine[2].ndim == 2
    if kind == "GRU" and len(mine) == 2:
        raise ValueError(f"layer {name!r}: a GRU without biases: expected config=, which says what reset_after is")
    if both:
        return name, "Bidirectional", {"name": name, "layer": {"class_name": kind, "config": config}}, weights
    return name, kind, config, weights


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
