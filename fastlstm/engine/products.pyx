# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Products over all rows: dW += dG' [x, h_prev, ...], db += sums of dG, dx = dG W_ih.

The sums run over the rows in the order of the backward pass, one chain per element that starts from what the gradient
holds, so neither `chunk` nor the threads nor a split of the sequence into windows changes a bit.
"""
from libc.string cimport memset

from .barrier cimport fl_barrier_asked, fl_barrier_wait
from .kernels cimport FL_C, FL_GATE, FL_H, FL_M, FL_VECTORS, FL_X, fl_kernels, fl_step
from .memory cimport Array, at
from .process cimport look
from .rows cimport rows_t, step_of, step_rows
from .run cimport Column, Source, seen


cdef ptrdiff_t chunk_rows(ptrdiff_t chunk, ptrdiff_t item) noexcept nogil:
    """Rows that are cut into strips and panels at a time; of float64 half as many, so that a strip fits the L1 cache."""
    return max(1, chunk * 4 // item)


cdef ptrdiff_t slice_size(ptrdiff_t rows, ptrdiff_t width) noexcept nogil:
    """Elements of a slice. A cache line more than it holds, lest slices of 2^n bytes all fall into the same cache sets."""
    return rows * width + 16


cdef inline ptrdiff_t strips_of(const run_t *run, int column) noexcept nogil:
    return (run.columns[column].units + run.w.k.strip - 1) // run.w.k.strip


cdef inline ptrdiff_t panels_of(const run_t *run, int source) noexcept nogil:
    return (run.sources[source].width + run.w.k.panel - 1) // run.w.k.panel


cdef ptrdiff_t product_memory(const run_t *run, ptrdiff_t chunk) noexcept nogil:
    """Elements of the memory that the team shares."""
    cdef ptrdiff_t total = 0, rows = min(chunk_rows(chunk, run.item), run.rows.R)
    cdef int i
    for i in range(run.source_count):
        total += panels_of(run, i) * slice_size(rows, run.w.k.panel)
    for i in range(run.column_count):
        total += strips_of(run, i) * slice_size(rows, run.w.k.strip)
    return total


# ---- the second factor -------------------------------------------------------------------------------------------------

cdef Span span_of(const run_t *run, int operand, ptrdiff_t t, ptrdiff_t row, ptrdiff_t high) noexcept nogil:
    """The operand of the rows from `row`, a row of step t, as far as it is contiguous, at most to `high`."""
    cdef const rows_t *rows = run.rows
    cdef Span span
    cdef Array a
    cdef ptrdiff_t r, n, before, item = run.item
    if operand == FL_H or operand == FL_C:          # of the step before: the initial state, or rows of this run
        r = row - rows.offset[t]
        before = t + 1 if run.reverse else t - 1
        n = step_rows(rows, before, r, rows.N)
        if n:
            a = seen(run, 0)[0] if operand == FL_H else run.c
            span.p = at(a, rows.offset[before] + r, item)
        else:
            a = seen(run, -1)[0] if operand == FL_H else run.c_0
            span.p = at(a, r, item)
            n = rows.N
        span.rows = min(n, min(high, rows.offset[t + 1]) - row)
    else:
        a = run.x if operand == FL_X else run.m if operand == FL_M else run.gates
        span.p = at(a, row, item)
        if operand >= FL_GATE:
            span.p += (operand - FL_GATE) * run.H * item
        span.rows = high - row
    span.ld = a.ld
    return span


cdef void factor_rows(const run_t *run, int operand, char *out, ptrdiff_t slice_stride, ptrdiff_t low, ptrdiff_t high,
                      ptrdiff_t first, ptrdiff_t columns) noexcept nogil:
    """Panels of rows [low, high) of an operand, its columns from `first` on, in the order of the backward pass."""
    cdef const fl_kernels *k = run.w.k
    cdef ptrdiff_t row = low, t = step_of(run.rows, low), item = run.item
    cdef Span span
    cdef const char *p
    while row < high:
        while run.rows.offset[t + 1] <= row:
            t += 1
        span = span_of(run, operand, t, row, high)
        p = span.p + first * item
        if run.reverse:
            k.slices(out + (row - low) * k.panel * item, slice_stride, k.panel, span.rows, p, span.ld, columns, NULL, NULL)
        else:
            k.slices(out + (high - row - span.rows) * k.panel * item, slice_stride, k.panel, span.rows,
                     p + (span.rows - 1) * span.ld * item, -span.ld, columns, NULL, NULL)
        row += span.rows


# ---- the first factor, the gates' gradients ----------------------------------------------------------------------------


cdef void gate_strips(const run_t *run, const Column *column, char *out, ptrdiff_t slice_stride, ptrdiff_t low,
                      ptrdiff_t n, ptrdiff_t first, ptrdiff_t width) noexcept nogil:
    """Strips of rows [low, low + n) of a column, its units from `first` on; db += sum of its rows."""
    cdef const fl_kernels *k = run.w.k
    cdef ptrdiff_t item = run.item, ld = column.g.ld
    cdef char *g = at(column.g, low, item) + first * item
    if not run.reverse:
        g, ld = g + (n - 1) * ld * item, -ld
    k.slices(out, slice_stride, k.strip, n, g, ld, width, column.db_ih + first * item if column.db_ih else NULL,
             column.db_hh + first * item if column.db_hh else NULL)


cdef void vector_gradients(const run_t *run, int c, ptrdiff_t low, ptrdiff_t high, ptrdiff_t first,
                           ptrdiff_t width) noexcept nogil:
    """dv += sum over the rows of dG[c] * operand, for the per-unit parameters of a column."""
    cdef const fl_kernels *k = run.w.k
    cdef ptrdiff_t item = run.item, ld = run.columns[c].g.ld, t, row, end
    cdef Span span
    cdef char *g
    cdef const char *a
    cdef int v, operand
    for v in range(FL_VECTORS):
        if not run.d_vectors[v] or run.w.cell.vectors[v].column != run.columns[c].gate:
            continue
        operand = run.w.cell.vectors[v].operand
        row, end = low, high
        while row < end:
            t = step_of(run.rows, row if run.reverse else end - 1)
            if not run.reverse:         # the last step first; forward in time all its rows have their state in one piece
                row = max(low, run.rows.offset[t])
            span = span_of(run, operand, t, row, end)
            g, a = at(run.columns[c].g, row, item) + first * item, span.p + first * item
            if run.reverse:
                k.weigh(run.d_vectors[v] + first * item, width, span.rows, g, ld, a, span.ld)
                row += span.rows
            else:
                k.weigh(run.d_vectors[v] + first * item, width, span.rows, g + (span.rows - 1) * ld * item, -ld,
                        a + (span.rows - 1) * span.ld * item, -span.ld)
                row, end = low, row


# ---- the products ------------------------------------------------------------------------------------------------------


cdef void outer_products(const run_t *run, char *memory, char *strips, ptrdiff_t panel, ptrdiff_t strip, ptrdiff_t n,
                         ptrdiff_t s0, ptrdiff_t s1, Watch *watch, bint looks) noexcept nogil:
    """dW += strips' panels over n rows, for the strips [s0, s1) of all columns."""
    cdef const fl_kernels *k = run.w.k
    cdef const Source *f
    cdef ptrdiff_t p = 0, first, base, mine, begin, end, item = run.item
    cdef int j, c
    for j in range(run.source_count):
        f = &run.sources[j]
        first = 0
        while first < f.width:
            if looks:
                look(watch, 2. * n * k.panel * k.strip * (s1 - s0))
            if fl_barrier_asked(&watch.barrier):
                return
            base = 0
            for c in range(run.column_count):
                mine = strips_of(run, c)
                if f.first <= c < f.end:
                    begin, end = max(0, s0 - base), min(mine, s1 - base)
                    k.outer(f.dw + ((f.rows[c - f.first] + begin * k.strip) * f.width + first) * item, f.width,
                            min(end * k.strip, run.columns[c].units) - begin * k.strip, min(k.panel, f.width - first), n,
                            strips + (base + begin) * strip * item, strip, memory + p * panel * item)
                base += mine
            first, p = first + k.panel, p + 1


