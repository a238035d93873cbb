"""README.md and the pages as written: their Python runs, and what they name exists."""

import functools
import inspect
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
from fastlstm import __main__ as cli

ROOT = Path(__file__).parents[1]
README, GATES, BENCHMARKS = "README.md", "docs/gates.md", "docs/benchmarks.md"
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [ROOT / README, *sorted((ROOT / "docs").rglob("*.md"))]
}
TEXT = PAGES[README]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
HOME = "https://github.com/fastlstm/fastlstm"


def blocks(language, page=README):
    """(line, whether it continues the one before, text) of each block of this language."""
    pattern, text = rf"^(<!-- continues -->\n)?```{language}\n(.*?)^```$", PAGES[page]
    for found in re.finditer(pattern, text, re.MULTILINE | re.DOTALL):
        yield text.count("\n", 0, found.start(2)) + 1, bool(found[1]), found[2]


PYTHON = {page: list(blocks("python", page)) for page in PAGES}
LINES = {page: [line for _, _, text in blocks("sh", page) for line in text.splitlines()] for page in PAGES}
SET_UP = [line for line in LINES[README] if line.startswith("python3 -m venv .venv && ")]
NEEDED = {"torch": "torch", "matplotlib": "matplotlib|import plot", "onnx": "onnx", "safetensors": r"\.save\(",
          "sklearn": r"sklearn|fastlstm\.forecast"}  # fmt: skip


def run(page, index):
    """Run block `index` of a page, after those that it continues; returns its names."""
    first = index
    while PYTHON[page][first][1]:
        first -= 1
    names = {"__name__": "__main__"}
    for line, _, text in PYTHON[page][first : index + 1]:
        for module, pattern in NEEDED.items():
            if re.search(pattern, text):
                pytest.importorskip(module, reason=f"{module} is not installed")
        exec(compile("\n" * (line - 1) + text, page, "exec"), names)
    return names


names_of = functools.cache(run)  # what a block leaves, where nothing of it but its names is looked at


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """In an empty folder, with the number of threads restored."""
    monkeypatch.chdir(tmp_path)
    chosen = fastlstm.threads._chosen
    yield
    fastlstm.set_num_threads(chosen)


LAST = [
    pytest.param(page, i, id=f"{page}:{found[i][0]}")
    for page, found in PYTHON.items()
    for i in range(len(found))
    if i + 1 == len(found) or not found[i + 1][1]  # with all that it continues
]


@pytest.mark.parametrize(("page", "index"), LAST)
def test_blocks_run(page, index):
    names_of(page, index)


def find(text, page=README):
    (index,) = [i for i, block in enumerate(PYTHON[page]) if text in block[2]]
    return page, index


def test_training_loop_learns_and_is_short():
    page, index = find("adam.step()")
    names = names_of(page, index)
    assert names["loss"] < 0.1 * np.var(names["target"])
    loop = PYTHON[page][index][2].split("rng = ")[1].splitlines()
    assert len(loop) <= 15


def test_estimators_learn():
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    page = "docs/how-to/estimators.md"
    names = names_of(*find("RecurrentClassifier(", page))
    assert names["model"].score(names["X_test"], names["y_test"]) > 0.9
    names = names_of(*find("RecurrentRegressor(", page))
    assert names["model"].score(names["X"][400:], names["level"][400:]) > 0.95
    names = names_of(*find("RecurrentForecaster(", page))
    assert names["model"].predict().shape == (12,)


