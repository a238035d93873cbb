/* Every kernel on buffers that end, or begin, at a page that must not be touched.
 *
 *     gcc -O1 -std=gnu11 -I src_c tests/guard.c src_c/cpu.c -o guard -lm && ./guard
 *
 * Sizes 1 to 65 in each dimension in turn, every instruction set of the machine, float and double, every cell forward and
 * backward, weights as they are, as bfloat16 and as int8. Prints how many kernel calls were made; a touch is a
 * segmentation fault.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "kernels.c"

enum { PLACES = 64, SPACE = 1 << 19 };

static char *places[PLACES];
static int used, from_front;
static size_t item, page;
static long calls;

/* The next buffer of exactly so many elements, filled with small numbers. */
static void *buffer(ptrdiff_t elements)
{
    size_t bytes = elements * item;
    if (used == PLACES || bytes > SPACE)
        exit(3);
    if (!places[used]) {
        char *p = mmap(0, SPACE + 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED || mprotect(p, page, PROT_NONE) || mprotect(p + page + SPACE, page, PROT_NONE))
            exit(4);
        places[used] = p + page;
    }
    char *p = places[used++] + (from_front ? 0 : SPACE - bytes);
    for (ptrdiff_t i = 0; i < elements; i++)
        if (item == 4)
            ((float *) p)[i] = (float) (i % 7 - 3) / 8;
        else
            ((double *) p)[i] = (double) (i % 7 - 3) / 8;
    return p;
}

static const fl_term *term_of(const fl_cell *cell, int pass, int x)
{
    for (int i = 0; i < FL_TERMS; i++)
        if (cell->terms[i].columns && cell->terms[i].pass == pass && (cell->terms[i].operand == FL_X) == x)
            return &cell->terms[i];
    return 0;
}

/* The panels of a step's two operands as words of two bfloat16, or of four int8 with the scales beside, exactly as large. */
static void narrow(const fl_kernels *k, fl_step *s, int type)
{
    const int gated = s->columns > 1, each = type == FL_BF16 ? 2 : 4;
    const ptrdiff_t w1 = (gated ? s->x_columns : FL_COLUMNS) * k->lanes, w2 = (gated ? s->h_columns : FL_COLUMNS) * k->lanes;
    const ptrdiff_t D = (s->D + each - 1) / each, K = (s->K + each - 1) / each;
    const char *wide = s->panels;
    char *out = buffer(s->end * (D * w1 + K * w2)), *scales = buffer(s->end * 2 * FL_COLUMNS * k->lanes);
    s->panels = out, s->scales = scales;
    for (ptrdiff_t b = 0; b < s->end; b++) {
        ptrdiff_t left = s->H - b * k->lanes * (gated ? 1 : FL_COLUMNS), vectors = (left + k->lanes - 1) / k->lanes;
        vectors = vectors < FL_COLUMNS ? vectors : FL_COLUMNS;
        for (int part = 0; part < 2; part++) {
            const ptrdiff_t rows = part ? s->K : s->D;
            const ptrdiff_t width =
                gated ? fl_panel_row(k->lanes, left, part ? s->h_columns : s->x_columns) : vectors * k->lanes;
            if (type == FL_BF16)
                k->to_bf16(out, wide, rows, width);
            else
                k->to_int8(out, scales, wide, rows, width);
            out += (part ? K * w2 : D * w1) * item;
            wide += rows * (part ? w2 : w1) * item;
            scales += FL_COLUMNS * k->lanes * item;
        }
    }
}

static void run(const fl_kernels *k, fl_step *s, fl_update update, int types)
{
    const void *wide = s->panels;
    for (int type = 0; type < types; type++) {
        s->panels = wide;
        if (type)
            narrow(k, s, type);
        k->pass[type](s, update);
        const ptrdiff_t end = s->end;
        s->backwards = 1, s->begin = end / 2; /* as a team shares the blocks */
        k->pass[type](s, update);
        s->end = s->begin, s->begin = 0;
        k->pass[type](s, update);
        s->backwards = 0, s->end = end;
        calls++;
    }
    s->panels = wide;
}

