# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The products by BLAS, at the caller's choice: x W_ih over all rows at once, h W_hh and dG W_hh step by step, dW, db, dx
over all rows. The updates are the cells' own, run as a pass without a product.

SciPy brings the BLAS (scipy.linalg.cython_blas). It is looked for at the first use, so that nobody else pays the import.
"""
import os
from _thread import RLock    # threading would double the import

from cpython.pycapsule cimport PyCapsule_GetName, PyCapsule_GetPointer
from libc.string cimport memcpy, memset

from .barrier cimport fl_barrier_wait
from .kernels cimport FL_H, FL_HR, FL_M, FL_X, fl_term
from .memory cimport at
from .products cimport Span, chunk_rows, span_of, vector_gradients
from .rows cimport step_of
from .run cimport Column, Source
from .weights cimport term_of

ctypedef void (*gemm_t)(char *, char *, int *, int *, int *, void *, const void *, int *, const void *, int *, void *, void *,
                        int *) noexcept nogil

cdef gemm_t sgemm = NULL
cdef gemm_t dgemm = NULL
cdef ptrdiff_t most = 1 << 30          # of a size in one call: BLAS counts in 32 bits

SIGNATURE = "void (char *, char *, int *, int *, int *, {0} *, {0} *, int *, {0} *, int *, {0} *, {0} *, int *)"


cdef gemm_t find(capsules, letter) except NULL:
    capsule = capsules[f"{letter}gemm"]
    cdef const char *name = PyCapsule_GetName(capsule)
    expected = SIGNATURE.format(f"__pyx_t_5scipy_6linalg_11cython_blas_{letter}")
    if name.decode() != expected:
        raise ImportError(f"scipy.linalg.cython_blas: {letter}gemm: expected {expected}, got {name.decode()}")
    return <gemm_t> PyCapsule_GetPointer(capsule, name)


# ---- the choice, and BLAS's own threads ---------------------------------------------------------------------------------

cdef bint chosen = False
_lock = RLock()                         # a signal's handler that comes amid may call a layer too
_held = 0                               # calls under way
_libraries = None                       # SciPy's BLAS, as threadpoolctl knows it
_threads = []                           # what they had before the first of these calls


def find_blas():
    """Look for BLAS, once."""
    global sgemm, dgemm, _libraries
    if sgemm == NULL:
        try:
            from scipy.linalg import cython_blas
            from threadpoolctl import ThreadpoolController
        except ImportError as error:
            raise ImportError("products by BLAS need SciPy and threadpoolctl: python -m pip install scipy threadpoolctl") \
                from error
        found = ThreadpoolController().select(user_api="blas").lib_controllers
        _libraries = [library for library in found if "scipy" in os.path.dirname(library.filepath)] or found
        dgemm = find(cython_blas.__pyx_capi__, "d")
        sgemm = find(cython_blas.__pyx_capi__, "s")


def use_products(name):
    """Choose how the products of the calls that follow are computed: "own" or "blas"."""
    global chosen
    if name not in ("own", "blas"):
        raise ValueError(f"products: expected 'own' or 'blas', got {name!r}")
    if name == "blas":
        find_blas()
    chosen = name == "blas"


def cut_products(size):
    """Rows and terms of a sum in one call of BLAS, and what it was: for the test of the cuts."""
    global most
    before, most = most, size
    return before


def products():
    """The choice: "own" or "blas"."""
    return "blas" if chosen else "own"


cdef object set_threads(counts):
    """As of 3.8 threadpoolctl lets only the thread that first set OpenBLAS's count set it again, and does nothing for
    others. Calls may come from any thread, and the last to end may be another than the first, so that is passed by.
    """
    for library, count in zip(_libraries, counts):
        getattr(library, "_real_set_num_threads", library.set_num_threads)(count)


cdef object hold():
    """Before a call: BLAS works on one thread, since the team shares the work. Calls that overlap count."""
    global _held, _threads
    with _lock:
        _held += 1
        if _held == 1:
            try:
                _threads = []
                _threads = [library.num_threads for library in _libraries]
                set_threads([1] * len(_threads))
            except BaseException:       # a signal's handler raised
                set_threads(_threads)
                _held -= 1
                raise


cdef object let_go():
    """After a call; the last one gives BLAS its threads back."""
    global _held
    with _lock:
        try:
            if _held == 1:
                set_threads(_threads)
        except BaseException:           # a signal's handler raised
            set_threads(_threads)
            raise
        finally:
            _held -= 1


# ---- gemm ---------------------------------------------------------------------------------------------------------------


cdef void gemm(ptrdiff_t item, bint transposed, bint weights_transposed, ptrdiff_t m, ptrdiff_t n, ptrdiff_t k,
               const char *a, ptrdiff_t lda, const char *b, ptrdiff_t ldb, bint add, char *c, ptrdiff_t ldc) noexcept nogil:
    """c [m, n] = op(a) op(b) (+ c), row by row in memory, which is column by column the product of b and a.

    op(a) [m, k] is a, or the transposed of a [k, m]; op(b) [k, n] is b, or the transposed of b [n, k]. m and k are cut
    into pieces that a 32-bit integer counts.
    """
    cdef char ta = b'T' if transposed else b'N'
    cdef char tb = b'T' if weights_transposed else b'N'
    cdef float one = 1, beta
    cdef double done = 1, dbeta
    cdef int rows, columns = <int> n, depth, la = <int> lda, lb = <int> ldb, lc = <int> ldc
    cdef ptrdiff_t i = 0, j
    while i < m:
        rows, j = <int> min(m - i, most), 0
        while j < k or j == 0:
            depth = <int> min(k - j, most)
            beta = dbeta = 1 if add or j else 0
            if item == 4:
                sgemm(&tb, &ta, &columns, &rows, &depth, &one, b + (j if weights_transposed else j * ldb) * item, &lb,
                      a + (j * lda + i if transposed else i * lda + j) * item, &la, &beta, c + i * ldc * item, &lc)
            else:
                dgemm(&tb, &ta, &columns, &rows, &depth, &done, b + (j if weights_transposed else j * ldb) * item, &lb,
                      a + (j * lda + i if transposed else i * lda + j) * item, &la, &dbeta, c + i * ldc * item, &lc)
            j += depth
            if depth == 0:
                break
        i += rows


cdef inline int run_of(const int *rows, int c, int columns) noexcept nogil:
    """How many columns from c on have their rows of the weight one after the other: one product serves them."""
    cdef int n = 1
    while c + n < columns and rows[c + n] == rows[c] + n:
        n += 1
    return n


# ---- forward ------------------------------------------------------------------------------------------------------------


cdef void add_term(const run_t *run, const fl_term *term, ptrdiff_t n, const char *a, ptrdiff_t lda, ptrdiff_t K,
                   char *gates) noexcept nogil:
    """gates [n, G*H] += a [n, K] W' for the columns of a term."""
    cdef ptrdiff_t item = run.item, H = run.H
    cdef int c = 0, width
    while c < term.columns:
        width = run_of(term.rows, c, term.columns)
        gemm(item, False, True, n, width * H, K, a, lda, run.w.weight[term.weight] + term.rows[c] * H * K * item, K, True,
             gates + (term.first + c) * H * item, run.gates.ld)
        c += width


