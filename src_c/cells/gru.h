/* GRU: reset and update gate r, z, candidate n, hidden state h (Cho 2014), in two forms. */

/* The reset gate after the product, as in cuDNN: x reaches n r z, h reaches r z q. */
#define GRU_CELL                                                                                                        \
    {.name = "gru", .states = "h", .gates = "rzn", .columns = "nrzq", .passes = 1, .past = 1,                           \
     .terms = {{0, FL_X, 0, 3, FL_IH, {2, 0, 1}}, {0, FL_H, 1, 3, FL_HH, {0, 1, 2}}}}

/* r, z = sigma(W x + R h + b)   q = R_n h + b_hn   n = act(W_n x + b_in + r q)   h~ = (1 - z) n + z h_prev
 * Reads the sums, h_prev; writes h, and for the tape n, r, z, q. */
UPDATE(gru_forward)
{
    ONE_VECTOR;
    EACH_ROW {
        PUT(1, GATE_ACT(SUM(1)));
        PUT(2, GATE_ACT(SUM(2)));
    }
    EACH_ROW {
        VEC r = SUM(1), z = SUM(2), q = SUM(3);
        VEC n = ACT(r * q + SUM(0));
        VEC h = (SPLAT(1) - z) * n + z * LOAD(AT(h_prev));
        if (s->tape) {
            PREFETCH_GATES(4);
            STORE(GATE(0), n);
            STORE(GATE(1), r);
            STORE(GATE(2), z);
            STORE(GATE(3), q);
        }
        NAME(store_h)(s, i, u, lanes, h);
    }
}

/* dn = dh (1 - z) act'   dz = dh (h_prev - n) sigma'   dr = dn q sigma'   dq = dn r   dh_prev gets z dh past the product
 * Reads the product dG W_hh, gates, h_prev; writes dh_out, and dG in place of the gates. */
UPDATE(gru_backward)
{
    EACH_VECTOR {
        VEC past, dh = NAME(gather_dh)(s, i, u, lanes, SUM(c), &past);
        VEC n = LOAD(GATE(0)), r = LOAD(GATE(1)), z = LOAD(GATE(2)), q = LOAD(GATE(3));
        PREFETCH_GATES(4);
        VEC dn = dh * (SPLAT(1) - z) * SLOPE(n);
        STORE(GATE(0), dn);
        STORE(GATE(1), dn * q * GATE_SLOPE(r));
        STORE(GATE(2), dh * (LOAD(AT(h_prev)) - n) * GATE_SLOPE(z));
        STORE(GATE(3), dn * r);
        STORE(AT(dh_out), z * dh + past);
    }
}

#define GRU_UPDATES {{NAME(gru_forward)}, {NAME(gru_backward)}}

/* The reset gate before the product, as first published: x reaches n r z, h reaches r z, and in a second pass s = r h,
 * which the tape keeps, reaches n. */
#define GRU_RESET_BEFORE_CELL                                                                                           \
    {.name = "gru_reset_before", .states = "h", .gates = "rzn", .columns = "nrzs", .passes = 2, .past = 1,              \
     .terms = {{0, FL_X, 0, 3, FL_IH, {2, 0, 1}},                                                                       \
               {0, FL_H, 1, 2, FL_HH, {0, 1}},                                                                          \
               {1, FL_GATE + 3, 0, 1, FL_HH, {2}}}}

/* First pass: r, z = sigma(W x + R h + b)   s = r h   the sums of n so far stay in the gates
 * Reads the sums, h_seen; writes n, r, z, s. */
UPDATE(gru_reset_before_forward_1)
{
    ONE_VECTOR;
    EACH_ROW {
        VEC r = GATE_ACT(SUM(1));
        STORE(GATE(0), SUM(0));
        STORE(GATE(1), r);
        STORE(GATE(2), GATE_ACT(SUM(2)));
        STORE(GATE(3), r * LOAD(AT(h_seen)));
    }
}

/* Second pass: n = act(sums + R_n s)   h~ = (1 - z) n + z h_prev
 * Reads the sums, z, h_prev; writes h and n. */
UPDATE(gru_reset_before_forward_2)
{
    EACH_VECTOR {
        VEC n = ACT(SUM(c)), z = LOAD(GATE(2));
        STORE(GATE(0), n);
        NAME(store_h)(s, i, u, lanes, (SPLAT(1) - z) * n + z * LOAD(AT(h_prev)));
    }
}

/* First pass: dn = dh (1 - z) act'   dz = dh (h_prev - n) sigma'   dh_prev gets z dh past the products
 * Reads the product dG W_hh, gates, h_prev; writes dh_out, and dn, dz in place of the gates. */
UPDATE(gru_reset_before_backward_1)
{
    EACH_VECTOR {
        VEC past, dh = NAME(gather_dh)(s, i, u, lanes, SUM(c), &past);
        VEC n = LOAD(GATE(0)), z = LOAD(GATE(2));
        PREFETCH_GATES(4);
        STORE(GATE(0), dh * (SPLAT(1) - z) * SLOPE(n));
        STORE(GATE(2), dh * (LOAD(AT(h_prev)) - n) * GATE_SLOPE(z));
        STORE(AT(dh_out), z * dh + past);
    }
}

/* Second pass, the product being ds = R_n' dn: dr = ds h sigma'   dh_prev += mask r ds
 * Reads the product, r, h_seen, mask; writes dh_out, and dr in place of r. */
UPDATE(gru_reset_before_backward_2)
{
    EACH_VECTOR {
        VEC ds = SUM(c), r = LOAD(GATE(1)), dh = r * ds;
        STORE(GATE(1), ds * LOAD(AT(h_seen)) * GATE_SLOPE(r));
        if (s->mask)
            dh *= LOAD(AT(mask));
        STORE(AT(dh_out), LOAD(AT(dh_out)) + dh);
    }
}

#define GRU_RESET_BEFORE_UPDATES                                                                                        \
    {{NAME(gru_reset_before_forward_1), NAME(gru_reset_before_forward_2)},                                              \
     {NAME(gru_reset_before_backward_1), NAME(gru_reset_before_backward_2)}}
