# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""How a call runs: the plan, and the team of threads. OpenMP is only here."""
from cython.parallel cimport parallel, threadid
from libc.string cimport memset

from .barrier cimport fl_barrier, fl_barrier_wait
from .blas cimport (blas_input_gradient, blas_memory, blas_weight_gradients, hold, input_product,
                    let_go)
from .memory cimport Buffer, bind
from .products cimport chunk_rows, input_gradient, product_memory, weight_gradients
from .recurrence cimport (Share, carry_back, carry_rows, copy_rows, last_states)
from .rows cimport cut, rows_t
from .run cimport Run, run_t
from .weights cimport pack_share

from .memory import empty

cdef extern from "clock.h" nogil:
    long fl_switches()
    double fl_now()
    double fl_get(const double *time)
    void fl_put(double *time, double value)

cdef extern from *:
    """
    #ifdef _OPENMP
    #include <omp.h>
    #define FL_OPENMP 1
    #else
    #define omp_get_num_threads() 1
    #define FL_OPENMP 0
    #endif
    """
    int FL_OPENMP
    int omp_get_num_threads() nogil

cdef extern from "fork.h":
    int fl_forked
    void fl_watch_fork()
    void fl_has_team() nogil
    int fl_count(int by)

fl_watch_fork()
cdef int MAX_TEAM = 256

# The constants of a call. They travel in its job.
cdef struct Tuning:
    # Sequences that a thread carries through time together: their states and one panel fit the L2 cache, and fewer read the
    # weights more often (python benchmarks/tune.py row_block: best at 1024 units, level below).
    ptrdiff_t row_block
    # Rows that the products over all rows take at a time (python benchmarks/tune.py chunk: level from 256 to 2048).
    ptrdiff_t chunk
    # Rows that x W_ih by BLAS takes at a time at inference.
    ptrdiff_t blas_rows
    # See plan().
    ptrdiff_t x_chunk
    ptrdiff_t units_rows            # rows per thread below which a team shares the units
    ptrdiff_t units_rows_large      # the same for large weights
    double large_weights            # bytes
    double crowd                    # see start()

cdef Tuning tuning
tuning.row_block, tuning.chunk, tuning.blas_rows, tuning.x_chunk = 96, 512, 4096, 64
tuning.units_rows, tuning.units_rows_large, tuning.large_weights = 4, 16, 8e6
tuning.crowd = 2


def tune(row_block=None, chunk=None, x_chunk=None, units_rows=None, units_rows_large=None, crowd=None):
    """Set the constants for a measurement (benchmarks/tune.py) or a test; returns all of them."""
    tuning.row_block = row_block or tuning.row_block
    tuning.chunk = chunk or tuning.chunk
    tuning.x_chunk = tuning.x_chunk if x_chunk is None else x_chunk
    tuning.units_rows = tuning.units_rows if units_rows is None else units_rows
    tuning.units_rows_large = tuning.units_rows_large if units_rows_large is None else units_rows_large
    tuning.crowd = tuning.crowd if crowd is None else crowd
    return {"row_block": tuning.row_block, "chunk": tuning.chunk, "x_chunk": tuning.x_chunk,
            "units_rows": tuning.units_rows, "units_rows_large": tuning.units_rows_large, "crowd": tuning.crowd}


def has_openmp():
    return bool(FL_OPENMP)


def forked():
    """True in a forked child whose parent had run a team, where OpenMP cannot be used."""
    return bool(fl_forked)


# ---- a call ------------------------------------------------------------------------------------------------------------

cdef struct Job:
    const run_t *runs[2]
    int count, team
    bint backward, by_units, blas
    ptrdiff_t ahead                 # rows of W x that are computed ahead
    char *memory
    Tuning tuning
    fl_barrier barrier