cdef void input_product(const run_t *run, ptrdiff_t first_row, ptrdiff_t last_row, ptrdiff_t gate_row, ptrdiff_t part,
                        ptrdiff_t parts) noexcept nogil:
    """gates = b + x W_ih' for one of `parts` shares of the rows [first_row, last_row), which go to `gate_row` and on."""
    cdef ptrdiff_t n = last_row - first_row, low = n * part // parts, high = n * (part + 1) // parts, r
    cdef ptrdiff_t size = run.w.passes[0].columns * run.H * run.item
    cdef char *gates = at(run.gates, gate_row + low, run.item)
    for r in range(high - low):
        if run.w.bias_row:
            memcpy(gates + r * run.gates.ld * run.item, run.w.bias_row, size)
        else:
            memset(gates + r * run.gates.ld * run.item, 0, size)
    add_term(run, term_of(run.w.cell, 0, FL_X), high - low, at(run.x, first_row + low, run.item), run.x.ld, run.D,
             gates)


cdef void step_product(const run_t *run, const Pass *step, fl_step *s, ptrdiff_t r) noexcept nogil:
    """What the pass would multiply, done beforehand: s.sums are complete and s.panels NULL.

    Forward: the gates take a W' of a term, or the projection m W_hr'. Backward: a product of its own, dG W.
    """
    cdef ptrdiff_t item = run.item
    cdef const fl_term *term
    cdef int c = 0, width
    cdef char *out
    s.panels = NULL
    if step.K == 0 or s.h_in == NULL:
        return
    if not step.back and step.operand != FL_M:
        add_term(run, step.term, s.n, <const char *> s.h_in, s.ldh_in, s.K, <char *> s.gates)
        return
    out = at(run.product, r, item)
    s.sums, s.ldsums = out, run.product.ld
    if step.operand == FL_M:            # W_hr [P, H]
        gemm(item, False, not step.back, s.n, s.H, s.K, <const char *> s.h_in, s.ldh_in, run.w.weight[FL_HR],
             run.H, False, out, run.product.ld)
        return
    term = step.term
    while c < term.columns:
        width = run_of(term.rows, c, term.columns)
        gemm(item, False, False, s.n, s.H, width * run.H, <const char *> s.h_in + c * run.H * item, s.ldh_in,
             run.w.weight[term.weight] + term.rows[c] * run.H * s.H * item, s.H, c > 0, out, run.product.ld)
        c += width


