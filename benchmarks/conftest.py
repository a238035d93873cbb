"""Options and fixtures of the benchmarks of this package alone."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for cases.py under any import mode
sys.path.append(str(Path(__file__).parents[1]))  # fastlstm in the tree, where none is installed


def pytest_addoption(parser):
    parser.addoption("--all-shapes", action="store_true", help="every shape of cases.py, not a few")


def pytest_generate_tests(metafunc):
    from cases import SHAPES

    few = ["28,128,28,128", "100,32,64,128", "100,64,256,256", "15,1,250,200", "100,1,512,512"]
    if "shape" in metafunc.fixturenames:
        metafunc.parametrize("shape", SHAPES if metafunc.config.getoption("--all-shapes") else few)
    if "threads" in metafunc.fixturenames:
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        metafunc.parametrize("threads", [1, 2][: max(1, cpus)], ids="{}t".format, indirect=True)


@pytest.fixture
def threads(request):
    """So many threads for the length of a test."""
    import fastlstm

    fastlstm.set_num_threads(request.param)
    yield request.param
    fastlstm.set_num_threads(None)


@pytest.fixture(scope="session")
def peak():
    """GFLOP/s of one core's FMA units."""
    import fastlstm

    return fastlstm.engine.fma_peak(np.dtype("float32"))
