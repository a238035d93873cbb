"""Memory that ends at a page which must not be touched: the kernels alone (guard.c), then whole calls."""

import ctypes
import mmap
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastlstm
from fastlstm import engine

HERE = Path(__file__).parent
SOURCES = HERE.parent / "src_c"

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="maps pages as Linux does")


@pytest.mark.parametrize(
    "emulate", [False, pytest.param(True, marks=pytest.mark.full)], ids=["this machine's", "avx512, emulated"]
)
def test_kernels(emulate, tmp_path):
    """Every kernel, sizes 1 to 65, on buffers of exactly the size that the C interface asks for."""
    gcc = shutil.which("gcc")
    if not gcc or not SOURCES.is_dir():
        pytest.skip("needs gcc and the C sources")
    if emulate and "avx2" not in engine.available_isas():
        pytest.skip("AVX-512 is emulated with AVX2")
    flags = ["-O0", "-std=gnu11", "-Wno-psabi", f"-I{SOURCES}"] + ["-DFL_EMULATE_AVX512"] * emulate
    guard = tmp_path / "guard"
    subprocess.run([gcc, *flags, HERE / "guard.c", SOURCES / "cpu.c", "-o", guard, "-lm"], check=True, timeout=300)
    run = subprocess.run([guard], capture_output=True, text=True, timeout=120)
    lines = run.stdout.splitlines()
    assert run.returncode == 0, f"ended with {run.returncode} after {lines[-1:]}"
    # an engine that emulates AVX-512 offers it where the processor, which this program asks, has none
    isas = ["baseline", "avx2", "avx512"]
    if not emulate:
        real = "avx512dq" in Path("/proc/cpuinfo").read_text()
        isas = [isa for isa in engine.available_isas() if isa != "avx512" or real]
    assert [line.split(",")[0] for line in lines[::2]] == [
        f"{isa} {kind}" for isa in isas for kind in ("float", "double")
    ]
    assert int(lines[-1].split()[-2]) > 10_000 * len(lines)


CALLS = """
import sys
sys.path.insert(0, {tests!r})
import numpy as np
from conftest import CELLS, make, problem, train
from test_guard import Guarded
import fastlstm
from fastlstm import engine

engine.use_isa({isa!r})
guarded, plain = Guarded(), engine.empty
rng = np.random.default_rng(0)
count = 0
for front in (False, True):
    for i in range(66):
        for cell in CELLS:
            T, N, D, H = (int(rng.integers(1, 7)) for _ in range(4))
            T, N, D, H = [(T, N, D, i), (T, i, D, H), (i, N, D, H), (T, N, i or 1, H)][(i + count) % 4]
            H = H or 1
            options = dict(dtype=[np.float32, np.float64][count % 2], num_layers=1 + count % 3 % 2,
                           bidirectional=count % 5 == 0, recurrent_dropout=0.2 * (count % 7 == 0),
                           activation="relu" if count % 11 == 0 and cell != "rnn" else "tanh")
            if cell in ("rnn", "slstm"):
                del options["activation"]
            if cell == "lstm" and H > 1 and count % 3 == 0:
                options["proj_size"] = max(1, H // 2)
            if cell == "lstm" and count % 4 == 0:
                options["zoneout"] = 0.2, 0.1
            lengths = rng.integers(0, T + 1, N) if count % 2 else None
            fastlstm.set_num_threads(1 + count % 3)
            results = []
            for use in (False, True):
                guarded.begin(front)
                engine.empty = guarded.empty if use else plain
                layer = make(cell, D, H, **options)
                p = problem(layer, T, N, lengths)
                if use:
                    layer._parameters.move(guarded.empty(layer.flat_params.shape, layer.dtype))
                    layer._gradients.move(guarded.empty(layer.flat_grads.shape, layer.dtype, zero=True))
                    p.x, p.dy = guarded.copy(p.x), guarded.copy(p.dy)
                    p.state = tuple(map(guarded.copy, p.state)) if isinstance(p.state, tuple) else guarded.copy(p.state)
                infer = layer(p.x, p.state, lengths)
                out, _ = train(layer, p, checkpoint_every=None if count % 3 else 2)
                if use and not layer.bidirectional and N:
                    stored = "bfloat16" if count % 4 == 0 and layer.dtype == np.float32 else None
                    stream = layer.stream(N, weights=stored)
                    for x_t in p.x[:3]:
                        stream.step(guarded.copy(x_t), out=guarded.empty((N, out["y"].shape[2]), layer.dtype))
                results.append([infer[0].tobytes(), *(a.tobytes() for a in out.values())])
            assert results[0] == results[1], (cell, T, N, D, H, options)
            count += 1
print(count)
"""


class Guarded:
    """Arrays between pages that must not be touched, which begin or end there."""

    PLACES, SPACE = 512, 1 << 20

    def __init__(self):
        page, libc = mmap.PAGESIZE, ctypes.CDLL(None, use_errno=True)
        size = self.SPACE + 2 * page
        self.maps = [mmap.mmap(-1, size) for _ in range(self.PLACES)]
        for m in self.maps:
            start = ctypes.addressof(ctypes.c_char.from_buffer(m))
            for at in (start, start + page + self.SPACE):
                if libc.mprotect(ctypes.c_void_p(at), ctypes.c_size_t(page), 0):
                    raise OSError(ctypes.get_errno(), "mprotect")

    def begin(self, front):
        self.front, self.used = front, 0

    def empty(self, shape, dtype, zero=False):
        import numpy as np

        dtype = np.dtype(dtype)
        count = int(np.prod(shape, dtype=np.int64))
        assert count * dtype.itemsize <= self.SPACE
        offset = mmap.PAGESIZE + (0 if self.front else self.SPACE - count * dtype.itemsize)
        array = np.frombuffer(self.maps[self.used], dtype, count, offset).reshape(shape)
        self.used += 1
        array.view(np.uint8)[...] = 0 if zero else 0xFF  # NaN: what is read before it is written shows
        return array

    def copy(self, a):
        array = self.empty(a.shape, a.dtype)
        array[...] = a
        return array


@pytest.mark.own
def test_whole_calls(isa):
    """Inference, forward, backward and streams with all arrays guarded: no touch, and the bits of plain memory."""
    code = CALLS.format(tests=str(HERE), isa=isa)
    command, folder = [sys.executable, "-X", "faulthandler", "-c", code], Path(fastlstm.__file__).parents[1]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder)
    assert run.returncode == 0, run.stderr[-3000:]
    assert int(run.stdout) > 700
