/* Sweeps all floats through exp, sigmoid and tanh of one instruction set, and prints the largest errors. NaNs are left
 * out, and exp is called as the kernels call it: from -87.3 to 87.3.
 *
 *     gcc -O2 -std=gnu11 -ffp-contract=fast -Wno-psabi -I src_c tests/ulp.c src_c/cpu.c -lm -o ulp
 *     ./ulp 0            the weakest instruction set; 1, 2: the next (four to twelve minutes each)
 *     ./ulp 1 1021       every 1021st number
 *
 * The oracle is the C library's double. This is outside of a call, so subnormal results are not flushed: where the true
 * one is below the smallest normal number, ours may be anything up to about that, 0 too. The exit status is 1 where an
 * error reaches 2 units in the last place, a result leaves its range, tanh is not odd to the bit, or a larger argument
 * gives a result that is smaller by 4 units or more.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "kernels.c"

#define BLOCK 4096
#define FLT_TINY 0x1p-126

#define EXP(isa, attribute)                                                        \
    attribute static void exp_##isa(const float *in, float *out)                   \
    {                                                                              \
        const int lanes = sizeof(vec_f32_##isa) / sizeof(float);                   \
        for (int i = 0; i < BLOCK; i += lanes) {                                   \
            vec_f32_##isa s, p;                                                    \
            exp_parts_f32_##isa(load_f32_##isa(in + i), &s, &p);                   \
            store_f32_##isa(out + i, s * p + s);                                   \
        }                                                                          \
    }
EXP(baseline, )
#if defined(__x86_64__)
EXP(avx2, __attribute__((target("avx2,fma"))))
#if defined(FL_EMULATE_AVX512)
EXP(avx512, __attribute__((target("avx2,fma"))))
#else
EXP(avx512, __attribute__((target("avx2,fma,avx512f,avx512dq,avx512bw,avx512vl"))))
#endif
static void (*const exps[])(const float *, float *) = {exp_baseline, exp_avx2, exp_avx512};
#else
static void (*const exps[])(const float *, float *) = {exp_baseline};
#endif

static double units(double difference, double at)
{
    int exponent;
    frexp(fmax(fabs(at), FLT_TINY), &exponent);
    return difference * ldexp(1, 24 - exponent);
}

typedef struct { double ulp, back; float worst; long wrong; float last[2]; long count; } Found;

static double exact(int what, double x) { return what == 0 ? exp(x) : what == 1 ? 1 / (1 + exp(-x)) : tanh(x); }

/* One result; side 1: the arguments fall. */
static void look(Found *f, int what, float x, float y, int side)
{
    double want = exact(what, x);
    f->count++;
    f->wrong += !(what == 2 ? fabsf(y) <= 1 : y >= 0 && (what == 0 || y <= 1));
    if (fabs(want) >= 1.001 * FLT_TINY) {
        double error = units(fabs(y - want), want);
        if (error > f->ulp)
            f->ulp = error, f->worst = x;
        double back = (side ? (double) y - f->last[1] : (double) f->last[0] - y);
        if (f->last[side] == f->last[side] && back > 0)
            f->back = fmax(f->back, units(back, want));
    } else
        f->wrong += fabs(y) > 1.001 * FLT_TINY;
    f->last[side] = y;
}

int main(int argc, char **argv)
{
    static const char *const names[] = {"exp", "sigmoid", "tanh"};
    int isa = argc > 1 ? atoi(argv[1]) : 0, failed = 0;
    uint64_t stride = argc > 2 ? strtoull(argv[2], 0, 10) : 1;
    if (isa >= fl_isa_count() || !stride)
        return 2;
    for (int what = 0; what < 3; what++) {
        Found f = {.last = {NAN, NAN}};
        float x[BLOCK], y[BLOCK], minus[BLOCK], y_minus[BLOCK];
        float limit = what ? INFINITY : 87.3f; /* exp_parts is only called within */
        for (uint64_t bits = 0; bits <= 0x7f800000; bits += stride * BLOCK) {
            int n = 0;
            for (uint64_t b = bits; n < BLOCK; n++, b += stride) {
                union { uint32_t u; float f; } word = {(uint32_t) (b < 0x7f800000 ? b : 0x7f800000)};
                x[n] = fminf(word.f, limit);
                minus[n] = -x[n];
            }
            if (what == 0) {
                exps[isa](x, y);
                exps[isa](minus, y_minus);
            } else {
                const fl_activation act = {what == 1 ? FL_SIGMOID : FL_TANH, 0, 0, INFINITY, 0, 0};
                fl_kernels_for(isa, 0)->map(&act, x, y, BLOCK);
                fl_kernels_for(isa, 0)->map(&act, minus, y_minus, BLOCK);
            }
            for (int i = 0; i < BLOCK; i++) {
                look(&f, what, x[i], y[i], 0);
                look(&f, what, minus[i], y_minus[i], 1);
                f.wrong += what == 2 && (y[i] != -y_minus[i] || signbit(y[i]) == signbit(y_minus[i]));
            }
            if (x[BLOCK - 1] == limit)
                break;
        }
        printf("%s %s: %.4f ulp at %a, steps back by at most %.2f ulp, %ld wrong, %ld numbers\n", fl_isa_name(isa),
               names[what], f.ulp, f.worst, f.back, f.wrong, f.count);
        failed |= f.wrong || f.ulp >= 2 || f.back >= 4;
    }
    return failed;
}