def test_a_newcomers_lines_are_ten():
    """Classifier, regressor, forecaster, stream: each in the README, in at most ten lines."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    for what in ("RecurrentClassifier(", "RecurrentForecaster(", ".stream("):
        page, index = find(what)
        assert len(PYTHON[page][index][2].splitlines()) <= 10
    names = names_of(*find("RecurrentClassifier("))
    test = slice(800, None)
    assert names["classifier"].score(names["X"][test], names["up"][test]) > 0.9
    assert names["regressor"].score(names["X"][test], names["total"][test]) > 0.9


def test_gates_keep_and_hide(capsys):
    names = run(*find("numbers = ", GATES))
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
    assert capsys.readouterr().out == next(text for _, _, text in blocks("text", GATES) if text.startswith("step"))


def test_gradient_crosses_300_steps(tmp_path):
    names = run(*find("plot.gates(", GATES))
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


def test_tutorial_learns():
    names = names_of(*find("nn.fit(", "docs/tutorial.md"))
    assert names["right"] > 0.95


def test_options_of_the_benchmark_exist():
    for line in LINES[BENCHMARKS]:
        if program := re.search(r"benchmarks/\w+\.py", line):
            source = (ROOT / program[0]).read_text(encoding="utf-8")
            for option in re.findall(r" (--[a-z-]+)", line):
                assert option == "--help" or f'"{option}"' in source, option


def test_lines_of_the_command_line_parse():
    parser, _ = cli._parser()
    lines = [line for line in LINES["docs/how-to/command-line.md"] if line.startswith("python -m fastlstm ")]
    assert len(lines) >= 6
    for line in lines:
        assert parser.parse_args(shlex.split(line)[3:]).command


def test_links():
    """README's are absolute, for the package index shows it too; those of the pages are checked when they are built."""
    links = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert len(links) > 10
    for link in links:
        assert link.startswith(f"{HOME}/blob/main/"), link
        assert (ROOT / link.removeprefix(f"{HOME}/blob/main/")).is_file(), link
    for page, text in PAGES.items():
        for link in re.findall(rf"{HOME}/blob/main/([\w/.-]+)", text):
            assert (ROOT / link).is_file(), f"{page}: {link}"
        for link in re.findall(r"\]\(([^):]+)\)", text):
            assert ((ROOT / page).parent / link).is_file(), f"{page}: {link}"
    assert PROJECT["project"]["urls"]["Homepage"] == HOME
    assert f"git clone {HOME} &&" in TEXT


def test_readme_is_short_and_begins_with_inference():
    assert len(TEXT.splitlines()) <= 150
    first = PYTHON[README][0][2].splitlines()
    assert len([line for line in first if line]) <= 5 and TEXT.index("lstm(x)") < TEXT.index("adam.step()")


def test_every_page_is_in_the_navigation():
    listed = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(f"docs/{name}" for name in listed) == sorted(set(PAGES) - {README})
    index = PAGES["docs/index.md"]
    assert all(f"]({name})" in index for name in listed if name != "index.md")


def test_every_public_name_is_in_the_reference():
    """A name or the module that it is listed in."""
    shown = re.findall(r"^(?:::: |`)([\w.]+)", PAGES["docs/api.md"], re.MULTILINE)
    for name in set(fastlstm.__all__) - {"__version__"}:
        value = getattr(fastlstm, name)
        where = getattr(value, "__module__", None) or value.__name__
        assert {f"fastlstm.{name}", f"{where}.{name}", where} & set(shown), name


@pytest.mark.parametrize("kind", [fastlstm.LSTM, fastlstm.GRU, fastlstm.RNN, fastlstm.SLSTM])
def test_help_of_a_layer_stands_alone(kind):
    described = re.findall(r"^    ([\w, ]+) : ", kind.__doc__, re.MULTILINE)
    described = {name for text in described for name in text.split(", ")}
    assert described >= set(inspect.signature(kind).parameters)


def test_results():
    text = PAGES[BENCHMARKS]
    assert text.count("<!-- results -->") == text.count("<!-- /results -->") == 1
    assert text.index("<!-- results -->") < text.index("<!-- /results -->")
    named = dict(re.findall(r"^\| (\w[^|]+) \| (\d+,\d+,\d+,\d+[\w,]*) \|", text, re.MULTILINE))
    source = (ROOT / "benchmarks" / "cases.py").read_text(encoding="utf-8")
    assert len(named) == len(set(named.values())) == 17 and all(f'"{shape}"' in source for shape in named.values())
