"""This machine's limits, how near to them the layers come, and PyTorch and ONNX Runtime in the same minute."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from statistics import median
from typing import Any, Self

import numpy as np

from .. import threads
from . import JobError
from .options import integer

HELP = "measure speed: this machine's limits, ours, PyTorch's, ONNX Runtime's"
DESCRIPTION = """Measure for about a minute: how fast this machine multiplies and reads; how near to that an
LSTM comes at five shapes (T steps, N sequences, D features, H units), inference and training;
and the time of PyTorch and ONNX Runtime, if they are installed, over ours: above 1 fastlstm is
faster. Each runs in a process of its own, in turn, and medians are printed. Nothing else should
run on the machine."""
EPILOG = """examples:
  {0}
  {0} --threads 1
  {0} --rounds 25 --peers torch"""

SHAPES = {
    "images by rows": (28, 128, 28, 128),
    "sensors": (100, 32, 64, 128),
    "text": (50, 64, 512, 512),
    "one sequence": (150, 1, 256, 256),
    "long and thin": (256, 256, 1, 64),
}
MODES = ("inference", "training")
PEERS = ("torch", "onnxruntime")
SECONDS = 0.1  # of one measurement, at least


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``python -m fastlstm bench``."""
    add = parser.add_argument
    add("--threads", type=integer(1, 1024), help="threads (default: the processors this process may use)")
    add("--rounds", type=integer(1, 1000), default=9, help="measurements of each, in turn (%(default)s)")
    add("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="libraries to compare with, or none (all)")


class Worker:
    """A library in a process of its own. A session of its own too: Ctrl-C reaches this process alone, which ends it."""

    def __init__(self, name: str, team: int) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fastlstm.jobs.peers", name, str(team)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        with suppress(BrokenPipeError):  # what was asked of a process that has ended
            self._process.communicate()

    def answer(self) -> Any:
        """The next line that it says."""
        line = self._process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise JobError(f"the process of {self.name} ended with status {self._process.wait()}")
        return json.loads(line)

    def __call__(self, do: str, **request: Any) -> Any:
        with suppress(BrokenPipeError):  # it has ended: the answer says so
            print(json.dumps({"do": do, **request}), file=self._process.stdin, flush=True)
        return self.answer()


def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Measure and print."""
    team = args.threads or threads.get_num_threads()
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(name, team)) for name in ("fastlstm", *dict.fromkeys(args.peers))]
        about = {worker.name: worker.answer() for worker in workers}
        workers = [worker for worker in workers if "missing" not in about[worker.name]]
        peers = [worker.name for worker in workers[1:]]
        limits = workers[0]("limits")
        print(*head(about, limits), sep="\n")
        print(columns(peers), flush=True)
        for name, shape in SHAPES.items():
            times = measure(workers, shape, args.rounds)
            peak = limits["peak"] * about["fastlstm"]["threads"]
            print(line(name, shape, times, peak, peers), flush=True)


def measure(workers: Sequence[Worker], shape: Sequence[int], rounds: int) -> dict[str, dict[str, float]]:
    """Mode to library to seconds of a call: medians over the rounds, in each of which all have their turn."""
    values = {worker.name: worker("prepare", shape=shape) for worker in workers}
    ours, times = values["fastlstm"], {}
    for mode in MODES:
        able = [worker for worker in workers if mode in values[worker.name]]
        for worker in able:
            if not np.allclose(values[worker.name][mode], ours[mode], rtol=1e-3, atol=1e-4):
                raise JobError(f"{worker.name} computes another output at {shape}: nothing to compare")
        taken: dict[str, list[float]] = {worker.name: [] for worker in able}
        for _ in range(rounds):
            for worker in able:
                taken[worker.name].append(worker("time", mode=mode, seconds=SECONDS))
        times[mode] = {name: median(seconds) for name, seconds in taken.items()}
    return times


def flops(shape: Sequence[int], mode: str) -> int:
    """Two per multiply-add of the products, forward; three times that with backward."""
    T, N, D, H = shape
    return 8 * T * N * H * (D + H) * (3 if mode == "training" else 1)


def head(about: dict[str, Any], limits: dict[str, Any]) -> list[str]:
    """Who is measured, and the machine's limits."""
    ours = about["fastlstm"]
    lines = [f"fastlstm {ours['version']}, {ours['isa']}, threads: {ours['threads']}"]
    for name, found in about.items():
        if name != "fastlstm":
            lines.append(f"{name}: " + ("not installed" if "missing" in found else found["version"]))
    read = ", ".join(f"{name} {value:.0f} GB/s" for name, value in limits["read"].items())
    return [*lines, f"one core: FMA peak {limits['peak']:.0f} GFLOP/s (float32); reads {read}", ""]


def columns(peers: Sequence[str]) -> str:
    """The two lines above the table."""
    inference = 18 + sum(2 + len(name) for name in peers)
    upper = f"{'':32}{'inference':<{inference}}training"
    names = {"inference": peers, "training": [name for name in peers if name != "onnxruntime"]}
    parts = [f"{'ms':>8}  {'% peak':>6}" + "".join(f"  {name}" for name in names[mode]) for mode in MODES]
    return f"{upper}\n{'shape':<15}{'T,N,D,H':<16}{parts[0]}  {parts[1]}"


def line(
    name: str, shape: Sequence[int], times: dict[str, dict[str, float]], peak: float, peers: Sequence[str]
) -> str:  # fmt: skip
    """A row: time, share of the peak of all threads' cores, and the times of the others over ours."""
    cells = [f"{name:<15}{','.join(map(str, shape)):<16}"]
    for mode in MODES:
        ours = times[mode]["fastlstm"]
        digits = ".0f" if ours >= 0.1 else ".3g"
        cells.append(f"{1e3 * ours:>8{digits}}  {100 * flops(shape, mode) / ours / 1e9 / peak:>6.0f}")
        cells += [f"  {times[mode][peer] / ours:>{len(peer)}.2f}" for peer in peers if peer in times[mode]]
        cells.append("  ")
    return "".join(cells).rstrip()
