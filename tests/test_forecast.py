"""The forecaster: what stands in its windows, what it forecasts, and how that is measured."""

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="scikit-learn is not installed")

from sklearn.base import clone  # noqa: E402
from sklearn.utils.estimator_checks import check_no_attributes_set_in_init, check_parameters_default_constructible  # noqa: E402

from fastlstm.forecast import RecurrentForecaster, last_value, rolling_origin, seasonal_naive  # noqa: E402

SMALL = {"hidden_size": 8, "epochs": 10, "learning_rate": 2e-2, "random_state": 0}


def wave(n=300, noise=0.1, trend=0.0, seed=0):
    t = np.arange(n)
    return 10 + np.sin(2 * np.pi * t / 12) + trend * t + noise * np.random.default_rng(seed).normal(size=n)


@pytest.mark.parametrize("difference", [None, "last", "season"])
@pytest.mark.parametrize("season", [None, 12])
def test_windows_hold_the_past_and_targets_what_follows(season, difference):
    f = RecurrentForecaster(horizon=3, window=5, season=season, difference=difference)
    if difference == "season" and season is None:
        with pytest.raises(ValueError, match="season: expected the steps"):
            f.fit(np.arange(40.0))
        return
    f._features = 1
    row, extra = np.random.default_rng(0).normal(size=(2, 40))
    x, after = f._windows(row, extra[:, None], (0.0, 1.0))
    least = 5 + (season or 0)
    assert len(x) == len(after) == 40 - 3 - least + 1 and x.shape[2] == (4 if season else 3)
    for i, end in enumerate(range(least, 38)):
        values, base = row[end - 5 : end], np.zeros(3)
        level = 0.0
        if difference == "last":
            level, base = row[end - 1], np.full(3, row[end - 1])
        if difference == "season":
            level, base = row[end - 12 : end].mean(), row[end - 12 : end - 9]
        columns = [values - level]
        if season:
            columns.append(values - row[end - 17 : end - 12])
        columns += [extra[end - 5 : end], extra[end - 2 : end + 3]]  # the last: of the step that is forecast
        np.testing.assert_allclose(x[i], np.stack(columns, axis=1), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(after[i] + base, row[end : end + 3])


@pytest.mark.parametrize("difference", [None, "last", "season"])
def test_forecasts_a_season_and_its_noise(difference):
    series = wave(400)
    f = RecurrentForecaster(12, 24, season=12, difference=difference, n_estimators=2, **SMALL)
    found = rolling_origin(f, series, 12, origins=20, refit_every=20)
    naive = rolling_origin(lambda past: seasonal_naive(past, 12, 12), series, 12, origins=20)
    last = rolling_origin(lambda past: last_value(past, 12), series, 12, origins=20)
    assert found.mae < naive.mae < last.mae and found.rmse < naive.rmse
    assert 0.079 < found.mae  # the mean of the noise's absolute value: no one can do better on average
    low, middle, high = found.coverage
    assert 0.02 < low < 0.3 and 0.3 < middle < 0.7 and 0.7 < high < 0.98
    np.testing.assert_array_equal(found.forecast, found.quantiles[:, :, 1])
    np.testing.assert_array_equal(found.truth[-1], series[-12:])
    np.testing.assert_array_equal(found.origins, np.arange(369, 389))


def test_a_trend_goes_on():
    series = wave(300, trend=0.05)
    f = RecurrentForecaster(12, 24, season=12, difference="season", **SMALL).fit(series)
    ahead = wave(312, noise=0, trend=0.05)[300:]
    assert abs(f.predict() - ahead).mean() < 0.15 < abs(seasonal_naive(series, 12, 12) - ahead).mean()


def test_exogenous_features_are_known_ahead():
    rng = np.random.default_rng(0)
    promotion = (rng.random(400) < 0.3).astype(float)
    series = 5 + 2 * promotion + 0.1 * rng.normal(size=400)
    f = RecurrentForecaster(4, 8, **SMALL | {"epochs": 20}).fit(series[:380], promotion[:380, None])
    ahead = f.predict(exog=promotion[380:384, None])
    assert abs(ahead - series[380:384]).max() < 0.6
    np.testing.assert_array_equal(ahead, f.predict(4, series[:380], promotion[:384, None]))
    np.testing.assert_array_equal(ahead[:2], f.predict(2, exog=promotion[380:384, None]))
    without = RecurrentForecaster(4, 8, **SMALL).fit(series[:380])
    assert abs(without.predict() - series[380:384]).max() > 0.6  # it cannot know
    found = rolling_origin(f, series, 4, 5, exog=promotion[:, None], refit_every=5)
    assert found.mae < 0.4
    for bad, error in ((None, "exog: expected 1 features"), (np.ones((3, 1)), r"exog: expected shape \(4, 1\)"),
                       (np.ones((4, 2)), r"exog: expected shape \(4, 1\)")):  # fmt: skip
        with pytest.raises(ValueError, match=error):
            f.predict(exog=bad)
    with pytest.raises(ValueError, match="exog: expected None, as in fit"):
        without.predict(exog=np.ones((4, 1)))
    with pytest.raises(ValueError, match=r"exog: expected shape \(380, 1\)"):
        f.fit(series[:380], promotion[:381, None])


def test_several_series_of_different_sizes():
    many = [10.0**k * wave(200, seed=k) for k in range(3)]
    f = RecurrentForecaster(6, 24, **SMALL).fit([series[:190] for series in many])
    found = f.predict()
    assert len(found) == 3
    for k, forecast in enumerate(found):
        assert forecast.shape == (6,) and abs(forecast - many[k][190:196]).mean() < 0.4 * 10.0**k
    (again,) = f.predict(6, [many[1][:190]])
    np.testing.assert_allclose(again, found[1], rtol=1e-6)
    assert f.predict_quantiles(2)[0].shape == (2, 3)
    assert f.predict(6, many[2]).shape == (6,)


def test_quantiles_do_not_cross_and_keep_their_order():
    series = wave(150, noise=1.0)
    f = RecurrentForecaster(5, 12, quantiles=(0.95, 0.5, 0.05), **SMALL | {"epochs": 2}).fit(series)
    q = f.predict_quantiles()
    assert (q[:, 0] >= q[:, 1]).all() and (q[:, 1] >= q[:, 2]).all() and (q[:, 0] > q[:, 2]).any()
    np.testing.assert_array_equal(f.predict(), q[:, 1])


def test_members_are_averaged_and_repeatable():
    series = wave(150)
    make = lambda **o: RecurrentForecaster(5, 12, **SMALL | o).fit(series)  # noqa: E731
    three = make(n_estimators=3)
    assert len({network.model_.flat_params.tobytes() for network in three.networks_}) == 3
    np.testing.assert_array_equal(three.predict(), make(n_estimators=3).predict())
    assert not np.array_equal(three.predict(), make().predict())
    early = make(early_stopping=True, validation_fraction=0.3, epochs=40, patience=3, learning_rate=0.1)
    scores = [record["validation_score"] for record in early.networks_[0].history_]
    assert max(scores) == early.networks_[0].best_score_ < 0


def test_rolling_origin_looks_at_the_past_alone():
    seen = []

    def method(past):
        seen.append(len(past))
        assert np.array_equal(past, np.arange(len(past)))
        return last_value(past, 3)

    found = rolling_origin(method, np.arange(50), 3, origins=4, step=5)
    assert seen == [32, 37, 42, 47] == found.origins.tolist()
    assert found.mae == 2 and found.rmse == pytest.approx(np.sqrt(14 / 3))
    with pytest.raises(ValueError, match="quantiles: expected those of a RecurrentForecaster"):
        _ = found.coverage
    with pytest.raises(ValueError, match="method: expected forecasts of shape"):
        rolling_origin(lambda past: [1.0], np.arange(50), 3)
    with pytest.raises(ValueError, match="series: expected more than"):
        rolling_origin(method, np.arange(9), 3, origins=10)
    forecaster = RecurrentForecaster(4, 6, **SMALL | {"epochs": 1})
    with pytest.raises(ValueError, match="horizon: expected 4, the forecaster's, with exog, got 3"):
        rolling_origin(forecaster, wave(60), 3, exog=np.ones((60, 1)))
    with pytest.raises(ValueError, match="exog: expected 60 rows, as series, got 59"):
        rolling_origin(forecaster, wave(60), 4, exog=np.ones((59, 1)))
    with pytest.raises(ValueError, match=r"exog: expected shape \(4, 2\) for each of 1 series"):
        forecaster.fit(wave(60), np.random.default_rng(0).normal(size=(60, 2))).predict(exog=np.ones((4, 1)))


def test_parameters_behave_as_scikit_learns():
    f = RecurrentForecaster(horizon=5, season=7)
    assert clone(f).get_params() == f.get_params() and "season=7" in repr(f)
    check_parameters_default_constructible("RecurrentForecaster", f)
    check_no_attributes_set_in_init("RecurrentForecaster", f)


@pytest.mark.parametrize("options, error", [
    ({"horizon": 0}, "horizon: expected"), ({"window": 0}, "window: expected"), ({"season": 0}, "season: expected"),
    ({"difference": "first"}, "difference: expected None, 'last' or 'season'"),
    ({"quantiles": (0.1, 0.9)}, "quantiles: expected numbers between 0 and 1, with 0.5"),
    ({"quantiles": (0, 0.5)}, "quantiles: expected"), ({"cell": "elman"}, "cell: expected one of"),
    ({"window": 300}, "series: expected at least 312 values"), ({"n_estimators": 0}, "n_estimators: expected"),
])  # fmt: skip
def test_bad_parameters(options, error):
    with pytest.raises(ValueError, match=error):
        RecurrentForecaster(**SMALL | options).fit(wave())


def test_bad_series():
    f = RecurrentForecaster(3, 6, **SMALL | {"epochs": 1})
    for bad, error in (
        ([1.0, np.nan] * 20, "series contains NaN"),
        (np.ones((30, 2)), "series: expected 1 axis"),
        (np.ones(5), "expected at least 9 values"),
    ):
        with pytest.raises(ValueError, match=error):
            f.fit(bad)
    f.fit(wave())
    with pytest.raises(ValueError, match="horizon: expected an integer from 1 to 3"):
        f.predict(4)
    with pytest.raises(ValueError, match="series: expected at least 6 values"):
        f.predict(3, np.ones(4))