cdef void carry(Job *job, const run_t *run, ptrdiff_t j, ptrdiff_t begin, ptrdiff_t end, ptrdiff_t part,
                ptrdiff_t parts) noexcept nogil:
    """A thread's part of run j, in blocks of sequences that go through the steps [begin, end) together."""
    cdef Share share
    cdef ptrdiff_t r0 = 0, r1 = run.rows.N, high
    cdef bint whole = job.by_units or job.ahead
    share.part, share.parts = 0, 1
    if job.by_units:
        share.part, share.parts = part, parts
    else:                             # the sequences of both directions stand in one line, cut into equal shares
        r0 = cut(run.rows, min(max(job.count * part - j * parts, 0), parts), parts)
        r1 = cut(run.rows, min(max(job.count * (part + 1) - j * parts, 0), parts), parts)
    while r0 < r1:
        high = r1 if whole else min(r1, r0 + job.tuning.row_block)
        if job.backward:
            carry_back(run, begin, end, r0, high, share, &job.barrier)
        else:
            carry_rows(run, begin, end, r0, high, share, &job.barrier, job.ahead)
        r0 = high


cdef void gradients(Job *job, ptrdiff_t begin, ptrdiff_t end, ptrdiff_t part, ptrdiff_t parts) noexcept nogil:
    """The products over the rows of the steps [begin, end), counted in the order of each direction's backward pass."""
    cdef const rows_t *rows = job.runs[0].rows
    cdef const run_t *run
    cdef ptrdiff_t j, low, high, met
    cdef bint add = job.runs[0].add_dx      # of the second direction it says what happens where it is alone
    for j in range(job.count):
        run = job.runs[j]
        low = begin if run.reverse else rows.T - end
        high = end if run.reverse else rows.T - begin
        if job.blas:
            blas_weight_gradients(run, job.memory, job.tuning.chunk, rows.offset[low], rows.offset[high], part, parts,
                                  &job.barrier)
        else:
            weight_gradients(run, job.memory, job.tuning.chunk, rows.offset[low], rows.offset[high], part, parts,
                             &job.barrier)
        if not run.dx.p:
            continue
        # The directions come from both ends: which of them reaches a step second adds to what is there.
        met = high if job.count == 1 else begin if j == 0 else rows.T - end
        met = max(low, min(met, high))
        if job.blas:
            blas_input_gradient(run, low, met, add or j == 0 and job.count == 2, part, parts)
            blas_input_gradient(run, met, high, add or j == 1, part, parts)
        else:
            input_gradient(run, low, met, add or j == 0 and job.count == 2, job.tuning.row_block, part, parts)
            input_gradient(run, met, high, add or j == 1, job.tuning.row_block, part, parts)


cdef void inputs(Job *job, ptrdiff_t begin, ptrdiff_t end, ptrdiff_t part, ptrdiff_t parts) noexcept nogil:
    """b + W_ih x by BLAS for the rows of the steps [begin, end)."""
    cdef const rows_t *rows = job.runs[0].rows
    cdef const run_t *run
    cdef ptrdiff_t j, low, high
    for j in range(job.count):
        run = job.runs[j]
        low = rows.offset[rows.T - end if run.reverse else begin]
        high = rows.offset[rows.T - begin if run.reverse else end]
        input_product(run, low, high, low if run.tape else 0, part, parts)


cdef void work(Job *job, ptrdiff_t part, ptrdiff_t parts) noexcept nogil:
    """What one thread does. Backward goes window by window of about chunk_rows() rows, so that the products find the gates'
    gradients in the cache; so does forward by BLAS, of blas_rows."""
    cdef const run_t *run
    cdef const rows_t *rows = job.runs[0].rows
    cdef ptrdiff_t j, begin = 0, end = rows.T, size = job.tuning.blas_rows
    if job.backward:
        size = chunk_rows(job.tuning.chunk, job.runs[0].item)
    for j in range(job.count):
        run = job.runs[j]
        if job.backward:
            pack_share(run.w.k, run.tasks, run.task_count, part, parts)
        else:
            pack_share(run.w.k, run.w.tasks, run.w.task_count, part, parts)
    if job.backward or job.runs[0].w.task_count:
        fl_barrier_wait(&job.barrier, <int> parts)
    while begin < rows.T:
        if job.backward or job.blas:
            end = begin + 1
            while end < rows.T and (end + 1 - begin) * rows.N <= size:
                end += 1
        if job.blas and not job.backward:
            inputs(job, begin, end, part, parts)
            fl_barrier_wait(&job.barrier, <int> parts)
        for j in range(job.count):
            carry(job, job.runs[j], j, begin, end, part, parts)
        if job.backward or job.blas:
            fl_barrier_wait(&job.barrier, <int> parts)
        if job.backward:
            gradients(job, begin, end, part, parts)
        begin = end


