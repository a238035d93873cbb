"""Where the system grants no threads a call warns and uses fewer; libgomp alone would end the process."""

import os
import subprocess
import sys

import pytest
from test_threads import ROOT, openmp

pytestmark = [openmp, pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of Linux")]

CHILD = """
import os, resource, time, warnings
import numpy as np, fastlstm
layer = fastlstm.LSTM(18, 131, rng=0)
x = np.random.default_rng(0).standard_normal((9, 8, 18)).astype(np.float32)

def work():
    layer.zero_grad()
    y, _, tape = layer.forward(x)
    return y.tobytes() + layer.backward(tape, np.ones_like(y))[0].tobytes() + layer.flat_grads.tobytes()

fastlstm.set_num_threads(1)
want = work()
{limit}
fastlstm.set_num_threads({threads})
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    same = work() == want
    again = work() == want
    few = len(caught)
    {lift}
    fastlstm.set_num_threads(2)
    time.sleep(1.1)
    same &= again and work() == want
print(same, few, len(caught), caught[0].message if caught else "")
"""
# No more processes for this user. The superuser has no such limit, so it becomes somebody.
PROCESSES = """
if os.getuid() == 0:
    os.setresuid(64321, 64321, 64321)
hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
resource.setrlimit(resource.RLIMIT_NPROC, (1, hard))
"""
# Address space for some stacks, not for all of them.
SPACE = """
with open("/proc/self/statm") as file:
    pages = int(file.read().split()[0])
hard = resource.getrlimit(resource.RLIMIT_AS)[1]
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (30 << 20), hard))
"""
LIMITS = {
    "processes": (PROCESSES, "resource.setrlimit(resource.RLIMIT_NPROC, (hard, hard))"),
    "space": (SPACE, "resource.setrlimit(resource.RLIMIT_AS, (hard, hard))"),
}


@pytest.mark.own  # BLAS has threads of its own
@pytest.mark.parametrize(("what", "threads"), [("processes", 2), ("processes", 7), ("space", 7)])
def test_threads_that_are_refused(what, threads):
    limit, lift = LIMITS[what]
    code = CHILD.format(limit=limit, lift=lift, threads=threads)
    path = os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    run = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path},
                         capture_output=True, text=True, timeout=60)  # fmt: skip
    assert run.returncode == 0, run.stderr
    words = run.stdout.split(maxsplit=3)
    assert words[0] == "True", run.stdout
    assert int(words[1]) >= 1 and "the system grants" in words[3], run.stdout
