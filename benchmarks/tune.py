"""The measurements behind the engine's constants: `python benchmarks/tune.py [constant ...]`.

row_block, chunk, x_chunk, start, meet, near, far, l1, l2: GFLOP/s with each value of the constant, in turn (A B A B),
medians, with as many threads as there are processors (benchmarks/scaling.py measures start, meet, near, far directly).
blas: the product of the backward pass, dG' a, by the engine's kernels and by SciPy's BLAS on one thread.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import sys
import time

import numpy as np

import fastlstm
from fastlstm import engine

TRAIN, FORWARD = True, False
CPUS = fastlstm.get_num_threads()
CONSTANTS = {
    "row_block": ((24, 48, 96, 192), ((28, 128, 28, 128), (100, 256, 64, 256)), (1, CPUS), (FORWARD, TRAIN)),
    "chunk": (
        (256, 512, 1024, 2048),
        ((28, 128, 28, 128), (100, 64, 256, 256), (25, 64, 1024, 1024)),
        (1, CPUS),
        (TRAIN,),
    ),
    "x_chunk": (
        (0, 32, 64, 128, 256),
        (
            (150, 1, 256, 256),
            (100, 1, 512, 512),
            (25, 4, 1024, 1024),
            (25, 16, 1024, 1024),
            (35, 20, 650, 650),
            (50, 8, 200, 200),
            (100, 4, 256, 256),
        ),
        (1, CPUS),
        (FORWARD,),
    ),
    "start": (
        (5e4, 1e5, 2.5e5, 5e5, 1e6),
        ((10, 4, 16, 32), (20, 4, 32, 64), (50, 2, 64, 64), (10, 16, 32, 64), (5, 32, 64, 128)),
        (CPUS,),
        (FORWARD, TRAIN),
    ),
    "meet": (
        (1e4, 2e4, 5e4, 1e5, 2e5),
        ((100, 1, 64, 64), (100, 2, 64, 96), (100, 1, 64, 128), (100, 6, 64, 128), (150, 1, 256, 256)),
        (CPUS,),
        (FORWARD, TRAIN),
    ),
    "near": (
        (2, 4, 8, 16, 32),
        (
            (50, 4, 64, 64),
            (150, 1, 256, 256),
            (100, 2, 256, 256),
            (100, 4, 256, 256),
            (100, 8, 256, 256),
            (50, 20, 200, 200),
        ),
        (CPUS,),
        (FORWARD, TRAIN),
    ),
    "far": (
        (8, 16, 32, 64),
        ((50, 16, 400, 400), (25, 4, 1024, 1024), (25, 16, 1024, 1024), (35, 20, 650, 650), (25, 40, 1024, 1024)),
        (CPUS,),
        (FORWARD, TRAIN),
    ),
    "l1": (
        (1 << 14, 1 << 15, 48 << 10, 1 << 16, 1 << 30),
        ((100, 32, 64, 128), (20, 96, 256, 256), (50, 20, 512, 512), (25, 16, 1024, 1024)),
        (1, CPUS),
        (FORWARD, TRAIN),
    ),
    "l2": (
        (1 << 18, 1 << 20, 1 << 21, 1 << 30),
        ((50, 64, 512, 512), (25, 64, 1024, 1024)),
        (1, CPUS),
        (FORWARD, TRAIN),
    ),
}
PRODUCTS = ((3584, 512, 28), (3584, 512, 128), (65536, 256, 64), (6400, 1024, 256), (6400, 1024, 512),
            (3200, 2048, 512), (1600, 4096, 1024), (1000, 800, 250))  # fmt: skip


def call(layer, x, dy, train):
    if train:
        y, _, tape = layer.forward(x)
        layer.backward(tape, dy)
    else:
        layer(x)


def measure(name, values, shape, threads, train, rounds=9):
    T, N, D, H = shape
    rng = np.random.default_rng(0)
    layer = fastlstm.LSTM(D, H, rng=0)
    x = rng.standard_normal((T, N, D), np.float32)
    dy = rng.standard_normal((T, N, H), np.float32)
    flops = 8 * T * N * H * (D + H) * (3 if train else 1)
    calls = max(1, int(0.02 * 1e11 * threads / flops))
    fastlstm.set_num_threads(threads)
    before = engine.tune()
    times = {value: [] for value in values}
    for _ in range(rounds):
        for value in values:
            engine.tune(**{name: value})
            call(layer, x, dy, train)
            begin = time.perf_counter()
            for _ in range(calls):
                call(layer, x, dy, train)
            times[value].append((time.perf_counter() - begin) / calls)
    engine.tune(**before)
    figures = "  ".join(f"{value:g}: {flops / np.median(t) / 1e9:.1f}" for value, t in times.items())
    print(f"{name:10} {shape!s:22} {threads} threads {'train  ' if train else 'forward'} {figures}", flush=True)


def products(rounds=9):
    from scipy.linalg.blas import sgemm

    rng = np.random.default_rng(0)
    for R, J, K in PRODUCTS:
        g, a = rng.standard_normal((R, J), np.float32), rng.standard_normal((R, K), np.float32)
        out = np.zeros((J, K), np.float32)
        engine.outer_product(g, a, out)
        ours, blas = [], []
        for _ in range(rounds):
            begin = time.perf_counter()
            engine.outer_product(g, a, out)
            middle = time.perf_counter()
            sgemm(1, a.T, g.T, 1, out.T, trans_b=True, overwrite_c=True)  # out' += a' g in column-major terms
            ours.append(middle - begin)
            blas.append(time.perf_counter() - middle)
        flops = 2 * R * J * K / 1e9
        print(
            f"blas       {(R, J, K)!s:22} engine {flops / np.median(ours):.1f}  BLAS {flops / np.median(blas):.1f}",
            flush=True,
        )


def main():
    names = sys.argv[1:] or [*CONSTANTS, "blas"]
    print(f"GFLOP/s, {engine.isa()}, FMA peak {engine.fma_peak():.0f} per core, now {engine.tune()}")
    for name in names:
        if name == "blas":
            products()
            continue
        values, shapes, threads, modes = CONSTANTS[name]
        for shape in shapes:
            for n in dict.fromkeys(threads):
                for train in modes:
                    measure(name, values, shape, n, train)


if __name__ == "__main__":
    main()
