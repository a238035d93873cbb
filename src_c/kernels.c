/* The ISA matrix: one block per ISA, each instantiates the templates for float and double.
 *
 *   ISA            suffix of the functions        TARGET         attribute that lets the compiler use the ISA
 *   ISA_NAME       its public name                VECTOR_BYTES   vector length
 *   ROWS           rows of the step tile: ROWS x 4 sums, a value a row or 4 weights, and one more must fit the registers
 *   REGISTERS      of vectors, where gcc must be told to keep weights in them (HOLD in panel.h); 0: it need not
 *   STRETCH(tiles) bytes of a panel that all tiles go through before the next ones
 *
 * STRETCH, GFLOP/s of an LSTM's step alone, 16 x 512 / 64 x 512 / 96 x 256 (rows x units), a Xeon with 48 KB and 2 MB of
 * cache, panels whole, then in stretches of 16, 32, 64, 128 KB. AVX2 reads 21 bytes of weights a cycle, which only the L1
 * cache gives it: 67, 81, 81, 66, 67 / 69, 86, 86, 71, 73 / 72, 85, 85, 72, 74. AVX-512 has them from the L2 in time, where
 * they are: with 16 rows of 1024 units 147, 170, 170, 159, 160, and with four times as many x 82, 155, 155, 146, 143; with
 * 64 rows of 512 units 186, 176, 181, 181, 186. SSE2 is level. A Zen 4 (32 KB, 1 MB) wants panels whole while they fit the
 * L2 with the next one: 25 steps of 16 x 1024 in stretches of 14, 128, 256 KB, whole, 82, 95, 95, 95 with AVX2, 94, 93, 102,
 * 102 with AVX-512. `python benchmarks/tune.py l1 l2` measures whole calls.
 */
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cells.h"
#include "fastlstm.h"

#define INLINE static inline __attribute__((always_inline, unused)) TARGET
#define NOINLINE __attribute__((noinline))
#define JOIN_(x, type, isa) x##_##type##_##isa
#define JOIN(x, type, isa) JOIN_(x, type, isa)

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif

#if defined(__clang__)
#pragma clang diagnostic ignored "-Wpsabi"
#else
#pragma GCC diagnostic ignored "-Wpsabi" /* vectors are only ever passed to inlined functions */
#endif

#define NO_LIMIT __builtin_inf()
#define PLAIN(kind) {kind, 0, 0, NO_LIMIT, 0, 0}
static const fl_choices defaults = {PLAIN(FL_TANH), PLAIN(FL_TANH), PLAIN(FL_SIGMOID), NO_LIMIT, NO_LIMIT, 1e-5};

#define FEW (ROWS / 2) /* rows with which two panels go at a time */

/* x-86 SSE2, AArch64 NEON, or whatever the compiler makes of 16-byte vectors. */
#define ISA baseline
#define ISA_NAME "baseline"
#define TARGET
#define VECTOR_BYTES 16
#if defined(__aarch64__)
#define ROWS 6
#else
#define ROWS 3
#endif
#define REGISTERS 0
#define STRETCH(tiles) (fl_caches.l2 / 8)
#include "instantiate.h"
#undef ISA
#undef ISA_NAME
#undef TARGET
#undef VECTOR_BYTES
#undef ROWS
#undef REGISTERS
#undef STRETCH

#if defined(__x86_64__)

#define ISA avx2
#define ISA_NAME "avx2"
#define TARGET __attribute__((target("avx2,fma")))
#define VECTOR_BYTES 32
#define ROWS 3
#define REGISTERS 16
#define STRETCH(tiles) (fl_caches.l2_feeds ? fl_caches.l2 / 4 : fl_caches.l1 / 16 * 7)
#include "instantiate.h"
#undef ISA
#undef ISA_NAME
#undef TARGET
#undef VECTOR_BYTES
#undef ROWS
#undef REGISTERS
#undef STRETCH

#define ISA avx512
#define ISA_NAME "avx512"
#if defined(FL_EMULATE_AVX512) /* the same code with the instructions of AVX2, to test it where there is no AVX-512 */
#define TARGET __attribute__((target("avx2,fma")))
#define REGISTERS 0
#else
#define REGISTERS 32
#define TARGET __attribute__((target("avx2,fma,avx512f,avx512dq,avx512bw,avx512vl")))
#endif
#define VECTOR_BYTES 64
#define ROWS 6
#define STRETCH(tiles) \
    (fl_caches.l2_feeds ? fl_caches.l2 / 4 : (tiles) <= 4 ? fl_caches.l1 / 3 * 2 : fl_caches.l2 / 8)
#include "instantiate.h"
#undef ISA
#undef ISA_NAME
#undef TARGET
#undef VECTOR_BYTES
#undef ROWS
#undef REGISTERS
#undef STRETCH

#endif

/* Weakest first; cpu.c says how many of them this machine can run. */
static const fl_kernels *const kernels[][2] = {
    {&kernels_f32_baseline, &kernels_f64_baseline},
#if defined(__x86_64__)
    {&kernels_f32_avx2, &kernels_f64_avx2},
    {&kernels_f32_avx512, &kernels_f64_avx512},
#endif
};

const fl_kernels *fl_kernels_for(int i, int is_double) { return kernels[i][is_double]; }
const char *fl_isa_name(int i) { return kernels[i][0]->isa; }

#define DESCRIPTOR(cell) cell##_CELL,
const fl_cell fl_cells[] = {CELLS(DESCRIPTOR)};
const int fl_cell_count = sizeof(fl_cells) / sizeof(fl_cells[0]);
