# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""A call and the process around it: signals that come meanwhile, threads that the system grants, processors that others
use."""
import os
import threading
import warnings

import numpy as np

from cpython.exc cimport PyErr_CheckSignals
from cpython.ref cimport Py_DECREF, Py_INCREF

from .barrier cimport fl_barrier_ask
from .kernels cimport kernels_of

cdef extern from "clock.h" nogil:
    double fl_now()
    double fl_get(const double *time)
    void fl_put(double *time, double value)
    long fl_switches()

cdef extern from "spare.h" nogil:
    ctypedef unsigned long pthread_t
    int fl_last_team
    int fl_spare_threads(int wanted, pthread_t *threads, int *error)

# Seconds between two looks for signals, and operations between two looks at the clock, which takes 25 ns.
cdef double PERIOD = 0.05, GLANCE = 1e6

# ---- signals -----------------------------------------------------------------------------------------------------------


cdef void look(Watch *watch, double work) noexcept nogil:
    """After so many operations more of the thread that made the call: if it is time, run the handlers of signals. If one
    raises, the team is asked to leave. Handlers are Python's main thread's; another one finds out here that it need not.
    """
    cdef double now
    cdef fl_word ours
    watch.left -= work
    if watch.left > 0 or not watch.wanted:
        return
    watch.left, now = GLANCE, fl_now()
    if watch.next == 0:
        watch.next = now + PERIOD
    elif now >= watch.next:
        ours = fl_get_word()
        fl_set_word(watch.word)
        handle(watch)
        fl_set_word(ours)
        watch.next = fl_now() + PERIOD


cdef void handle(Watch *watch) noexcept with gil:
    try:                                # a handler may come as soon as there is Python to run
        if threading.current_thread() is not threading.main_thread():
            watch.wanted = False
            return
        PyErr_CheckSignals()
    except BaseException as error:
        Py_INCREF(error)
        watch.error, watch.wanted = <void *> error, False
        fl_barrier_ask(&watch.barrier)


cdef object end_watch(Watch *watch):
    """Raise what a handler raised."""
    if watch.error:
        error = <object> watch.error
        Py_DECREF(error)
        watch.error = NULL
        raise error


def vector_bytes():
    """Of the instruction set in use: a measure of its speed."""
    return 4 * kernels_of(np.float32).lanes


def in_turn(list calls, bint watched, list done):
    """Call function(*arguments) for each of `calls`; `done`, an empty list, becomes [False], and [True] at the end.

    Functions of C are not parted by the handlers of signals, unless watched: all of them are called or none.
    """
    done.append(False)
    for function, arguments in calls:
        function(*arguments)
        if watched:
            PyErr_CheckSignals()
    done[0] = True


# ---- threads -----------------------------------------------------------------------------------------------------------

cdef double refused_until
cdef int most


cdef int granted(int team) except -1:
    """How many threads of a team can be had. Asked where this thread's team grows; after a refusal once a second."""
    global refused_until, most, fl_last_team
    cdef pthread_t threads[256]
    cdef int error = 0, count
    if team > fl_last_team:
        if fl_now() < refused_until:
            team = min(team, most)
        count = fl_spare_threads(team - 1, threads, &error)
        if count < team - 1:
            refused_until, most = fl_now() + 1, 1 + count
            warnings.warn(f"fastlstm: a call may use {team} threads, and the system grants {1 + count} "
                          f"({os.strerror(error)}): it uses {1 + count}; set_num_threads asks for fewer, and "
                          f"`ulimit -u` and `ulimit -v` show limits", RuntimeWarning, stacklevel=4)
            team = 1 + count
    if team > 1:
        fl_last_team = team
    return team


# ---- processors --------------------------------------------------------------------------------------------------------

cdef double crowded_until, crowded_for = 0.1


def crowded():
    """Whether teams that meet at every step stay one thread at present, see end_meetings()."""
    return crowd()


cdef bint crowd() noexcept:
    return fl_now() < fl_get(&crowded_until)


cdef void begin_meetings(Watch *watch) noexcept:
    watch.switches, watch.begin = fl_switches(), fl_now()


cdef void end_meetings(Watch *watch, double limit) noexcept:
    """See whether a team had the processors that it wanted.

    A team that meets at every step stands still whenever one of its threads has no processor: two processes of two threads
    on two processors fell to a tenth. So where it had to leave its processors more than `limit` times a millisecond, such
    calls run on one thread for a tenth of a second, and longer if it is no better then, up to two seconds. Other threads of
    this process that compute count as others, too.
    """
    cdef double end = fl_now()
    if limit > 0 and fl_switches() - watch.switches > 2 + limit * 1e3 * (end - watch.begin):
        fl_put(&crowded_until, end + fl_get(&crowded_for))
        fl_put(&crowded_for, min(2 * fl_get(&crowded_for), 2))
    else:
        fl_put(&crowded_for, 0.1)
