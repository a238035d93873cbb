"""The two time loops."""
from .memory cimport Array
from .process cimport Watch
from .run cimport run_t
from .weights cimport Pass, Panel
from .kernels cimport fl_step

cdef struct Share:              # of a pass's blocks
    ptrdiff_t part, parts
    bint looks                  # this thread looks for signals
    bint backwards              # from the last block to the first, at every other step

cdef void forward_pass(const run_t *run, int p, ptrdiff_t row, ptrdiff_t r, ptrdiff_t n, ptrdiff_t previous,
                       ptrdiff_t gate_row, bint ready, Share share) noexcept nogil
cdef void carry_rows(const run_t *run, ptrdiff_t begin, ptrdiff_t end, ptrdiff_t r0, ptrdiff_t r1, Share share,
                     Watch *watch, ptrdiff_t chunk) noexcept nogil
cdef void carry_back(const run_t *run, ptrdiff_t begin, ptrdiff_t end, ptrdiff_t r0, ptrdiff_t r1, Share share,
                     Watch *watch) noexcept nogil
cdef void last_states(const run_t *run) noexcept nogil
cdef void copy_rows(Array to, ptrdiff_t i, Array source, ptrdiff_t j, ptrdiff_t n, ptrdiff_t width,
                    ptrdiff_t item) noexcept nogil
