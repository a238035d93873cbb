"""The estimators: scikit-learn's own checks, its tools around them, and what is ours."""

import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import fastlstm
from fastlstm import nn, threads

pytest.importorskip("sklearn", reason="scikit-learn is not installed")

from sklearn.base import clone  # noqa: E402
from sklearn.calibration import CalibratedClassifierCV  # noqa: E402
from sklearn.exceptions import NotFittedError  # noqa: E402
from sklearn.model_selection import GridSearchCV, cross_val_score  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import StandardScaler  # noqa: E402
from sklearn.utils.estimator_checks import parametrize_with_checks  # noqa: E402

from fastlstm.sklearn import RecurrentClassifier, RecurrentRegressor  # noqa: E402

SMALL = {"hidden_size": 16, "learning_rate": 2e-2, "random_state": 0}
QUICK = SMALL | {"epochs": 10}
BOTH = pytest.mark.parametrize("kind", [RecurrentClassifier, RecurrentRegressor])


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")  # in scikit-learn's own check
@parametrize_with_checks([RecurrentClassifier(**SMALL), RecurrentRegressor(**SMALL)], expected_failed_checks=None)
def test_scikit_learns_checks(estimator, check):
    check(estimator)


def task(n=200, ragged=False, dtype=np.float32, seed=0):
    """Whether the first of two features sums up to more than 0; the sum at each step."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, 8, 2)).astype(dtype)
    if ragged:
        X = [x[: rng.integers(3, 9)] for x in X]
    sums = [np.cumsum(x[:, 0]) for x in X]
    y = np.where(np.array([s[-1] for s in sums]) > 0, "up", "down")
    return X, y, sums if ragged else np.array(sums)


@pytest.mark.parametrize("ragged", [False, True], ids=["array", "list"])
@pytest.mark.parametrize("options", [
    {"cell": "lstm"}, {"cell": "gru", "bidirectional": True}, {"cell": "rnn"}, {"cell": "slstm"},
    {"num_layers": 2, "dropout": 0.1, "layer_options": {"forget_bias": 1.0, "peepholes": True}},
    {"layer_options": {"proj_size": 5}, "schedule": "cosine", "weight_decay": 1e-3, "grad_clip": None},
], ids=["lstm", "bidirectional gru", "rnn", "slstm", "two layers", "projection"])  # fmt: skip
def test_classifier_learns(options, ragged):
    X, y, _ = task(400, ragged)
    new, truth, _ = task(400, ragged, seed=1)
    c = RecurrentClassifier(**QUICK | options).fit(X, y)
    assert c.score(new, truth) > 0.9
    assert c.model_.dtype == np.float32 and c.n_features_in_ == 2 and list(c.classes_) == ["down", "up"]
    p = c.predict_proba(new)
    np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(c.classes_[p.argmax(axis=1)], c.predict(new))
    np.testing.assert_allclose(np.exp(c.predict_log_proba(new)), p, rtol=1e-4)
    assert len(c.history_) == c.n_iter_ == 10 and c.history_[-1]["loss"] < c.history_[0]["loss"]


@pytest.mark.parametrize("ragged", [False, True], ids=["array", "list"])
def test_many_to_many(ragged):
    X, _, sums = task(300, ragged)
    r = RecurrentRegressor(many_to_many=True, **QUICK).fit(X, sums)
    predicted = r.predict(X)
    assert isinstance(predicted, list) == ragged and all(len(p) == len(x) for p, x in zip(predicted, X, strict=True))
    assert r.score(X, sums) > 0.95
    pairs = [np.stack([s, -s], axis=1) for s in sums] if ragged else np.stack([sums, -sums], axis=-1)
    two = RecurrentRegressor(many_to_many=True, **QUICK).fit(X, pairs)
    assert two.predict(X)[0].shape == (len(X[0]), 2) and two.score(X, pairs) > 0.95
    labels = [np.where(s > 0, "+", "-") for s in sums] if ragged else np.where(sums > 0, "+", "-")
    c = RecurrentClassifier(many_to_many=True, class_weight={"+": 3, "-": 1}, **QUICK)
    assert c.fit(X, labels, sample_weight=np.arange(300) % 3).score(X, labels) > 0.9
    assert c.predict_proba(X)[3].shape == (len(X[3]), 2)
    flat = np.concatenate([p == t for p, t in zip(c.predict(X), labels, strict=True)])
    assert c.score(X, labels) == pytest.approx(flat.mean())
    first = np.arange(300) < 7
    assert c.score(X, labels, sample_weight=first) == pytest.approx(c.score(X[:7], labels[:7]))


@pytest.mark.own
def test_a_list_of_equal_sequences_is_the_array():
    X, y, _ = task(100)
    c = RecurrentClassifier(**QUICK).fit(X, y)
    np.testing.assert_array_equal(c.predict_proba(list(X)), c.predict_proba(X))
    ragged = [x[:t] for x, t in zip(X, np.arange(100) % 7 + 1, strict=True)]
    alone = np.concatenate([c.predict_proba(x[None]) for x in ragged])
    np.testing.assert_allclose(c.predict_proba(ragged), alone, rtol=1e-4, atol=1e-6)


def test_a_table_is_one_feature_per_step():
    X, y, _ = task(60)
    table = X[:, :, 0]
    a, b = (RecurrentClassifier(**QUICK).fit(x, y) for x in (table, table[:, :, None]))
    np.testing.assert_array_equal(a.predict_proba(table), b.predict_proba(table))
    assert (a.n_features_in_, b.n_features_in_) == (8, 1)
    c = RecurrentClassifier(**QUICK).fit([row[: 3 + i % 5] for i, row in enumerate(table)], y)  # 1-D rows
    assert c.n_features_in_ == 1 and c.predict(table).shape == (60,)


def test_types_are_kept():
    X, y, sums = task(40)
    for dtype, expected in ((np.float64, "f8"), (np.float32, "f4"), (np.uint8, "f4"), (np.int64, "f8")):
        r = RecurrentRegressor(**QUICK | {"epochs": 1}).fit((10 * X).astype(dtype), sums[:, -1])
        assert r.model_.dtype == expected and r.predict(X).dtype == expected


def test_predictions_are_in_the_units_of_y():
    X, _, sums = task(300)
    y = 1e6 + 1e4 * sums[:, -1]
    assert RecurrentRegressor(**QUICK).fit(1e3 * X + 77, y).score(1e3 * X + 77, y) > 0.9


@pytest.mark.parametrize("loss", ["mse", "mae", "huber"])
def test_losses(loss):
    X, _, sums = task(300)
    y = sums[:, -1].copy()
    y[::30] += 300  # outliers
    error = abs(RecurrentRegressor(loss=loss, **SMALL | {"epochs": 20}).fit(X, y).predict(X) - sums[:, -1]).mean()
    assert (error < 1) == (loss == "mae"), error


@BOTH
@pytest.mark.parametrize("batch_size", [1000, 16])
def test_weights_are_what_they_say(kind, batch_size):
    """Weight 0 is absence; in one batch weight 3 is three times the sequence."""
    X, _, sums = task(60, dtype=np.float64)
    y = (sums[:, -1] > 0) if kind is RecurrentClassifier else sums[:, -1]
    w = np.arange(60) % 4
    make = lambda: kind(batch_size=batch_size, **QUICK)  # noqa: E731
    weighted = make().fit(X, y, sample_weight=w)
    without = make().fit(X[w > 0], y[w > 0], sample_weight=w[w > 0])
    np.testing.assert_array_equal(weighted.model_.flat_params, without.model_.flat_params)
    assert not np.allclose(weighted.model_.flat_params, make().fit(X[w > 0], y[w > 0]).model_.flat_params)
    if batch_size == 1000:
        repeated = make().fit(X.repeat(w, axis=0), y.repeat(w))
        np.testing.assert_allclose(repeated.model_.flat_params, weighted.model_.flat_params, rtol=1e-6, atol=1e-8)


@BOTH
@pytest.mark.parametrize("ragged", [False, True], ids=["array", "list"])
def test_weights_of_sequences_with_a_target_at_each_step(kind, ragged):
    X, y, sums = task(60, dtype=np.float64, ragged=ragged)
    target = sums if kind is RecurrentRegressor else [(row > 0).astype(int) for row in sums]
    w = 1 + np.arange(60) % 3
    take = (lambda a: [row for row, n in zip(a, w, strict=True) for _ in range(n)]) if ragged else (
        lambda a: np.repeat(np.asarray(a), w, axis=0))  # fmt: skip
    make = lambda: kind(many_to_many=True, batch_size=1000, **QUICK)  # noqa: E731
    weighted, repeated = make().fit(X, target, sample_weight=w), make().fit(take(X), take(target))
    np.testing.assert_allclose(repeated.model_.flat_params, weighted.model_.flat_params, rtol=1e-6, atol=1e-8)
    assert weighted.score(X, target, w) == pytest.approx(repeated.score(take(X), take(target)), rel=1e-6)
    assert kind(many_to_many=True, early_stopping=True, **QUICK).fit(X, target, sample_weight=w).best_score_ > 0.5


def test_a_batch_counts_by_its_weights():
    c = RecurrentClassifier()
    z, t = np.random.default_rng(0).normal(size=(6, 3)), np.array([0, 1, 2, 0, 1, 2])
    w = np.array([0.5, 1, 2, 3, 1, 4.5])
    loss, dz = nn.softmax_cross_entropy(z, t, weight=w)
    value, gradient = c._weighted_loss(z, t, w)
    np.testing.assert_allclose([value, *gradient[0]], [2 * loss, *2 * dz[0]])
    value, gradient = c._weighted_loss(z, t, 0 * w)
    assert value == 0 and not gradient.any()


def test_class_weight_balances():
    rng = np.random.default_rng(0)
    y = (rng.random(600) < 0.05).astype(int)
    X = rng.normal(size=(600, 6, 1)) + 0.5 * y[:, None, None]
    plain, balanced = (RecurrentClassifier(class_weight=w, **QUICK).fit(X, y) for w in (None, "balanced"))
    found = [c.predict(X)[y == 1].mean() for c in (plain, balanced)]
    assert found[0] < 0.6 < found[1]


@BOTH
def test_early_stopping_restores_the_best(kind):
    X, y, sums = task(120)
    y = y if kind is RecurrentClassifier else sums[:, -1] + np.random.default_rng(1).normal(size=120) * 3
    seen = []
    keep = lambda e, record: seen.append(e.model_.flat_params.copy())  # noqa: E731
    e = kind(early_stopping=True, patience=3, validation_fraction=0.25, callbacks=[keep], **SMALL).fit(X, y)
    scores = [record["validation_score"] for record in e.history_]
    assert len(scores) == int(np.argmax(scores)) + 1 + 3 < 50
    assert e.best_score_ == max(scores)
    np.testing.assert_array_equal(e.model_.flat_params, seen[int(np.argmax(scores))])


def test_early_stopping_by_a_scorer():
    X, y, _ = task(100)
    c = RecurrentClassifier(early_stopping=True, scoring="neg_log_loss", **QUICK).fit(X, y)
    assert all(record["validation_score"] < 0 for record in c.history_)
    c = RecurrentClassifier(early_stopping=True, scoring="neg_log_loss", **QUICK).fit(X[:, :, 0], y)
    assert all(record["validation_score"] < 0 for record in c.history_)
    ragged, _, sums = task(100, ragged=True)
    r = RecurrentRegressor(many_to_many=True, early_stopping=True, **QUICK).fit(ragged, sums)
    assert r.best_score_ > 0.8


@pytest.mark.parametrize("early", [False, True])
def test_an_interrupt_leaves_a_fitted_estimator(early, capsys):
    X, y, _ = task(200)
    seen = []

    def stop(e, record):
        seen.append(e.model_.flat_params.copy())
        if record["epoch"] == 4:
            raise KeyboardInterrupt

    c = RecurrentClassifier(early_stopping=early, callbacks=[stop], **SMALL).fit(X, y)
    err = capsys.readouterr().err
    assert err.startswith("interrupted in epoch ") and err.count("\n") == 1
    assert len(c.history_) == c.n_iter_ == 4 and c.predict(X).shape == (200,)
    best = int(np.argmax([r["validation_score"] for r in c.history_])) if early else 3
    np.testing.assert_array_equal(c.model_.flat_params, seen[best])
    assert ("the best so far" if early else "of the last step") in err


def test_callbacks_end_the_training_and_warm_start_goes_on():
    X, y, _ = task(200)
    c = RecurrentClassifier(callbacks=[lambda e, record: record["epoch"] == 2], warm_start=True, **QUICK)
    first = c.fit(X, y).model_.flat_params.copy()
    loss = c.history_[0]["loss"]
    assert c.n_iter_ == 2
    c.fit(X, y)
    assert c.history_[0]["loss"] < 0.8 * loss and not np.array_equal(first, c.model_.flat_params)
    cold = clone(c).set_params(warm_start=False)
    np.testing.assert_array_equal(cold.fit(X, y).model_.flat_params, cold.fit(X, y).model_.flat_params)
    with pytest.raises(ValueError, match="previously unseen labels"):
        c.fit(X, np.arange(200) % 3)
    for change in ({"hidden_size": 9}, {"cell": "gru"}, {"layer_options": {"peepholes": True}}, {"dropout": 0.5}):
        kept = c.get_params()
        with pytest.raises(ValueError, match=f"{[*change][0]}: expected .* as the network that goes on has"):
            c.set_params(**change).fit(X, y)
        with pytest.raises(ValueError, match=f"{[*change][0]}: expected .* as the network that goes on has"):
            c.partial_fit(X, y)
        c.set_params(**kept)
    assert c.set_params(warm_start=False, hidden_size=9).fit(X, y).model_[1].layer.hidden_size == 9


def test_partial_fit():
    X, y, sums = task(200)
    c = RecurrentClassifier(**QUICK)
    with pytest.raises(ValueError, match="classes: expected all classes in the first call"):
        c.partial_fit(X, y)
    for _ in range(4):
        for part in (slice(0, 100), slice(100, 200)):
            c.partial_fit(X[part], y[part], classes=["up", "down"])
    assert c.score(X, y) > 0.9 and [r["epoch"] for r in c.history_] == [*range(1, 9)]
    with pytest.raises(ValueError, match="classes: expected .* as before"):
        c.partial_fit(X, y, classes=["up", "down", "left"])
    with pytest.raises(ValueError, match="class_weight: partial_fit expects"):
        RecurrentClassifier(class_weight="balanced").partial_fit(X, y, classes=["up", "down"])
    r = RecurrentRegressor(**QUICK)
    for _ in range(10):
        r.partial_fit(X, sums[:, -1])
    assert r.score(X, sums[:, -1]) > 0.8
    again = pickle.loads(pickle.dumps(r))
    for e in (r, again):  # optimiser and order go on in the copy
        e.partial_fit(X, sums[:, -1])
    np.testing.assert_array_equal(r.model_.flat_params, again.model_.flat_params)


@pytest.mark.parametrize("ragged", [False, True], ids=["array", "list"])
def test_scikit_learns_tools(ragged):
    X, y, _ = task(150, ragged)
    c = RecurrentClassifier(**QUICK)
    assert cross_val_score(c, X, y, cv=3).mean() > 0.8
    search = GridSearchCV(c, {"cell": ["lstm", "gru"]}, cv=2).fit(X, y)
    assert search.best_score_ > 0.8 and search.predict(X).shape == (150,)
    calibrated = CalibratedClassifierCV(c, cv=2).fit(X, y)
    assert calibrated.score(X, y) > 0.8


def test_pipeline_and_frames():
    pandas = pytest.importorskip("pandas")
    X, y, _ = task(150)
    frame = pandas.DataFrame(X[:, :, 0]).add_prefix("day ")
    pipe = make_pipeline(StandardScaler(), RecurrentClassifier(**QUICK)).set_output(transform="pandas")
    assert pipe.fit(frame, y).score(frame, y) > 0.9
    assert pipe[-1].feature_names_in_[2] == "day 2"
    with pytest.raises(ValueError, match="feature names should match"):
        pipe.predict(frame[frame.columns[::-1]])
    sums = frame.cumsum(axis=1)  # and as the targets of all steps
    ragged = list(X[:, :, :1])
    ragged[0] = ragged[0][:4]
    column = pandas.Series(ragged, index=range(7, 7 + len(ragged)), dtype=object)
    c = RecurrentClassifier(**QUICK).fit(column, y)
    np.testing.assert_array_equal(c.predict(column), c.predict(ragged))
    r = RecurrentRegressor(many_to_many=True, **QUICK).fit(frame, sums)
    assert r.predict(frame).shape == (150, 8) and r.score(frame, sums) == pytest.approx(r.score(X[:, :, :1], sums))


@pytest.mark.own
def test_processes_of_joblib():
    joblib = pytest.importorskip("joblib")
    X, y, _ = task(100)
    jobs = [joblib.delayed(RecurrentClassifier(cell=cell, **QUICK).fit)(X, y) for cell in ("lstm", "gru")]
    with joblib.parallel_config("loky", n_jobs=2):
        found = joblib.Parallel()(jobs)
    for c, cell in zip(found, ("lstm", "gru"), strict=True):
        here = RecurrentClassifier(cell=cell, **QUICK).fit(X, y)
        np.testing.assert_array_equal(c.model_.flat_params, here.model_.flat_params)


@pytest.mark.own
def test_n_jobs_is_for_these_calls_alone():
    X, y, _ = task(100)
    before, seen = fastlstm.get_num_threads(), []
    record = lambda *_: seen.append(fastlstm.get_num_threads())  # noqa: E731
    one, three = (RecurrentClassifier(n_jobs=n, callbacks=[record], **QUICK | {"epochs": 1}).fit(X, y) for n in (1, 3))
    assert seen[0] == 1 and (seen[1] == 3 or seen[1] == before == 1) and fastlstm.get_num_threads() == before
    np.testing.assert_array_equal(one.model_.flat_params, three.model_.flat_params)


def test_fits_of_several_threads():
    X, y, _ = task(100)
    fit = lambda seed: RecurrentClassifier(n_jobs=seed + 1, **QUICK | {"random_state": seed}).fit(X, y)  # noqa: E731
    alone = [fit(seed).model_.flat_params for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for params, c in zip(alone, pool.map(fit, range(4)), strict=True):
            np.testing.assert_array_equal(c.model_.flat_params, params)


def test_blas_is_held_and_let_go():
    controller = pytest.importorskip("threadpoolctl").ThreadpoolController().select(user_api="blas")
    counts = lambda: [library.num_threads for library in controller.lib_controllers]  # noqa: E731
    before = counts()
    with threads.blas_on_one_thread(), threads.blas_on_one_thread():
        assert set(counts()) == {1}
    assert counts() == before


def test_pickle_is_small_and_exact():
    X, y, _ = task(100)
    c = RecurrentClassifier(hidden_size=64, epochs=2, random_state=0).fit(X, y)
    data = pickle.dumps(c)
    np.testing.assert_array_equal(pickle.loads(data).predict_proba(X), c.predict_proba(X))
    assert len(data) < 2.2 * c.model_.flat_params.nbytes + 10_000  # parameters and gradients, not the optimiser


@pytest.mark.parametrize("options, error", [
    ({"cell": "elman"}, "cell: expected one of 'lstm'"), ({"epochs": 0}, "epochs: expected an integer from 1"),
    ({"schedule": "cyclic"}, "schedule: expected one of"), ({"dropout": 1.0}, "dropout: expected 0 <= dropout < 1"),
    ({"validation_fraction": 0}, "validation_fraction: expected"), ({"learning_rate": 0}, "learning_rate: expected"),
    ({"callbacks": [3]}, "callbacks: expected a list of functions"), ({"bidirectional": 2}, "bidirectional: expected"),
    ({"hidden_size": 0}, "hidden_size: expected"), ({"layer_options": {"units": 3}}, "layer_options: .* got 'units'"),
    ({"patience": 0}, "patience: expected"), ({"tol": "small"}, "tol: expected a number"),
    ({"layer_options": {"batch_first": True}}, "layer_options: .* got 'batch_first'"),
    ({"layer_options": {"num_layers": 2}}, "layer_options: .* got 'num_layers'"),
    ({"layer_options": ["peepholes"]}, "layer_options: expected a dict or None, got a list"),
    ({"callbacks": print}, "callbacks: expected a list of functions"), ({"n_jobs": 1.5}, "n_jobs: expected an integer"),
    ({"class_weight": {"up": -1, "down": 1}}, "class_weight: expected numbers >= 0"),
    ({"many_to_many": True, "scoring": "accuracy"}, "scoring: expected None or a function"),
])  # fmt: skip
def test_bad_parameters(options, error):
    X, y, _ = task(20)
    with pytest.raises((ValueError, TypeError), match=error):
        RecurrentClassifier(**QUICK | options).fit(X, y)


def test_bad_data():
    X, y, sums = task(20)
    ragged, _, _ = task(20, ragged=True)
    c = RecurrentClassifier(**QUICK | {"epochs": 1})
    with pytest.raises(NotFittedError):
        c.predict(X)
    c.fit(X, y)
    for bad, error in (
        (X[:, :, :1], "X has 1 features a step, but RecurrentClassifier is expecting 2"),
        ([np.ones((3, 2)), np.ones((3, 1))], r"X\[1\]: expected an array of shape \(T_i, 2\)"),
        ([np.ones((3, 2)), np.ones((0, 2))], r"X\[1\]: expected an array"),
        ([np.ones((3, 2)), np.full((2, 2), np.nan)], "X contains NaN"),
        (np.full((2, 3, 2), np.inf), "X contains infinity"),
        (np.ones((2, 3, 2, 1)), "X: expected an array"),
        (np.ones((2, 0, 2)), "X: expected an array"),
        (np.ones(3), "Expected 2D array, got 1D array instead"),
        ([[[1.0, 2.0]], [[1.0, 2.0], [3.0, 4.0]]], "X: expected an array .* make each sequence an array"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=error):
            c.predict(bad)
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        c.fit(X, y[:-1])
    with pytest.raises(ValueError, match="Unknown label type"):
        c.fit(X, sums[:, 0])
    with pytest.raises(ValueError, match="not 0|zero"):
        c.fit(X, y, sample_weight=np.zeros(20))
    with pytest.raises(ValueError, match="(?i)negative"):
        c.fit(X, y, sample_weight=-np.ones(20))
    each = RecurrentRegressor(many_to_many=True, **QUICK | {"epochs": 1})
    with pytest.raises(ValueError, match=r"y\[0\]: expected a target for each step"):
        each.fit(ragged, [np.ones(9)] * 20)
    with pytest.raises(ValueError, match="y: expected the targets of 20 sequences"):
        each.fit(X, sums[:3])
    each.fit(X, sums).set_params(warm_start=True)
    with pytest.raises(ValueError, match="y: expected targets of shape"):
        each.fit(X, sums[:, :, None])


@pytest.mark.own
def test_import_of_the_package_imports_none_of_it():
    code = "import fastlstm, sys; assert not {'sklearn', 'joblib', 'scipy'} & set(sys.modules); import fastlstm.sklearn"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
