# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""How a call runs: the team of threads. OpenMP is only here."""
from cython.parallel cimport parallel, threadid
from libc.string cimport memset

from .barrier cimport fl_barrier, fl_barrier_wait
from .blas cimport (blas_input_gradient, blas_memory, blas_weight_gradients, hold, input_product,
                    let_go)
from .memory cimport Buffer, bind
from .planning cimport Tuning, alone, tuning
from .process cimport (FL_OURS, Watch, begin_meetings, crowd, end_meetings, end_watch, fl_get_word,
                       fl_set_word, fl_word, granted)
from .products cimport chunk_rows, input_gradient, product_memory, weight_gradients
from .recurrence cimport (Share, carry_back, carry_rows, copy_rows, last_states)
from .rows cimport cut, rows_t
from .run cimport Run, run_t
from .weights cimport pack_share

from .memory import empty
from .planning import plan

cdef extern from "clock.h" nogil:
    double fl_now()

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

cdef extern from "fork.h" nogil:
    int fl_forked
    void fl_watch_fork()
    void fl_has_team() nogil
    int fl_count(int by)

fl_watch_fork()
cdef int MAX_TEAM = 256


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
    Watch watch


cdef void carry(Job *job, const run_t *run, ptrdiff_t j, ptrdiff_t begin, ptrdiff_t end, ptrdiff_t part,
                ptrdiff_t parts) noexcept nogil:
    """A thread's part of run j, in blocks of sequences that go through the steps [begin, end) together."""
    cdef Share share
    cdef ptrdiff_t r0 = 0, r1 = run.rows.N, high
    cdef bint whole = job.by_units or job.ahead
    share.part, share.parts, share.looks, share.backwards = 0, 1, part == 0, False
    if job.by_units:
        share.part, share.parts = part, parts
    else:                             # the sequences of both directions stand in one line, cut into equal shares
        r0 = cut(run.rows, min(max(job.count * part - j * parts, 0), parts), parts)
        r1 = cut(run.rows, min(max(job.count * (part + 1) - j * parts, 0), parts), parts)
    while r0 < r1:
        high = r1 if whole else min(r1, r0 + job.tuning.row_block)
        if job.backward:
            carry_back(run, begin, end, r0, high, share, &job.watch)
        else:
            carry_rows(run, begin, end, r0, high, share, &job.watch, job.ahead)
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
                                  &job.watch)
        else:
            weight_gradients(run, job.memory, job.tuning.chunk, rows.offset[low], rows.offset[high], part, parts,
                             &job.watch)
        if job.watch.barrier.agreed:
            return
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


cdef void work(void *of, ptrdiff_t part, ptrdiff_t parts) noexcept nogil:
    """What one thread does. Backward goes window by window of about chunk_rows() rows, so that the products find the gates'
    gradients in the cache; so does forward by BLAS, of blas_rows."""
    cdef Job *job = <Job *> of
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
        fl_barrier_wait(&job.watch.barrier, <int> parts)
    while begin < rows.T:
        if job.backward or job.blas:
            end = begin + 1
            while end < rows.T and (end + 1 - begin) * rows.N <= size:
                end += 1
        if job.blas and not job.backward:
            inputs(job, begin, end, part, parts)
            fl_barrier_wait(&job.watch.barrier, <int> parts)
        for j in range(job.count):
            carry(job, job.runs[j], j, begin, end, part, parts)
        if (job.backward or job.blas) and fl_barrier_wait(&job.watch.barrier, <int> parts):
            return
        if job.backward:
            gradients(job, begin, end, part, parts)
            if job.watch.barrier.agreed:
                return
        begin = end


cdef void take_part(Work work, void *of, fl_word word, ptrdiff_t part, ptrdiff_t parts) noexcept nogil:
    """Every thread computes under the caller's control word and ours, and has its own again afterwards."""
    cdef fl_word own = fl_get_word()
    fl_set_word(word | FL_OURS)
    work(of, part, parts)
    fl_set_word(own)


cdef void run_team(Work work, void *of, int team, Watch *watch) noexcept nogil:
    watch.word = fl_get_word()
    if team == 1:
        take_part(work, of, watch.word, 0, 1)
    else:
        fl_has_team()
        with parallel(num_threads=team):
            take_part(work, of, watch.word, threadid(), omp_get_num_threads())


