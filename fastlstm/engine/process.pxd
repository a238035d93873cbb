"""A call and the process around it."""
from .barrier cimport fl_barrier

cdef extern from "control.h" nogil:
    ctypedef unsigned long fl_word
    fl_word FL_OURS
    fl_word fl_get_word()
    void fl_set_word(fl_word word)

cdef struct Watch:              # what the threads of a call share
    fl_barrier barrier
    fl_word word                # the caller's control word
    bint wanted                 # signals are looked for
    double row_work             # operations of a row of a step
    double left                 # operations until the clock is read again
    double next                 # when signals are looked for again
    void *error                 # what a signal's handler raised
    long switches               # see end_meetings()
    double begin

cdef void look(Watch *watch, double work) noexcept nogil
cdef object end_watch(Watch *watch)
cdef bint crowd() noexcept
cdef void begin_meetings(Watch *watch) noexcept
cdef void end_meetings(Watch *watch, double limit) noexcept
cdef int granted(int team) except -1
