"""src_c/barrier.h seen from Cython."""

cdef extern from "barrier.h" nogil:
    ctypedef struct fl_barrier:
        int waiting, phase, asked, agreed
    void fl_barrier_ask(fl_barrier *barrier)
    int fl_barrier_asked(const fl_barrier *barrier)
    int fl_barrier_wait(fl_barrier *barrier, int team)