def meet(int threads, int rounds):
    """Start a team that meets so many times and does nothing else. Returns the seconds that it took, all in all."""
    cdef fl_barrier barrier
    cdef double begin = fl_now()
    cdef int i
    memset(&barrier, 0, sizeof(barrier))
    fl_has_team()
    with nogil, parallel(num_threads=1 if fl_forked else min(threads, MAX_TEAM)):
        for i in range(rounds):
            fl_barrier_wait(&barrier, omp_get_num_threads())
    return fl_now() - begin


cdef tuple choose(Py_ssize_t T, Py_ssize_t N, Py_ssize_t D, Py_ssize_t H, int columns, Py_ssize_t item, int directions,
                  threads, Py_ssize_t blocks, bint blas):
    """plan() with what this moment says: whether the process may have a team, which threads it may use and gets, and
    whether others want the processors."""
    if fl_forked or alone(T, N, D, H, columns, item, directions):
        threads = 1
    elif callable(threads):
        threads = threads()
    team, by_units, ahead = plan(T, N, D, H, columns, item, directions, min(threads, MAX_TEAM), blocks)
    if by_units and team > 1 and tuning.crowd > 0 and crowd():
        team, by_units, ahead = plan(T, N, D, H, columns, item, directions, 1, blocks)
    if blas:                            # the rows are shared out, never the units
        team, by_units, ahead = min(team, max(1, directions * N)), False, 0
    return granted(team), by_units, ahead


cdef Py_ssize_t least_blocks(const weights_t *w) noexcept:
    """Blocks of units of the pass forward that has the fewest."""
    cdef Py_ssize_t blocks = w.passes[0].panel.blocks
    cdef int i
    for i in range(1, w.cell.passes):
        if not w.passes[i].whole:
            blocks = min(blocks, w.passes[i].panel.blocks)
    return blocks


cdef Job prepare(list runs, threads, bint backward, bint watched) except *:
    cdef Job job
    cdef Run run = runs[0]
    cdef Py_ssize_t blocks = run.s.back[0].panel.blocks if backward else least_blocks(run.s.w)
    cdef int i
    memset(&job, 0, sizeof(Job))
    job.count, job.backward, job.tuning, job.blas = <int> len(runs), backward, tuning, run.s.w.blas
    job.team, job.by_units, job.ahead = choose(run.s.rows.T, run.s.rows.N, run.s.D, run.s.H, min(run.s.w.gate_columns, 4),
                                               run.s.item, job.count, threads, blocks, job.blas)
    if backward or not run.s.w.plain:
        job.ahead = 0
    for i in range(job.count):
        run = runs[i]
        job.runs[i] = &run.s
    job.watch.wanted = watched
    job.watch.row_work = 2. * run.s.w.gate_columns * run.s.H * (run.s.D + run.s.P)
    return job


def calls():
    """How many calls are under way in this process."""
    return fl_count(0)


cdef object start(Work work, void *of, int team, bint meets, bint blas, Watch *watch):
    """A call: work(of, part, team) by every thread of a team. Raises what a signal's handler raised meanwhile."""
    meets = meets and team > 1
    if meets:
        begin_meetings(watch)
    if blas:
        hold()
    fl_count(1)
    try:
        with nogil:
            run_team(work, of, team, watch)
    finally:
        fl_count(-1)
        if blas:
            let_go()
    if meets:
        end_meetings(watch, tuning.crowd)
    end_watch(watch)


def forward(list runs, threads):
    """Carry one layer, its one or two directions, over the rows. threads: how many at most, or a function that says so,
    which is asked where the work may want a team."""
    cdef Job job = prepare(runs, threads, False, True)
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
    start(work, &job, job.team, job.by_units, job.blas, &job.watch)
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


def backward(list runs, threads, Buffer memory=None, bint watched=False):
    """Carry the gradients of one layer back: dx, dh, dc, and the weights' gradients added to.

    watched: a signal's handler that raises ends the call, and the gradients are partly added.
    """
    cdef Job job = prepare(runs, threads, True, watched)
    cdef Buffer needed = memory
    if needed is None:
        needed = workspace(runs)
    job.memory = <char *> needed.data
    start(work, &job, job.team, job.by_units, job.blas, &job.watch)