cdef void run_team(Job *job) noexcept nogil:
    if job.team == 1:
        work(job, 0, 1)
    else:
        fl_has_team()
        with parallel(num_threads=job.team):
            work(job, threadid(), omp_get_num_threads())


cdef bint small(double rows, double D, double H, double columns) noexcept nogil:
    """A team costs about 5 us to start: as one core takes for 5e5 operations, so 1e6 is the break-even."""
    return 2 * columns * H * (D + H) * rows < 1e6


def plan(Py_ssize_t T, Py_ssize_t N, Py_ssize_t D, Py_ssize_t H, int columns, int item, int directions, int threads,
         Py_ssize_t blocks):
    """How a call runs: (team, by_units, ahead).

    team: threads. by_units: they share the units and meet at every step, instead of each carrying its own sequences.
    ahead: rows of W x that are computed ahead, with the weights read once; 0: x and h in one product. Neither changes a
    bit. blocks: blocks of units of the pass that has the fewest. x_chunk, units_rows and units_rows_large by `python
    benchmarks/tune.py x_chunk units_rows units_rows_large` on two cores of an EPYC with AVX-512 and 1 MB of L2; the other
    limits lie between the shapes of those runs where the choice turned.
    """
    cdef double weights = columns * <double> H * (D + H) * item
    cdef bint large = weights > tuning.large_weights
    if small(T * N * directions, D, H, columns):
        threads = 1
    # With fewer than four rows a thread waits for weights, not for arithmetic: two threads that read half of them each are
    # faster than two that read all (2 rows of 256 units: 154 against 75 GFLOP/s). Weights beyond the caches make this so
    # for more rows (16 rows of 1024 units: 180 against 140). Below 128 units the meeting at every step costs more.
    by_units = threads > 1 and H >= 128 and (
        directions * N < (tuning.units_rows_large if large else tuning.units_rows) * min(threads, blocks))
    if by_units:
        threads = min(threads, blocks)
    elif threads > 1:
        threads = min(threads, max(1, directions * N))
    # W x ahead pays where its weights are read from far away for few rows: 1 row of 256 units 40 -> 55 GFLOP/s, 16 rows
    # of 1024 units 81 -> 95; 4 rows of 256 units 96 -> 89. It needs all sequences in one thread's hands.
    ahead = 0
    if tuning.x_chunk and (by_units or threads == 1) and T > 1 and D >= 16 and N <= (20 if large else 2):
        ahead = max(tuning.x_chunk, N)
    return threads, by_units, ahead


cdef Job prepare(list runs, threads, bint backward) except *:
    cdef Job job
    cdef Run run = runs[0]
    cdef ptrdiff_t blocks = run.s.back[0].panel.blocks if backward else run.s.w.passes[0].panel.blocks
    cdef int i, columns = min(run.s.w.gate_columns, 4)
    cdef ptrdiff_t rows = run.s.rows.T * run.s.rows.N * len(runs)
    memset(&job, 0, sizeof(Job))
    job.count, job.backward, job.tuning = <int> len(runs), backward, tuning
    for i in range(1, 0 if backward else run.s.w.cell.passes):
        if not run.s.w.passes[i].whole:
            blocks = min(blocks, run.s.w.passes[i].panel.blocks)
    if fl_forked or small(rows, run.s.D, run.s.H, columns):
        threads = 1
    elif callable(threads):
        threads = threads()
    job.team, job.by_units, job.ahead = plan(run.s.rows.T, run.s.rows.N, run.s.D, run.s.H, columns, run.s.item, job.count,
                                             min(threads, MAX_TEAM), blocks)
    job.blas = run.s.w.blas
    if job.by_units and job.team > 1 and tuning.crowd > 0 and fl_now() < fl_get(&crowded_until):
        job.team, job.by_units, job.ahead = plan(run.s.rows.T, run.s.rows.N, run.s.D, run.s.H, columns, run.s.item,
                                                 job.count, 1, blocks)
    if job.blas:                        # the rows are shared out, never the units
        job.team, job.by_units = min(job.team, max(1, job.count * run.s.rows.N)), False
    if backward or job.blas or not run.s.w.plain:
        job.ahead = 0
    for i in range(job.count):
        run = runs[i]
        job.runs[i] = &run.s
    return job


