/* LSTM: input, forget and output gate i, f, o, candidate g, memory cell c, hidden state h (Hochreiter and Schmidhuber
 * 1997; Gers 2000). */

#define LSTM_CELL                                                                                                       \
    {.name = "lstm", .states = "hc", .gates = "ifgo", .columns = "ifgo", .passes = 1,                                   \
     .terms = {{0, FL_X, 0, 4, FL_IH, {0, 1, 2, 3}}, {0, FL_H, 0, 4, FL_HH, {0, 1, 2, 3}}}}

/* i, f, o = sigma(W x + R h + b)   g = act(...)   c~ = limit(f c_prev + i g)   h~ = o out(c~)
 * zoneout: c = keep_c c_prev + (1 - keep_c) c~
 * Reads the sums, c_prev, keep_c; writes c, h, and for the tape i, f, g, o. */
UPDATE(lstm_forward)
{
    ONE_VECTOR;
    EACH_ROW { /* a loop of its own: what waits for c would keep the next row's gates out of the processor's window */
        PUT(0, GATE_ACT(SUM(0)));
        PUT(1, GATE_ACT(SUM(1)));
        PUT(2, ACT(SUM(2)));
        PUT(3, GATE_ACT(SUM(3)));
    }
    EACH_ROW {
        VEC in = SUM(0), forget = SUM(1), g = SUM(2), out = SUM(3);
        VEC c_prev = LOAD(AT(c_prev));
        VEC c = LIMIT(forget * c_prev + in * g, cell_clip);
        VEC h = out * OUT_ACT(c);
        if (s->keep_c) {
            VEC keep = LOAD(AT(keep_c));
            c = keep * c_prev + (SPLAT(1) - keep) * c;
        }
        STORE(AT(c), c);
        if (s->tape) {
            PREFETCH_GATES(4);
            STORE(GATE(0), in);
            STORE(GATE(1), forget);
            STORE(GATE(2), g);
            STORE(GATE(3), out);
        }
        NAME(store_h)(s, i, u, lanes, h);
    }
}

/* do = dh out(c~) sigma'   dc~ = (1 - keep_c) dc + dh o out'(c~)   di = dc~ g sigma'   df = dc~ c_prev sigma'
 * dg = dc~ i act'          dc_prev = f dc~ + keep_c dc              with c~ computed again from the gates; beyond the
 * limit dc~ is 0
 * Reads the product dG W_hh, gates, c_prev, dc, keep_c; writes dc, and dG in place of the gates. */
UPDATE(lstm_backward)
{
    EACH_VECTOR {
        VEC past, dh = NAME(gather_dh)(s, i, u, lanes, SUM(c), &past);
        VEC in = LOAD(GATE(0)), forget = LOAD(GATE(1)), g = LOAD(GATE(2)), out = LOAD(GATE(3));
        VEC c_prev = LOAD(AT(c_prev)), dc = LOAD(AT(dc)), kept = SPLAT(0);
        PREFETCH_GATES(4);
        VEC c_new = LIMIT(forget * c_prev + in * g, cell_clip), tc = OUT_ACT(c_new);
        if (s->keep_c) {
            VEC keep = LOAD(AT(keep_c));
            kept = keep * dc;
            dc = (SPLAT(1) - keep) * dc;
        }
        dc = WITHIN(c_new, cell_clip, dc + dh * out * OUT_SLOPE(tc));
        STORE(GATE(0), dc * g * GATE_SLOPE(in));
        STORE(GATE(1), dc * c_prev * GATE_SLOPE(forget));
        STORE(GATE(2), dc * in * SLOPE(g));
        STORE(GATE(3), dh * tc * GATE_SLOPE(out));
        STORE(AT(dc), dc * forget + kept);
        if (s->dh_out)
            STORE(AT(dh_out), past);
    }
}

#define LSTM_UPDATES {{NAME(lstm_forward)}, {NAME(lstm_backward)}}