cdef void weight_gradients(const run_t *run, char *memory, ptrdiff_t chunk, ptrdiff_t first_row, ptrdiff_t last_row,
                           ptrdiff_t part, ptrdiff_t parts, Watch *watch) noexcept nogil:
    """The rows [first_row, last_row): one of `parts` threads computes its strips of gate columns, for all factors. The
    thread of part 0 looks for signals, and where one ends the call all come back early."""
    cdef const fl_kernels *k = run.w.k
    cdef ptrdiff_t item = run.item, R = last_row - first_row, size = min(chunk_rows(chunk, item), run.rows.R)
    cdef ptrdiff_t panel = slice_size(size, k.panel), strip = slice_size(size, k.strip), done = 0, low, n, base, p, end
    cdef ptrdiff_t total = 0, panels = 0, s0, s1, first, width
    cdef char *strips
    cdef int c, j
    for c in range(run.column_count):
        total += strips_of(run, c)
    for j in range(run.source_count):
        panels += panels_of(run, j)
    strips = memory + panels * panel * item
    while done < R:
        n = min(size, R - done)
        low = first_row + done if run.reverse else last_row - done - n
        base = 0                        # panels, shared out one by one
        for j in range(run.source_count):
            p, end = max(0, panels * part // parts - base), min(panels_of(run, j), panels * (part + 1) // parts - base)
            if p < end:
                factor_rows(run, run.sources[j].operand, memory + (base + p) * panel * item, panel, low, low + n,
                            p * k.panel, min(run.sources[j].width, end * k.panel) - p * k.panel)
            base += panels_of(run, j)
        base = 0
        for c in range(run.column_count):   # this thread's strips, and the gradients that are sums of theirs
            s0, s1 = max(0, total * part // parts - base), min(strips_of(run, c), total * (part + 1) // parts - base)
            if s0 < s1:
                first = s0 * k.strip
                width = min(run.columns[c].units, s1 * k.strip) - first
                gate_strips(run, &run.columns[c], strips + (base + s0) * strip * item, strip, low, n, first, width)
                vector_gradients(run, c, low, low + n, first, width)
            base += strips_of(run, c)
        if fl_barrier_wait(&watch.barrier, <int> parts):
            return
        outer_products(run, memory, strips, panel, strip, n, total * part // parts, total * (part + 1) // parts, watch,
                       part == 0)
        if fl_barrier_wait(&watch.barrier, <int> parts):
            return
        done += n


cdef void input_gradient(const run_t *run, ptrdiff_t begin, ptrdiff_t end, bint add, ptrdiff_t block, ptrdiff_t part,
                         ptrdiff_t parts) noexcept nogil:
    """dx = dG W_ih (+ dx) for a thread's part of the rows of the steps [begin, end), `block` rows at a time."""
    cdef fl_step s
    cdef const Source *x = &run.sources[0]
    cdef ptrdiff_t row, high
    if begin >= end:
        return
    row, high = run.rows.offset[begin], run.rows.offset[end]
    row, high = row + (high - row) * part // parts, row + (high - row) * (part + 1) // parts
    while row < high:
        memset(&s, 0, sizeof(fl_step))
        s.n, s.K, s.H = min(block, high - row), (x.end - x.first) * run.H, run.D
        s.columns = s.x_columns = s.h_columns = 1
        s.panels, s.begin, s.end = run.back_x.p, 0, run.back_x.blocks
        s.h_in, s.ldh_in = at(run.gates, row, run.item) + x.first * run.H * run.item, run.gates.ld
        s.h, s.ldh = at(run.dx, row, run.item), run.dx.ld
        if add:
            s.dh_in, s.lddh_in = s.h, s.ldh
        run.w.run_pass(&s, run.w.k.linear.backward[0])
        row += s.n
