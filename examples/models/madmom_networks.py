"""madmom's recurrent networks (0.16.1): beats (Boeck and Schedl 2011; online, 2016), downbeats (Boeck, Krebs and Widmer
2016), onsets (Eyben et al. 2010), notes (Boeck and Schedl 2012). LSTMs with peepholes, GRUs and plain RNNs, of one
direction and two, on frames of a spectrum.

    pip download madmom==0.16.1 --no-deps --no-binary :all: --no-build-isolation     (needs Cython and NumPy)
    python examples/models/madmom_networks.py madmom-0.16.1.tar.gz                   (needs fastlstm[models])

The weights are pickles of madmom's classes; they are read here by an unpickler that knows arrays and plain holders of
attributes, and runs nothing else. madmom's own layers (NumPy, one step at a time) are run from its sources to compare.
The models are for non-commercial use (CC BY-NC-SA), see the archive's madmom/models/LICENSE.

The outputs (probabilities; of the notes a number for each key) differ by less than 1e-5 over 300 frames. Over 1,000 one
of the eight for downbeats differs by 3e-4, the others as before: on frames that are no music it is nearly chaotic. The
lines printed give error and times for each kind of network, on one core.
"""

import io
import pickle
import sys
import tarfile
import time
import types
import warnings

import numpy as np
from threadpoolctl import threadpool_limits

import fastlstm
from fastlstm import nn

FOLDER = "madmom-0.16.1/madmom/"
NETWORKS = {  # name: (file, how many there are, number of the first)
    "beats": ("beats/2015/beats_blstm_{}", 8, 1),
    "beats, online": ("beats/2016/beats_lstm_{}", 8, 1),
    "downbeats": ("downbeats/2016/downbeats_blstm_{}", 8, 1),
    "downbeats, rhythm": ("downbeats/2016/downbeats_bgru_rhythmic_{}", 6, 0),
    "downbeats, harmony": ("downbeats/2016/downbeats_bgru_harmonic_{}", 6, 0),
    "onsets": ("onsets/2013/onsets_brnn_{}", 8, 1),
    "onsets, online": ("onsets/2013/onsets_rnn_{}", 8, 1),
    "notes": ("notes/2013/notes_brnn", 1, 0),
}


class Holder:
    """Stands for one of madmom's classes: whatever it is given becomes attributes."""

    def __setstate__(self, state):
        self.__dict__.update(state)


class Reader(pickle.Unpickler):
    """Arrays, holders and names of activations; anything else in the file is an error."""

    known = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("numpy.core.multiarray", "_reconstruct"): np.ndarray(0).__reduce__()[0],
        ("copy_reg", "_reconstructor"): lambda kind, *_: object.__new__(kind),
        ("__builtin__", "object"): object,
    }

    def find_class(self, module, name):
        if module.startswith("madmom.ml.nn.activations"):
            return name
        if module.startswith("madmom.ml.nn"):
            return type(name, (Holder,), {})
        if (module, name) not in self.known:
            raise pickle.UnpicklingError(f"{module}.{name}: expected arrays and layers of madmom")
        return self.known[module, name]


def networks(archive, name):
    """Those of one kind, as holders."""
    file, count, first = NETWORKS[name]
    for number in range(first, first + count):
        data = archive.extractfile(f"{FOLDER}models/{file.format(number)}.pkl").read()
        yield Reader(io.BytesIO(data), encoding="latin1").load()


def parts_of(side):
    """The holders of the gates in our order, with the sign of each: madmom's update gate is 1 - z."""
    if hasattr(side, "forget_gate"):
        return [(1, side.input_gate), (1, side.forget_gate), (1, side.cell), (1, side.output_gate)]
    if hasattr(side, "reset_gate"):
        return [(1, side.reset_gate), (-1, side.update_gate), (1, side.cell)]
    return [(1, side)]


