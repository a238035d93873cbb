"""The tests' own test: plants faults one at a time into C, Cython and Python, and shows which test catches each.

    python tests/faults.py             all of them: some 40 minutes of one core
    python tests/faults.py gru _batch  those whose place holds one of these words
    python tests/faults.py 15-         from the 15th on

Works on a copy in a temporary folder, built with gcc for the baseline instruction set alone (the others are the same
text), with little optimisation. Ends with exit status 1 if a fault survived.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
LADDER = "test_ladder.py"
BITS = "test_exact.py"

# where, what stands there (once), what it becomes, the tests that are to see it
FAULTS = [
    # C: the cells
    ("src_c/cells/lstm.h", "in = SUM(0), forget = SUM(1)", "in = SUM(1), forget = SUM(0)", LADDER),
    ("src_c/cells/lstm.h", "PUT(2, ACT(SUM(2)))", "PUT(2, GATE_ACT(SUM(2)))", LADDER),
    ("src_c/cells/lstm.h", "dc * c_prev * GATE_SLOPE(forget)", "dc * c_prev * GATE_SLOPE(in)", LADDER),
    ("src_c/cells/lstm.h", "dc * forget + kept", "dc * forget", LADDER),
    ("src_c/cells/lstm_peephole.h", "SUM(1) + PARAMETER(1)", "SUM(1) + PARAMETER(0)", LADDER),
    ("src_c/cells/gru.h", "STORE(GATE(3), dn * r);", "STORE(GATE(3), dn * z);", LADDER),
    ("src_c/cells/gru.h", "            dh *= LOAD(AT(mask));", "            dh *= SPLAT(1);", LADDER),
    ("src_c/cells/gru.h", "STORE(GATE(3), r * LOAD(AT(h_seen)));", "STORE(GATE(3), r * LOAD(AT(h_prev)));", LADDER),
    ("src_c/cells/rnn.h", "dh * SLOPE(LOAD(GATE(0)))", "dh", LADDER),
    ("src_c/cells/lstm_coupled.h", "dc * (c_prev - g) *", "dc * c_prev *", LADDER),
    ("src_c/cells/lstm_norm.h", "a[1] * c_prev + a[0] * a[2]", "a[1] * c_prev + a[0] * a[3]", LADDER),
    ("src_c/cells/lstm_norm.h", "STORE(AT(dc), dc * forget + kept);", "STORE(AT(dc), dc * forget);", LADDER),
    ("src_c/cells/slstm.h", "STORE(STATE(dc, 1), dn * forget);", "STORE(STATE(dc, 1), dn);", "test_slstm.py " + LADDER),
    ("src_c/cells/slstm.h", "STORE(GATE(1), df * slope);", "STORE(GATE(1), df);", "test_slstm.py " + LADDER),
    ("src_c/cells/linear.h", "WITHIN(LOAD(AT(y)), proj_clip, dh)", "dh", LADDER),
    # C: what the cells share
    ("src_c/update.h", "keep * LOAD(AT(h_prev)) + (SPLAT(1) - keep) * h", "keep * h + (SPLAT(1) - keep) * h", LADDER),
    ("src_c/update.h", "        dh *= LOAD(AT(mask));", "        dh += LOAD(AT(mask));", LADDER),
    ("src_c/update.h", "dh + LOAD(AT(dh_in)) :", "dh :", LADDER),
    ("src_c/vmath.h", "v[l] = p[l];", "v[l] = p[0];", LADDER),
    ("src_c/vmath.h", "return lanes == LANES ?", "return lanes ?", "test_guard.py " + LADDER),
    ("src_c/vmath.h", "0x1.6beb94976ab99p-10", "0x1.7beb94976ab99p-10", "test_vmath.py"),
    ("src_c/vmath.h", "0x1.1111111118794p-7", "0x1.1111112118794p-7", "test_vmath.py"),
    ("src_c/vmath.h", "return SPLAT(1) - y * y;", "return SPLAT(1) - a;", LADDER),
    ("src_c/panel.h", "if (part < left)", "if (part < left - 1)", LADDER),
    ("src_c/pass.h", "!one_tile && tile < b->higher", "!one_tile && tile <= b->higher", LADDER),
    ("src_c/pass.h", "block + most < s->end ? block + most : s->end;", "block + most;", "test_guard.py " + BITS),
    ("src_c/pass.h", "s->backwards ? count - 1 - i : i", "s->backwards ? count - 2 - i : i", BITS),
    ("src_c/pass.h", "row = first_row;", ";", BITS),
    ("src_c/pass.h", "const REAL *init = pre;", "const REAL *init = NAME(zeros);", BITS),
    ("src_c/fastlstm.h", "n * i / count & ~(ptrdiff_t) 3", "n * i / count", BITS),
    ("src_c/pack.h", "b + 0x7fffu + (b >> 16 & 1u)", "b", "test_stream.py test_layers.py"),
    ("src_c/pack.h", "= a + b;", "= a;", LADDER),
    ("src_c/outer.h", "for (; j < columns; j++)", "for (; j + 1 < columns; j++)", LADDER),
    ("src_c/outer.h", "j < rows ? NAME(load_part)", "j < rows - 1 ? NAME(load_part)", LADDER),
    ("src_c/outer.h", "if (columns > 2 * LANES) {", "if (columns > 3 * LANES - 2) {", LADDER),
    # Cython
    ("fastlstm/engine/recurrence.pyx",
     "            split = max(has_previous, has_following)", "            split = 0", LADDER),
    ("fastlstm/engine/recurrence.pyx", "s.mask, s.ldmask = at(run.mask, r, item)",
     "s.mask, s.ldmask = at(run.mask, 0, item)", LADDER + " " + BITS),
    ("fastlstm/engine/recurrence.pyx",
     "for p in range(run.back_count):", "for p in range(min(1, run.back_count)):", LADDER),
    ("fastlstm/engine/recurrence.pyx", "n - m, width, run.item)", "n - m, 0, run.item)", LADDER),
    ("fastlstm/engine/products.pyx", "done += n", "done += n + 1", LADDER + " " + BITS),
    ("fastlstm/engine/products.pyx",
     "    if begin >= end:\n        return", "    if begin >= end - 1:\n        return", LADDER),
    ("fastlstm/engine/products.pyx", "        if add:", "        if not add:", LADDER),
    ("fastlstm/engine/rows.pyx", "while r > 0 and sizes[r - 1] <= t:", "while r > 0 and sizes[r - 1] < t:", LADDER),
    ("fastlstm/engine/rows.pyx", "row += 1", "row += 2", LADDER),
    ("fastlstm/engine/team.pyx", "job.count * (part + 1) - j * parts", "job.count * part + 1 - j * parts", BITS),
    ("fastlstm/engine/recurrence.pyx", "ready, origin = j, low", "ready, origin = j + 1, low", BITS + " " + LADDER),
    ("fastlstm/engine/team.pyx", "rows, width = max(job.ahead, run.s.rows.N),", "rows, width = run.s.rows.N,",
     BITS + " " + LADDER),
    ("fastlstm/engine/stepper.pyx",
     "        if reset is not None:\n            self.h", "        if False:\n            self.h",
     "test_sequences.py test_stream.py"),
    ("fastlstm/engine/memory.pyx",
     "calls - kept[i].used > KEPT_CALLS", "calls - kept[i].used > 1000", "test_memory.py"),
    ("fastlstm/engine/memory.pyx",
     "size[0] <= kept[i].size <=", "size[0] <= kept[i].size + 4096 <=", "test_memory.py test_guard.py"),
    ("fastlstm/engine/weights.pyx", "weights_t *s = &self.s\n        cdef Pass *step = &s.passes[index]",
     "weights_t *s = &self.s\n        cdef Pass *step = &s.passes[0]", LADDER),
    ("fastlstm/engine/team.pyx", "    fl_set_word(own)", "    pass", "test_control.py"),
    ("fastlstm/engine/team.pyx",
     "fl_set_word(word | FL_OURS)", "fl_set_word(own | FL_OURS)", "test_control.py"),
    ("fastlstm/engine/process.pyx", "            team = 1 + count", "            pass", "test_spare.py"),
    ("fastlstm/engine/process.pyx", "        fl_barrier_ask(&watch.barrier)", "        pass", "test_interrupt.py"),
    ("fastlstm/engine/process.pyx", "        if watched:", "        if True:", "test_interrupt.py"),
    ("fastlstm/engine/stepper.pyx", "] = h, c\n            raise", "] = h, self.states[1]\n            raise",
     "test_interrupt.py"),
    ("fastlstm/engine/stepper.pyx", "s.N * (part + 1) // parts, cuts", "s.N * (part + 1) // parts - part, cuts",
     "test_stream.py"),
    ("fastlstm/engine/stepper.pyx", "fl_barrier_wait(&s.watch.barrier, <int> parts)",
     "fl_barrier_asked(&s.watch.barrier)", "test_stream.py"),
    # Python
    ("fastlstm/_batch.py", 'order="C") if gradient else', 'order="C") if False else', "test_threads.py"),
    ("fastlstm/_places.py", "else valid & (np.arange(T)[:, None] < lengths)", "else valid", "test_sequences.py"),
    ("fastlstm/_places.py",
     'np.argsort(-lengths, kind="stable")\n        self.rows', 'np.argsort(lengths)\n        self.rows', LADDER),
    ("fastlstm/_places.py",
     "out[d::dirs, self.passes[reverse]] =", "out[d::dirs, self.passes[False]] =", "test_sequences.py"),
    ("fastlstm/_weights.py", "return windows[::-1] if self._directions[0] else windows", "return windows",
     "test_threads.py::test_windows_of_an_inference_have_the_bits_of_one"),
    ("fastlstm/_layer.py",
     "(dx, tape.dropout[layer - 1], dx)", "(dx, tape.dropout[0], dx)", LADDER),
    ("fastlstm/_weights.py", "1 / (1 - p) if p < 1 else 0", "1", "test_layers.py test_ladder.py"),
    ("fastlstm/_layer.py",
     "if tape._parameters != self._parameters.fingerprint(tape._batch.rows.R):", "if False:", "test_tape.py"),
    ("fastlstm/tape.py", "grads[:] = saved", "pass", "test_memory.py test_tape.py"),
    ("fastlstm/tape.py", "self._used = begun and self.checkpoint_every is None", "pass", "test_memory.py"),
    ("fastlstm/_weights.py",
     "        self._writeable(False)\n", "", "test_layers.py test_attributes.py test_memory.py"),
    ("fastlstm/_weights.py",
     "    if self._frozen is not None:\n            raise RuntimeError(\"load",
     "    if False:\n            raise RuntimeError(\"load", "test_layers.py test_errors.py"),
    ("fastlstm/_parameters.py", "copy=np.shares_memory(value, self.flat)", "copy=False",
     "test_layers.py test_attributes.py test_errors.py"),
    ("fastlstm/_checks.py", "if not found >= 0:", "if found < 0:", "test_nn.py test_nn_training.py test_errors.py"),
    ("fastlstm/engine/stepper.pyx", "self.states[1][:, reset] = 0", "pass", "test_sequences.py test_stream.py"),
    ("fastlstm/_saved.py", "os.fsync(file.fileno())", "pass", "test_files.py"),
    ("fastlstm/nn/optimisers.py", "a[:] = values[f\"{name}.{i}\"]", "pass", "test_nn.py test_nn_training.py"),
]  # fmt: skip


def run(command, folder, **options):
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, **options)


def build(copy, module):
    """One module of the engine, quickly."""
    engine = copy / "fastlstm" / "engine"
    made = copy / f"{module}.c"
    target = engine / f"{module}{sysconfig.get_config_var('EXT_SUFFIX')}"
    sources = [made, *([copy / "src_c/kernels.c", copy / "src_c/cpu.c"] if module == "kernels" else [])]
    flags = [
        "-O0",
        "-g0",
        "-w",
        "-std=gnu11",
        "-ffp-contract=fast",
        "-fopenmp",
        "-fvisibility=hidden",
        "-shared",
        "-fPIC",
    ]
    flags += [f"-I{p}" for p in (copy / "src_c", engine, np.get_include(), sysconfig.get_path("include"))]
    for command in (
        [sys.executable, "-m", "cython", "-3", engine / f"{module}.pyx", "-o", made],
        ["gcc", *flags, "-DNPY_NO_DEPRECATED_API=NPY_2_0_API_VERSION", *sources, "-o", target],
    ):
        done = run(command, copy)
        if done.returncode:
            return done.stderr[-500:] or "it does not build"
    return ""


def prepare(copy):
    known = run(["git", "ls-files", "-z"], ROOT, check=True).stdout.split("\0")
    for name in filter(None, known):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    for name in ("src_c/kernels.c", "src_c/cpu.c"):
        text = (copy / name).read_text(encoding="utf-8").replace("#if defined(__x86_64__)", "#if 0")
        text = text.replace("#if 0\n#include <immintrin.h>", "#if 1\n#include <immintrin.h>")
        (copy / name).write_text(text, encoding="utf-8")
    for path in (copy / "fastlstm" / "engine").glob("*.pyx"):
        wrong = build(copy, path.stem)
        if wrong:
            sys.exit(f"{path.name}: {wrong}")


def plant(copy, place, old, new, tests):
    """Name of the test that catches the fault, or ""."""
    path = copy / place
    text = path.read_text(encoding="utf-8")
    if text.count(old) != 1:
        sys.exit(f"{place}: {old!r} stands there {text.count(old)} times")
    path.write_text(text.replace(old, new), encoding="utf-8")
    module = "kernels" if place.startswith("src_c") else path.stem if path.suffix == ".pyx" else ""
    kept = None
    try:
        if module:
            target = copy / "fastlstm" / "engine" / f"{module}{sysconfig.get_config_var('EXT_SUFFIX')}"
            kept = target.read_bytes()
            target.unlink()
            if build(copy, module):
                return "the compiler"
        files = [f"tests/{name}" for name in tests.split()]
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-p",
            "no:cacheprovider",
            "-o",
            "addopts=-q -m 'not full'",
            *files,
        ]
        env = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "2", "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            done = run(command, copy, env=env, timeout=900)
        except subprocess.TimeoutExpired:
            return ""
        if done.returncode == 0:
            return ""
        if done.returncode < 0 or "Fatal Python error" in done.stderr:
            return "it crashes"
        found = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
        if done.returncode != 1 or not found:
            sys.exit(f"{place}: pytest ended with {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return found[1].removeprefix("tests/")
    finally:
        path.write_text(text, encoding="utf-8")
        if kept:
            target.write_bytes(kept)


def main(words):
    chosen = FAULTS
    if words and words[0].rstrip("-").isdigit():
        chosen = FAULTS[int(words[0].rstrip("-")) - 1 :]
    elif words:
        chosen = [fault for fault in FAULTS if any(word in fault[0] for word in words)]
    survived = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        prepare(copy)
        for place, old, new, tests in chosen:
            begin = time.monotonic()
            caught = plant(copy, place, old, new, tests)
            survived += not caught
            line = " ".join(old.split())[:50]
            print(f"{'caught  ' if caught else 'SURVIVED'} | {place} | {line} | {caught or tests} | "
                  f"{time.monotonic() - begin:.0f} s", flush=True)  # fmt: skip
    print(f"{len(chosen) - survived} of {len(chosen)} faults caught")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
