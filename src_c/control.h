/* The word that says how a thread computes with floating-point numbers: rounding, subnormals, traps. */
#ifndef FASTLSTM_CONTROL_H
#define FASTLSTM_CONTROL_H

/* FL_OURS: what a call adds to the caller's word. Subnormal numbers count as zero: a state that decays through them would
 * take fifteen times as long (tests/test_control.py). And nothing traps. */
#if defined(__x86_64__)
typedef unsigned fl_word; /* MXCSR, which also collects what happened */
#define FL_OURS 0x9fc0u   /* FTZ, all masks, DAZ */
static inline fl_word fl_get_word(void) { return __builtin_ia32_stmxcsr(); }
static inline void fl_set_word(fl_word word) { __builtin_ia32_ldmxcsr(word); }
#elif defined(__aarch64__)
typedef unsigned long fl_word; /* FPCR */
#define FL_OURS (1ul << 24)    /* FZ */
static inline fl_word fl_get_word(void)
{
    fl_word word;
    __asm__ volatile("mrs %0, fpcr" : "=r"(word));
    return word;
}
static inline void fl_set_word(fl_word word) { __asm__ volatile("msr fpcr, %0" : : "r"(word)); }
#else
typedef int fl_word;
#define FL_OURS 0
static inline fl_word fl_get_word(void) { return 0; }
static inline void fl_set_word(fl_word word) { (void) word; }
#endif

#endif
