"""What a type checker sees: a user's program."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy", reason="mypy is not installed")
ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "tests" / "typed.py"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Lines of the program at which mypy finds something, with what it says."""
    cache = tmp_path_factory.mktemp("mypy")
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--cache-dir", cache, PROGRAM]
    run = subprocess.run(command, cwd=ROOT, env=os.environ | {"MYPYPATH": str(ROOT)}, capture_output=True, text=True)
    assert not run.stderr, run.stderr
    lines = [re.match(r"tests/typed\.py:(\d+): error: (.*)", line) for line in run.stdout.splitlines()]
    return {int(match[1]): match[2] for match in lines if match}


def test_what_comes_out_has_types(found):
    wrong = {number for number, line in enumerate(PROGRAM.read_text().splitlines(), 1) if "# error" in line}
    assert len(wrong) == 6
    assert found.keys() == wrong, found
