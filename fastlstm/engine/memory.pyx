# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Aligned memory, kept between calls up to a limit.

Fresh memory costs a page fault per 4 KB, so the blocks of panels, tapes and workspaces that a call gives back wait for the
next: at most `kept_limit` bytes, and none that the last KEPT_CALLS calls did not use.
"""
import os

cimport cython
cimport numpy as cnp
from cpython.object cimport PyTypeObject
from cpython.ref cimport Py_INCREF
from libc.stdint cimport uint64_t

cnp.import_array()

cdef extern from *:
    """
    #include <pthread.h>
    #include <stdint.h>
    #include <stdlib.h>
    #include <string.h>
    #include <sys/mman.h>

    /* Blocks from here on are mapped, at whole huge pages: fresh ones cost a fault per 2 MB, and they really go back. */
    #define FL_LARGE ((size_t) 4 << 20)
    #define FL_HUGE ((size_t) 2 << 20)

    static void *fl_allocate(size_t size)
    {
        void *p;
        if (size < FL_LARGE)
            return posix_memalign(&p, 64, size) ? 0 : p;
        char *mapped = mmap(0, size + FL_HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (mapped == MAP_FAILED)
            return 0;
        size_t before = -(uintptr_t) mapped % FL_HUGE;
        if (before)
            munmap(mapped, before);
        munmap(mapped + before + size, FL_HUGE - before);
    #ifdef MADV_HUGEPAGE
        madvise(mapped + before, size, MADV_HUGEPAGE);
    #endif
        return mapped + before;
    }

    static void fl_free(void *p, size_t size)
    {
        if (size < FL_LARGE)
            free(p);
        else if (p)
            munmap(p, size);
    }

    /* Calls from several threads take and give blocks at the same time, in a free-threaded Python too. */
    static pthread_mutex_t fl_pool = PTHREAD_MUTEX_INITIALIZER;
    static void fl_lock(void) { pthread_mutex_lock(&fl_pool); }
    static void fl_unlock(void) { pthread_mutex_unlock(&fl_pool); }
    static void fl_pool_in_child(void) { pthread_mutex_init(&fl_pool, 0); }
    static void fl_watch_pool(void) { pthread_atfork(fl_lock, fl_unlock, fl_pool_in_child); }

    /* Words of 4 bytes, not always at multiples of 8; where all are wanted two at a time, at 14 GB/s and more. */
    static uint64_t fl_sum(const void *words, ptrdiff_t count, ptrdiff_t stride)
    {
        const char *p = words;
        uint64_t total = 0, two;
        uint32_t one;
        ptrdiff_t i = 0;
        for (; stride == 1 && i + 1 < count; i += 2) {
            memcpy(&two, p + 4 * i, sizeof two);
            total += two;
        }
        for (; i < count; i += stride) {
            memcpy(&one, p + 4 * i, sizeof one);
            total += one;
        }
        return total;
    }
    """
    size_t FL_LARGE
    void *fl_allocate(size_t size) nogil
    void fl_free(void *p, size_t size) nogil
    void fl_lock() nogil
    void fl_unlock() nogil
    void fl_watch_pool()
    uint64_t fl_sum(const void *words, ptrdiff_t count, ptrdiff_t stride) nogil

cdef extern from "numpy/arrayobject.h":
    ctypedef struct PyArray_Descr
    object PyArray_NewFromDescr(PyTypeObject *kind, PyArray_Descr *dtype, int axes, const cnp.npy_intp *sizes,
                                const cnp.npy_intp *strides, void *data, int flags, object made_from)
    int PyArray_SetBaseObject(cnp.ndarray array, object base) except -1

fl_watch_pool()

cdef struct Block:
    void *data              # NULL: a free place
    size_t size
    size_t used             # number of the call that gave it back

cdef enum:
    MOST_AXES = 4
    PLACES = 64
    KEPT_CALLS = 16

cdef Block kept[PLACES]
cdef size_t kept_bytes = 0
cdef size_t kept_limit = 0
cdef size_t calls = 0
cdef size_t taken = 0
cdef size_t failing = 0     # see fail_block()


cdef size_t tenth_of_memory():
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 10
    except (OSError, ValueError):
        return 1 << 30


kept_limit = tenth_of_memory()


cdef void drop(Block *block) noexcept nogil:
    """Under the lock."""
    global kept_bytes
    fl_free(block.data, block.size)
    kept_bytes -= block.size
    block.data = NULL


cdef Block *oldest() noexcept nogil:
    cdef Block *found = NULL
    cdef int i
    for i in range(PLACES):
        if kept[i].data and (found == NULL or kept[i].used < found.used):
            found = &kept[i]
    return found


cdef void *take(size_t *size) noexcept nogil:
    """A block of at least `size` bytes: a kept one, not twice as large, or a fresh one. NULL: there is none."""
    global kept_bytes, taken
    cdef Block *best = NULL
    cdef void *data = NULL
    cdef int i
    fl_lock()
    taken += 1
    if taken == failing:
        fl_unlock()
        return NULL
    for i in range(PLACES):
        if kept[i].data and size[0] <= kept[i].size <= 2 * size[0] + 4096 and (
                best == NULL or kept[i].size < best.size):
            best = &kept[i]
    if best:
        data, size[0] = best.data, best.size
        kept_bytes -= best.size
        best.data = NULL
    fl_unlock()
    return data if data else fl_allocate(size[0])


cdef void give(void *data, size_t size) noexcept nogil:
    global kept_bytes
    cdef Block *place = NULL
    cdef int i
    fl_lock()
    if size <= kept_limit:
        while kept_bytes + size > kept_limit:
            drop(oldest())
        for i in range(PLACES):
            if not kept[i].data:
                place = &kept[i]
                break
        if place == NULL:
            place = oldest()
            drop(place)
        place.data, place.size, place.used = data, size, calls
        kept_bytes += size
    fl_unlock()
    if place == NULL:
        fl_free(data, size)


def begin_call():
    """A call of a layer begins: what the last KEPT_CALLS calls did not use goes back to the system."""
    global calls
    cdef int i
    fl_lock()
    calls += 1
    for i in range(PLACES):
        if kept[i].data and calls - kept[i].used > KEPT_CALLS:
            drop(&kept[i])
    fl_unlock()


cdef void shrink(size_t limit) noexcept nogil:
    fl_lock()
    while kept_bytes > limit:
        drop(oldest())
    fl_unlock()


def release_memory():
    """Give the memory kept between calls back to the system."""
    shrink(0)


def set_memory_kept(nbytes):
    """Keep at most so many bytes; None: a tenth of the machine's memory."""
    global kept_limit
    cdef size_t limit = tenth_of_memory() if nbytes is None else nbytes
    fl_lock()
    kept_limit = limit
    fl_unlock()
    shrink(limit)


def memory_kept():
    """Bytes kept at the moment."""
    fl_lock()
    cdef size_t found = kept_bytes
    fl_unlock()
    return found


def blocks_taken():
    """How many blocks calls have asked for so far, kept ones and fresh ones. For tests."""
    return taken


def fail_block(n):
    """The n-th block from now on is not to be had; 0: all are. For tests."""
    global failing
    failing = taken + n if n else 0


@cython.final
cdef class Buffer:
    """64-byte aligned memory that goes back when the last array on it is gone."""

    def __cinit__(self, size_t size):
        if size > <size_t> -1 // 4:
            raise MemoryError(f"no memory for {size} bytes")
        self.size = max(<size_t> 64, (size + 63) // 64 * 64)
        if self.size >= FL_LARGE:
            self.size = (self.size + 65535) // 65536 * 65536      # whole pages everywhere
        self.data = take(&self.size)
        if not self.data:
            raise MemoryError(f"no memory for {size} bytes")
        self.shape[0] = self.size

    def __dealloc__(self):
        if self.data:
            give(self.data, self.size)

    def __getbuffer__(self, Py_buffer *view, int flags):
        view.buf = self.data
        view.obj, view.len, view.itemsize = self, self.size, 1
        view.readonly, view.ndim, view.format = 0, 1, NULL
        view.shape, view.strides, view.suboffsets, view.internal = self.shape, &view.itemsize, NULL, NULL


def empty(shape, dtype):
    """An uninitialised array on such memory."""
    cdef cnp.npy_intp sizes[MOST_AXES]
    cdef int i, axes = <int> len(shape)
    cdef size_t item = dtype.itemsize
    cdef double size = item             # exact as far as memory goes
    if axes > MOST_AXES:
        raise AssertionError(f"expected at most {MOST_AXES} axes, got {shape}")
    for i in range(axes):
        sizes[i] = shape[i]
        size *= sizes[i]
    if size > <double> (<size_t> -1 // 4):
        raise MemoryError(f"no memory for {size:.0f} bytes")
    cdef Buffer buffer = Buffer(<size_t> size)
    Py_INCREF(dtype)                    # the two calls take a reference each
    array = PyArray_NewFromDescr(<PyTypeObject *> cnp.ndarray, <PyArray_Descr *> dtype, axes, sizes, NULL, buffer.data,
                                 cnp.NPY_ARRAY_CARRAY, None)
    Py_INCREF(buffer)
    PyArray_SetBaseObject(array, buffer)
    return array


def plain(array, cnp.dtype dtype):
    """Whether the kernels can read an array as it is: an ndarray of this type, C-contiguous, aligned."""
    return type(array) is cnp.ndarray and <void *> cnp.PyArray_DESCR(array) == <void *> dtype and (
        cnp.PyArray_ISCARRAY_RO(array))


def sum_of_words(cnp.ndarray flat, Py_ssize_t stride=1):
    """A number that a change of a value changes: the sum of a contiguous array's words, or of every stride-th."""
    return fl_sum(cnp.PyArray_DATA(flat), cnp.PyArray_NBYTES(flat) // 4, stride)


cdef Array bind(object array, Py_ssize_t rows, Py_ssize_t columns, Py_ssize_t item) except *:
    """Memory of a [rows, columns] array whose rows are contiguous."""
    cdef Array a
    a.p, a.ld = NULL, 0
    if array is None:
        return a
    cdef cnp.ndarray x = array
    if x.ndim != 2 or x.shape[0] != rows or x.shape[1] != columns or cnp.PyArray_ITEMSIZE(x) != item or (
            columns > 1 and x.strides[1] != item):
        raise AssertionError(f"expected rows of shape {(rows, columns)}, got {array.shape}, strides {array.strides}")
    a.p, a.ld = x.data, (x.strides[0] if rows > 1 else columns * item) // item
    return a


cdef char *data_of(object array) except? NULL:
    return NULL if array is None else (<cnp.ndarray> array).data
