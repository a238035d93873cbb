/* LSTM with layer normalisation (Ba et al. 2016) of the four pre-activations, gate by gate over the units, and of the cell
 * on its way out: norm(v) = (v - mean) / sqrt(variance + epsilon), times a gain, plus a bias. The second pass needs all
 * units of a row; it has no product. The tape: pre-activations, gates, normalised pre-activations, dh, c~. */

#define LSTM_NORM_CELL                                                                                                  \
    {.name = "lstm_norm", .states = "hc", .gates = "ifgo", .columns = "wxyzifgojklmdc", .passes = 2,                    \
     .terms = {{0, FL_X, 0, 4, FL_IH, {0, 1, 2, 3}}, {0, FL_H, 0, 4, FL_HH, {0, 1, 2, 3}}},                             \
     .vectors = {{"weight_ln_i", 4, FL_GATE + 8, 1}, {"weight_ln_f", 5, FL_GATE + 9, 1},                                \
                 {"weight_ln_g", 6, FL_GATE + 10, 1}, {"weight_ln_o", 7, FL_GATE + 11, 1},                              \
                 {"weight_ln_c", 12, FL_GATE + 13, 1}, {"bias_ln_i", 4, FL_ONE}, {"bias_ln_f", 5, FL_ONE},              \
                 {"bias_ln_g", 6, FL_ONE}, {"bias_ln_o", 7, FL_ONE}, {"bias_ln_c", 12, FL_ONE}}}

/* Vectors of units of a row: u, and the lanes that hold units. */
#define EACH_UNIT for (ptrdiff_t u = 0, lanes = LANES_AT(0); u < s->H; u += LANES, lanes = LANES_AT(u))

/* The sum of the lanes, in one order. */
INLINE REAL NAME(across)(VEC v)
{
    REAL sum = 0;
    for (int l = 0; l < LANES; l++)
        sum += v[l];
    return sum;
}

/* Mean, and 1 / sqrt(variance + epsilon), of a row of H numbers. */
static NOINLINE TARGET void NAME(moments)(const fl_step *s, const REAL *row, double epsilon, REAL *mean, REAL *scale)
{
    const int whole = 0;
    VEC sum = {0}, square = {0};
    EACH_UNIT sum += LOAD(row + u);
    *mean = NAME(across)(sum) / (REAL) s->H;
    EACH_UNIT {
        VEC d = LOAD(row + u) - SPLAT(*mean);
        for (int l = (int) lanes; l < LANES; l++)
            d[l] = 0;
        square += d * d;
    }
    REAL variance = NAME(across)(square) / (REAL) s->H;
    *scale = 1 / (REAL) __builtin_sqrt((double) (variance + (REAL) epsilon));
}

/* After the pre-activations, the second pass: i, f, o = sigma(gain norm(a) + bias)   g = act(...)   c~ = limit(f c_prev + i g)
 * h~ = o out(gain norm(c~) + bias)                      zoneout: c = keep_c c_prev + (1 - keep_c) c~
 * Reads the pre-activations, the vectors, c_prev, keep_c; writes c, h, c~ and for the tape i, f, g, o. */
UPDATE(lstm_norm_forward_2)
{
    (void) unit, (void) columns, (void) pre;
    EACH_ROW {
        REAL mean[4], scale[4], c_mean, c_scale;
        REAL *const c_new = (REAL *) s->gates + i * s->ldgates + 13 * s->H;
        for (int k = 0; k < 4; k++)
            NAME(moments)(s, (REAL *) s->gates + i * s->ldgates + k * s->H, o->epsilon, &mean[k], &scale[k]);
        const int at = s->tape ? 4 : 0;
        EACH_UNIT {
            VEC a[4], c_prev = LOAD(AT(c_prev));
            for (int k = 0; k < 4; k++) {
                a[k] = (LOAD(GATE(k)) - SPLAT(mean[k])) * SPLAT(scale[k]) * PARAMETER(k) + PARAMETER(5 + k);
                a[k] = k == 2 ? ACT(a[k]) : GATE_ACT(a[k]);
                STORE(GATE(at + k), a[k]);
            }
            STORE(c_new + u, LIMIT(a[1] * c_prev + a[0] * a[2], cell_clip));
        }
        NAME(moments)(s, c_new, o->epsilon, &c_mean, &c_scale);
        EACH_UNIT {
            VEC c = LOAD(c_new + u);
            VEC h = LOAD(GATE(at + 3)) * OUT_ACT((c - SPLAT(c_mean)) * SPLAT(c_scale) * PARAMETER(4) + PARAMETER(9));
            if (s->keep_c) {
                VEC keep = LOAD(AT(keep_c));
                c = keep * LOAD(AT(c_prev)) + (SPLAT(1) - keep) * c;
            }
            STORE(AT(c), c);
            NAME(store_h)(s, i, u, lanes, h);
        }
    }
}

