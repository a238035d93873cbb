"""How a call runs: the team of threads."""
from .process cimport Watch
from .weights cimport weights_t

ctypedef void (*Work)(void *of, ptrdiff_t part, ptrdiff_t parts) noexcept nogil

cdef void run_team(Work work, void *of, int team, Watch *watch) noexcept nogil
cdef object start(Work work, void *of, int team, bint meets, bint blas, Watch *watch)
cdef tuple choose(Py_ssize_t T, Py_ssize_t N, Py_ssize_t D, Py_ssize_t H, int columns, Py_ssize_t item, int directions,
                  threads, Py_ssize_t blocks, bint blas)
cdef Py_ssize_t least_blocks(const weights_t *w) noexcept
