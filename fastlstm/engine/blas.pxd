"""The products by BLAS."""
from .kernels cimport fl_step
from .process cimport Watch
from .run cimport run_t
from .weights cimport Pass

cdef object hold()
cdef object let_go()
cdef void input_product(const run_t *run, ptrdiff_t first_row, ptrdiff_t last_row, ptrdiff_t gate_row, ptrdiff_t part,
                        ptrdiff_t parts) noexcept nogil
cdef void step_product(const run_t *run, const Pass *step, fl_step *s, ptrdiff_t r) noexcept nogil
cdef ptrdiff_t blas_memory(const run_t *run, ptrdiff_t chunk) noexcept nogil
cdef void blas_weight_gradients(const run_t *run, char *memory, ptrdiff_t chunk, ptrdiff_t first_row, ptrdiff_t last_row,
                                ptrdiff_t part, ptrdiff_t parts, Watch *watch) noexcept nogil
cdef void blas_input_gradient(const run_t *run, ptrdiff_t begin, ptrdiff_t end, bint add, ptrdiff_t part,
                              ptrdiff_t parts) noexcept nogil
