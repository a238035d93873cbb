# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The plan of a call, and the constants behind it."""

from .kernels cimport caches, set_caches

from .kernels import cache_size

# On an EPYC (Zen 4) with two threads the choice turned at 4 rows a thread with near weights and at 16 with far ones, which
# are near / 2 and far / 2; below 128 units and one row meetings cost more than they bring.
tuning.row_block, tuning.chunk, tuning.blas_rows, tuning.x_chunk = 96, 512, 4096, 64
tuning.start, tuning.meet, tuning.update, tuning.near, tuning.far = 2.5e5, 5e4, 75, 8, 32
tuning.cache, tuning.crowd = 2 * cache_size(2), 2


def tune(**values):
    """Set the constants for a measurement (benchmarks/tune.py) or a test; returns all of them."""
    global tuning
    cdef dict now = tuning
    now |= caches()
    if unknown := values.keys() - now.keys():
        raise TypeError(f"tune: expected {', '.join(now)}, got {', '.join(sorted(unknown))}")
    now.update(values)
    tuning = now
    set_caches(now)
    return now


cdef double step_cost(double rows, double share, double D, double H, int columns, int item, bint ahead) noexcept:
    """What a thread's share of the units costs it at one step of so many rows: with few of them it waits for weights, not
    for arithmetic. ahead: those of x are not read at every step."""
    cdef double read = tuning.near if columns * H * (D + H) * item * share <= tuning.cache else tuning.far
    cdef double x = max(2 * rows, 0 if ahead else read)
    return columns * H * share * (H * max(2 * rows, read) + D * x + tuning.update * rows)


cdef bint alone(Py_ssize_t T, Py_ssize_t N, Py_ssize_t D, Py_ssize_t H, int columns, int item, int directions) noexcept:
    """Whether no team can be worth its start."""
    return T * directions * step_cost(N, 1, D, H, columns, item, False) <= 2 * tuning.start


def plan(Py_ssize_t T, Py_ssize_t N, Py_ssize_t D, Py_ssize_t H, int columns, int item, int directions, int threads,
         Py_ssize_t blocks):
    """How a call runs: (team, by_units, ahead).

    team: threads. by_units: they share the units and meet at every step, instead of each carrying its own sequences.
    ahead: rows of W x that are computed ahead, with the weights read once; 0: x and h in one product. Neither changes a
    bit. blocks: blocks of units of the pass that has the fewest. The cheapest team is taken, of several the smallest.
    """
    cdef double cost, best
    cdef int n, team = 1
    cdef bint by_units = False, large = columns * <double> H * (D + H) * item > tuning.cache
    # W x ahead pays where its weights are read from far away for few rows: 1 row of 256 units 40 -> 55 GFLOP/s, 16 rows
    # of 1024 units 81 -> 95; 4 rows of 256 units 96 -> 89 (python benchmarks/tune.py x_chunk). It needs all sequences in
    # one thread's hands.
    cdef bint ahead = tuning.x_chunk and T > 1 and D >= 16 and N <= (20 if large else 2)
    best = T * directions * step_cost(N, 1, D, H, columns, item, ahead)
    for n in range(2, threads + 1):
        if n * tuning.start >= best:            # no larger team can be worth it
            break
        # Across the sequences: every thread reads all weights, and the one with the most sequences is the last.
        if n <= directions * N:
            cost = T * step_cost((directions * N + n - 1) // n, 1, D, H, columns, item, False) + n * tuning.start
            if cost < best:
                best, team, by_units = cost, n, False
        # Across the units: a thread reads its own, which may fit its cache where all do not, but has to meet the others.
        if n <= blocks:
            cost = (blocks + n - 1) // n / <double> blocks
            cost = T * directions * (step_cost(N, cost, D, H, columns, item, ahead) + n * tuning.meet) + n * tuning.start
            if cost < best:
                best, team, by_units = cost, n, True
    return team, by_units, tuning.x_chunk if ahead and (by_units or team == 1) else 0
