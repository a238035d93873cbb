"""What a training loop needs around a recurrent layer: modules, losses, optimisers, schedules, and the loop itself.

Everything works on flat buffers, in place, in the type of the arrays it is given (float32 stays float32). Every part is
usable alone: a module is anything with ``forward``, ``backward``, ``flat_params`` and ``flat_grads``, a loss a function
that returns its value and its gradient, a schedule a function of the progress.
"""

from .ctc import ctc
from .losses import binary_cross_entropy, huber, mae, mse, quantile, softmax_cross_entropy
from .modules import Dropout, Embedding, LayerNorm, Linear, Module
from .optimisers import EMA, SGD, Adam, AdamW, RMSprop, clip_grad_norm, clip_grad_value
from .schedules import constant, cosine, linear, one_cycle, schedule
from .sequential import Recurrent, Sequential
from .training import Batches, EarlyStopping, fit

__all__ = [
    "EMA",
    "SGD",
    "Adam",
    "AdamW",
    "Batches",
    "Dropout",
    "EarlyStopping",
    "Embedding",
    "LayerNorm",
    "Linear",
    "Module",
    "RMSprop",
    "Recurrent",
    "Sequential",
    "binary_cross_entropy",
    "clip_grad_norm",
    "clip_grad_value",
    "constant",
    "cosine",
    "ctc",
    "fit",
    "huber",
    "linear",
    "mae",
    "mse",
    "one_cycle",
    "quantile",
    "schedule",
    "softmax_cross_entropy",
]
