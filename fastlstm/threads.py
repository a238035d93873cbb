"""How many threads a call may use, and what this build runs on."""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Any

from . import _checks, engine
from ._version import __version__

_chosen: int | None = None
_here: ContextVar[int | None] = ContextVar("threads of the calls of this context", default=None)


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
    n = None if n is None else _checks.integer("n", n, 1)
    _chosen = n


def get_num_threads() -> int:
    """Largest number of threads that a call uses.

    `set_num_threads` if it was called, else the number of processors that this process may use (affinity and cgroup
    quota), or the environment variable OMP_NUM_THREADS if that is less. Within ``threadpoolctl.threadpool_limits`` not
    more than its limit, in the thread that set it. 1 in a forked child, and in a build without OpenMP, which says so
    once in a RuntimeWarning.

    Calls at the same time from several Python threads share this number, unless it comes from `set_num_threads`; and
    where other programs keep the processors busy, a call whose threads would wait for each other at every step runs on
    one for a while. No bit of a result depends on any of this.
    """
    global _told
    if engine.forked():
        return 1
    wanted = _here.get() or _chosen or min(_from_environment() or sys.maxsize, _processors())
    if "threadpoolctl" in sys.modules:
        wanted = _limited(wanted)
    if wanted > 1 and not engine.has_openmp():
        if not _told:
            _told = True
            warnings.warn(
                "fastlstm was built without OpenMP and uses one thread; FASTLSTM_REQUIRE_OPENMP=1 makes a build that "
                "lacks it fail, fastlstm.set_num_threads(1) says that one is meant",
                RuntimeWarning, stacklevel=3,
            )  # fmt: skip
        return 1
    return wanted


_told = False


def _limited(wanted: int) -> int:
    """Not more than what threadpoolctl has limited the calling thread to: it sets OpenMP's own count, which a call does
    not heed, as it says how many it wants. A count of all processors, or of what the environment says, is no limit."""
    global _omp
    if not engine.has_openmp():
        return wanted
    if _omp is None:
        import ctypes  # threadpoolctl has imported it

        _omp = ctypes.PyDLL(sys.modules[engine.forked.__module__].__file__)
    count: int = _omp.omp_get_max_threads()
    limits = count < wanted and count < min(_from_environment() or sys.maxsize, _omp.omp_get_num_procs())
    return count if limits else wanted


_omp: Any = None  # the library


def _from_environment() -> int:
    """OMP_NUM_THREADS, 0 if it is no number."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(first) if first.isascii() and first.isdigit() else 0


def threads_of_call() -> int:
    """What a call that begins now may use: the processors are shared with the calls that are under way."""
    asked = _here.get() or _chosen
    return get_num_threads() if asked else max(1, get_num_threads() // (1 + engine.calls()))


@contextmanager
def limited(n: int | None) -> Iterator[None]:
    """With at most n threads for the calls made within, by this thread alone: nothing changes for others.

    None changes nothing.
    """
    token = _here.set(_here.get() if n is None else _checks.integer("n", n, 1))
    try:
        yield
    finally:
        _here.reset(token)


_blas_lock = Lock()
_blas_held = 0
_blas: list[tuple[Any, int]] = []  # a library, and the threads it had


@contextmanager
def blas_on_one_thread() -> Iterator[None]:
    """With NumPy's BLAS on one thread, which a training loop wants: its products are small, its threads keep spinning
    after a call, in the way of the layer's team, and its bits depend on their number. Contexts of several threads
    count: the last to end restores what the first found.
    """
    global _blas_held
    from threadpoolctl import ThreadpoolController

    with _blas_lock:
        if _blas_held == 0:
            found = ThreadpoolController().select(user_api="blas").lib_controllers
            _blas[:] = [(library, library.num_threads) for library in found]
            for library, _ in _blas:
                _set_blas(library, 1)
        _blas_held += 1
    try:
        yield
    finally:
        with _blas_lock:
            _blas_held -= 1
            if _blas_held == 0:
                for library, count in _blas:
                    _set_blas(library, count)


def _set_blas(library: Any, count: int) -> None:
    """As of 3.8 threadpoolctl heeds only the thread that was first to set OpenBLAS's count; the last to leave may be
    another, so that is passed by."""
    getattr(library, "_real_set_num_threads", library.set_num_threads)(count)


def _processors() -> int:
    """Processors by affinity (read anew, it is cheap) and cgroup quota (read once)."""
    global _quota
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if _quota is None:
        _quota = _cgroup_quota()
    return max(1, math.ceil(min(count, _quota)))


_quota: float | None = None


def _cgroup_quota(root: str = "/sys/fs/cgroup", own: str = "/proc/self/cgroup") -> float:
    """Processors that the cgroup of this process and those above it grant, infinity if none sets a limit.

    root: where the hierarchies are mounted; own: the file that names this process's group in each.
    """
    granted = math.inf
    for line in _read(own).splitlines() or ["0::/"]:
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        folder = f"{root}/cpu" if controllers else root
        granted = min(granted, _quota_of(folder))
        for part in group.split("/"):
            if part not in ("", ".."):  # every group above has its say
                folder = f"{folder}/{part}"
                granted = min(granted, _quota_of(folder))
    return granted


def _quota_of(folder: str) -> float:
    """The quota of one group: one file in the second version of cgroups, two in the first."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        words = " ".join(_read(f"{folder}/{name}") for name in names).split()
        if len(words) == 2 and words[0] not in ("max", "-1"):
            try:
                return float(words[0]) / float(words[1])
            except (ValueError, ZeroDivisionError):
                continue
    return math.inf


