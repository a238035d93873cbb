/* What this machine can run, and the barrier of a team of threads. */
#include <sched.h>

#include "fastlstm.h"

#if defined(__x86_64__)
#include <cpuid.h>

/* The register state that the operating system saves (XCR0). */
static unsigned long long saved_state(void)
{
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (unsigned long long) high << 32 | low;
}

int fl_isa_count(void)
{
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE) || !(c & bit_AVX) || !(c & bit_FMA))
        return 1;
    unsigned long long state = saved_state();
    if ((state & 0x6) != 0x6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & bit_AVX2)) /* XMM and YMM */
        return 1;
    unsigned wanted = bit_AVX512F | bit_AVX512DQ | bit_AVX512BW | bit_AVX512VL;
    if ((state & 0xe6) != 0xe6 || (b & wanted) != wanted) /* and opmask, upper ZMM, ZMM 16 to 31 */
        return 2;
    return 3;
}

#define PAUSE() __builtin_ia32_pause()

#else

int fl_isa_count(void) { return 1; }

#if defined(__aarch64__)
#define PAUSE() __asm__ volatile("yield")
#else
#define PAUSE() ((void) 0)
#endif

#endif

/* Some tens of microseconds of spinning, longer than a step's imbalance, before the core is given to someone else. */
#define SPINS 2000

void fl_barrier_wait(fl_barrier *barrier, int team)
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
        if (++spins < SPINS)
            PAUSE();
        else
            sched_yield();
    }
}
