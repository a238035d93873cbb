/* What this machine can run. */
#include "fastlstm.h"

fl_cache_sizes fl_caches = {32 << 10, 1 << 20, 0};

#if defined(__x86_64__)
#include <cpuid.h>

/* The register state that the operating system saves (XCR0). */
static unsigned long long saved_state(void)
{
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (unsigned long long) high << 32 | low;
}

/* AMD's do: see STRETCH in kernels.c. */
int fl_l2_feeds(void)
{
    unsigned a, b, c, d;
    return __get_cpuid(0, &a, &b, &c, &d) && b == signature_AMD_ebx;
}

int fl_isa_count(void)
{
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE) || !(c & bit_AVX) || !(c & bit_FMA))
        return 1;
    unsigned long long state = saved_state();
    if ((state & 0x6) != 0x6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & bit_AVX2)) /* XMM and YMM */
        return 1;
#if defined(FL_EMULATE_AVX512)
    return 3;
#endif
    unsigned wanted = bit_AVX512F | bit_AVX512DQ | bit_AVX512BW | bit_AVX512VL;
    if ((state & 0xe6) != 0xe6 || (b & wanted) != wanted) /* and opmask, upper ZMM, ZMM 16 to 31 */
        return 2;
    return 3;
}

#else

int fl_l2_feeds(void) { return 0; }
int fl_isa_count(void) { return 1; }

#endif
