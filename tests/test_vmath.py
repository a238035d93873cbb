"""The kernels' own sigmoid and tanh, and the other activations, on every instruction set.

Largest errors measured on x86-64, in units of the last place: tanh 1.94 (float32) and 1.92 (float64), sigmoid 1.994
and 1.98.
"""

from decimal import Decimal, localcontext

import numpy as np
import pytest

from fastlstm import engine

ULP = 2.0
NORMAL = 1.001  # results below this many of the smallest normal number may be 0
DTYPES = (np.float32, np.float64)
NAMES = ("tanh", "sigmoid", "relu", "softsign", "hard_tanh", "hard_sigmoid", "identity")


def ulps(got, want, dtype):
    """|got - want| in units of the last place of want; want is more precise than got."""
    info = np.finfo(dtype)
    exponent = np.floor(np.log2(np.maximum(abs(want), info.tiny)))
    unit = np.exp2(exponent - info.nmant)
    return (abs(got.astype(want.dtype) - want) / unit).astype(float)


def sigmoid(x):
    e = np.exp(-abs(x))
    return np.where(x < 0, e, 1) / (1 + e)


EXACT = {"tanh": np.tanh, "sigmoid": sigmoid}
# Those made of the same exponential, with their numbers; the error allowed, in units of the last place.
MADE = {
    "elu": ((0.75,), lambda x: np.where(x > 0, x, 0.75 * np.expm1(np.minimum(x, 0))), 2.5),
    "leaky_relu": ((0.2,), lambda x: np.where(x > 0, x, type(x[0])(np.float32(0.2)) * x), 1.0),
    "softplus": ((), lambda x: np.maximum(x, 0) + np.log1p(np.exp(-abs(x))), 3.0),
    "scaled_tanh": ((1.5, 0.5), lambda x: 1.5 * np.tanh(0.5 * x), 4.5),
    "linear_sigmoid": ((0.25, 0.5), lambda x: np.clip(0.25 * x + 0.5, 0, 1), 1.0),
}


def all_floats(stride):
    bits = np.arange(0, 2**32, stride, dtype=np.uint64).astype(np.uint32)
    x = bits.view(np.float32)
    return x[np.isfinite(x)]


def near(dtype):
    """Values at which something changes: zeros, powers of two, limits, and their neighbours."""
    info = np.finfo(dtype)
    points = [0.1732868, 0.34657, 0.625, 9.01, 9.02, 10, 18.9, 19.06, 19.1, 20, 87.33, 87.3365, 88.7, 103.9]
    points += [708.39, 709.7, 745.1, 1e30, info.max, info.tiny, info.smallest_subnormal, 0]
    points = np.concatenate([2.0 ** np.arange(-60, 11), np.array(points, np.float64)]).astype(dtype)
    points = np.concatenate([points, np.nextafter(points, dtype(0)), np.nextafter(points, info.max)])
    return np.concatenate([points, -points])


@pytest.mark.parametrize("name", EXACT)
def test_float32_dense(isa, name):
    """One in 1021 of all numbers: 4.2 million."""
    x = all_floats(1021)
    assert x.size > 4_000_000
    got, want = engine.activation(name, x), EXACT[name](x.astype(np.float64))
    normal = abs(want) >= NORMAL * np.finfo(np.float32).tiny
    error = ulps(got[normal], want[normal], np.float32)
    worst = error.argmax()
    assert error[worst] < ULP, f"{error[worst]:.4f} ulp at {x[normal][worst]!r}"
    assert (abs(got[~normal]) <= NORMAL * np.finfo(np.float32).tiny).all()
    if name == "sigmoid":
        small = x[want < 0.999 * np.finfo(np.float32).tiny]
        assert small.size and not engine.activation(name, small, called=True).any()


@pytest.mark.parametrize("name", EXACT)
def test_float32_where_it_matters(isa, name):
    """Every 37th number with an exponent from -6 to 6, both signs."""
    low, high = (np.float32(v).view(np.uint32) for v in (2.0**-6, 64))
    x = np.arange(low, high, 37, dtype=np.uint32).view(np.float32)
    x = np.concatenate([x, -x, near(np.float32)])
    want = EXACT[name](x.astype(np.float64))
    normal = abs(want) >= NORMAL * np.finfo(np.float32).tiny
    error = ulps(engine.activation(name, x[normal]), want[normal], np.float32)
    assert error.max() < ULP, f"{error.max():.4f} ulp at {x[normal][error.argmax()]!r}"


