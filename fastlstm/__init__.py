"""Fast recurrent layers (LSTM, GRU, RNN, sLSTM) for CPUs: forward and backward, training and inference."""

from typing import TYPE_CHECKING, Any

from . import _interrupt as _interrupt  # first of all: Ctrl-C during the imports of a command
from ._layer import Layer
from ._version import __version__
from .engine import release_memory
from .gradcheck import gradcheck
from .layers import GRU, LSTM, RNN, SLSTM
from .sequences import pad, unpad
from .stream import Stream
from .tape import Tape
from .threads import get_num_threads, set_memory_kept, set_num_threads, set_products, show_config

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "SLSTM",
    "Layer",
    "Stack",
    "Stream",
    "Tape",
    "__version__",
    "files",
    "gate_order",
    "get_num_threads",
    "gradcheck",
    "load",
    "nn",
    "pad",
    "plot",
    "read_state_dict",
    "reference",
    "release_memory",
    "set_memory_kept",
    "set_num_threads",
    "set_products",
    "show_config",
    "unpad",
]

# onnx, keras, torch, sklearn and forecast are not in __all__: they need other packages.
_MODULES = ("files", "forecast", "keras", "nn", "onnx", "plot", "reference", "sklearn", "torch")
_ELSEWHERE = {"Stack": "stack", "gate_order": "files", "load": "files", "read_state_dict": "files"}


if TYPE_CHECKING:
    from . import files, nn, plot, reference
    from .files import gate_order, load, read_state_dict
    from .stack import Stack
else:

    def __getattr__(name: str) -> Any:
        """What inference does not need is imported when it is first named."""
        from importlib import import_module

        if name in _MODULES:
            return import_module(f"{__name__}.{name}")
        if name in _ELSEWHERE:
            return getattr(import_module(f"{__name__}.{_ELSEWHERE[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
