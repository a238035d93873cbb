"""What the commands share: values of options, files that are written whole or not at all."""

from __future__ import annotations

import argparse
import io
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .._saved import replace_file
from . import JobError


def integer(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected an integer from {low} to {high}, got {text!r}")
        return value

    return parse


def rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number > 0, got {text!r}")
    return value


def write(path: Path, content: bytes, option: str) -> None:
    """Write a file whole or not at all."""
    try:
        replace_file(path, content)
    except OSError as error:
        raise JobError(f"{option}: cannot write {path}: {error.strerror or error}") from error


def check_output(parser: argparse.ArgumentParser, option: str, path: Path | None) -> None:
    """Find out before the training whether ``path`` can be written after it."""
    if path is None:
        return
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        parser.error(f"argument {option}: {path} is not a regular file")
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        parser.error(f"argument {option}: cannot write {path}: {error.strerror or error}")


def check_picture(parser: argparse.ArgumentParser, path: Path | None) -> None:
    """Find out whether ``--plot`` names a kind of picture that matplotlib, if there, can write."""
    check_output(parser, "--plot", path)
    if path is None:
        return
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise JobError("--plot needs matplotlib: python -m pip install matplotlib") from error
    if _form(path) not in FigureCanvasAgg.filetypes:
        parser.error(f"argument --plot: unknown kind of picture {path.suffix!r}, try .png, .pdf or .svg")


def write_picture(path: Path, figure: Any) -> None:
    """Save a matplotlib Figure."""
    picture = io.BytesIO()
    figure.savefig(picture, format=_form(path), dpi=120)
    write(path, picture.getvalue(), "--plot")


def _form(path: Path) -> str:
    return path.suffix[1:].lower() or "png"
