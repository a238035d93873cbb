/* sLSTM (Beck et al. 2024, xLSTM): an exponential input gate, a sigmoid or exponential forget gate, a normaliser n and a
 * stabiliser m, which keeps the exponentials in range: c exp(m) and n exp(m) are the paper's sums. A page is one head. The choice `gate` is the forget gate's:
 * a sigmoid, else an exponential; the output gate is a sigmoid. */

#define SLSTM_CELL                                                                                                      \
    {.name = "slstm", .states = "hcnm", .gates = "ifzo", .columns = "ifzos", .passes = 1,                               \
     .terms = {{0, FL_X, 0, 4, FL_IH, {0, 1, 2, 3}}, {0, FL_H, 0, 4, FL_HH, {0, 1, 2, 3}}}}

/* a = W x + R h + b   k = ln sigma(a_f) + m_prev, or a_f + m_prev   m = max(k, a_i), a_i where n_prev = 0
 * i = exp(a_i - m)   f = exp(k - m)   z = act(a_z)   o = sigma(a_o)
 * c = f c_prev + i z   n = f n_prev + i   h~ = o c / n
 * Reads the sums, c_prev; writes c (and n, m beside it), h, and for the tape i, f, z, o, s = dk / da_f. */
UPDATE(slstm_forward)
{
    ONE_VECTOR;
    const int bounded = o->gate.kind == FL_SIGMOID;
    EACH_ROW {
        VEC a_i = SUM(0), a_f = SUM(1), z = ACT(SUM(2)), out = NAME(sigmoid)(SUM(3));
        VEC c_prev = LOAD(AT(c_prev)), n_prev = LOAD(STATE(c_prev, 1));
        VEC k = (bounded ? NAME(log_sigmoid)(a_f) : a_f) + LOAD(STATE(c_prev, 2));
        VEC m = SELECT((UVEC) (k > a_i) & (UVEC) (n_prev != SPLAT(0)), k, a_i);
        VEC in = NAME(exp)(a_i - m), forget = NAME(exp)(k - m);
        VEC c = forget * c_prev + in * z, n = forget * n_prev + in;
        if (s->tape) {
            PREFETCH_GATES(5);
            STORE(GATE(0), in);
            STORE(GATE(1), forget);
            STORE(GATE(2), z);
            STORE(GATE(3), out);
            STORE(GATE(4), bounded ? NAME(sigmoid)(-a_f) : SPLAT(1));
        }
        STORE(AT(c), c);
        STORE(STATE(c, 1), n);
        STORE(STATE(c, 2), m);
        NAME(store_h)(s, i, u, lanes, out * (c / n));
    }
}

/* do = dh y o (1 - o) with y = c / n   dc += dh o / n   dn -= dh o y / n   df = f (dc c_prev + dn n_prev)
 * di = i (dc z + dn)   dm -= df + di, which goes to the one that m is: dk = df (+ dm), da_i = di (+ dm)
 * da_f = dk s   dz = dc i act'   dc_prev = f dc   dn_prev = f dn   dm_prev = dk
 * Reads the product dG W_hh, gates, c_prev, dc; writes dc (and dn, dm beside it), and dG in place of the gates. */
UPDATE(slstm_backward)
{
    EACH_VECTOR {
        VEC past, dh = NAME(gather_dh)(s, i, u, lanes, SUM(c), &past);
        VEC in = LOAD(GATE(0)), forget = LOAD(GATE(1)), z = LOAD(GATE(2)), out = LOAD(GATE(3)), slope = LOAD(GATE(4));
        VEC c_prev = LOAD(AT(c_prev)), n_prev = LOAD(STATE(c_prev, 1));
        VEC dc = LOAD(AT(dc)), dn = LOAD(STATE(dc, 1)), dm = LOAD(STATE(dc, 2));
        PREFETCH_GATES(5);
        VEC n = forget * n_prev + in;
        n = SELECT(n == SPLAT(0), SPLAT(1), n); /* of the lanes beyond the units */
        VEC y = (forget * c_prev + in * z) / n, dy = dh * out / n;
        dc += dy;
        dn -= dy * y;
        VEC df = forget * (dc * c_prev + dn * n_prev), di = in * (dc * z + dn);
        dm -= df + di;
        UVEC kept = (UVEC) (forget >= SPLAT(1)) & (UVEC) (in < SPLAT(1)) & (UVEC) (n_prev != SPLAT(0)); /* m was k */
        df += SELECT(kept, dm, SPLAT(0));
        STORE(GATE(0), di + SELECT(kept, SPLAT(0), dm));
        STORE(GATE(1), df * slope);
        STORE(GATE(2), dc * in * SLOPE(z));
        STORE(GATE(3), dh * y * out * (SPLAT(1) - out));
        STORE(AT(dc), dc * forget);
        STORE(STATE(dc, 1), dn * forget);
        STORE(STATE(dc, 2), df);
        if (s->dh_out)
            STORE(AT(dh_out), past);
    }
}

#define SLSTM_UPDATES {{NAME(slstm_forward)}, {NAME(slstm_backward)}}
