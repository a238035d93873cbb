"""The pictures: what they show, and that it can be read. The gates from a tape made by hand."""

import sys

import numpy as np
import pytest
from conftest import numeric_gradient

import fastlstm
from fastlstm import plot

STEPS, BATCH, UNITS = 30, 3, 5


class FakeTape:
    """What `plot.gates` reads of a tape."""

    def __init__(self, names):
        rng = np.random.default_rng(0)
        self.names = names
        self.values = {k: rng.uniform(-1 if k in "gnh" else 0, 1, (STEPS, BATCH, UNITS)) for k in [*names, "c", "h"]}

    def gates(self, layer, reverse=False):
        return {k: self.values[k] for k in self.names}

    def cells(self, layer, reverse=False):
        assert "f" in self.names, "only an LSTM has a cell"
        return 4 * self.values["c"]

    def hidden(self, layer, reverse=False):
        return self.values["h"]


def test_the_candidate_of_an_slstm_has_signs(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    x = np.random.default_rng(0).standard_normal((5, 2, 3)).astype(np.float32)
    for layer, title, low in (
        (fastlstm.SLSTM(3, 4, rng=0), "candidate z", -1),
        (fastlstm.GRU(3, 4, rng=0), "update gate z", 0),
    ):
        figure = plot.gates(layer.forward(x)[2])
        (ax,) = [ax for ax in figure.axes if ax.get_title() == title]
        assert ax.images[0].get_clim() == (low, 1)


@pytest.mark.parametrize(("names", "titles"), [("ifgo", 6), ("rzn", 4), ("", 1), ("h", 1)])
def test_panels(names, titles, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    tape = FakeTape(list(names))
    figure = plot.gates(tape, layer=1, reverse=True, sequence=2, path=tmp_path / "gates.png")
    panels = [ax for ax in figure.axes if ax.get_title()]
    assert len(panels) == titles and figure.get_suptitle() == "layer 1, reverse, sequence 2"
    for name, ax in zip(names.replace("h", ""), panels, strict=False):
        image = ax.images[0]
        np.testing.assert_array_equal(image.get_array(), tape.values[name][:, 2].T)
        assert image.get_clim() == ((-1, 1) if name in "gn" else (0, 1))
    if "f" in names:
        assert panels[4].images[0].get_clim()[1] == pytest.approx(4 * tape.values["c"][:, 2].max())
    assert panels[-1].get_title() == "hidden state h"
    assert (tmp_path / "gates.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("sequence", [-1, BATCH])
def test_no_such_sequence(sequence):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    with pytest.raises(ValueError, match="sequence: expected 0..2, got"):
        plot.gates(FakeTape(list("ifgo")), sequence=sequence)


def test_no_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot.gates(FakeTape(list("ifgo")))


def test_what_cannot_be_drawn():
    lstm = fastlstm.LSTM(2, 3, rng=0)
    _, _, tape = lstm.forward(np.zeros((4, 2, 2), np.float32))
    _, _, empty = lstm.forward(np.zeros((0, 2, 2), np.float32))
    for arguments, error, word in (
        ((3,), TypeError, "tape"),
        ((tape, 0, False, "a"), TypeError, "sequence"),
        ((tape, 0, False, 1.0), TypeError, "sequence"),
        ((tape, 0, False, 2), ValueError, "sequence"),
        ((empty,), ValueError, "no steps"),
    ):
        with pytest.raises(error, match=word):
            plot.gates(*arguments)


# ------------------------------------------------- curves, confusion, forecast

HISTORY = [
    {"epoch": e, "loss": 2.0**-e, "lr": 0.1, "validation_loss": 2.0**-e + 0.01, "validation_score": 1 - 2.0**-e}
    for e in range(1, 9)
]


def brightness(colour):
    from matplotlib.colors import to_rgb

    return float(np.dot(to_rgb(colour), (0.2126, 0.7152, 0.0722)))


def texts(figure):
    """All that is written and seen, with its box; matplotlib also keeps labels of ticks outside of the view."""
    from matplotlib.text import Text

    figure.draw_without_rendering()
    for ax in figure.axes:
        unseen = set()
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
                if not low <= tick.get_loc() <= high:
                    unseen |= set(tick.findobj(Text))
        for text in ax.findobj(Text):
            if text.get_text() and text.get_visible() and text not in unseen:
                yield text, text.get_window_extent()


def pictures(style):
    rng = np.random.default_rng(0)
    label, wave = rng.integers(0, 4, 200), np.sin(np.arange(60) / 5)
    names = np.array(["ant", "buff-tailed bumble bee", "cat", "dragonfly"])
    lstm = fastlstm.LSTM(2, 3, rng=0)
    x = rng.standard_normal((20, 2, 2)).astype(np.float32)
    yield plot.learning_curves(HISTORY, style=style)
    yield plot.confusion_matrix(label, (label + (rng.random(200) < 0.1)) % 4, style=style)
    yield plot.confusion_matrix(names[label], names[::-1][label], style=style)
    bands = {"95 %": (wave[:9] - 2, wave[:9] + 2), "80 %": (wave[:9] - 1, wave[:9] + 1)}
    yield plot.forecast(wave, wave[:9], intervals=bands, actual=wave[:9] + 0.1, style=style)
    yield plot.forecast(wave, wave[:9], times=np.datetime64("2024-01-01") + np.arange(69), style=style)
    yield plot.gradients({"LSTM": plot.gradient_sizes(lstm, x), "flat": np.linspace(1, 2, 20)}, style=style)
    yield plot.gates(lstm.forward(x)[2], style=style)
    yield plot.gates(lstm.forward(x)[2], style=style, name="c")


@pytest.mark.parametrize("style", ["light", "dark"])
def test_text_is_readable_and_does_not_overlap(style):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    for figure in pictures(style):
        face = brightness(figure.get_facecolor())
        assert (face > 0.9) == (style == "light")
        written = list(texts(figure))
        in_fields = {id(text) for ax in figure.axes if ax.images for text in ax.texts}
        assert len(written) > 5
        for i, (text, box) in enumerate(written):
            if id(text) not in in_fields:
                assert abs(brightness(text.get_color()) - face) > 0.5, text
            others = [other for other, other_box in written[i + 1 :] if overlap(box, other_box)]
            assert not others, f"{text} and {others[0]}"
            assert figure.bbox.x0 - 1 <= box.x0 and box.x1 <= figure.bbox.x1 + 1, text
        for ax in figure.axes:
            for line in ax.lines:
                if line.get_label()[0] != "_":
                    assert abs(brightness(line.get_color()) - face) > 0.2


def overlap(a, b):
    return min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1


def test_learning_curves_show_losses_and_scores():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    as_lists = {name: [record[name] for record in HISTORY] for name in HISTORY[0]}
    for history in (HISTORY, as_lists):
        left, right = plot.learning_curves(history).axes
        assert [line.get_label() for line in left.lines] == ["loss", "validation loss"]
        np.testing.assert_array_equal(left.lines[1].get_data(), [range(1, 9), as_lists["validation_loss"]])
        np.testing.assert_array_equal(right.lines[0].get_ydata(), as_lists["validation_score"])
        assert left.get_yscale() == "log" and right.get_yscale() == "linear"
        assert [text.get_text() for text in left.get_legend().get_texts()] == [
            "loss", "validation loss", "validation score",
        ]  # fmt: skip
    (alone,) = plot.learning_curves({"accuracy": [0.1, 0.2]}).axes
    assert alone.get_yscale() == "linear" and alone.get_ylabel() == "score"
    for history, error in (([], TypeError), ([1], TypeError), ({"lr": [1]}, ValueError)):
        with pytest.raises(error, match="history: expected"):
            plot.learning_curves(history)


def test_confusion_matrix_counts():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    true, predicted = ["a", "a", "b", "c", "a"], ["a", "b", "b", "a", "a"]
    ax = plot.confusion_matrix(true, predicted, labels=["c", "b", "a"]).axes[0]
    expected = np.array([[0, 0, 1], [0, 1, 0], [0, 1, 2]])
    np.testing.assert_allclose(ax.images[0].get_array(), expected / expected.sum(axis=1, keepdims=True))
    written = {tuple(map(int, text.get_position()))[::-1]: text.get_text() for text in ax.texts}
    assert written == {(0, 2): "1", (1, 1): "1", (2, 1): "1", (2, 2): "2"}
    assert [t.get_text() for t in ax.get_yticklabels()] == ["c", "b", "a"] and "3 of 5 right" in ax.get_title()
    assert len(plot.confusion_matrix(np.arange(60), np.arange(60)).axes[0].get_xticks()) <= 40
    for arguments, match in (
        (([1], [1, 2]), "predicted: expected"),
        (([], []), "predicted: expected"),
        (([1, 2], [1, 1], [1]), r"labels: .*\[2\] is missing"),
        (([1, 2], [1, 1], [1, 2, 1]), "labels: expected each class once"),
    ):
        with pytest.raises(ValueError, match=match):
            plot.confusion_matrix(*arguments[:2], labels=arguments[2] if len(arguments) > 2 else None)


def test_forecast_stands_after_the_series():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    series, ahead = np.arange(10.0), np.array([10.0, 12, 11])
    (ax,) = plot.forecast(series, ahead, intervals=(ahead - 1, ahead + 2), actual=ahead + 0.5, shown=4).axes
    known, came, predicted, end = ax.lines
    np.testing.assert_array_equal(known.get_data(), [range(6, 10), series[6:]])
    np.testing.assert_array_equal(came.get_data(), [range(9, 13), [9, 10.5, 12.5, 11.5]])
    np.testing.assert_array_equal(predicted.get_data(), [range(10, 13), ahead])
    band = ax.collections[0].get_paths()[0].vertices
    assert band[:, 0].min() == 10 and band[:, 0].max() == 12 and band[:, 1].min() == 9 and band[:, 1].max() == 14
    assert set(end.get_xdata()) == {9}
    for options, match in (
        ({"intervals": (ahead + 1, ahead)}, "lower <= upper"),
        ({"intervals": (ahead,)}, "expected a pair"),
        ({"intervals": (ahead, ahead[:2])}, r"intervals: expected shape \(3,\)"),
        ({"actual": ahead[:2]}, r"actual: expected shape \(3,\), got shape \(2,\)"),
        ({"times": range(12)}, r"times: expected shape \(13,\)"),
        ({"shown": 0}, "shown: expected at least 1"),
        ({"style": "blue"}, "style: expected 'light' or 'dark', got 'blue'"),
    ):
        with pytest.raises(ValueError, match=match):
            plot.forecast(series, ahead, **options)


# ------------------------------------------------------- gradients, given Axes


@pytest.mark.parametrize("batch_first", [False, True])
def test_gradient_sizes_are_those_of_the_input(batch_first):
    rng = np.random.default_rng(0)
    gru = fastlstm.GRU(2, 4, batch_first=batch_first, dtype=np.float64, rng=0)
    gru.flat_grads[:] = 3
    x, dy = rng.standard_normal((6, 3, 2)), rng.standard_normal((3, 4))
    given = x.swapaxes(0, 1) if batch_first else x
    sizes = plot.gradient_sizes(gru, given, dy)
    assert (gru.flat_grads == 3).all()

    def loss():
        y = gru(x.swapaxes(0, 1) if batch_first else x)[0]
        return np.sum((y[:, -1] if batch_first else y[-1]) * dy)

    numeric = numeric_gradient(loss, x)
    np.testing.assert_allclose(sizes, np.sqrt((numeric**2).sum(axis=2).mean(axis=1)), rtol=1e-6)
    assert plot.gradient_sizes(gru, given).shape == (6,)
    for layer, arguments, match in (
        (fastlstm.GRU(2, 4, bidirectional=True), (given,), "layer: expected .* one direction"),
        (fastlstm.GRU(2, 4, direction="reverse"), (given,), "layer: expected .* one direction"),
        (gru, (given[0],), "x: expected three axes"),
        (gru, (given, dy[:2]), r"dy: expected shape \(3, 4\)"),
    ):
        with pytest.raises(ValueError, match=match):
            plot.gradient_sizes(layer, *arguments)


def test_gradients_of_several_layers():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    (ax,) = plot.gradients({"RNN": [0, 0.001, 0.1, 2], "LSTM": [1, 1.5, 1.8, 2]}).axes
    rnn, lstm = ax.lines
    np.testing.assert_allclose(rnn.get_ydata(), [1, 0.05, 0.0005, np.nan])
    np.testing.assert_allclose(lstm.get_data(), [range(4), [1, 0.9, 0.75, 0.5]])
    assert ax.get_yscale() == "log"
    for sizes, error in (({}, TypeError), ([1.0], TypeError), ({"a": [1, 0]}, ValueError), ({"a": []}, ValueError)):
        with pytest.raises(error, match="sizes"):
            plot.gradients(sizes)


def test_on_a_given_axes(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from matplotlib.figure import Figure

    tape = fastlstm.LSTM(2, 3, rng=0).forward(np.zeros((4, 2, 2), np.float32))[2]
    figure = Figure(layout="constrained")
    axes = figure.subplots(2, 3).ravel()
    axes[0].set_facecolor("black")
    calls = [
        lambda **o: plot.gradients({"a": [1, 2]}, **o),
        lambda **o: plot.learning_curves(HISTORY, **o),
        lambda **o: plot.confusion_matrix([1, 2], [2, 2], **o),
        lambda **o: plot.forecast([1, 2], [3], **o),
        lambda **o: plot.gates(tape, name="f", **o),
    ]
    for ax, call in zip(axes, calls, strict=False):
        assert call(ax=ax) is figure and ax.has_data()
        with pytest.raises(TypeError, match="ax: expected a matplotlib Axes, got int"):
            call(ax=3)
    assert brightness(axes[0].lines[0].get_color()) > brightness(axes[1].lines[0].get_color())  # on black, on white
    assert calls[3](ax=axes[5], path=tmp_path / "all.svg") is figure
    assert (tmp_path / "all.svg").stat().st_size > 5000
    with pytest.raises(ValueError, match="name: expected one of i, f, g, o, c, h with ax, got None"):
        plot.gates(tape, ax=axes[5])
    with pytest.raises(ValueError, match="name: expected one of i, f, g, o, c, h, got 'z'"):
        plot.gates(tape, name="z")
