"""Fast recurrent layers (LSTM, GRU, RNN) for CPUs: forward and backward, training and inference."""

from . import reference
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
    "reference",
    "release_memory",
    "set_num_threads",
    "show_config",
]
