# The constants of a call. They travel in its job.
cdef struct Tuning:
    # Sequences that a thread carries through time together: their states and one panel fit the L2 cache, and fewer read the
    # weights more often (python benchmarks/tune.py row_block: best at 1024 units, level below).
    ptrdiff_t row_block
    # Rows that the products over all rows take at a time (python benchmarks/tune.py chunk: level from 256 to 2048).
    ptrdiff_t chunk
    # Rows that x W_ih by BLAS takes at a time at inference.
    ptrdiff_t blas_rows
    ptrdiff_t x_chunk               # rows of W x that are computed ahead
    # What plan() weighs against each other, in operations of one core: the time in which it could do so many.
    # All but `cache` are what `python benchmarks/scaling.py` measures and prints in this unit; where the choice turns,
    # `python benchmarks/tune.py start meet near far` shows.
    double start                    # to start a team, for each thread
    double meet                     # to meet once, for each thread, and to wait for the slowest
    double update                   # to update a gate
    double near, far                # to read a weight from the cache, from beyond
    double cache                    # bytes of weights that are near: twice the machine's L2
    double crowd                    # see end_meetings()

cdef Tuning tuning
cdef bint alone(Py_ssize_t T, Py_ssize_t N, Py_ssize_t D, Py_ssize_t H, int columns, int item, int directions) noexcept
