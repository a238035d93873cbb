/* Teams that share the units of an LSTM and meet at every step, as in engine/team.pyx, for ThreadSanitizer.
 *
 *     clang-19 -O1 -g -fsanitize=thread -fopenmp -std=gnu11 -Wno-psabi -I src_c tests/race.c src_c/cpu.c -o race -lm
 *     OMP_TOOL_LIBRARIES=/usr/lib/llvm-19/lib/libarcher.so TSAN_OPTIONS=ignore_noninstrumented_modules=1 ./race
 *
 * Debian: clang-19, libomp-19-dev; Archer tells the sanitizer where OpenMP's threads begin and end. Two callers with a team
 * each compute at the same time. The exit status is 66 where the sanitizer speaks, 1 where a bit differs from one thread's.
 */
#include <omp.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "barrier.h"
#include "kernels.c"

enum { T = 60, N = 3, D = 5, H = 150, G = 4 * H, ROUNDS = 20 };

typedef struct {
    const fl_kernels *k;
    ptrdiff_t blocks, stride;
    float *panels, *bias, *x, *w_ih, *w_hh, *b, *h, *c, *gates; /* h, c [T+1][N][H], gates [T][N][G] */
    fl_barrier barrier;
} Job;

static float *numbers(ptrdiff_t count, double scale)
{
    float *p = aligned_alloc(64, (size_t) (count * 4 + 63) / 64 * 64);
    for (ptrdiff_t i = 0; i < count; i++)
        p[i] = (float) (scale * (double) (i * 7919 % 101 - 50) / 50);
    return p;
}

static void prepare(Job *job, int isa)
{
    memset(job, 0, sizeof(*job));
    job->k = fl_kernels_for(isa, 0);
    job->blocks = (H + job->k->lanes - 1) / job->k->lanes, job->stride = (ptrdiff_t) (D + H) * 4 * job->k->lanes;
    job->panels = numbers(job->blocks * job->stride, 0), job->bias = numbers(job->blocks * 4 * job->k->lanes, 0);
    job->x = numbers(T * N * D, 1), job->w_ih = numbers(G * D, 0.4), job->w_hh = numbers(G * H, 0.1), job->b = numbers(G, 0.3);
    job->h = numbers((T + 1) * N * H, 0), job->c = numbers((T + 1) * N * H, 0), job->gates = numbers(T * N * G, 0);
}

static void release(Job *job)
{
    float *const all[] = {job->panels, job->bias, job->x, job->w_ih, job->w_hh, job->b, job->h, job->c, job->gates};
    for (size_t i = 0; i < sizeof(all) / sizeof(*all); i++)
        free(all[i]);
}

/* What one thread of a team does: its share of the packing, then its units of every step. */
static void work(Job *job, int part, int parts)
{
    const fl_kernels *k = job->k;
    const ptrdiff_t begin = job->blocks * part / parts, end = job->blocks * (part + 1) / parts;
    const void *x[4], *h[4], *b[4], *none[4] = {0};
    for (int c = 0; c < 4; c++)
        x[c] = job->w_ih + c * H * D, h[c] = job->w_hh + c * H * H, b[c] = job->b + c * H;
    k->pack(job->panels, x, D, 1, H, D, 4, 1, job->stride, begin, end);
    k->pack(job->panels + D * 4 * k->lanes, h, H, 1, H, H, 4, 1, job->stride, begin, end);
    if (part == 0)
        k->pack_bias(job->bias, b, none, H, 4, job->blocks);
    fl_barrier_wait(&job->barrier, parts);
    for (int t = 0; t < T; t++) {
        fl_step s = {.n = N, .D = D, .K = H, .H = H, .begin = begin, .end = end, .columns = 4, .x_columns = 4,
                     .h_columns = 4, .panels = job->panels, .bias = job->bias, .tape = 1};
        s.x = job->x + t * N * D, s.ldx = D;
        s.h_in = s.h_seen = s.h_prev = job->h + t * N * H, s.ldh_in = s.ldh_seen = s.ldh_prev = H;
        s.c_prev = job->c + t * N * H, s.ldc_prev = H;
        s.h = job->h + (t + 1) * N * H, s.ldh = H, s.c = job->c + (t + 1) * N * H, s.ldc = H;
        s.gates = job->gates + t * N * G, s.ldgates = G;
        k->pass[FL_PLAIN](&s, k->cells[0].forward[0]);
        fl_barrier_wait(&job->barrier, parts);
    }
}

static int team(Job *job, int threads)
{
#pragma omp parallel num_threads(threads)
    work(job, omp_get_thread_num(), omp_get_num_threads());
    return 0;
}

static int differ;

static void *caller(void *given)
{
    int isa = *(int *) given;
    Job one, many;
    for (int round = 0; round < ROUNDS; round++) {
        prepare(&one, isa), prepare(&many, isa);
        work(&one, 0, 1);
        team(&many, 2 + round % 3);
        if (memcmp(one.h, many.h, sizeof(float) * (T + 1) * N * H) || one.h[T * N * H] == 0)
            __atomic_store_n(&differ, 1, __ATOMIC_RELAXED);
        release(&one), release(&many);
    }
    return 0;
}

int main(void)
{
    if (strcmp(fl_cells[0].name, "lstm"))
        return 2;
    for (int isa = 0; isa < fl_isa_count(); isa++) {
        pthread_t other;
        if (pthread_create(&other, 0, caller, &isa))
            return 3;
        caller(&isa);
        pthread_join(other, 0);
        printf("%s: %d teams, %s\n", fl_isa_name(isa), 2 * ROUNDS, differ ? "bits differ" : "the bits of one thread");
        fflush(stdout);
    }
    return differ;
}
