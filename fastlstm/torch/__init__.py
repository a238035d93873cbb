"""Recurrent layers for PyTorch: drop-in modules, and a way to put them into a model that exists.

Needs the extra ``fastlstm[torch]``.
"""

from .accelerate import Accelerated, accelerate, restore
from .modules import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell

__all__ = ["Accelerated", "GRU", "GRUCell", "LSTM", "LSTMCell", "RNN", "RNNCell", "accelerate", "restore"]