/* All that an update may read or write besides the product, exact in size. */
static void arrays(fl_step *s, const fl_cell *cell, ptrdiff_t n, ptrdiff_t H)
{
    const ptrdiff_t S = (ptrdiff_t) strlen(cell->states) - 1, G = (ptrdiff_t) strlen(cell->columns);
    memset(s, 0, sizeof(*s));
    s->n = n, s->H = H, s->tape = 1;
#define ARRAY(name, width) s->name = buffer(n * (width)), s->ld##name = (width)
    ARRAY(h_seen, H);
    ARRAY(h_prev, H);
    ARRAY(h, H);
    ARRAY(h_masked, H);
    ARRAY(gates, G * H);
    ARRAY(mask, H);
    ARRAY(keep_h, H);
    ARRAY(keep_c, H);
    if (S) {
        ARRAY(c_prev, S * H);
        ARRAY(c, S * H);
        ARRAY(dc, S * H);
    }
    s->vectors = buffer(FL_VECTORS * H);
}

/* A pass over whole rows, without and with a tape. */
static void whole(const fl_kernels *k, fl_step *s, fl_update update)
{
    s->columns = 1;
    for (s->tape = 0; s->tape < 2; s->tape++, calls++)
        update(s, 0, (int) s->n, 0, (int) ((s->H + k->lanes - 1) / k->lanes), 0);
}

static void forward(const fl_kernels *k, int index, int pass, ptrdiff_t n, ptrdiff_t D, ptrdiff_t H)
{
    const fl_cell *cell = &fl_cells[index];
    const fl_term *x = term_of(cell, pass, 1), *h = term_of(cell, pass, 0);
    fl_step step, *s = &step;
    arrays(s, cell, n, H);
    if (!h) {
        whole(k, s, k->cells[index].forward[pass]);
        return;
    }
    int first = x && x->first < h->first ? x->first : h->first, end = h->first + h->columns;
    if (x && x->first + x->columns > end)
        end = x->first + x->columns;
    s->columns = end - first, s->h_first = h->first - first, s->h_columns = h->columns;
    s->x_columns = x ? x->columns : h->columns, s->D = x ? D : 0, s->K = H;
    const int gated = s->columns > 1, w1 = gated ? s->x_columns : FL_COLUMNS, w2 = gated ? s->h_columns : FL_COLUMNS;
    const ptrdiff_t units = gated ? k->lanes : FL_COLUMNS * k->lanes, stride = (s->D * w1 + s->K * w2) * k->lanes;
    s->end = (H + units - 1) / units;
    char *panels = buffer(s->end * stride);
    const void *weights[FL_COLUMNS] = {0}, *biases[FL_COLUMNS] = {0};
    for (int part = 0; part < 2; part++) {
        const fl_term *t = part ? h : x;
        if (!t)
            continue;
        ptrdiff_t K = part ? s->K : s->D;
        for (int c = 0; c < t->columns; c++)
            weights[c] = buffer(H * K), biases[t->first - first + c] = buffer(H);
        k->pack(panels + (part ? s->D * w1 * k->lanes * item : 0), weights, K, 1, H, K, t->columns, gated, stride, 0, s->end);
        calls++;
    }
    const ptrdiff_t blocks = s->end * (gated ? 1 : FL_COLUMNS);
    void *bias = buffer(blocks * s->columns * k->lanes);
    k->pack_bias(bias, biases, biases, H, s->columns, blocks);
    s->panels = panels;
    s->x = x ? buffer(n * D) : 0, s->ldx = D;
    s->h_in = buffer(n * H), s->ldh_in = H;
    if (x)
        s->bias = bias;
    else
        s->sums = (char *) s->gates + first * H * item, s->ldsums = s->ldgates;
    run(k, s, k->cells[index].forward[pass], item == 4 ? FL_WEIGHT_TYPES : 1);
    if (x)
        run(k, s, k->store, 1);
}

