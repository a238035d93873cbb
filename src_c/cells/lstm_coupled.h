/* LSTM with coupled gates (CIFG, Greff et al. 2017): what the forget gate lets go of, the input gate takes in, i = 1 - f;
 * three quarters of the weights and of the work. */

#define LSTM_COUPLED_CELL                                                                                               \
    {.name = "lstm_coupled", .states = "hc", .gates = "fgo", .columns = "fgo", .passes = 1,                             \
     .terms = {{0, FL_X, 0, 3, FL_IH, {0, 1, 2}}, {0, FL_H, 0, 3, FL_HH, {0, 1, 2}}}}

/* f, o = sigma(W x + R h + b)   g = act(...)   c~ = limit(f c_prev + (1 - f) g)   h~ = o out(c~)
 * zoneout: c = keep_c c_prev + (1 - keep_c) c~
 * Reads the sums, c_prev, keep_c; writes c, h, and for the tape f, g, o. */
UPDATE(lstm_coupled_forward)
{
    ONE_VECTOR;
    EACH_ROW { /* in two loops, as in lstm.h */
        PUT(0, GATE_ACT(SUM(0)));
        PUT(1, ACT(SUM(1)));
        PUT(2, GATE_ACT(SUM(2)));
    }
    EACH_ROW {
        VEC forget = SUM(0), g = SUM(1), out = SUM(2), c_prev = LOAD(AT(c_prev));
        VEC c = LIMIT(forget * c_prev + (SPLAT(1) - forget) * g, cell_clip);
        VEC h = out * OUT_ACT(c);
        if (s->keep_c) {
            VEC keep = LOAD(AT(keep_c));
            c = keep * c_prev + (SPLAT(1) - keep) * c;
        }
        STORE(AT(c), c);
        if (s->tape) {
            PREFETCH_GATES(3);
            STORE(GATE(0), forget);
            STORE(GATE(1), g);
            STORE(GATE(2), out);
        }
        NAME(store_h)(s, i, u, lanes, h);
    }
}

/* do = dh out(c~) sigma'   dc~ = (1 - keep_c) dc + dh o out'(c~)   df = dc~ (c_prev - g) sigma'   dg = dc~ (1 - f) act'
 * dc_prev = f dc~ + keep_c dc                                      with c~ computed again from the gates;
 * beyond the limit dc~ is 0
 * Reads the product dG W_hh, gates, c_prev, dc, keep_c; writes dc, and dG in place of the gates. */
UPDATE(lstm_coupled_backward)
{
    EACH_VECTOR {
        VEC past, dh = NAME(gather_dh)(s, i, u, lanes, SUM(c), &past);
        VEC forget = LOAD(GATE(0)), g = LOAD(GATE(1)), out = LOAD(GATE(2));
        VEC c_prev = LOAD(AT(c_prev)), dc = LOAD(AT(dc)), kept = SPLAT(0);
        PREFETCH_GATES(3);
        VEC c_new = LIMIT(forget * c_prev + (SPLAT(1) - forget) * g, cell_clip), tc = OUT_ACT(c_new);
        if (s->keep_c) {
            VEC keep = LOAD(AT(keep_c));
            kept = keep * dc;
            dc = (SPLAT(1) - keep) * dc;
        }
        dc = WITHIN(c_new, cell_clip, dc + dh * out * OUT_SLOPE(tc));
        STORE(GATE(0), dc * (c_prev - g) * GATE_SLOPE(forget));
        STORE(GATE(1), dc * (SPLAT(1) - forget) * SLOPE(g));
        STORE(GATE(2), dh * tc * GATE_SLOPE(out));
        STORE(AT(dc), dc * forget + kept);
        if (s->dh_out)
            STORE(AT(dh_out), past);
    }
}

#define LSTM_COUPLED_UPDATES {{NAME(lstm_coupled_forward)}, {NAME(lstm_coupled_backward)}}
