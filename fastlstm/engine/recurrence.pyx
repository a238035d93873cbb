# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The two time loops.

Rows [row, row + n) of one step are the sequences [r, r + n). `previous` is the row of r at the step before (in the direction
of the run), -1: there is none, the initial state stands before.
"""
from libc.string cimport memcpy, memset

from .barrier cimport fl_barrier_asked, fl_barrier_wait
from .blas cimport step_product
from .kernels cimport FL_GATE, FL_H, FL_M
from .memory cimport at
from .process cimport look
from .rows cimport rows_t, step_rows
from .run cimport seen

# ---- one step forward --------------------------------------------------------------------------------------------------


cdef inline void use(fl_step *s, const Pass *step, const Panel *panel, Share share) noexcept nogil:
    s.D, s.K, s.H = step.D, step.K, step.H
    s.columns, s.x_columns, s.h_first, s.h_columns = step.columns, step.x_columns, step.h_first, step.h_columns
    s.panels, s.scales = panel.p, step.scales
    s.begin = panel.blocks * share.part // share.parts
    s.end = panel.blocks * (share.part + 1) // share.parts
    s.backwards = share.backwards


cdef inline void run_pass(const run_t *run, const Pass *step, fl_step *s, ptrdiff_t r, Share share) noexcept nogil:
    """The kernel call; a pass over whole rows gets this thread's rows, the others its units."""
    cdef ptrdiff_t low = s.n * share.part // share.parts
    if step.whole:
        step.update(s, low, <int> (s.n * (share.part + 1) // share.parts - low), 0,
                    <int> ((s.H + run.w.k.lanes - 1) // run.w.k.lanes), NULL)
        return
    if run.w.blas:
        step_product(run, step, s, r)
    run.w.run_pass(s, step.update)


cdef void start(const run_t *run, fl_step *s, ptrdiff_t row, ptrdiff_t r, ptrdiff_t n, ptrdiff_t gate_row) noexcept nogil:
    """What all passes of a step have in common."""
    cdef ptrdiff_t item = run.item
    memset(s, 0, sizeof(fl_step))
    s.n = n
    s.gates, s.ldgates = at(run.gates, gate_row, item), run.gates.ld
    s.mask, s.ldmask = at(run.mask, r, item), run.mask.ld
    s.keep_h, s.ldkeep_h = at(run.keep_h, row, item), run.keep_h.ld
    s.keep_c, s.ldkeep_c = at(run.keep_c, row, item), run.keep_c.ld
    s.vectors = run.w.vectors
    s.choices = run.w.choices


cdef inline void previous_state(const run_t *run, fl_step *s, ptrdiff_t r, ptrdiff_t previous) noexcept nogil:
    """h_{t-1} as it is and as the products see it, and c_{t-1}."""
    cdef const Array *h = &run.h_0 if previous < 0 else &run.h
    cdef const Array *h_seen = seen(run, previous)
    cdef ptrdiff_t row = r if previous < 0 else previous
    s.h_prev, s.ldh_prev = at(h[0], row, run.item), h.ld
    s.h_seen, s.ldh_seen = at(h_seen[0], row, run.item), h_seen.ld
    if not run.c.p:                     # inference: updated in place
        s.c_prev, s.ldc_prev = at(run.c_n, r, run.item), run.c_n.ld
    elif previous < 0:
        s.c_prev, s.ldc_prev = at(run.c_0, r, run.item), run.c_0.ld
    else:
        s.c_prev, s.ldc_prev = at(run.c, previous, run.item), run.c.ld


cdef void forward_pass(const run_t *run, int p, ptrdiff_t row, ptrdiff_t r, ptrdiff_t n, ptrdiff_t previous,
                       ptrdiff_t gate_row, bint ready, Share share) noexcept nogil:
    """Pass p of one step: sums = b + W_ih x_t + W_hh h_{t-1}, then the cell's update; the projection h = W_hr m is last.

    ready: the gates hold b + W_ih x_t. A later pass goes on with what the first one left in the gates.
    """
    cdef fl_step s
    cdef const Pass *step = &run.w.passes[p]
    cdef ptrdiff_t item = run.item
    start(run, &s, row, r, n, gate_row)
    use(&s, step, &step.panel, share)
    previous_state(run, &s, r, previous)
    s.tape = run.tape
    s.ahead = (row - previous) * s.ldgates if previous >= 0 else 0
    if run.m.p and p < run.w.pass_count - 1:        # the projection is to come
        s.h, s.ldh = at(run.m, row if run.tape else r, item), run.m.ld
        s.keep_h = NULL
    else:
        s.h, s.ldh = at(run.h, row, item), run.h.ld
        if run.mask.p:
            s.h_masked, s.ldh_masked = at(run.h_masked, row, item), run.h_masked.ld
    if run.c.p:
        s.c, s.ldc = at(run.c, row, item), run.c.ld
    else:
        s.c, s.ldc = at(run.c_n, r, item), run.c_n.ld
    if p == 0 and not ready:
        s.x, s.ldx = at(run.x, row, item), run.x.ld
        s.bias = run.w.bias
    elif step.operand != FL_M and not step.whole:
        s.sums, s.ldsums = <char *> s.gates + step.first * run.H * item, s.ldgates
    if step.operand == FL_H:
        s.h_in, s.ldh_in = s.h_seen, s.ldh_seen
    elif step.operand == FL_M:
        s.h_in, s.ldh_in = at(run.m, row if run.tape else r, item), run.m.ld
    elif not step.whole:
        s.h_in, s.ldh_in = <char *> s.gates + (step.operand - FL_GATE) * run.H * item, s.ldgates
    run_pass(run, step, &s, r, share)


cdef void input_pass(const run_t *run, ptrdiff_t row, ptrdiff_t n, ptrdiff_t gate_row, Share share) noexcept nogil:
    """gates = b + W_ih x for n rows."""
    cdef fl_step s
    cdef const Pass *step = &run.w.passes[0]
    start(run, &s, row, 0, n, gate_row)
    use(&s, step, &step.panel, share)
    s.x, s.ldx = at(run.x, row, run.item), run.x.ld
    s.bias = run.w.bias
    run.w.run_pass(&s, run.w.k.store)


cdef void carry_rows(const run_t *run, ptrdiff_t begin, ptrdiff_t end, ptrdiff_t r0, ptrdiff_t r1, Share share,
                     Watch *watch, ptrdiff_t chunk) noexcept nogil:
    """The time loop for the sequences [r0, r1) and its own steps [begin, end): h_t, c_t = cell(x_t, h_{t-1}, c_{t-1}).

    share: this thread's units, the team meets after every pass. chunk: rows of the gates that take b + W_ih x for several
    steps at once (0: none; else r0, r1 are the whole batch), so that W_ih is read once per chunk. By BLAS the gates hold
    b + W_ih x of all these steps already. Where a signal ends the call it comes back early.
    """
    cdef const rows_t *rows = run.rows
    cdef ptrdiff_t i, j, t, n, m, row, previous, before, T = rows.T, low, high, origin = 0, ready = 0
    cdef ptrdiff_t gate_row
    cdef bint ahead = chunk or run.w.blas
    cdef int p
    if run.w.blas:
        origin = rows.offset[T - end if run.reverse else begin]
    for i in range(begin, end):
        t = T - 1 - i if run.reverse else i
        n = step_rows(rows, t, r0, r1)
        if n == 0:
            continue
        share.backwards = i & 1
        if share.looks:
            look(watch, n * watch.row_work)
        if share.parts == 1 and fl_barrier_asked(&watch.barrier):
            return
        row = rows.offset[t] + r0
        if chunk and i >= ready:
            j = i + 1                   # steps i..j of the loop share the gates' memory
            low, high = rows.offset[t], rows.offset[t + 1]
            while j < T:
                t = T - 1 - j if run.reverse else j
                if max(high, rows.offset[t + 1]) - min(low, rows.offset[t]) > chunk:
                    break
                low, high = min(low, rows.offset[t]), max(high, rows.offset[t + 1])
                j += 1
            t = T - 1 - i if run.reverse else i
            ready, origin = j, low
            input_pass(run, low, high - low, low if run.tape else 0, share)
        gate_row = row if run.tape else row - origin if ahead else r0
        before = t + 1 if run.reverse else t - 1
        m = min(n, step_rows(rows, before, r0, r1))
        previous = rows.offset[before] + r0 if m else -1
        for p in range(run.w.pass_count):
            if m:
                forward_pass(run, p, row, r0, m, previous, gate_row, ahead, share)
            if m < n:
                forward_pass(run, p, row + m, r0 + m, n - m, -1, gate_row + m, ahead, share)
            if share.parts > 1 and fl_barrier_wait(&watch.barrier, <int> share.parts):
                return


# ---- one step backward -------------------------------------------------------------------------------------------------


cdef void backward_pass(const run_t *run, int p, ptrdiff_t row, ptrdiff_t r, ptrdiff_t n, ptrdiff_t previous,
                        ptrdiff_t following, Share share) noexcept nogil:
    """Pass p of one step: the first gathers dh_t = dy_t + W_hh' dG_{t+1} + what goes past the product; with a projection
    the next is dm = W_hr' dp. following: the row of r at the step after, -1: there is none."""
    cdef fl_step s
    cdef const Pass *step = &run.back[p]
    cdef ptrdiff_t item = run.item
    start(run, &s, row, r, n, row)
    use(&s, step, &step.panel, share)
    previous_state(run, &s, r, previous)
    if previous >= 0:
        s.ahead = (previous - row) * s.ldgates
    s.dc, s.lddc = at(run.dc, r, item), run.dc.ld
    if p == 0:
        if following >= 0:
            s.h_in, s.ldh_in = at(run.gates, following, item) + step.first * run.H * item, run.gates.ld
        if run.past or following < 0:
            s.dh_in, s.lddh_in = at(run.dh, r, item), run.dh.ld
        if run.past:
            s.dh_out, s.lddh_out = at(run.dh, r, item), run.dh.ld
        s.dy, s.lddy = at(run.dy, row, item), run.dy.ld
        if run.m.p:
            s.h, s.ldh = at(run.dp, row, item), run.dp.ld
            s.y, s.ldy = at(run.h, row, item), run.h.ld
    elif step.operand == FL_M:
        s.h_in, s.ldh_in = at(run.dp, row, item), run.dp.ld
        s.mask = s.keep_h = NULL
    elif not step.whole:
        s.h_in, s.ldh_in = <char *> s.gates + step.first * run.H * item, s.ldgates
        s.dh_out, s.lddh_out = at(run.dh, r, item), run.dh.ld
    run_pass(run, step, &s, r, share)


cdef void first_state(const run_t *run, ptrdiff_t row, ptrdiff_t r, ptrdiff_t n, Share share) noexcept nogil:
    """dh_0 = W_hh' dG + what went past the product, for the state before the rows [row, row + n)."""
    cdef fl_step s
    cdef const Pass *step = &run.back[0]
    if n <= 0:
        return
    start(run, &s, row, r, n, row)
    use(&s, step, &step.panel, share)
    s.keep_h = NULL
    s.h_in, s.ldh_in = at(run.gates, row, run.item) + step.first * run.H * run.item, run.gates.ld
    s.h, s.ldh = at(run.dh, r, run.item), run.dh.ld
    if run.past:
        s.dh_in, s.lddh_in = s.h, s.ldh
    if run.w.blas:
        step_product(run, step, &s, r)
    run.w.run_pass(&s, run.w.k.linear.backward[0])


cdef void carry_back(const run_t *run, ptrdiff_t begin, ptrdiff_t end, ptrdiff_t r0, ptrdiff_t r1, Share share,
                     Watch *watch) noexcept nogil:
    """The time loop backward for the sequences [r0, r1) and its own steps [begin, end): gates become gradients, and in the
    end dh and dc those of the first states."""
    cdef const rows_t *rows = run.rows
    cdef ptrdiff_t i, t, n, split, row, before, after, has_previous, has_following, T = rows.T
    cdef int p
    for i in range(begin, end):
        t = i if run.reverse else T - 1 - i
        n = step_rows(rows, t, r0, r1)
        if n == 0:
            continue
        share.backwards = i & 1
        if share.looks:
            look(watch, n * watch.row_work)
        if share.parts == 1 and fl_barrier_asked(&watch.barrier):
            return
        row = rows.offset[t] + r0
        before, after = (t + 1, t - 1) if run.reverse else (t - 1, t + 1)
        has_previous = min(n, step_rows(rows, before, r0, r1))
        has_following = min(n, step_rows(rows, after, r0, r1))
        split = min(has_previous, has_following)      # one of the two is n or 0, so this splits the rows at most once
        if split == 0:
            split = max(has_previous, has_following)
        for p in range(run.back_count):
            if split:
                backward_pass(run, p, row, r0, split, rows.offset[before] + r0 if has_previous else -1,
                              rows.offset[after] + r0 if has_following else -1, share)
            if split < n:
                backward_pass(run, p, row + split, r0 + split, n - split,
                              rows.offset[before] + r0 + split if has_previous > split else -1,
                              rows.offset[after] + r0 + split if has_following > split else -1, share)
            if share.parts > 1 and fl_barrier_wait(&watch.barrier, <int> share.parts):
                return
    if end < T:
        return
    if run.reverse:
        for t in range(T):
            n = step_rows(rows, t, r0, r1)
            split = min(n, step_rows(rows, t + 1, r0, r1))
            first_state(run, rows.offset[t] + r0 + split, r0 + split, n - split, share)
    else:
        first_state(run, r0, r0, step_rows(rows, 0, r0, r1), share)


# ---- last states -------------------------------------------------------------------------------------------------------


cdef void copy_rows(Array to, ptrdiff_t i, Array source, ptrdiff_t j, ptrdiff_t n, ptrdiff_t width,
                    ptrdiff_t item) noexcept nogil:
    cdef ptrdiff_t r
    for r in range(n):
        memcpy(at(to, i + r, item), at(source, j + r, item), width * item)


cdef void last_rows(const run_t *run, Array to, Array source, Array first, ptrdiff_t width) noexcept nogil:
    """The state of every sequence after its last valid step."""
    cdef const rows_t *rows = run.rows
    cdef ptrdiff_t t, n, m
    n = rows.active[0] if rows.T else 0
    copy_rows(to, n, first, n, rows.N - n, width, run.item)
    if run.reverse:
        copy_rows(to, 0, source, 0, n, width, run.item)
        return
    for t in range(rows.T):
        n, m = rows.active[t], rows.active[t + 1] if t + 1 < rows.T else 0
        copy_rows(to, m, source, rows.offset[t] + m, n - m, width, run.item)


cdef void last_states(const run_t *run) noexcept nogil:
    last_rows(run, run.h_n, run.h, run.h_0, run.P)
    if run.c.p:
        last_rows(run, run.c_n, run.c, run.c_0, run.C)
