"""Fast recurrent layers (LSTM, GRU, RNN) for CPUs: forward and backward, training and inference."""

from typing import Any

from ._engine import release_memory
from .gradcheck import gradcheck
from .layers import GRU, LSTM, RNN, Layer, Stream, Tape
from .threads import get_num_threads, set_num_threads, show_config

__version__ = "0.1.0"

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Layer",
    "Stream",
    "Tape",
    "get_num_threads",
    "gradcheck",
    "nn",
    "plot",
    "reference",
    "release_memory",
    "set_num_threads",
    "show_config",
]


def __getattr__(name: str) -> Any:
    """The modules that inference does not need are imported when they are first named."""
    if name in ("nn", "plot", "reference"):
        from importlib import import_module

        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