def decimal(name, x):
    """tanh or sigmoid of a double to 40 digits."""
    with localcontext() as context:
        context.prec = 400 if name == "tanh" and abs(x) < 1e-3 else 60
        e = (Decimal(-abs(x)) * (2 if name == "tanh" else 1)).exp()
        if name == "tanh":
            return ((1 - e) / (1 + e)).copy_sign(Decimal(x))
        return (e if x < 0 else 1) / (1 + e)


def spread(dtype=np.float64):
    rng = np.random.default_rng(9)
    smallest = -600 if dtype == np.float64 else -80
    return np.concatenate([
        rng.standard_normal(30_000), rng.uniform(-40, 40, 30_000), rng.uniform(-708, 708, 10_000),
        np.exp(rng.uniform(smallest, 6, 20_000)) * rng.choice([-1, 1], 20_000), near(dtype),
    ]).astype(dtype)  # fmt: skip


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 60, reason="long double is no wider than double")
@pytest.mark.parametrize("name", EXACT)
def test_float64_long_double(isa, name):
    x = spread()
    want = EXACT[name](x.astype(np.longdouble))
    # The oracle itself, in 60 digits.
    checked = np.random.default_rng(0).choice(np.flatnonzero(abs(x) > 1e-20), 300)
    for i in checked:
        exact = decimal(name, float(x[i]))
        high = float(want[i])
        value = Decimal(high) + Decimal(float(want[i] - np.longdouble(high)))
        assert abs(value - exact) <= exact.copy_abs() * Decimal("4e-19"), x[i]
    normal = abs(want) >= NORMAL * np.finfo(np.float64).tiny
    error = ulps(engine.activation(name, x[normal]), want[normal], np.float64)
    assert error.max() < ULP, f"{error.max():.4f} ulp at {x[normal][error.argmax()]!r}"


@pytest.mark.parametrize("name", EXACT)
def test_float64_decimal(isa, name):
    """The same without a wide type: fewer points, 40 exact digits."""
    rng = np.random.default_rng(4)
    x = np.concatenate([rng.standard_normal(400), rng.uniform(-30, 30, 400), 2.0 ** np.arange(-9, 5)])
    got = engine.activation(name, x)
    for xi, value in zip(x.tolist(), got.tolist(), strict=True):
        exact = decimal(name, xi)
        error = abs(Decimal(value) - exact) / Decimal(float(np.spacing(abs(float(exact)))))
        assert error < ULP, f"{error:.4f} ulp at {xi!r}"


@pytest.mark.parametrize("dtype", DTYPES, ids=("f32", "f64"))
def test_tanh_shape(isa, dtype):
    x = np.concatenate([abs(spread(dtype)), np.array([np.inf], dtype)])
    x.sort()
    y = engine.activation("tanh", x)
    assert engine.activation("tanh", -x).tobytes() == (-y).tobytes(), "not odd to the bit"
    assert (abs(y) <= 1).all()
    limit = 9.02 if dtype == np.float32 else 19.07
    assert (y[x >= limit] == 1).all()
    high = y[x > limit - 3]
    assert (np.diff(high) >= -np.finfo(dtype).eps).all()
    assert (y * (1 - 2 * np.finfo(dtype).eps) <= x).all()
    assert (y[x > 0] > 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=("f32", "f64"))
def test_sigmoid_shape(isa, dtype):
    x = np.sort(np.concatenate([spread(dtype), np.array([np.inf, -np.inf], dtype)]))
    y = engine.activation("sigmoid", x, called=True)
    assert (y >= 0).all() and (y <= 1).all()
    assert (y[x > (17.4 if dtype == np.float32 else 37.5)] == 1).all()
    assert (y[x < (-87.34 if dtype == np.float32 else -708.4)] == 0).all()
    assert (y[x > (-87.33 if dtype == np.float32 else -708.39)] > 0).all()
    step = np.diff(y)
    assert (step >= -4 * np.spacing(y[1:])).all(), "falls by more than rounding"


