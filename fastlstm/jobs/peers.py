"""One library in a process of its own, as `bench` measures it: a line of JSON in, a line out.

`python -m fastlstm.jobs.peers NAME THREADS`. The weights of a shape are fastlstm's from a seed, so that all compute the
same, and each says what its last output is.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import engine, layers, threads
from .._version import __version__

READ_BYTES = {"16 KB": 1 << 14, "256 KB": 1 << 18, "8 MB": 1 << 23, "256 MB": 1 << 28}

Call = Callable[[], Any]


class Fastlstm:
    """This package; inference on packed weights, as ONNX Runtime's are."""

    def __init__(self, team: int) -> None:
        threads.set_num_threads(team)
        self.about = {"version": __version__, "isa": engine.isa(), "threads": threads.get_num_threads()}

    def calls(self, layer: layers.LSTM, x: Any, dy: Any) -> dict[str, Call]:
        """What is timed, by mode; each returns y."""

        def training() -> Any:
            y, _, tape = layer.forward(x)
            layer.zero_grad()
            layer.backward(tape, dy)
            return y

        frozen = layers.LSTM(layer.input_size, layer.hidden_size)
        frozen.load_state_dict(layer.state_dict())
        frozen.freeze()
        return {"inference": lambda: frozen(x)[0], "training": training}

    def limits(self) -> dict[str, Any]:
        """GFLOP/s and GB/s of one core."""
        from ..engine import fma_peak, read_bandwidth

        return {
            "peak": fma_peak(seconds=0.2),
            "read": {name: read_bandwidth(size, 0.2) for name, size in READ_BYTES.items()},
        }


class Torch:
    """PyTorch, eager; inference under inference_mode."""

    def __init__(self, team: int) -> None:
        import torch

        self.torch = torch
        torch.set_num_threads(team)
        self.about = {"version": torch.__version__, "threads": torch.get_num_threads()}

    def calls(self, layer: layers.LSTM, x: Any, dy: Any) -> dict[str, Call]:
        """See `Fastlstm`."""
        torch = self.torch
        theirs = torch.nn.LSTM(layer.input_size, layer.hidden_size)
        theirs.load_state_dict({name: torch.from_numpy(value) for name, value in layer.state_dict().items()})
        x, dy = torch.from_numpy(x), torch.from_numpy(dy)
        x_training = x.clone().requires_grad_()

        def inference() -> Any:
            with torch.inference_mode():
                return theirs(x)[0].numpy()

        def training() -> Any:
            y, _ = theirs(x_training)
            theirs.zero_grad()
            x_training.grad = None
            y.backward(dy)
            return y.detach().numpy()

        return {"inference": inference, "training": training}


class OnnxRuntime:
    """ONNX Runtime; inference alone. The model is written by `fastlstm.onnx`, which needs onnx."""

    def __init__(self, team: int) -> None:
        import onnx  # noqa: F401
        import onnxruntime

        self.library, self.options = onnxruntime, onnxruntime.SessionOptions()
        self.options.intra_op_num_threads, self.options.inter_op_num_threads = team, 1
        self.about = {"version": onnxruntime.__version__, "threads": team}

    def calls(self, layer: layers.LSTM, x: Any, dy: Any) -> dict[str, Call]:
        """See `Fastlstm`."""
        from .. import onnx

        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "lstm.onnx")
            onnx.save(layer, path, state=False, lengths=False)
            session = self.library.InferenceSession(path, self.options, providers=["CPUExecutionProvider"])
        return {"inference": lambda: session.run(["y"], {"x": x})[0]}


LIBRARIES: dict[str, Any] = {"fastlstm": Fastlstm, "torch": Torch, "onnxruntime": OnnxRuntime}


def time_call(call: Call, seconds: float) -> float:
    """Seconds of one call, the mean over at least ``seconds``."""
    count, begin = 0, time.perf_counter()
    while True:
        call()
        count += 1
        passed = time.perf_counter() - begin
        if passed >= seconds:
            return passed / count


def serve(name: str, team: int) -> None:
    """Answer requests until the other end closes."""
    answer_to = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints goes beside the answers

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answer_to, flush=True)

    try:
        library = LIBRARIES[name](team)
    except ImportError as error:
        answer({"missing": str(error)})
        return
    answer(library.about)
    calls: dict[str, Call] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "limits":
            answer(library.limits())
        elif request["do"] == "prepare":
            T, N, D, H = request["shape"]
            rng = np.random.default_rng(1)
            x, dy = rng.standard_normal((T, N, D), np.float32), rng.standard_normal((T, N, H), np.float32)
            calls = library.calls(layers.LSTM(D, H, rng=0), x, dy)
            answer({mode: np.asarray(call())[-1, 0, :8].tolist() for mode, call in calls.items()})
        else:
            answer(time_call(calls[request["mode"]], request["seconds"]))


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
