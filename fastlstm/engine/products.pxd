"""Products over all rows: dW, db, dx."""
from .process cimport Watch
from .run cimport run_t

cdef struct Span:               # rows whose operand lies in one piece
    const char *p               # of the first of them
    ptrdiff_t ld, rows

cdef Span span_of(const run_t *run, int operand, ptrdiff_t t, ptrdiff_t row, ptrdiff_t high) noexcept nogil
cdef void vector_gradients(const run_t *run, int c, ptrdiff_t low, ptrdiff_t high, ptrdiff_t first,
                           ptrdiff_t width) noexcept nogil
cdef ptrdiff_t chunk_rows(ptrdiff_t chunk, ptrdiff_t item) noexcept nogil
cdef ptrdiff_t product_memory(const run_t *run, ptrdiff_t chunk) noexcept nogil
cdef ptrdiff_t slice_size(ptrdiff_t rows, ptrdiff_t width) noexcept nogil
cdef void weight_gradients(const run_t *run, char *memory, ptrdiff_t chunk, ptrdiff_t first_row, ptrdiff_t last_row,
                           ptrdiff_t part, ptrdiff_t parts, Watch *watch) noexcept nogil
cdef void input_gradient(const run_t *run, ptrdiff_t begin, ptrdiff_t end, bint add, ptrdiff_t block, ptrdiff_t part,
                         ptrdiff_t parts) noexcept nogil