@pytest.mark.parametrize("dtype", DTYPES, ids=("f32", "f64"))
def test_special_values(isa, dtype):
    info = np.finfo(dtype)
    x = np.array([np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, info.max, -info.max], dtype)
    for name, values in {
        "tanh": [1, -1, 0.0, -0.0, 1, -1],
        "sigmoid": [1, 0, 0.5, 0.5, 1, 0],
        "relu": [np.inf, 0, 0, 0, info.max, 0],
        "softsign": [1, -1, 0.0, -0.0, 1, -1],
        "hard_tanh": [1, -1, 0.0, -0.0, 1, -1],
        "hard_sigmoid": [1, 0, 0.5, 0.5, 1, 0],
        "identity": [np.inf, -np.inf, 0.0, -0.0, info.max, -info.max],
    }.items():
        y = engine.activation(name, x, called=True)
        assert np.isnan(y[:2]).all(), name
        np.testing.assert_array_equal(y[2:], np.array(values, dtype), err_msg=name)
        if name in ("tanh", "softsign", "hard_tanh", "identity"):
            np.testing.assert_array_equal(np.signbit(y[2:]), np.signbit(x[2:]), err_msg=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=("f32", "f64"))
def test_subnormals(isa, dtype):
    info = np.finfo(dtype)
    x = np.linspace(info.smallest_subnormal, info.tiny, 1000, dtype=dtype)
    x = np.concatenate([x, -x])
    y = engine.activation("tanh", x)
    assert (abs(y - x) <= 2 * info.smallest_subnormal).all()
    assert (engine.activation("sigmoid", x) == 0.5).all()
    for name in ("softsign", "hard_tanh", "identity"):
        np.testing.assert_array_equal(engine.activation(name, x), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=("f32", "f64"))
def test_the_others(isa, dtype):
    """Exact: one rounding per operation, as in NumPy."""
    one, three, six = dtype(1), dtype(3), dtype(6)
    x = np.concatenate([spread(dtype), np.linspace(-4, 4, 10_001, dtype=dtype)])
    x = x[abs(x) < 1e29]
    formulas = {
        "relu": np.maximum(x, 0),
        "softsign": x / (one + abs(x)),
        "hard_tanh": np.clip(x, -one, one),
        "hard_sigmoid": np.minimum(np.maximum(x + three, 0), six) / six,
        "identity": x,
    }
    for name, want in formulas.items():
        got = engine.activation(name, x)
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, want, err_msg=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=("f32", "f64"))
def test_tails(isa, dtype):
    """Any size and place: an element does not depend on its neighbours."""
    x = np.linspace(-3, 3, 40, dtype=dtype)
    for name in NAMES:
        whole = engine.activation(name, x)
        for size in range(36):
            for start in (0, 1, 3):
                got = engine.activation(name, x[start : start + size])
                assert got.tobytes() == whole[start : start + size].tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=("f32", "f64"))
def test_close_between_instruction_sets(dtype):
    x = spread(dtype)
    for name in EXACT:
        results = []
        for isa in engine.available_isas():
            engine.use_isa(isa)
            results.append(engine.activation(name, x))
        for y in results[1:]:
            np.testing.assert_allclose(y, results[0], rtol=4 * np.finfo(dtype).eps, atol=np.finfo(dtype).tiny)


@pytest.mark.parametrize("dtype", DTYPES, ids=("f32", "f64"))
@pytest.mark.parametrize("name", MADE)
def test_made_of_others(isa, name, dtype):
    numbers, exact, bound = MADE[name]
    rng = np.random.default_rng(3)
    x = np.concatenate([rng.uniform(-30, 30, 200_000), rng.standard_normal(100_000), np.linspace(-80, 80, 9999)])
    x = x.astype(dtype)
    wide = x.astype(np.float64 if dtype == np.float32 else np.longdouble)
    want = exact(wide)
    if name == "leaky_relu" and dtype == np.float64:
        want = np.where(wide > 0, wide, np.longdouble(0.2) * wide)
    got = engine.activation(name, x, *numbers)
    error = ulps(got, want, dtype)
    if name == "linear_sigmoid":  # near 0 the sum cancels: an error of the pre-activation
        error = abs(got - want) / np.finfo(dtype).eps
    assert error.max() <= bound, f"{error.max():.3f} ulp at {x[error.argmax()]!r}"


@pytest.mark.parametrize("dtype", DTYPES, ids=("f32", "f64"))
@pytest.mark.parametrize("name", MADE)
def test_made_of_others_at_the_edges(isa, name, dtype):
    numbers, exact, _ = MADE[name]
    x = np.array([0, -0.0, np.inf, -np.inf, np.nan, 1e30, -1e30, 700, -700, 1e-30, -1e-30], dtype)
    with np.errstate(all="ignore"):
        want = exact(x.astype(np.float64))
    np.testing.assert_allclose(engine.activation(name, x, *numbers), want.astype(dtype), rtol=1e-6, atol=1e-300)
