/* A barrier for a team that meets once per step: spins a bounded while, then yields the processor. */
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

typedef struct { int waiting, phase; char pad[56]; } fl_barrier;

static inline void fl_barrier_wait(fl_barrier *barrier, int team)
{
    if (team == 1)
        return;
    int phase = __atomic_load_n(&barrier->phase, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&barrier->waiting, 1, __ATOMIC_ACQ_REL) == team) {
        __atomic_store_n(&barrier->waiting, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&barrier->phase, phase + 1, __ATOMIC_RELEASE);
        return;
    }
    for (int spins = 0; __atomic_load_n(&barrier->phase, __ATOMIC_ACQUIRE) == phase;) {
        if (++spins < FL_SPINS)
            FL_PAUSE();
        else
            sched_yield();
    }
}

#endif
