/* A product and nothing else. Not a cell of its own: the projection of one (Sak 2014), dx and dh_0. */

/* h~ = limit(W_hr m)
 * Reads the sums; writes h. */
UPDATE(linear_forward)
{
    EACH_VECTOR NAME(store_h)(s, i, u, lanes, LIMIT(SUM(c), proj_clip));
}

/* h = dh gathered: dh_0, dx, and the gradient of the projection's output, 0 beyond its limit
 * Reads the product, dy, dh_in, y; writes h. */
UPDATE(linear_backward)
{
    EACH_VECTOR {
        VEC past, dh = NAME(gather_dh)(s, i, u, lanes, SUM(c), &past);
        STORE(AT(h), s->y ? WITHIN(LOAD(AT(y)), proj_clip, dh) : dh);
        if (s->dh_out)
            STORE(AT(dh_out), past);
    }
}

#define LINEAR_UPDATES {{NAME(linear_forward)}, {NAME(linear_backward)}}
