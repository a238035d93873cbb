"""Whole training programs in PyTorch, torch.nn's layer and ours in turn in the same model; and what a small call costs.

    python benchmarks/torch_training.py --threads 1 2
    OMP_WAIT_POLICY=passive python benchmarks/torch_training.py --threads 2

Embedding, recurrent layer, linear, cross-entropy, clipping, AdamW and a schedule; the times are those of whole steps.
Both models start from the same weights, and their first losses are compared before anything is timed. The first line of
the output counts the OpenMP libraries: with two there are two pools of threads, and the second command shows what the
waiting of one costs the other. Times are medians; nothing else may run on the machine.
"""

from __future__ import annotations

import argparse
import os
import time
from statistics import median

import numpy as np
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastlstm
import fastlstm.torch

# T, N, D, H, whether lengths vary and the sequences are packed; and the ratio that is aimed at.
JOBS = {
    "28,128,28,128": ((28, 128, 28, 128), False, 1.3),
    "100,32,64,128": ((100, 32, 64, 128), False, 1.3),
    "100,64,128,256 packed": ((100, 64, 128, 256), True, 4.0),
}
WORDS, CLASSES = 1000, 20


class Model(torch.nn.Module):
    def __init__(self, kind, D, H):
        super().__init__()
        self.embedding, self.rnn = torch.nn.Embedding(WORDS, D), kind(D, H)
        self.out = torch.nn.Linear(H, CLASSES)

    def forward(self, words, lengths):
        x = self.embedding(words)
        if lengths is None:
            return self.out(self.rnn(x)[0])
        y, _ = self.rnn(pack_padded_sequence(x, lengths, enforce_sorted=False))
        return self.out(pad_packed_sequence(y, total_length=len(words))[0])


class Training:
    """A model with its optimiser; the same batches for the same seed."""

    def __init__(self, kind, shape, packed):
        self.T, self.N, D, H = shape
        torch.manual_seed(0)
        self.model = Model(kind, D, H)
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimiser, 2e-3, total_steps=100_000)
        self.rng, self.packed = np.random.default_rng(0), packed

    def step(self):
        words = torch.from_numpy(self.rng.integers(WORDS, size=(self.T, self.N)))
        lengths, labels = None, words % CLASSES
        if self.packed:
            lengths = torch.from_numpy(self.rng.integers(1, self.T + 1, self.N))
            labels = labels.masked_fill(torch.arange(self.T)[:, None] >= lengths, -100)
        loss = torch.nn.functional.cross_entropy(self.model(words, lengths).flatten(0, 1), labels.flatten())
        self.optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.schedule.step()
        return loss.item()


def turns(jobs, rounds, seconds):
    """Medians over the rounds of the time of one call of each, in turn, each warmed up after the other's turn."""
    calls = {}
    for name, run in jobs.items():
        run()
        start = time.perf_counter()
        run()
        calls[name] = max(1, round(seconds / (time.perf_counter() - start)))
    found = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, run in jobs.items():
            run()
            start = time.perf_counter()
            for _ in range(calls[name]):
                run()
            found[name].append((time.perf_counter() - start) / calls[name])
    return {name: median(times) for name, times in found.items()}


def small_calls(rounds):
    """One step of one sequence: the drop-in beside a call with arrays, in microseconds."""
    D = H = 8
    ours, theirs, layer = fastlstm.torch.LSTM(D, H), torch.nn.LSTM(D, H), fastlstm.LSTM(D, H)
    x = torch.randn(1, 1, D)
    array, dy = x.numpy(), np.ones((1, 1, H), np.float32)
    given = torch.from_numpy(dy)

    def infer(module):
        def call():
            with torch.no_grad():
                module(x)

        return call

    def train(module):
        return lambda: module(x)[0].backward(given)

    def by_arrays():
        _, _, tape = layer.forward(array)
        layer.backward(tape, dy, need_dx=False)

    print("\none step of one sequence, D = H = 8, 1 thread: microseconds")
    for what, jobs, most in (
        ("inference", {"numpy": lambda: layer(array), "ours": infer(ours), "torch.nn": infer(theirs)}, 15),
        ("training", {"numpy": by_arrays, "ours": train(ours), "torch.nn": train(theirs)}, 60),
    ):
        t = {name: 1e6 * value for name, value in turns(jobs, rounds, 0.05).items()}
        print(f"{what:10} numpy {t['numpy']:6.1f}   ours {t['ours']:6.1f} (+{t['ours'] - t['numpy']:.1f}, aim: {most})"
              f"   torch.nn {t['torch.nn']:6.1f}")  # fmt: skip


def openmp_libraries():
    from threadpoolctl import threadpool_info

    return sum(library["user_api"] == "openmp" for library in threadpool_info())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1], metavar="N")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a turn")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, fastlstm {fastlstm.__version__} ({fastlstm.show_config('dicts')['isa']})")
    print(f"OpenMP libraries: {openmp_libraries()}, OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY', '')}")
    for threads in args.threads:
        torch.set_num_threads(threads)
        fastlstm.set_num_threads(threads)
        print(f"\ntraining, {threads} thread(s): milliseconds a step")
        for name, (shape, packed, aim) in JOBS.items():
            kinds = {"torch.nn": torch.nn.LSTM, "ours": fastlstm.torch.LSTM}
            trainings = {which: Training(kind, shape, packed) for which, kind in kinds.items()}
            losses = [training.step() for training in trainings.values()]
            if abs(losses[0] - losses[1]) > 1e-5 * losses[0]:
                raise SystemExit(f"{name}: the losses differ, {losses}")
            t = turns({which: training.step for which, training in trainings.items()}, args.rounds, args.seconds)
            print(f"{name:22} torch.nn {1e3 * t['torch.nn']:7.1f}   ours {1e3 * t['ours']:7.1f}   "
                  f"ratio {t['torch.nn'] / t['ours']:.2f} (aim: {aim})")  # fmt: skip
    torch.set_num_threads(1)
    fastlstm.set_num_threads(1)
    small_calls(args.rounds)


if __name__ == "__main__":
    main()
