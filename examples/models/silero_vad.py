"""silero-vad (6.2.3): is somebody speaking? Every 32 ms of sound a short-time Fourier transform, four convolutions, one
step of an LSTM, and a probability.

    pip download silero-vad==6.2.3 --no-deps                    (needs fastlstm[models])
    python examples/models/silero_vad.py silero_vad-6.2.3-py3-none-any.whl

The weights come from an ONNX model in the wheel: `fastlstm.onnx.load` makes a layer of its LSTM, transform and
convolutions are matrix products in NumPy. (The wheel's safetensors file has the weights of another training.) Frame by
frame, as a microphone gives them, the LSTM is a stream. It is compared with the wheel's ONNX model for one frame in
ONNX Runtime, and with its TorchScript model where PyTorch is installed, both fed as the package feeds them; all frames
at once are compared with the wheel's ONNX model for whole sequences.

Nobody speaks: the sound is synthesised, a voice of 30 harmonics and three formants that says vowels with pauses, and
noise. The probabilities differ by less than 1e-5; the last line gives error and times, on one core.
"""

import io
import sys
import time
import warnings
import zipfile

import numpy as np
import onnx
from threadpoolctl import threadpool_limits

import fastlstm.onnx

RATE, FRAME, CONTEXT = 16_000, 512, 64  # samples; each frame is read with the last 64 of the one before
WINDOW, HOP = 256, 128
SEQUENCE = "silero_vad_16k_sequence"  # the model for whole sequences; its weights are those of all
STRIDES = (1, 2, 2, 1)  # of the four convolutions


def sound(seconds):
    """Vowels of a voice whose pitch wanders, three a second and then a pause; noise all the time."""
    rng = np.random.default_rng(0)
    t = np.arange(int(seconds * RATE)) / RATE
    pitch = 120 + 15 * np.sin(2 * np.pi * 0.7 * t) + 4 * np.sin(2 * np.pi * 5 * t)
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    vowels = np.array([[730, 1090, 2440], [270, 2290, 3010], [300, 870, 2240], [530, 1840, 2480], [570, 840, 2410]])
    knots = np.arange(0, seconds + 1, 1 / 3)
    formants = vowels[rng.integers(len(vowels), size=len(knots))]
    formants = np.stack([np.interp(t, knots, f) for f in formants.T])
    voice = np.zeros_like(t)
    for k in range(1, 31):
        distance = (k * pitch - formants) / np.array([[90], [110], [170]])
        voice += (np.array([[1], [0.5], [0.25]]) / (1 + distance**2)).sum(0) * np.sin(k * phase)
    speaks = np.clip(3 * np.sin(2 * np.pi * t / 4), 0, 1) * (0.3 + np.clip(np.sin(2 * np.pi * 3 * t), 0, 1))
    return (0.15 * voice * speaks + 0.003 * rng.standard_normal(len(t))).astype(np.float32)


