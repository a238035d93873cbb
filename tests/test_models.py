"""Published models run on fastlstm with their own numbers; skipped where a model's package has not been fetched.

FASTLSTM_MODELS: a folder with the packages, as `.ci/run` fetches them.
"""

import importlib.util
import io
import os
import pickle
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples" / "models"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def package(name):
    path = Path(os.environ.get("FASTLSTM_MODELS", ".")) / name
    if not path.exists():
        pytest.skip(f"{name} is not in the folder FASTLSTM_MODELS")
    return path


def test_madmom_networks(capsys):
    """The first network of each kind: LSTM with peepholes, GRU with a trained first state, RNN; one direction, both."""
    path = package("madmom-0.16.1.tar.gz")
    pytest.importorskip("scipy", reason="scipy is not installed")
    found = example("madmom_networks").main(path, 100, 1, rounds=1)
    assert len(found) == 8 and all(error < 1e-5 and spread > 0.1 for error, spread in found.values()), found
    assert capsys.readouterr().out.count("madmom's own") == 8


def test_silero_vad(capsys):
    """Streamed and at once, against ONNX Runtime and TorchScript; of 4 seconds half is speech."""
    path = package("silero_vad-6.2.3-py3-none-any.whl")
    for name in ("onnx", "onnxruntime"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    error, spread = example("silero_vad").main(path, 4, rounds=1)
    assert error < 1e-5 and spread > 0.9
    assert "125 frames" in capsys.readouterr().out


def test_g2p_en(capsys):
    error, spread = example("g2p_en").main(package("g2p_en-2.1.0-py3-none-any.whl"), 40, rounds=1)
    assert error < 1e-4 and spread > 20
    assert "phonemes same" in capsys.readouterr().out


def test_g2pm(capsys):
    error, spread = example("g2pm").main(package("g2pM-0.1.2.5-py3-none-any.whl"), rounds=1)
    assert error < 1e-4 and spread > 20
    shown = capsys.readouterr().out
    assert "jin1 tian1 yin2 xing2" in shown and "syllables same" in shown


@pytest.mark.parametrize("name", ["madmom_networks", "g2pm"])
def test_pickles_run_nothing_foreign(name):
    reader = example(name).Reader
    for code in (os.getcwd, print):
        with pytest.raises(pickle.UnpicklingError, match="expected arrays"):
            reader(io.BytesIO(pickle.dumps(code))).load()