static void backward(const fl_kernels *k, int index, int pass, ptrdiff_t n, ptrdiff_t H)
{
    const fl_cell *cell = &fl_cells[index];
    const fl_term *h = term_of(cell, pass, 0);
    const ptrdiff_t G = (ptrdiff_t) strlen(cell->columns), units = FL_COLUMNS * k->lanes;
    fl_step step, *s = &step;
    if (!k->cells[index].backward[pass])
        return;
    arrays(s, cell, n, H);
    ARRAY(dy, H);
    ARRAY(dh_in, H);
    ARRAY(dh_out, H);
    if (!h) {
        whole(k, s, k->cells[index].backward[pass]);
        return;
    }
    s->columns = s->x_columns = s->h_columns = 1, s->K = h->columns * H, s->end = (H + units - 1) / units;
    char *panels = buffer(s->end * s->K * units);
    const void *weights[FL_COLUMNS];
    for (int c = 0; c < h->columns; c++)
        weights[c] = buffer(H * H);
    k->pack(panels, weights, 1, H, H, H, h->columns, 0, s->K * units, 0, s->end);
    s->panels = panels;
    s->h_in = (char *) buffer(n * G * H) + h->first * H * item, s->ldh_in = G * H;
    run(k, s, k->cells[index].backward[pass], 1);
    used = 0;
    arrays(s, cell, n, H);
    ARRAY(dh_in, H);
    ARRAY(dh_out, H);
    s->columns = 1, s->end = (H + units - 1) / units;
    run(k, s, k->cells[index].backward[pass], 1); /* the last step: nothing comes through a product */
}

/* out [J][K] += g' a, as weight_gradients() cuts it. */
static void products(const fl_kernels *k, ptrdiff_t n, ptrdiff_t J, ptrdiff_t K)
{
    const ptrdiff_t strips = (J + k->strip - 1) / k->strip, panels = (K + k->panel - 1) / k->panel;
    char *g = buffer(n * J), *a = buffer(n * K), *out = buffer(J * K), *sum = buffer(J), *sum2 = buffer(J);
    char *cut_g = buffer(strips * n * k->strip), *cut_a = buffer(panels * n * k->panel);
    k->slices(cut_g, n * k->strip, k->strip, n, g + (n - 1) * J * item, -J, J, sum, sum2);
    k->slices(cut_a, n * k->panel, k->panel, n, a, K, K, 0, 0);
    for (ptrdiff_t p = 0; p < panels; p++, calls++)
        k->outer(out + p * k->panel * item, K, J, K - p * k->panel < k->panel ? K - p * k->panel : k->panel, n, cut_g,
                 n * k->strip, cut_a + p * n * k->panel * item);
    k->weigh(buffer(J), J, n, g, J, buffer(n * J), J);
    for (int kind = FL_TANH; kind <= FL_SCALED_TANH; kind++) {
        fl_activation act = {kind, 0.5, 0.5, 1, 0, 0};
        k->map(&act, a, buffer(n * K), n * K);
    }
    calls += 3;
}

static void sizes(const fl_kernels *k, ptrdiff_t n, ptrdiff_t D, ptrdiff_t H)
{
    for (int index = 0; index < fl_cell_count; index++)
        for (int pass = 0; pass < fl_cells[index].passes; pass++) {
            used = 0;
            forward(k, index, pass, n, D, H);
            used = 0;
            backward(k, index, pass, n, H);
        }
    used = 0;
    products(k, n, H, D);
}

int main(void)
{
    page = sysconf(_SC_PAGESIZE);
    for (int isa = 0; isa < fl_isa_count(); isa++)
        for (int is_double = 0; is_double < 2; is_double++)
            for (from_front = 0; from_front < 2; from_front++) {
                const fl_kernels *k = fl_kernels_for(isa, is_double);
                item = is_double ? 8 : 4;
                for (ptrdiff_t size = 1; size <= 65; size++) {
                    fl_caches.l1 = fl_caches.l2 = size % 3 ? 64 << size % 3 * 4 : 1 << 20; /* panels cut, and whole */
                    fl_caches.l2_feeds = size % 2;
                    sizes(k, size, 3, 5);
                    sizes(k, 2, size, k->lanes + 1);
                    sizes(k, 1 + size % 8, 2 + size % 3, size);
                    sizes(k, 1, size, size);
                    if (size % 8 == 1) /* more tiles of rows than take a part of a panel one after the other */
                        sizes(k, 96 + size, 3, 5);
                }
                printf("%s %s, %s: %ld calls\n", k->isa, is_double ? "double" : "float",
                       from_front ? "guarded before" : "guarded behind", calls);
                fflush(stdout);
            }
    return 0;
}
