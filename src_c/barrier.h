/* A barrier for a team that meets once per step: spins a bounded while, then yields the processor. A thread may ask the
 * team to leave its work: all learn of it at the same meeting. */
#ifndef FASTLSTM_BARRIER_H
#define FASTLSTM_BARRIER_H

#include <sched.h>

#if defined(__x86_64__)
#define FL_PAUSE() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define FL_PAUSE() __asm__ volatile("yield")
#else
#define FL_PAUSE() ((void) 0)
#endif

/* Some tens of microseconds of spinning, longer than a step's imbalance, before the core is given to someone else. */
#define FL_SPINS 2000

typedef struct { int waiting, phase, asked, agreed; char pad[48]; } fl_barrier;

/* At any time: the team is to leave. */
static inline void fl_barrier_ask(fl_barrier *barrier) { __atomic_store_n(&barrier->asked, 1, __ATOMIC_RELAXED); }

/* Whether someone has asked: what a thread that works alone may go by. */
static inline int fl_barrier_asked(const fl_barrier *barrier)
{
    return __atomic_load_n(&barrier->asked, __ATOMIC_RELAXED);
}

/* Meet; whether the team is to leave, the same answer for all of it, which `agreed` keeps until the next meeting. */
static inline int fl_barrier_wait(fl_barrier *barrier, int team)
{
    if (team == 1)
        return barrier->agreed = fl_barrier_asked(barrier);
    int phase = __atomic_load_n(&barrier->phase, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&barrier->waiting, 1, __ATOMIC_ACQ_REL) == team) {
        barrier->agreed = fl_barrier_asked(barrier);
        __atomic_store_n(&barrier->waiting, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&barrier->phase, phase + 1, __ATOMIC_RELEASE);
        return barrier->agreed;
    }
    for (int spins = 0; __atomic_load_n(&barrier->phase, __ATOMIC_ACQUIRE) == phase;) {
        if (++spins < FL_SPINS)
            FL_PAUSE();
        else
            sched_yield();
    }
    return barrier->agreed;
}

#endif