# ---- over all rows ------------------------------------------------------------------------------------------------------


cdef ptrdiff_t blas_memory(const run_t *run, ptrdiff_t chunk) noexcept nogil:
    """Elements of the memory that the team shares: the rows of h_{t-1}."""
    return min(chunk_rows(chunk, run.item), run.rows.R) * run.P


cdef void gather(const run_t *run, char *out, ptrdiff_t low, ptrdiff_t high) noexcept nogil:
    """out [high - low, P] = h_{t-1} of the rows."""
    cdef ptrdiff_t row = low, t = step_of(run.rows, low), r
    cdef Span span
    while row < high:
        while run.rows.offset[t + 1] <= row:
            t += 1
        span = span_of(run, FL_H, t, row, high)
        for r in range(span.rows):
            memcpy(out + (row - low + r) * run.P * run.item, span.p + r * span.ld * run.item, run.P * run.item)
        row += span.rows


cdef void add_bias(const run_t *run, const Column *column, ptrdiff_t low, ptrdiff_t high, ptrdiff_t first,
                   ptrdiff_t width) noexcept nogil:
    """db += sum over the rows of dG."""
    cdef ptrdiff_t row, u
    cdef char *g
    cdef char *db
    cdef int i
    for i in range(2):
        db = column.db_hh if i else column.db_ih
        if db == NULL:
            continue
        for row in range(low, high):
            g = at(column.g, row, run.item) + first * run.item
            if run.item == 4:
                for u in range(width):
                    (<float *> db)[first + u] += (<float *> g)[u]
            else:
                for u in range(width):
                    (<double *> db)[first + u] += (<double *> g)[u]


cdef void blas_weight_gradients(const run_t *run, char *memory, ptrdiff_t chunk, ptrdiff_t first_row, ptrdiff_t last_row,
                                ptrdiff_t part, ptrdiff_t parts, Watch *watch) noexcept nogil:
    """dW += dG' operand, db += sums of dG over the rows [first_row, last_row); a thread has its units of every column."""
    cdef ptrdiff_t item = run.item, size = min(chunk_rows(chunk, item), run.rows.R), low = first_row, n, first, width
    cdef const Source *f
    cdef const Column *column
    cdef const char *a
    cdef ptrdiff_t lda
    cdef Span span
    cdef int c, j
    while low < last_row:
        n = min(size, last_row - low)
        gather(run, memory + n * part // parts * run.P * item, low + n * part // parts, low + n * (part + 1) // parts)
        if fl_barrier_wait(&watch.barrier, <int> parts):
            return
        for c in range(run.column_count):
            column = &run.columns[c]
            first = column.units * part // parts
            width = column.units * (part + 1) // parts - first
            if width == 0:
                continue
            for j in range(run.source_count):
                f = &run.sources[j]
                if not f.first <= c < f.end:
                    continue
                if f.operand == FL_H:
                    a, lda = memory, run.P
                else:
                    span = span_of(run, f.operand, 0, low, low + n)
                    a, lda = span.p, span.ld
                gemm(item, True, False, width, f.width, n, at(column.g, low, item) + first * item, column.g.ld, a, lda, True,
                     f.dw + (f.rows[c - f.first] + first) * f.width * item, f.width)
            add_bias(run, column, low, low + n, first, width)
            vector_gradients(run, c, low, low + n, first, width)
        if fl_barrier_wait(&watch.barrier, <int> parts):
            return
        low += n


cdef void blas_input_gradient(const run_t *run, ptrdiff_t begin, ptrdiff_t end, bint add, ptrdiff_t part,
                              ptrdiff_t parts) noexcept nogil:
    """dx = dG W_ih (+ dx) for a thread's part of the rows of the steps [begin, end)."""
    cdef const fl_term *term = term_of(run.w.cell, 0, FL_X)
    cdef ptrdiff_t row, high, item = run.item
    cdef int c = 0, width
    if begin >= end:
        return
    row, high = run.rows.offset[begin], run.rows.offset[end]
    row, high = row + (high - row) * part // parts, row + (high - row) * (part + 1) // parts
    while c < term.columns and row < high:
        width = run_of(term.rows, c, term.columns)
        gemm(item, False, False, high - row, run.D, width * run.H,
             at(run.gates, row, item) + (term.first + c) * run.H * item, run.gates.ld,
             run.w.weight[term.weight] + term.rows[c] * run.H * run.D * item, run.D, add or c > 0,
             at(run.dx, row, item), run.dx.ld)
        c += width


if os.environ.get("FASTLSTM_PRODUCTS"):
    use_products(os.environ["FASTLSTM_PRODUCTS"])
