/* Time, and how this process fares beside others. */
#ifndef FASTLSTM_CLOCK_H
#define FASTLSTM_CLOCK_H

#include <sys/resource.h>
#include <time.h>

/* How often this process had to leave a processor that it would have gone on using. */
static inline long fl_switches(void)
{
    struct rusage used;
    return getrusage(RUSAGE_SELF, &used) ? 0 : used.ru_nivcsw;
}

/* Seconds of a clock that never goes back. */
static inline double fl_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double) now.tv_sec + 1e-9 * (double) now.tv_nsec;
}

/* A time that threads read and write at the same time. */
static inline double fl_get(const double *time)
{
    double value;
    __atomic_load(time, &value, __ATOMIC_RELAXED);
    return value;
}

static inline void fl_put(double *time, double value) { __atomic_store(time, &value, __ATOMIC_RELAXED); }

#endif
