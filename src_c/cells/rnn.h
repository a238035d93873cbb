/* RNN (Elman 1990): the hidden state h alone. */

#define RNN_CELL                                                                                                        \
    {.name = "rnn", .states = "h", .gates = "h", .columns = "h", .passes = 1,                                           \
     .terms = {{0, FL_X, 0, 1, FL_IH, {0}}, {0, FL_H, 0, 1, FL_HH, {0}}}}

/* h~ = act(W x + R h + b)
 * Reads the sums; writes h, and for the tape h~. */
UPDATE(rnn_forward)
{
    EACH_VECTOR {
        VEC a = ACT(SUM(c));
        if (s->tape)
            STORE(GATE(0), a);
        NAME(store_h)(s, i, u, lanes, a);
    }
}

/* da = dh act'
 * Reads the product dG W_hh, h~; writes da in its place. */
UPDATE(rnn_backward)
{
    EACH_VECTOR {
        VEC past, dh = NAME(gather_dh)(s, i, u, lanes, SUM(c), &past);
        STORE(GATE(0), dh * SLOPE(LOAD(GATE(0))));
        if (s->dh_out)
            STORE(AT(dh_out), past);
    }
}

#define RNN_UPDATES {{NAME(rnn_forward)}, {NAME(rnn_backward)}}