cdef double crowded_until, crowded_for = 0.1


def calls():
    """How many calls are under way in this process."""
    return fl_count(0)


def crowded():
    """Whether teams that meet at every step stay one thread for now, see start()."""
    return fl_now() < fl_get(&crowded_until)


cdef object start(Job *job):
    """Run a call, and see whether its team had the processors that it wanted.

    A team that meets at every step stands still whenever one of its threads has no processor: two processes of two threads
    on two processors fell to a tenth. So where it had to leave its processors more than tuning.crowd times a millisecond,
    such calls run on one thread for a tenth of a second, and longer if it is no better then, up to two seconds. Other
    threads of this process that compute count as others, too.
    """
    cdef bint watch = job.by_units and job.team > 1
    cdef long switches = fl_switches() if watch else 0
    cdef double begin = fl_now() if watch else 0, end
    if job.blas:
        hold()
    fl_count(1)
    try:
        with nogil:
            run_team(job)
    finally:
        fl_count(-1)
        if job.blas:
            let_go()
    if watch:
        end = fl_now()
        if tuning.crowd > 0 and fl_switches() - switches > 2 + tuning.crowd * 1e3 * (end - begin):
            fl_put(&crowded_until, end + fl_get(&crowded_for))
            fl_put(&crowded_for, min(2 * fl_get(&crowded_for), 2))
        else:
            fl_put(&crowded_for, 0.1)


def forward(list runs, threads):
    """Carry one layer, its one or two directions, over the rows. threads: how many at most, or a function that says so,
    which is asked where the work may want a team."""
    cdef Job job = prepare(runs, threads, False)
    cdef Run run
    cdef ptrdiff_t rows, width
    workspaces = []
    for run in runs:
        if job.blas:
            run.room_for_products()
        if not run.s.tape and (job.ahead or job.blas or run.s.w.cell.passes > 1):     # sums wait in the gates
            rows, width = max(job.ahead, run.s.rows.N), run.s.w.gate_columns * run.s.H
            if job.blas:
                rows = min(run.s.rows.R, max(rows, tuning.blas_rows))
            gates = empty((rows, width), run.w.dtype)
            workspaces.append(gates)
            run.s.gates = bind(gates, rows, width, run.s.item)
        if not run.s.c.p and run.s.c_n.p != run.s.c_0.p:
            copy_rows(run.s.c_n, 0, run.s.c_0, 0, run.s.rows.N, run.s.C, run.s.item)
    start(&job)
    for run in runs:
        if run.w.s.task_count:      # panels that calls share are packed, and nobody writes to them
            run.w.s.task_count = 0
        with nogil:
            last_states(&run.s)


def workspace(list runs):
    """Memory for `backward` of any of these runs."""
    cdef Run run
    cdef size_t size = 0
    for run in runs:
        size = max(size, <size_t> (run.s.item * (
            blas_memory(&run.s, tuning.chunk) if run.s.w.blas else product_memory(&run.s, tuning.chunk))))
    return Buffer(size)


def backward(list runs, threads, Buffer memory=None):
    """Carry the gradients of one layer back: dx, dh, dc, and the weights' gradients added to."""
    cdef Job job = prepare(runs, threads, True)
    cdef Buffer needed = memory
    if needed is None:
        needed = workspace(runs)
    job.memory = <char *> needed.data
    start(&job)
