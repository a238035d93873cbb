/* LSTM with peepholes (Gers and Schmidhuber 2000): i and f look at the cell as it was, o at the new one, through a weight
 * a unit: p_i, p_f, p_o. The tape keeps c~, which is what p_o weighs. */

#define LSTM_PEEPHOLE_CELL                                                                                              \
    {.name = "lstm_peephole", .states = "hc", .gates = "ifgo", .columns = "ifgoc", .passes = 1,                         \
     .terms = {{0, FL_X, 0, 4, FL_IH, {0, 1, 2, 3}}, {0, FL_H, 0, 4, FL_HH, {0, 1, 2, 3}}},                             \
     .vectors = {{"weight_ci", 0, FL_C}, {"weight_cf", 1, FL_C}, {"weight_co", 3, FL_GATE + 4}}}

/* i = sigma(W x + R h + p_i c_prev + b)   f = sigma(... + p_f c_prev ...)   g = act(...)   c~ = limit(f c_prev + i g)
 * o = sigma(... + p_o c~ ...)   h~ = o out(c~)                      zoneout: c = keep_c c_prev + (1 - keep_c) c~
 * Reads the sums, the vectors, c_prev, keep_c; writes c, h, and for the tape i, f, g, o, c~. */
UPDATE(lstm_peephole_forward)
{
    ONE_VECTOR;
    EACH_ROW { /* in two loops, as in lstm.h */
        VEC c_prev = LOAD(AT(c_prev));
        PUT(0, GATE_ACT(SUM(0) + PARAMETER(0) * c_prev));
        PUT(1, GATE_ACT(SUM(1) + PARAMETER(1) * c_prev));
        PUT(2, ACT(SUM(2)));
    }
    EACH_ROW {
        VEC in = SUM(0), forget = SUM(1), g = SUM(2);
        VEC c_prev = LOAD(AT(c_prev));
        VEC c = LIMIT(forget * c_prev + in * g, cell_clip);
        VEC out = GATE_ACT(SUM(3) + PARAMETER(2) * c);
        VEC h = out * OUT_ACT(c);
        if (s->tape) {
            PREFETCH_GATES(5);
            STORE(GATE(0), in);
            STORE(GATE(1), forget);
            STORE(GATE(2), g);
            STORE(GATE(3), out);
            STORE(GATE(4), c);
        }
        if (s->keep_c) {
            VEC keep = LOAD(AT(keep_c));
            c = keep * c_prev + (SPLAT(1) - keep) * c;
        }
        STORE(AT(c), c);
        NAME(store_h)(s, i, u, lanes, h);
    }
}

/* do = dh out(c~) sigma'   dc~ = (1 - keep_c) dc + dh o out'(c~) + p_o do   di = dc~ g sigma'   df = dc~ c_prev sigma'
 * dg = dc~ i act'          dc_prev = f dc~ + keep_c dc + p_i di + p_f df; beyond the limit dc~ is 0
 * Reads the product dG W_hh, gates, the vectors, c_prev, dc, keep_c; writes dc, and dG in place of the gates; c~ stays. */
UPDATE(lstm_peephole_backward)
{
    EACH_VECTOR {
        VEC past, dh = NAME(gather_dh)(s, i, u, lanes, SUM(c), &past);
        VEC in = LOAD(GATE(0)), forget = LOAD(GATE(1)), g = LOAD(GATE(2)), out = LOAD(GATE(3));
        VEC c_new = LOAD(GATE(4)), tc = OUT_ACT(c_new), c_prev = LOAD(AT(c_prev)), dc = LOAD(AT(dc)), kept = SPLAT(0);
        PREFETCH_GATES(5);
        if (s->keep_c) {
            VEC keep = LOAD(AT(keep_c));
            kept = keep * dc;
            dc = (SPLAT(1) - keep) * dc;
        }
        VEC dout = dh * tc * GATE_SLOPE(out);
        dc = WITHIN(c_new, cell_clip, dc + (dh * out * OUT_SLOPE(tc) + PARAMETER(2) * dout));
        VEC din = dc * g * GATE_SLOPE(in), dforget = dc * c_prev * GATE_SLOPE(forget);
        STORE(GATE(0), din);
        STORE(GATE(1), dforget);
        STORE(GATE(2), dc * in * SLOPE(g));
        STORE(GATE(3), dout);
        STORE(AT(dc), dc * forget + kept + PARAMETER(0) * din + PARAMETER(1) * dforget);
        if (s->dh_out)
            STORE(AT(dh_out), past);
    }
}

#define LSTM_PEEPHOLE_UPDATES {{NAME(lstm_peephole_forward)}, {NAME(lstm_peephole_backward)}}
