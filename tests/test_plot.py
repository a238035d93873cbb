"""The picture of the gates, from a tape made by hand."""

import sys

import numpy as np
import pytest

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