def framed(samples):
    """(frames, 576): each frame behind its context."""
    frames = samples[: len(samples) // FRAME * FRAME].reshape(-1, FRAME)
    before = np.concatenate([np.zeros((1, CONTEXT), np.float32), frames[:-1, -CONTEXT:]])
    return np.concatenate([before, frames], axis=1)


def convolve(x, weight, bias, stride):
    """relu of a convolution over three steps, zeros around: x (n, steps, channels), weight (3 * channels, out)."""
    n, steps, channels = x.shape
    padded = np.zeros((n, steps + 2, channels), np.float32)
    padded[:, 1:-1] = x
    taps = [padded[:, k : k + steps : stride] for k in range(3)]
    return np.maximum(np.concatenate(taps, axis=2) @ weight + bias, 0)


class Detector:
    """The network: all but the LSTM in NumPy."""

    def __init__(self, model):
        weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        self.transform = weights["stft.forward_basis_buffer"][:, 0].T  # (window, cosines and sines)
        self.layers = []
        for i, stride in enumerate(STRIDES):
            kernel = weights[f"encoder.{i}.weight"]  # (out, channels, 3)
            matrix = np.ascontiguousarray(kernel.transpose(2, 1, 0).reshape(-1, len(kernel)))
            self.layers.append((matrix, weights[f"encoder.{i}.bias"], stride))
        (self.lstm,) = fastlstm.onnx.load(model).values()
        self.stream = self.lstm.stream()
        self.last, self.bias = weights["output.weight"].ravel(), weights["output.bias"]

    def features(self, frames):
        """What the LSTM reads, (n, 128)."""
        blocks = np.concatenate([frames, frames[:, -2 : -2 - CONTEXT : -1]], axis=1).reshape(len(frames), -1, HOP)
        parts = np.concatenate([blocks[:, :-1], blocks[:, 1:]], axis=2) @ self.transform
        half = WINDOW // 2 + 1
        x = np.sqrt(parts[..., :half] ** 2 + parts[..., half:] ** 2)
        for matrix, bias, stride in self.layers:
            x = convolve(x, matrix, bias, stride)
        return x[:, 0]

    def probability(self, h):
        return 1 / (1 + np.exp(-(np.maximum(h, 0) @ self.last + self.bias)))

    def frame_by_frame(self, frames):
        self.stream.reset()
        return np.array([self.probability(self.stream.step(self.features(frame[None]))) for frame in frames]).ravel()

    def at_once(self, frames):
        return self.probability(self.lstm(self.features(frames))[0])


def session(wheel, name):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.inter_op_num_threads = options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(wheel.read(f"silero_vad/data/{name}.onnx"), options, ["CPUExecutionProvider"])


def in_onnx_runtime(wheel):
    """The package's model for one frame, and the one for many, as functions of frames."""
    one, many = session(wheel, "silero_vad"), session(wheel, SEQUENCE)
    rate, zeros = np.array(RATE), np.zeros((1, 1, 128), np.float32)

    def frame_by_frame(frames):
        state, found = np.zeros((2, 1, 128), np.float32), []
        for frame in frames:
            probability, state = one.run(None, {"input": frame[None], "state": state, "sr": rate})
            found.append(probability)
        return np.array(found).ravel()

    return frame_by_frame, lambda frames: many.run(None, {"input": frames, "h": zeros, "c": zeros})[0].ravel()


def in_torchscript(wheel):
    """The same for the TorchScript model, which keeps state and context itself; None without PyTorch."""
    try:
        import torch
    except ImportError:
        return None
    with warnings.catch_warnings(action="ignore"):  # that TorchScript is old
        model = torch.jit.load(io.BytesIO(wheel.read("silero_vad/data/silero_vad.jit")))

    def frame_by_frame(frames):
        model.reset_states()
        with torch.inference_mode():
            return np.array([model(torch.from_numpy(frame[None, CONTEXT:]), RATE).item() for frame in frames])

    return frame_by_frame


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


def main(path, seconds=30, rounds=5):
    frames = framed(sound(seconds))
    with zipfile.ZipFile(path) as wheel:
        ours = Detector(onnx.load_from_string(wheel.read(f"silero_vad/data/{SEQUENCE}.onnx")))
        runtime, script = in_onnx_runtime(wheel), in_torchscript(wheel)
    fastlstm.set_num_threads(1)
    ways = {"fastlstm": ours.frame_by_frame, "ONNX Runtime": runtime[0], "TorchScript": script}
    ways |= {"at once: fastlstm": ours.at_once, "ONNX Runtime at once": runtime[1]}
    ways = {name: way for name, way in ways.items() if way is not None}
    with threadpool_limits(1):
        for _ in range(2):  # the second time the states are to begin anew
            found = {name: way(frames) for name, way in ways.items()}
    error = max(abs(a - b).max() for a in found.values() for b in found.values())
    spread = np.ptp(found["ONNX Runtime"])
    times = race(rounds, *(lambda way=way: way(frames) for way in ways.values()))
    x = ours.features(frames)
    (steps,) = race(rounds, lambda: [ours.stream.step(row) for row in x])
    each = ", ".join(f"{name} {1e6 * t / len(frames):.1f}" for name, t in zip(ways, times, strict=True))
    print(f"{len(frames)} frames, us each: {each} (of fastlstm's the LSTM's step {1e6 * steps / len(frames):.1f}); "
          f"probabilities range over {spread:.2f} and differ by {error:.1e}")  # fmt: skip
    return error, spread


if __name__ == "__main__":
    main(sys.argv[1])
