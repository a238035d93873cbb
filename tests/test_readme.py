"""README.md as written: its Python runs, and its commands name things that exist."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

import fastlstm

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def blocks(language):
    """(line, whether it continues the one before, text) of each block of this language."""
    pattern = rf"^(<!-- continues -->\n)?```{language}\n(.*?)^```$"
    for found in re.finditer(pattern, TEXT, re.MULTILINE | re.DOTALL):
        yield TEXT.count("\n", 0, found.start(2)) + 1, bool(found[1]), found[2]


PYTHON = list(blocks("python"))
LINES = [line for _, _, text in blocks("sh") for line in text.splitlines()]
SET_UP = [line for line in LINES if line.startswith("python3 -m venv .venv && ")]


def run(index):
    """Run block `index`, after those that it continues; returns its names."""
    first = index
    while PYTHON[first][1]:
        first -= 1
    names = {"__name__": "__main__"}
    for line, _, text in PYTHON[first : index + 1]:
        for module, what in (("torch", "PyTorch"), ("matplotlib", "matplotlib")):
            if module in text or (module == "matplotlib" and "plot.gates" in text):
                pytest.importorskip(module, reason=f"{what} is not installed")
        exec(compile("\n" * (line - 1) + text, "README.md", "exec"), names)
    return names


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """In an empty folder, with the number of threads restored."""
    monkeypatch.chdir(tmp_path)
    chosen = fastlstm.threads._chosen
    yield
    fastlstm.set_num_threads(chosen)


@pytest.mark.parametrize("index", range(len(PYTHON)), ids=[f"line{line}" for line, _, _ in PYTHON])
def test_block_runs(index):
    run(index)


def find(text):
    (index,) = [i for i, block in enumerate(PYTHON) if text in block[2]]
    return index


def test_training_loop_learns_and_is_short():
    index = find("adam.step()")
    names = run(index)
    assert names["loss"] < 0.1 * np.var(names["target"])
    loop = PYTHON[index][2].split("rng = ")[1].splitlines()
    assert len(loop) <= 15


def test_gates_keep_and_hide(capsys):
    names = run(find("numbers = "))
    gates, c, h, numbers = names["gates"], names["c"][:, 0], names["y"][:, 0], names["numbers"]
    held = slice(51, 350)
    assert (gates["f"] > 0.9999).all()
    assert (gates["i"][held] < 1e-4).all()
    assert (gates["o"][held] < 1e-4).all()
    np.testing.assert_allclose(c[50:350], np.broadcast_to(numbers, (300, 4)), atol=5e-3)  # kept for 300 steps
    np.testing.assert_allclose(c[349], c[50], rtol=1e-3)
    assert abs(h[held]).max() < 1e-4  # and to itself
    np.testing.assert_allclose(h[350], np.tanh(c[350]), rtol=1e-3)
    assert abs(h[360:]).max() < 1e-4
    assert capsys.readouterr().out == next(text for _, _, text in blocks("text") if text.startswith("step"))


def test_gradient_crosses_300_steps(tmp_path):
    names = run(find("plot.gates("))
    f = names["gates"]["f"][51:351, 0].prod(axis=0)
    assert (f > 0.98).all()
    # d h_350 / d x_50: through the input gate, 300 forget gates, and the open output gate
    i, c, g = 1 / (1 + np.exp(-10.0)), names["c"][350, 0], names["numbers"]
    expected = np.sum(i * (1 - np.tanh(c) ** 2) * f * g * i * (1 - i) * 20)
    np.testing.assert_allclose(names["dx"][50, 0, 0], expected, rtol=1e-2)
    assert (tmp_path / "gates.png").read_bytes()[:4] == b"\x89PNG"
    assert (ROOT / "docs" / "gates.png").stat().st_size < 60_000


def test_set_up_is_two_commands_of_one_line():
    assert len(SET_UP) == 2
    job, tests = SET_UP
    assert job.endswith(".venv/bin/python -m fastlstm mnist")
    assert tests.endswith(".venv/bin/python -m pytest")
    extras = PROJECT["project"]["optional-dependencies"]
    for command in SET_UP:
        assert len(command.split(" && ")) == 3
        (target,) = [word for word in shlex.split(command) if word.startswith(".[")]
        assert set(target[2:-1].split(",")) <= set(extras)
    parity = extras["parity"]
    assert "torch==2.13.0" in parity
    assert {"onnx", "onnxruntime"} <= {re.match(r"[a-z]+", name)[0] for name in parity}


def test_ci_takes_the_test_command_from_here():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    pattern = re.search(r"grep '(\^python3 -m venv.*?)' README\.md", script)[1]
    assert [line for line in TEXT.splitlines() if re.search(pattern, line)] == SET_UP[1:]


@pytest.mark.parametrize("arguments", [["mnist", "--help"], ["config"]], ids=" ".join)
def test_commands_exist(arguments):
    command = [sys.executable, "-m", "fastlstm", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    words = ["--data", "--save", "--plot"] if "mnist" in arguments else ["instruction sets", "threads"]
    for word in words:
        assert word in done.stdout


def test_options_of_the_benchmark_exist():
    source = (ROOT / "benchmarks" / "peers.py").read_text(encoding="utf-8")
    for line in LINES:
        if "peers.py" in line:
            for option in re.findall(r" (--[a-z-]+)", line):
                assert option == "--help" or f'"{option}"' in source, option


def test_links_and_results():
    for name in re.findall(r"\]\(([^)#:]+)\)", TEXT):
        assert (ROOT / name).is_file(), name
    assert TEXT.count("<!-- results -->") == TEXT.count("<!-- /results -->") == 1
    assert TEXT.index("<!-- results -->") < TEXT.index("<!-- /results -->")
