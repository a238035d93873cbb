"""Losses: values by hand or by PyTorch, gradients by central differences, masks, errors."""

import itertools
import math

import numpy as np
import pytest
from conftest import numeric_gradient

from fastlstm import nn

F32 = np.float32


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def check(loss, z, atol=1e-8):
    """The gradient that loss() returns for z against central differences."""
    value, dz = loss()
    assert isinstance(value, float) and dz.shape == z.shape and dz.dtype == z.dtype
    np.testing.assert_allclose(dz, numeric_gradient(lambda: loss()[0], z), atol=atol)
    assert np.abs(dz).max() > 1e-3
    return value


@pytest.mark.parametrize("lead", [(), (6,), (3, 2)])
@pytest.mark.parametrize("smooth", [0.0, 0.1])
@pytest.mark.parametrize("ignore", [None, -100])
@pytest.mark.parametrize("shares", [None, [1.0, 2.0, 0.5, 3.0]])
def test_cross_entropy_matches_torch(rng, lead, smooth, ignore, shares):
    z, labels = 2 * rng.normal(size=(*lead, 4)), rng.integers(0, 4, lead)
    if ignore is not None and lead:
        labels[0] = ignore
    options = {"label_smoothing": smooth, "class_weight": shares, "ignore_index": ignore}
    value = check(lambda: nn.softmax_cross_entropy(z, labels, **options), z)
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    theirs = torch.nn.functional.cross_entropy(
        torch.from_numpy(z.reshape(-1, 4)), torch.from_numpy(np.atleast_1d(labels).reshape(-1)),
        None if shares is None else torch.tensor(shares, dtype=torch.float64),
        ignore_index=-1 if ignore is None else ignore, label_smoothing=smooth,
    )  # fmt: skip
    assert value == pytest.approx(float(theirs), rel=1e-12)


ELEMENTWISE = {
    "mse": (nn.mse, lambda p, t: (p - t) ** 2),
    "mae": (nn.mae, lambda p, t: abs(p - t)),
    "huber": (lambda p, t, **o: nn.huber(p, t, 0.7, **o),
              lambda p, t: (p - t) ** 2 / 2 if abs(p - t) <= 0.7 else 0.7 * (abs(p - t) - 0.35)),
    "binary": (nn.binary_cross_entropy,
               lambda z, t: -t * math.log(1 / (1 + math.exp(-z))) - (1 - t) * math.log(1 / (1 + math.exp(z)))),
}  # fmt: skip


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("weighted", [False, True])
def test_elementwise_losses(rng, name, weighted):
    loss, scalar = ELEMENTWISE[name]
    p, t = 1.5 * rng.normal(size=(5, 3)), rng.uniform(size=(5, 3))
    w = np.array([1, 0, 2, 3, 0.5]) if weighted else np.ones(5)
    value = check(lambda: loss(p, t, weight=w if weighted else None), p)
    by_hand = sum(w[i] * scalar(p[i, j], t[i, j]) for i, j in np.ndindex(5, 3)) / (3 * w.sum())
    assert value == pytest.approx(by_hand, rel=1e-12)
    assert loss(p.astype(F32), t)[1].dtype == F32


def test_binary_cross_entropy_does_not_overflow():
    value, dz = nn.binary_cross_entropy(np.array([1e4, -1e4, 1e4, -1e4]), [1, 0, 0, 1])
    assert value == 5000
    np.testing.assert_array_equal(dz, [0, 0, 0.25, -0.25])


def test_quantile(rng):
    quantiles = [0.1, 0.5, 0.9]
    p, t = rng.normal(size=(4, 2, 3)), rng.normal(size=(4, 2))
    value = check(lambda: nn.quantile(p, t, quantiles), p)
    by_hand = np.mean([max(q * (t[i] - p[i][k]), (q - 1) * (t[i] - p[i][k]))
                       for i in np.ndindex(4, 2) for k, q in enumerate(quantiles)])  # fmt: skip
    assert value == pytest.approx(by_hand, rel=1e-12)
    check(lambda: nn.quantile(p, t, quantiles, weight=[1, 0, 2, 1]), p)
    sample = rng.normal(size=20001)  # least at the sample's quantile
    at = lambda v: nn.quantile(np.full((sample.size, 1), v), sample, [0.9])[0]  # noqa: E731
    best = np.quantile(sample, 0.9)
    assert at(best) < min(at(best - 0.05), at(best + 0.05))


def test_what_a_mask_hides_may_be_anything(rng):
    z, labels = rng.normal(size=(4, 3)), np.array([0, 1, 2, 0])
    mask = np.array([True, False, True, True])
    want, dwant = nn.softmax_cross_entropy(z[mask], labels[mask])
    z[1] = np.nan
    got, dgot = nn.softmax_cross_entropy(z, labels, weight=mask)
    assert got == pytest.approx(want, rel=1e-14)
    np.testing.assert_allclose(dgot[mask], dwant, rtol=1e-14)
    assert not dgot[1].any()
    value, dp = nn.mse(np.array([1.0, np.nan, 3.0, 5.0]), [0, 0, 0, 0], weight=mask)
    assert value == pytest.approx(35 / 3) and dp[1] == 0
    value, dz = nn.binary_cross_entropy(np.zeros(4), [1.0, np.nan, 0.0, 1.0], weight=mask)
    assert value == pytest.approx(np.log(2)) and dz[1] == 0


