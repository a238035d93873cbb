"""The speed of fastlstm alone: ``pytest benchmarks --benchmark-only``, beside others: peers.py."""

import numpy as np
import pytest
from cases import Case

pytest.importorskip("pytest_benchmark")
fastlstm = pytest.importorskip("fastlstm")

pytestmark = pytest.mark.benchmark(max_time=0.4, min_rounds=7, warmup=True, warmup_iterations=1)


def note(benchmark, case, threads, peak):
    isa = getattr(fastlstm.engine, "isa", None)
    benchmark.extra_info.update(threads=threads, isa=isa() if isa else None, cell=case.cell, dtype=case.dtype)
    if benchmark.stats:  # not with --benchmark-disable
        gflops = case.flops / benchmark.stats.stats.median / 1e9
        benchmark.extra_info["gflops"] = round(gflops, 1)
        if peak:
            benchmark.extra_info["share_of_fma_peak"] = round(gflops / (peak * threads), 3)


def layer_of(case, params):
    layer = fastlstm.LSTM(case.D, case.H, case.layers, bidirectional=case.dirs == 2)
    layer.load_state_dict(params)
    return layer


@pytest.mark.parametrize("mode", ["forward", "training"])
def test_layer(benchmark, shape, mode, threads, peak):
    case = Case(shape, mode)
    benchmark.group = f"T,N,D,H = {shape}  {mode}"
    x, dy, params = case.inputs()
    layer = layer_of(case, params)

    def training():
        y, _, tape = layer.forward(x)
        layer.zero_grad()
        layer.backward(tape, dy)
        return y

    y = benchmark(training if mode == "training" else lambda: layer(x)[0])
    assert y.shape == dy.shape
    assert np.isfinite(y).all()
    note(benchmark, case, threads, peak)


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
@pytest.mark.parametrize("units", [64, 512])
def test_stream(benchmark, units, weights, threads, peak):
    case = Case(f"8,1,{units},{units}", "stream")
    benchmark.group = f"stream.step  N,D,H = 1,{units},{units}"
    x, _, params = case.inputs()
    layer = layer_of(case, params)
    stream = layer.stream(1) if weights == "float32" else layer.stream(1, weights=weights)
    x_t, out = x[0], np.empty((1, units), np.float32)
    benchmark(stream.step, x_t, out=out)
    assert np.isfinite(out).all()
    benchmark.extra_info["weights"] = weights
    note(benchmark, case, threads, peak)
