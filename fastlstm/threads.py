"""How many threads a call may use, and what this build runs on."""

from __future__ import annotations

import math
import operator
import os

from . import _engine

_chosen: int | None = None


def set_num_threads(n: int | None) -> None:
    """Set the largest number of threads that a call uses.

    Parameters
    ----------
    n : int or None
        At least 1. None: back to the default, see `get_num_threads`.

    Raises
    ------
    TypeError, ValueError
        ``n`` is no integer, smaller than 1, or beyond a C int.

    Notes
    -----
    The number holds for the whole process and is read when a call starts; results do not depend on it, to the bit.
    """
    global _chosen
    if n is not None:
        if isinstance(n, bool):
            raise TypeError("n: expected an integer, got bool")
        try:
            n = operator.index(n)
        except TypeError:
            raise TypeError(f"n: expected an integer, got {type(n).__name__}") from None
        if not 1 <= n < 2**31:
            raise ValueError(f"n: expected an integer from 1 to {2**31 - 1}, got {n}")
    _chosen = n


def get_num_threads() -> int:
    """Largest number of threads that a call uses.

    `set_num_threads` if it was called, else the environment variable OMP_NUM_THREADS, else the number of processors
    that this process may use (affinity and cgroup quota). 1 in a build without OpenMP and in a forked child.
    """
    if not _engine.has_openmp() or _engine.forked():
        return 1
    if _chosen is not None:
        return _chosen
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if first.isascii() and first.isdigit() and int(first) > 0:
        return min(int(first), 2**31 - 1)
    return _processors()


def _processors() -> int:
    """Processors by affinity (read anew, it is cheap) and cgroup quota (read once)."""
    global _quota
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if _quota is None:
        _quota = _cgroup_quota()
    return max(1, math.ceil(min(count, _quota)))


_quota: float | None = None


def _cgroup_quota() -> float:
    """Processors that the cgroup grants, infinity if it sets no limit."""
    for path, parse in (
        ("/sys/fs/cgroup/cpu.max", lambda text: text.split()),
        (
            "/sys/fs/cgroup/cpu/cpu.cfs_quota_us",
            lambda text: [text.strip(), _read("/sys/fs/cgroup/cpu/cpu.cfs_period_us")],
        ),
    ):
        try:
            quota, period = parse(_read(path))
            if quota not in ("max", "-1"):
                return float(quota) / float(period)
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return math.inf


def _read(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read()


def show_config() -> None:
    """Print the version, the instruction sets, the threads and what they come from."""
    from . import __version__

    isas = " ".join(f"[{name}]" if name == _engine.isa() else name for name in _engine.available_isas())
    if not _engine.has_openmp():
        threads = "1 (built without OpenMP)"
    elif _engine.forked():
        threads = "1 (forked child)"
    else:
        threads = str(get_num_threads())
    print(f"fastlstm {__version__}")
    print(f"instruction sets: {isas}   (FASTLSTM_ISA forces one)")
    print(f"threads: {threads}   (set_num_threads, OMP_NUM_THREADS)")
