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


def test_madmom_beats(capsys):
    error, spread = example("madmom_beats").main(package("madmom-0.16.1.tar.gz"), 200, 2)
    assert error < 1e-5 and spread > 0.1
    assert "8 networks" in capsys.readouterr().out


def test_madmom_beats_runs_nothing_foreign():
    reader = example("madmom_beats").Reader
    for code in (os.getcwd, print):
        with pytest.raises(pickle.UnpicklingError, match="expected arrays"):
            reader(io.BytesIO(pickle.dumps(code))).load()