/* First pass: dh, gathered, waits in the tape. */
UPDATE(lstm_norm_backward_1)
{
    EACH_VECTOR {
        VEC past, dh = NAME(gather_dh)(s, i, u, lanes, SUM(c), &past);
        STORE(GATE(12), dh);
        if (s->dh_out)
            STORE(AT(dh_out), past);
    }
}

/* Second pass, with r = gain norm(c~) + bias, e = gain dr, n = norm(c~):
 * do = dh out(r) sigma'   dr = dh o out'(r)   dc~ = (1 - keep_c) dc + scale (e - mean(e) - n mean(e n))
 * di = dc~ g sigma'   df = dc~ c_prev sigma'   dg = dc~ i act'   dc_prev = f dc~ + keep_c dc; beyond the limit dc~ is 0
 * and from these, by the same line, the gradients of the four pre-activations
 * Reads dh, pre-activations, gates, c~, the vectors, c_prev, dc, keep_c; writes dc, in place of the pre-activations dG, of
 * the gates, of dh the gradients of the normalised a, c~ after gain and bias, and what gains are weighed by. */
UPDATE(lstm_norm_backward_2)
{
    (void) unit, (void) columns, (void) pre;
    EACH_ROW {
        REAL mean[5], scale[5];
        VEC sum[5] = {{0}}, weighed[5] = {{0}};
        for (int k = 0; k < 5; k++)
            NAME(moments)(s, (REAL *) s->gates + i * s->ldgates + (k < 4 ? k : 13) * s->H, o->epsilon, &mean[k],
                          &scale[k]);
        EACH_UNIT {
            VEC n = (LOAD(GATE(13)) - SPLAT(mean[4])) * SPLAT(scale[4]), gain = PARAMETER(4);
            VEC out = LOAD(GATE(7)), dh = LOAD(GATE(12)), t = OUT_ACT(n * gain + PARAMETER(9));
            VEC dr = dh * out * OUT_SLOPE(t);
            STORE(GATE(7), dh * t * GATE_SLOPE(out));
            STORE(GATE(12), dr);
            sum[4] += gain * dr; /* zero in the lanes beyond the units, as the gain is */
            weighed[4] += gain * dr * n;
        }
        const VEC sum_c = SPLAT(NAME(across)(sum[4]) / (REAL) s->H);
        const VEC weighed_c = SPLAT(NAME(across)(weighed[4]) / (REAL) s->H);
        EACH_UNIT {
            VEC c_new = LOAD(GATE(13)), n = (c_new - SPLAT(mean[4])) * SPLAT(scale[4]);
            VEC in = LOAD(GATE(4)), forget = LOAD(GATE(5)), g = LOAD(GATE(6));
            VEC c_prev = LOAD(AT(c_prev)), dc = LOAD(AT(dc)), kept = SPLAT(0), d[4];
            if (s->keep_c) {
                VEC keep = LOAD(AT(keep_c));
                kept = keep * dc;
                dc = (SPLAT(1) - keep) * dc;
            }
            dc += SPLAT(scale[4]) * (PARAMETER(4) * LOAD(GATE(12)) - sum_c - n * weighed_c);
            dc = WITHIN(c_new, cell_clip, dc);
            d[0] = dc * g * GATE_SLOPE(in), d[1] = dc * c_prev * GATE_SLOPE(forget), d[2] = dc * in * SLOPE(g);
            d[3] = LOAD(GATE(7));
            STORE(AT(dc), dc * forget + kept);
            STORE(GATE(13), n);
            for (int k = 0; k < 4; k++) {
                VEC norm = (LOAD(GATE(k)) - SPLAT(mean[k])) * SPLAT(scale[k]), e = PARAMETER(k) * d[k];
                STORE(GATE(4 + k), d[k]);
                STORE(GATE(8 + k), norm);
                sum[k] += e;
                weighed[k] += e * norm;
            }
        }
        for (int k = 0; k < 4; k++) {
            const VEC a = SPLAT(NAME(across)(sum[k]) / (REAL) s->H), b = SPLAT(NAME(across)(weighed[k]) / (REAL) s->H);
            EACH_UNIT STORE(GATE(k), SPLAT(scale[k]) * (PARAMETER(k) * LOAD(GATE(4 + k)) - a - LOAD(GATE(8 + k)) * b));
        }
    }
}

#define LSTM_NORM_UPDATES                                                                                               \
    {{NAME(store_sums), NAME(lstm_norm_forward_2)}, {NAME(lstm_norm_backward_1), NAME(lstm_norm_backward_2)}}