def stack_of(network):
    """The same network as layers of fastlstm, the recurrent ones as one, and the state that it begins with."""
    *recurrent, last = network.layers
    both = hasattr(recurrent[0], "fwd_layer")
    weights, starts = {}, []
    for i, layer in enumerate(recurrent):
        for side, suffix in ((layer.fwd_layer, ""), (layer.bwd_layer, "_reverse")) if both else ((layer, ""),):
            parts, suffix = parts_of(side), f"_l{i}{suffix}"
            weights["weight_ih" + suffix] = np.concatenate([sign * part.weights.T for sign, part in parts])
            weights["weight_hh" + suffix] = np.concatenate([sign * part.recurrent_weights.T for sign, part in parts])
            weights["bias_ih" + suffix] = np.concatenate([sign * part.bias.ravel() for sign, part in parts])
            if len(parts) == 4:
                for letter, place in zip("ifo", (0, 1, 3), strict=True):
                    weights[f"weight_c{letter}{suffix}"] = parts[place][1].peephole_weights.ravel()
            zeros = np.zeros(parts[0][1].bias.size, np.float32)
            starts.append([getattr(side, name, zeros) for name in ("init", "hid_init", "cell_init")])
    kind, options = {4: (fastlstm.LSTM, {"peepholes": True}), 3: (fastlstm.GRU, {}), 1: (fastlstm.RNN, {})}[len(parts)]
    units, size = weights["weight_hh_l0"].shape[1], weights["weight_ih_l0"].shape[1]
    layer = kind(size, units, len(recurrent), bidirectional=both, init="zeros", **options)
    layer.load_state_dict(weights)  # there is one bias: the second stays zero
    linear = nn.Linear(last.weights.shape[0], last.weights.shape[1])
    linear.load_state_dict({"weight": last.weights.T, "bias": last.bias.ravel()})
    init, hid_init, cell_init = np.swapaxes(starts, 0, 1)  # a file has one of the first two: the GRUs' were trained
    h = init + hid_init
    return fastlstm.Stack([layer, linear]), ((h, cell_init) if kind is fastlstm.LSTM else h, None)


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def softmax(a):
    e = np.exp(a - a.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


ACTIVATIONS = {"sigmoid": sigmoid, "softmax": softmax, "linear": lambda a: a}


def original(archive):
    """madmom's own layers, from its sources: what makes a function of features out of a holder."""
    version = types.ModuleType("distutils.version")  # which Python no longer has
    version.LooseVersion = lambda text: tuple(map(int, text.split(".")[:2]))
    package = types.ModuleType("madmom_layers")
    package.__path__ = []
    before = {name: sys.modules.get(name) for name in ("distutils", "distutils.version")}
    sys.modules |= {"distutils": types.ModuleType("distutils"), "distutils.version": version, "madmom_layers": package}
    for name in ("activations", "layers"):
        module = types.ModuleType(f"madmom_layers.{name}")
        module.__package__ = "madmom_layers"
        sys.modules[module.__name__] = module
        with warnings.catch_warnings(action="ignore"):  # of a library from 2018 about its own imports
            exec(archive.extractfile(f"{FOLDER}ml/nn/{name}.py").read(), module.__dict__)
    for name, module in before.items():
        if module is None:
            del sys.modules[name]
        else:
            sys.modules[name] = module
    layers, activations = sys.modules["madmom_layers.layers"], sys.modules["madmom_layers.activations"]

    def rebuild(value):
        if not isinstance(value, Holder):
            return getattr(activations, value) if isinstance(value, str) else value
        made = object.__new__(getattr(layers, type(value).__name__))
        state = {key: rebuild(part) for key, part in vars(value).items()}
        with warnings.catch_warnings(action="ignore"):  # that its files are older than it
            made.__setstate__(state) if "__setstate__" in dir(made) else vars(made).update(state)
        return made

    def run_of(network):
        made = [rebuild(layer) for layer in network.layers]

        def run(x):
            for layer in made:
                x = layer(x)
            return x

        return run

    return run_of


def features(frames, size):
    """What a spectrum and its rises look like: loudness with a beat twice a second, on a logarithmic scale."""
    rng = np.random.default_rng(0)
    beat = 0.1 + np.exp(-10 * (np.arange(frames) % 50) / 50)[:, None]
    loud = np.log10(1 + 3 * rng.random(size) * beat * (0.7 + 0.3 * rng.random((frames, size))))
    rises = np.maximum(np.diff(loud, axis=0, prepend=0), 0)
    return np.where(np.arange(size) < size / 2, loud, rises).astype(np.float32)


def race(rounds, *functions):
    """The least processor time of each in seconds, run in turn on one core: others on the machine matter little."""
    times = []
    with threadpool_limits(1):
        for _ in range(rounds):
            for function in functions:
                begin = time.process_time()
                function()
                times.append(time.process_time() - begin)
    return [min(times[i :: len(functions)]) for i in range(len(functions))]


def pair_of(network, run_of):
    """Ours and theirs, as functions of features; and our recurrent layer."""
    (stack, state), activation = stack_of(network), ACTIVATIONS[network.layers[-1].activation_fn]
    return lambda x: activation(stack(x, state)[0]), run_of(network), stack[0]


def main(path, frames=300, count=8, rounds=5):
    """By kind: error and range of the outputs of the first `count` networks; the first one is timed."""
    fastlstm.set_num_threads(1)
    found = {}
    with tarfile.open(path) as archive:
        run_of = original(archive)
        kinds = {name: list(networks(archive, name)) for name in NETWORKS}
    for name, ensemble in kinds.items():
        pairs = [pair_of(network, run_of) for network in ensemble[:count]]
        layer = pairs[0][2]
        x = features(frames, layer.input_size)
        results = [(ours(x), theirs(x)) for ours, theirs, _ in pairs]
        error = max(abs(ours - theirs).max() for ours, theirs in results)
        spread = max(np.ptp(theirs) for _, theirs in results)
        ours, theirs = race(rounds, *(lambda way=way, x=x: way(x) for way in pairs[0][:2]))
        print(f"{name}, {len(ensemble)} of {layer}: {frames} frames of one: fastlstm {1e3 * ours:.2f} ms, madmom's own "
              f"{1e3 * theirs:.1f} ms; outputs range over {spread:.2f} and differ by {error:.1e}")  # fmt: skip
        found[name] = error, spread
    return found


if __name__ == "__main__":
    main(sys.argv[1])