def _read(path: str) -> str:
    """The content of a file, nothing if it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def set_products(products: str) -> None:
    """Choose how the matrix products of the calls that follow are computed.

    Parameters
    ----------
    products : {"own", "blas"}
        "own" (the default): kernels of this package. "blas": SciPy's BLAS, through `scipy.linalg.cython_blas`, held
        at one thread for the length of a call; the gates' updates are the same functions. The environment variable
        FASTLSTM_PRODUCTS chooses at import.

    Raises
    ------
    ValueError
        Another word.
    ImportError
        "blas" without SciPy or threadpoolctl (``pip install 'fastlstm[blas]'``).

    Notes
    -----
    By BLAS results are as exact, but their bits depend on the batch size and on the threads: OpenBLAS computes few
    rows by other kernels than many, and cuts a sum where it suits the number of rows. All promises of equal bits are
    those of "own", which bfloat16 and int8 weights need. A signal ends a long call only between products, and may leave
    the gradients of a stack's finished layers added. Frozen layers and streams keep what was chosen when they were
    made.
    """
    engine.use_products(products)


def set_memory_kept(nbytes: int | None) -> None:
    """Set how much memory of finished calls is kept for the next ones.

    Parameters
    ----------
    nbytes : int or None
        At least 0; 0 keeps none. None: back to the default, a tenth of the machine's memory.

    Raises
    ------
    TypeError, ValueError
        ``nbytes`` is no integer, or negative.

    Notes
    -----
    Fresh memory costs a page fault per page, so a training loop is faster with what the call before has left. What the
    last 16 calls did not use is given back in any case, at the next call; `release_memory` gives all back now.
    """
    engine.set_memory_kept(None if nbytes is None else _checks.integer("nbytes", nbytes, 0, 2**62))


def show_config(mode: str = "stdout") -> dict[str, Any] | None:
    """Tell the version, the instruction sets, the threads and what they come from.

    Parameters
    ----------
    mode : {"stdout", "dicts"}
        Print it, or return it as a dict, as `numpy.show_config` does.

    Returns
    -------
    dict or None
        version, isa, available_isas, products, threads, openmp, forked.
    """
    _checks.choice("mode", mode, ("stdout", "dicts"))
    found: dict[str, Any] = {
        "version": __version__,
        "isa": engine.isa(),
        "available_isas": engine.available_isas(),
        "products": engine.products(),
        "threads": get_num_threads(),
        "openmp": engine.has_openmp(),
        "forked": engine.forked(),
    }
    if mode == "dicts":
        return found
    isas = " ".join(f"[{name}]" if name == found["isa"] else name for name in found["available_isas"])
    why = "" if found["openmp"] else " (built without OpenMP)"
    why = " (forked child)" if found["openmp"] and found["forked"] else why
    print(f"fastlstm {__version__}")
    print(f"instruction sets: {isas}   (FASTLSTM_ISA forces one)")
    print(f"products: {found['products']}   (set_products, FASTLSTM_PRODUCTS)")
    print(f"threads: {found['threads']}{why}   (set_num_threads, OMP_NUM_THREADS)")
    return None
