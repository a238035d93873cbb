"""One library in a process of its own, spoken to over its pipes by peers.py.

An adapter has four methods: ``__init__(threads)`` imports and names its version, ``prepare(case)`` takes the
same weights and inputs as all others, ``run()`` does the job once, ``result()`` does it once more and returns
{"y": ..., "dx": ..., parameter name: its gradient} for the comparison.  What a library cannot do raises
NotImplementedError with the reason.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np
from cases import Case


def seconds(run, calls):
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return time.perf_counter() - start


def fastest(candidates):
    """The candidate that takes the least time: a peer is measured on its best path."""
    for run in candidates:
        run()
        run()
    return min(candidates, key=lambda run: min(seconds(run, 1) for _ in range(5)))


def reorder(w, order, axis=0):
    """Gate blocks of one axis in another order."""
    blocks = np.split(w, len(order), axis)
    return np.concatenate([blocks[g] for g in order], axis)


class Adapter:
    def only(self, case, ragged=False, training=True, float64=True, stream=False):
        """Refuse in words what this library does not do."""
        if case.ragged and not ragged:
            raise NotImplementedError("ragged batches are not measured here")
        if case.mode == "training" and not training:
            raise NotImplementedError("inference only")
        if case.dtype == "float64" and not float64:
            raise NotImplementedError("no float64")
        if case.mode == "stream" and not stream:
            raise NotImplementedError("no stream measured here")
        if case.weights and type(self) is not FastLSTM:
            raise NotImplementedError(f"no {case.weights} weights measured here")


class FastLSTM(Adapter):
    def __init__(self, threads):
        sys.path.append(str(Path(__file__).parents[1]))  # in the tree, where none is installed
        import fastlstm

        self.lib, self.version = fastlstm, f"fastlstm {getattr(fastlstm, '__version__', '?')}"
        fastlstm.set_num_threads(threads)
        self.engine = getattr(fastlstm, "engine", None)  # "before" may be a checkout without it: it is timed alone
        self.isa = self.engine and self.engine.isa()

    def prepare(self, case):
        self.case, (x, self.dy, params) = case, case.inputs()
        layer = getattr(self.lib, case.cell.upper())(
            case.D, case.H, case.layers, bidirectional=case.dirs == 2, dtype=np.dtype(case.dtype)
        )
        layer.load_state_dict(params)
        self.layer, lengths = layer, case.lengths
        if case.mode == "stream":
            self.x, stream = x, layer.stream(case.N, **({"weights": case.weights} if case.weights else {}))
            step, x_t, out = stream.step, x[0], np.empty((case.N, case.H), case.dtype)
            self.reset, self.step = stream.reset, step
            self.run = lambda: step(x_t, out=out)
        elif case.mode == "forward":
            layer.freeze()  # as ONNX Runtime does: the weights are packed before the first call
            self.run = lambda: layer(x, lengths=lengths)
        else:

            def train():
                y, _, tape = layer.forward(x, lengths=lengths)
                layer.zero_grad()
                return y, layer.backward(tape, self.dy)[0]

            self.run = train

    def result(self):
        if self.case.mode == "stream":
            self.reset()
            return {"y": np.stack([np.array(self.step(x_t)) for x_t in self.x])}
        if self.case.mode == "forward":
            return {"y": self.run()[0]}
        y, dx = self.run()
        return {"y": y, "dx": dx} | {name: np.array(g) for name, g in self.layer.grads.items()}

    def limits(self, dtype, size):
        """What one core does now, as limit.Core has it; None of a checkout that cannot measure it."""
        engine, dtype = self.engine, np.dtype(dtype)
        if not hasattr(engine, "activation_rate"):
            return None
        found = {name: engine.activation_rate(name, dtype, 0.02) for name in ("sigmoid", "tanh")}
        return found | {"peak": engine.fma_peak(dtype), "read": engine.read_bandwidth(size)}


class Torch(Adapter):
    packed = False

    def __init__(self, threads):
        import torch

        torch.set_num_threads(threads)
        self.inference = contextlib.ExitStack()  # entered once, not at each call
        self.lib, self.version = torch, f"PyTorch {torch.__version__}"

    def prepare(self, case):
        self.only(case, ragged=True, stream=True)
        if case.ragged and case.dirs == 2 and not self.packed:
            raise NotImplementedError("padded in full, the reverse direction is another job")
        torch, packed = self.lib, self.packed and case.ragged
        self.inference.close()
        x, dy, params = case.inputs()
        self.case, x, dy = case, torch.from_numpy(x), torch.from_numpy(dy)
        make = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "rnn": torch.nn.RNN}[case.cell]
        net = make(case.D, case.H, case.layers, bidirectional=case.dirs == 2, dtype=dy.dtype)
        net.load_state_dict({name: torch.from_numpy(w) for name, w in params.items()})
        self.net, self.x = net, x
        if case.mode != "training":
            self.inference.enter_context(torch.inference_mode())
        if case.mode == "stream":
            return self.prepare_stream(params)
        if packed:
            lengths, rnn = torch.from_numpy(case.lengths), torch.nn.utils.rnn

            def forward(x):
                y, _ = net(rnn.pack_padded_sequence(x, lengths, enforce_sorted=False))
                return rnn.pad_packed_sequence(y, total_length=case.T)[0]
        else:

            def forward(x):
                return net(x)[0]

        if case.mode == "forward":
            self.run = lambda: forward(x)
        else:
            x.requires_grad_(True)

            def train():
                x.grad = None
                net.zero_grad(set_to_none=True)
                y = forward(x)
                y.backward(dy)
                return y

            self.run = train

    def prepare_stream(self, params):
        torch, x, make = self.lib, self.x, type(self.net).__name__
        make = torch.nn.RNNCell if make == "RNN" else getattr(torch.nn, make + "Cell")
        cell = make(self.case.D, self.case.H, dtype=x.dtype)
        cell.load_state_dict({name[:-3]: torch.from_numpy(w) for name, w in params.items()})
        x_t, lstm = x[:1].clone(), self.case.cell == "lstm"

        def forward(x_t, state):
            return self.net(x_t, state)

        def forward_cell(x_t, state):
            state = cell(x_t[0], state)
            return state[0] if lstm else state, state

        def stepper(step):
            state = None

            def run():
                nonlocal state
                state = step(x_t, state)[1]

            run.step = step
            return run

        self.run = fastest([stepper(forward), stepper(forward_cell)])

    def result(self):
        if self.case.mode == "stream":
            state, ys = None, []
            for t in range(self.case.T):
                y, state = self.run.step(self.x[t : t + 1], state)
                ys.append(y.reshape(self.case.N, self.case.H).numpy())
            return {"y": np.stack(ys)}
        out = {"y": self.case.zero_padding(self.run().detach().numpy())}
        if self.case.mode == "training":
            out |= {"dx": self.x.grad.numpy()} | {n: p.grad.numpy() for n, p in self.net.named_parameters()}
        return out


class TorchPacked(Torch):
    packed = True


class Onnx(Adapter):
    def __init__(self, threads):
        import onnx
        import onnxruntime

        self.onnx, self.lib, self.version = onnx, onnxruntime, f"ONNX Runtime {onnxruntime.__version__}"
        self.options = onnxruntime.SessionOptions()
        self.options.intra_op_num_threads, self.options.inter_op_num_threads = threads, 1

    def session(self, case, params):
        """A graph of one node per layer; of one step with its state going in and out for a stream."""
        helper, numpy_helper = self.onnx.helper, self.onnx.numpy_helper
        order = {"lstm": [0, 3, 1, 2], "gru": [1, 0, 2], "rnn": [0]}[case.cell]
        stream = case.mode == "stream"
        states = (["h", "c"] if case.cell == "lstm" else ["h"]) if stream else []
        nodes, consts, source = [], {}, "x"
        for layer in range(case.layers):
            ends = [f"_l{layer}{end}" for end in ("", "_reverse")[: case.dirs]]
            gates = {
                n: [reorder(params[n + e], order) for e in ends]
                for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            }
            consts |= {
                f"W{layer}": np.stack(gates["weight_ih"]),
                f"R{layer}": np.stack(gates["weight_hh"]),
                f"B{layer}": np.stack(
                    [np.concatenate(b) for b in zip(gates["bias_ih"], gates["bias_hh"], strict=True)]
                ),
            }
            last = layer == case.layers - 1
            target = "y" if last else f"y{layer}"
            more = {"linear_before_reset": 1} if case.cell == "gru" else {}
            ins = [source, *[f"{w}{layer}" for w in "WRB"], "n" if case.ragged else "", *states]
            nodes.append(
                helper.make_node(
                    case.cell.upper(),
                    ins,
                    [target, *[s + "_n" for s in states]],
                    hidden_size=case.H,
                    direction="bidirectional" if case.dirs == 2 else "forward",
                    **more,
                )
            )
            if not last:  # (T, dirs, N, H) -> (T, N, dirs*H)
                consts["shape"] = np.array([case.T, case.N, case.dirs * case.H])
                nodes.append(helper.make_node("Transpose", [target], [target + "t"], perm=[0, 2, 1, 3]))
                nodes.append(helper.make_node("Reshape", [target + "t", "shape"], [f"x{layer}"]))
                source = f"x{layer}"
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(case.dtype))
        steps, state_shape = 1 if stream else case.T, [case.dirs, case.N, case.H]
        ins = [helper.make_tensor_value_info("x", kind, [steps, case.N, case.D])]
        ins += [helper.make_tensor_value_info(s, kind, state_shape) for s in states]
        if case.ragged:
            ins.append(helper.make_tensor_value_info("n", self.onnx.TensorProto.INT32, [case.N]))
        outs = [helper.make_tensor_value_info("y", kind, [steps, *state_shape])]
        outs += [helper.make_tensor_value_info(s + "_n", kind, state_shape) for s in states]
        graph = helper.make_graph(
            nodes, "rnn", ins, outs, [numpy_helper.from_array(w, name) for name, w in consts.items()]
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
        return self.lib.InferenceSession(model.SerializeToString(), self.options, providers=["CPUExecutionProvider"])

    def prepare(self, case):
        self.only(case, ragged=True, training=False, float64=False, stream=True)
        self.case, (x, _, params) = case, case.inputs()
        self.x, session = x, self.session(case, params)
        if case.mode == "stream":
            names = ["h", "c"][: 2 if case.cell == "lstm" else 1]
            self.state = {s: np.zeros((1, case.N, case.H), case.dtype) for s in names}
            feeds, run = {"x": x[:1]} | self.state, session.run

            def step():
                out = run(None, feeds)
                feeds.update(zip(names, out[1:], strict=True))
                return out

            self.feeds, self.run = feeds, step
            return
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", self.lib.OrtValue.ortvalue_from_numpy(x))
        if case.ragged:
            lengths = case.lengths.astype(np.int32)
            binding.bind_ortvalue_input("n", self.lib.OrtValue.ortvalue_from_numpy(lengths))
        binding.bind_output("y")
        self.binding, self.run = binding, lambda: session.run_with_iobinding(binding)

    def result(self):
        case = self.case
        if case.mode == "stream":
            ys = []
            self.feeds.update(self.state)
            for t in range(case.T):
                self.feeds["x"] = self.x[t : t + 1]
                ys.append(self.run()[0].reshape(case.N, case.H))
            return {"y": np.stack(ys)}
        self.run()
        y = self.binding.copy_outputs_to_cpu()[0]  # (T, dirs, N, H)
        return {"y": y.transpose(0, 2, 1, 3).reshape(case.T, case.N, -1)}


class Jax(Adapter):
    def __init__(self, threads):
        import jax

        jax.config.update("jax_enable_x64", True)
        self.lib, self.version = jax, f"JAX {jax.__version__}"

    def network(self, case, unroll):
        """lax.scan over the recurrence alone: the products with x are one product before it."""
        jax, jnp = self.lib, self.lib.numpy

        def step(p, h, c, gx):
            gh = h @ p["weight_hh"] + p["bias_hh"]
            if case.cell == "rnn":
                h = jnp.tanh(gx + gh)
            elif case.cell == "gru":
                (r, z, n), (hr, hz, hn) = jnp.split(gx, 3, 1), jnp.split(gh, 3, 1)
                r, z = jax.nn.sigmoid(r + hr), jax.nn.sigmoid(z + hz)
                h = (1 - z) * jnp.tanh(n + r * hn) + z * h
            else:
                i, f, g, o = jnp.split(gx + gh, 4, 1)
                c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
                h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return h, c

        def one(p, x, reverse):
            gx = x @ p["weight_ih"] + p["bias_ih"]
            zero = jnp.zeros((case.N, case.H), x.dtype)

            def body(carry, g):
                carry = step(p, *carry, g)
                return carry, carry[0]

            return jax.lax.scan(body, (zero, zero), gx, reverse=reverse, unroll=unroll)[1]

        def network(params, x):
            for layer in range(case.layers):
                ends = [f"_l{layer}{end}" for end in ("", "_reverse")[: case.dirs]]
                parts = [{n: params[n + end] for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")} for end in ends]
                x = jnp.concatenate([one(p, x, i == 1) for i, p in enumerate(parts)], axis=-1)
            return x

        def training(params, x, dy):
            y, back = jax.vjp(network, params, x)
            return y, *back(dy)

        return jax.jit(training if case.mode == "training" else network)

    def prepare(self, case):
        self.only(case)
        self.case, (x, dy, params) = case, case.inputs()
        put = self.lib.device_put
        args = [put({name: np.ascontiguousarray(w.T) for name, w in params.items()}), put(x)]
        args += [put(dy)] if case.mode == "training" else []

        def runner(unroll):
            call, wait = self.network(case, unroll), self.lib.block_until_ready
            return lambda: wait(call(*args))

        self.run = fastest([runner(1), runner(4)])

    def result(self):
        if self.case.mode == "forward":
            return {"y": np.asarray(self.run())}
        y, dparams, dx = self.run()
        return {"y": np.asarray(y), "dx": np.asarray(dx)} | {n: np.asarray(g).T for n, g in dparams.items()}


class Keras(Adapter):
    def __init__(self, threads):
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(1)
        import keras

        self.tf, self.lib = tf, keras
        self.version = f"Keras {keras.__version__} on TensorFlow {tf.__version__}"

    def names(self):
        for layer in range(self.case.layers):
            for end in ("", "_reverse")[: self.case.dirs]:
                yield f"_l{layer}{end}"

    def prepare(self, case):
        self.only(case)
        self.case, tf, layers, (x, dy, params) = case, self.tf, self.lib.layers, case.inputs()
        make = {"lstm": layers.LSTM, "gru": layers.GRU, "rnn": layers.SimpleRNN}[case.cell]
        self.lib.backend.clear_session()
        stack = [make(case.H, return_sequences=True, dtype=case.dtype) for _ in range(case.layers)]
        if case.dirs == 2:
            stack = [layers.Bidirectional(layer, dtype=case.dtype) for layer in stack]
        first = layers.Input((case.T, case.D), batch_size=case.N, dtype=case.dtype)
        net = self.lib.Sequential([first, *stack])
        order, weights = [1, 0, 2] if case.cell == "gru" else list(range(case.G)), []
        for end in self.names():
            bias_ih, bias_hh = (reorder(params[n + end], order) for n in ("bias_ih", "bias_hh"))
            weights += [reorder(params[n + end], order).T for n in ("weight_ih", "weight_hh")]
            weights += [np.stack([bias_ih, bias_hh]) if case.cell == "gru" else bias_ih + bias_hh]
        net.set_weights(weights)
        x, dy = (tf.constant(np.ascontiguousarray(a.transpose(1, 0, 2))) for a in (x, dy))

        def forward(x, dy):
            return net(x, training=False)

        def training(x, dy):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = net(x, training=True)
            return y, tape.gradient(y, [x, *net.trainable_variables], output_gradients=dy)

        def runner(xla):
            call = tf.function(training if case.mode == "training" else forward, jit_compile=xla)
            return lambda: call(x, dy)

        self.order, self.run = order, fastest([runner(False), runner(True)])

    def result(self):
        if self.case.mode == "forward":
            return {"y": self.run().numpy().transpose(1, 0, 2)}
        y, (dx, *grads) = self.run()
        out = {"y": y.numpy().transpose(1, 0, 2), "dx": dx.numpy().transpose(1, 0, 2)}
        for i, end in enumerate(self.names()):
            kernel, recurrent, bias = (g.numpy() for g in grads[3 * i : 3 * i + 3])
            rows = {
                "weight_ih": kernel.T,
                "weight_hh": recurrent.T,
                "bias_ih": bias.reshape(-1, len(kernel.T))[0],
            }
            out |= {name + end: reorder(g, self.order) for name, g in rows.items()}
        return out


ADAPTERS = {
    "fastlstm": FastLSTM,
    "fastlstm-blas": FastLSTM,
    "before": FastLSTM,
    "torch": Torch,
    "torch-packed": TorchPacked,
    "ort": Onnx,
    "jax": Jax,
    "keras": Keras,
}


def serve(peer, threads, cpus, requests, replies):
    os.sched_setaffinity(0, cpus)

    def reply(*message):
        pickle.dump(message, replies, pickle.HIGHEST_PROTOCOL)
        replies.flush()

    try:
        adapter = ADAPTERS[peer](threads)
    except ImportError as error:
        return reply("skip", f"not installed: {error}")
    except Exception as error:  # noqa: BLE001 - a library that cannot start is said, and the others go on
        return reply("skip", f"does not start: {type(error).__name__}: {error}")
    reply("ok", {"version": adapter.version, "isa": getattr(adapter, "isa", None)})
    while True:
        try:
            name, *args = pickle.load(requests)
        except EOFError:
            return
        try:
            if name == "prepare":
                adapter.prepare(Case(**args[0]))
                answer = adapter.result()
            elif name == "calls":  # how many calls one measurement needs to last
                answer = 1
                seconds(adapter.run, 2)
                while (took := seconds(adapter.run, answer)) < args[0]:
                    answer = max(answer + 1, min(10 * answer, int(1.2 * answer * args[0] / took)))
            elif name == "measure":  # seconds per call, after a short warm-up: other processes had the caches
                start = time.perf_counter()
                adapter.run()
                while time.perf_counter() - start < 2e-3:
                    adapter.run()
                answer = seconds(adapter.run, args[0]) / args[0]
            else:
                answer = adapter.limits(*args) if hasattr(adapter, "limits") else None
            reply("ok", answer)
        except NotImplementedError as error:
            reply("skip", str(error))
        except Exception:  # noqa: BLE001 - whatever a library raises is told to peers.py
            reply("error", traceback.format_exc(limit=-3))


if __name__ == "__main__":
    if sys.platform == "linux":  # never outlive peers.py: a stopped process would not see its pipe close
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    pipe = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print stays out of the pipe
    serve(sys.argv[1], int(sys.argv[2]), [int(c) for c in sys.argv[3].split(",")], sys.stdin.buffer, pipe)
