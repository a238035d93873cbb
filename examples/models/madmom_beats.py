"""madmom's beat tracker (Boeck and Schedl 2011, madmom 0.16.1): eight networks of three bidirectional LSTM layers with
peepholes, 266 features of a spectrum to one probability of a beat, their mean taken.

    pip download madmom==0.16.1 --no-deps --no-binary :all: --no-build-isolation     (needs Cython and NumPy)
    python examples/models/madmom_beats.py madmom-0.16.1.tar.gz

The weights are pickles of madmom's classes; they are read here by an unpickler that knows arrays and plain holders of
attributes, and runs nothing else. madmom's own layers (NumPy, one step at a time) are run from its sources to compare.
The models are for non-commercial use (CC BY-NC-SA), see the archive's madmom/models/LICENSE.

Found on one core of an EPYC (Zen 3) for 2,000 frames, 20 seconds of music: see the last line it prints; the outputs
differ by less than 1e-5.
"""

import io
import pickle
import sys
import tarfile
import time
import types
import warnings

import numpy as np

import fastlstm
from fastlstm import nn

FOLDER = "madmom-0.16.1/madmom/"
FEATURES, FRAMES = 266, 2000


class Holder:
    """Stands for one of madmom's classes: whatever it is given becomes attributes."""

    def __setstate__(self, state):
        self.__dict__.update(state)


class Reader(pickle.Unpickler):
    """Arrays, holders and names of activations; anything else in the file is an error."""

    def find_class(self, module, name):
        if module.startswith("madmom.ml.nn.activations"):
            return name
        if module.startswith("madmom.ml.nn"):
            return type(name, (Holder,), {})
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype"), ("numpy.core.multiarray", "_reconstruct")):
            return getattr(np, name) if module == "numpy" else np.ndarray(0).__reduce__()[0]
        raise pickle.UnpicklingError(f"{module}.{name}: expected arrays and layers of madmom")


def networks(archive):
    """The members of the ensemble, as holders."""
    for number in range(1, 9):
        data = archive.extractfile(f"{FOLDER}models/beats/2015/beats_blstm_{number}.pkl").read()
        yield Reader(io.BytesIO(data), encoding="latin1").load()


def stack_of(network):
    """The same network as layers of fastlstm: one bidirectional LSTM of three layers, and a sigmoid's input."""
    *recurrent, last = network.layers
    units = recurrent[0].fwd_layer.cell.bias.size
    lstm = fastlstm.LSTM(FEATURES, units, len(recurrent), bidirectional=True, peepholes=True, init="zeros")
    for i, layer in enumerate(recurrent):
        for side, suffix in ((layer.fwd_layer, f"_l{i}"), (layer.bwd_layer, f"_l{i}_reverse")):
            parts = [side.input_gate, side.forget_gate, side.cell, side.output_gate]  # our order: i, f, g, o
            lstm.params["weight_ih" + suffix] = np.concatenate([part.weights.T for part in parts])
            lstm.params["weight_hh" + suffix] = np.concatenate([part.recurrent_weights.T for part in parts])
            lstm.params["bias_ih" + suffix] = np.concatenate([part.bias.ravel() for part in parts])
            for letter, part in zip("ifo", (side.input_gate, side.forget_gate, side.output_gate), strict=True):
                lstm.params[f"weight_c{letter}{suffix}"] = part.peephole_weights.ravel()
    linear = nn.Linear(2 * units, 1)
    linear.params["weight"] = last.weights.reshape(2 * units, 1).T
    linear.params["bias"] = last.bias.ravel()
    return fastlstm.Stack([lstm, linear])


def original(archive):
    """madmom's own layers, from its sources: a function of a holder and features."""
    package = types.ModuleType("madmom_layers")
    package.__path__ = []
    sys.modules["madmom_layers"] = package
    for name in ("activations", "layers"):
        module = types.ModuleType(f"madmom_layers.{name}")
        module.__package__ = "madmom_layers"
        sys.modules[module.__name__] = module
        with warnings.catch_warnings(action="ignore"):  # of a library from 2018 about its own imports
            exec(archive.extractfile(f"{FOLDER}ml/nn/{name}.py").read(), module.__dict__)
    layers, activations = sys.modules["madmom_layers.layers"], sys.modules["madmom_layers.activations"]

    def rebuild(value):
        if not isinstance(value, Holder):
            return getattr(activations, value) if isinstance(value, str) else value
        made = object.__new__(getattr(layers, type(value).__name__))
        state = {key: rebuild(part) for key, part in vars(value).items()}
        made.__setstate__(state) if hasattr(made, "reset") and "__setstate__" in dir(made) else vars(made).update(state)
        return made

    def run(network, x):
        for layer in network.layers:
            x = rebuild(layer)(x)
        return x.ravel()

    return run


def features(frames):
    """What a spectrum and its rises look like: positive numbers, periodic loudness."""
    rng = np.random.default_rng(0)
    beat = np.exp(-10 * (np.arange(frames) % 50) / 50)[:, None]
    return (rng.random((frames, FEATURES)) * (0.2 + beat) * rng.random(FEATURES)).astype(np.float32)


def main(path, frames=FRAMES, compare=8):
    x = features(frames)
    with tarfile.open(path) as archive:
        ensemble = list(networks(archive))
        stacks = [stack_of(network) for network in ensemble]
        run = original(archive)
    fastlstm.set_num_threads(1)
    begin = time.perf_counter()
    ours = [1 / (1 + np.exp(-stack(x)[0].ravel())) for stack in stacks]
    middle = time.perf_counter()
    theirs = [run(network, x) for network in ensemble[:compare]]
    end = time.perf_counter()
    error = max(abs(a - b).max() for a, b in zip(ours, theirs, strict=False))
    spread = max(np.ptp(b) for b in theirs)
    print(f"{frames} frames, {len(ours)} networks: fastlstm {middle - begin:.3f} s, "
          f"madmom's own {(end - middle) / compare * len(ours):.2f} s ({compare} run); "
          f"outputs range over {spread:.2f} and differ by {error:.1e}")  # fmt: skip
    return error, spread


if __name__ == "__main__":
    main(sys.argv[1])