def test_types_are_kept_whatever_the_numbers_are():
    for delta in (1, 1.0, np.float64(1), np.float32(1)):
        assert nn.huber(np.ones(3, F32), np.zeros(3), delta)[1].dtype == F32


# ----------------------------------------------------------------------- CTC


def ctc_by_paths(z, label, blank=0):
    """Minus the log of the summed probability of all paths that become the label."""
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    total = 0.0
    for path in itertools.product(range(z.shape[1]), repeat=len(z)):
        merged = [k for k, _ in itertools.groupby(path) if k != blank]
        if merged == list(label):
            total += math.prod(p[t, k] for t, k in enumerate(path))
    return -math.log(total)


@pytest.mark.parametrize("blank", [0, 2])
def test_ctc_sums_all_paths(rng, blank):
    z = rng.normal(size=(5, 4, 3))
    a, b = (k for k in range(3) if k != blank)
    labels, lengths = [[a, b], [b, b], [], [a]], [5, 4, 3, 1]
    value = check(lambda: nn.ctc(z, labels, lengths, blank=blank), z)
    by_hand = [ctc_by_paths(z[:n, i], label, blank) / max(1, len(label))
               for i, (label, n) in enumerate(zip(labels, lengths, strict=True))]  # fmt: skip
    assert value == pytest.approx(np.mean(by_hand), rel=1e-12)


def test_ctc_matches_torch(rng):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    T, N, K = 30, 6, 9
    z = rng.normal(size=(T, N, K))
    labels = [rng.integers(1, K, n) for n in (3, 10, 1, 7, 12, 5)]
    lengths = np.array([30, 25, 4, 30, 29, 12])
    value, dz = nn.ctc(z, labels, lengths)
    logits = torch.tensor(z, requires_grad=True)
    theirs = torch.nn.functional.ctc_loss(
        logits.log_softmax(2), torch.from_numpy(np.concatenate(labels)), torch.from_numpy(lengths),
        torch.tensor([len(row) for row in labels]),
    )  # fmt: skip
    theirs.backward()
    assert value == pytest.approx(float(theirs.detach()), rel=1e-12)
    np.testing.assert_allclose(dz, logits.grad.numpy(), atol=1e-12)


def test_ctc_reads_nothing_past_the_lengths(rng):
    z = rng.normal(size=(6, 2, 4))
    want, dwant = nn.ctc(z, [[1], [2, 3]], [4, 6])
    z[4:, 0] = np.nan
    got, dgot = nn.ctc(z, [[1], [2, 3]], [4, 6])
    assert got == want
    np.testing.assert_array_equal(dgot, dwant)


ONES = np.ones((4, 2, 3))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: nn.softmax_cross_entropy(ONES, [0, 1]), ValueError, r"labels: expected shape \(4, 2\)"),
        (lambda: nn.softmax_cross_entropy(ONES[0], [0, 1], weight=[1, -1]), ValueError, "weight: expected finite"),
        (lambda: nn.softmax_cross_entropy(ONES[0], [0, 1], weight=[0, 0]), ValueError, "weight: expected finite"),
        (lambda: nn.softmax_cross_entropy(ONES[0], [0, 1], weight=[1]), ValueError, "weight: expected a shape"),
        (lambda: nn.softmax_cross_entropy(ONES[0], [7, 7], ignore_index=7), ValueError, "labels: expected at least"),
        (lambda: nn.softmax_cross_entropy(ONES[0], [0, 1], label_smoothing=1), ValueError, "label_smoothing: exp"),
        (lambda: nn.softmax_cross_entropy(ONES[0], [0, 1], class_weight=[1, 2]), ValueError, "class_weight: expec"),
        (lambda: nn.binary_cross_entropy(np.ones(2), [0, 2]), ValueError, "target: expected values from 0 to 1"),
        (lambda: nn.huber(np.ones(2), np.ones(2), 0), ValueError, "delta: expected a"),
        (lambda: nn.quantile(np.ones((2, 1)), [1, 2], [1.0]), ValueError, "quantiles: expected numbers between"),
        (lambda: nn.quantile(np.ones((2, 1)), [1, 2], [0.1, 0.2]), ValueError, r"pred: expected shape \(..., 2\)"),
        (lambda: nn.quantile(np.ones((2, 1)), [1], [0.1]), ValueError, r"target: expected shape \(2,\)"),
        (lambda: nn.ctc(ONES, [[1]]), ValueError, "labels: expected 2 sequences, got 1"),
        (lambda: nn.ctc(ONES, [[1], [3]]), ValueError, r"labels\[1\]: expected values 0..2, got 3"),
        (lambda: nn.ctc(ONES, [[1], [0]]), ValueError, r"labels\[1\]: expected labels other than blank"),
        (lambda: nn.ctc(ONES, [[1], [1, 1, 1]]), ValueError, r"labels\[1\]: needs at least 5 steps"),
        (lambda: nn.ctc(ONES, [[1], [1]], [4, 5]), ValueError, "lengths: expected 2 integers from 1 to 4"),
        (lambda: nn.ctc(ONES[0], [[1], [1]]), ValueError, r"logits: expected shape \(T, N, K\)"),
        (lambda: nn.ctc(ONES, [[1], [1]], blank=3), ValueError, "blank: expected an integer from 0 to 2"),
    ],
)
def test_loss_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()
