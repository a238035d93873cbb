"""LSTM, GRU and RNN, and their cells, as modules of PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .._habits import refuse_sparse
from ._carry import WHOLE, Steps
from ._recurrent import Recurrent


class _Sequences(Recurrent):
    """A module that reads whole sequences; not for direct use."""

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> Any:
        """Outputs and last states, as torch.nn's layer.

        Parameters
        ----------
        input : Tensor, shape (T, N, D), (N, T, D) with batch_first, or (T, D) for one sequence; or PackedSequence
        hx : None, or (h_0, c_0) for the LSTM, h_0 for GRU and RNN
            h_0 of shape (num_layers*dirs, N, P), c_0 (num_layers*dirs, N, H); without N for one sequence.
        lengths : None or Tensor of int, shape (N,)
            Valid steps of each sequence, 0 to T in any order: what packing is for, without packing.
        mask, resets : None or Tensor of bool, shape (T, N), (N, T) with batch_first
            Steps that are skipped where the mask is False; steps that no state comes into.

        Returns
        -------
        output : Tensor, shape (T, N, dirs*P), or PackedSequence
            Zero where a step is not valid.
        h_n, or (h_n, c_n)
            States after the last valid step of each sequence.
        """
        if isinstance(input, PackedSequence):
            if not (lengths is None and mask is None and resets is None):
                raise ValueError("lengths, mask, resets: expected None with a PackedSequence, which has its lengths")
            return self._packed(input, hx)
        x, h, c = self._enter(input, hx)
        single = x.dim() == 2
        swapped = self.batch_first and not single
        batch = (x.shape[0 if swapped else 1],) if x.dim() == 3 else ()
        self._check_shapes(x, h, c, (2, 3), (self._depth, *batch))
        steps = WHOLE
        if not (lengths is None and mask is None and resets is None):
            lengths, mask = _tensor("lengths", lengths), _tensor("mask", mask)
            resets = _tensor("resets", resets)
            if single:
                lengths = None if lengths is None else lengths.reshape(1)
                mask, resets = (None if a is None else a.unsqueeze(1) for a in (mask, resets))
            elif swapped:
                mask, resets = (None if a is None else a.transpose(0, 1) for a in (mask, resets))
            steps = Steps(lengths, mask, resets)
        if single:
            x, h, c = (None if a is None else a.unsqueeze(1) for a in (x, h, c))
        elif swapped:
            x = x.transpose(0, 1)
        y, h, c = self._carry(x, h, c, steps)
        if single:
            return y.squeeze(1), _state(h.squeeze(1), None if c is None else c.squeeze(1))
        return y.transpose(0, 1) if swapped else y, _state(h, c)

    def _packed(self, packed: PackedSequence, hx: Any) -> Any:
        rows, batch_sizes, order, back = packed
        x, h, c = self._enter(rows, hx)
        self._check_shapes(x, h, c, (2,), (self._depth, int(batch_sizes[0])))
        if order is not None:
            h, c = (None if a is None else a.index_select(1, order) for a in (h, c))
        y, h, c = self._carry(x, h, c, Steps(batch_sizes=batch_sizes))
        if back is not None:
            h, c = (None if a is None else a.index_select(1, back) for a in (h, c))
        return PackedSequence(y, batch_sizes, order, back), _state(h, c)

    @property
    def mode(self) -> str:
        """What torch.nn's layer calls itself: "LSTM", "GRU", "RNN_TANH" or "RNN_RELU"."""
        return f"RNN_{str(self.nonlinearity).upper()}" if self._kind == "RNN" else self._kind


class LSTM(_Sequences):
    """`torch.nn.LSTM` on fastlstm's kernels: its arguments, its names of parameters, its call.

    Parameters
    ----------
    input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype
        As in torch.nn.LSTM. CPU; torch.float32 or torch.float64.
    **options
        The keyword-only arguments of `fastlstm.LSTM` but dtype and rng: direction, peepholes, coupled, layer_norm,
        activation, recurrent_activation, clip, recurrent_dropout, zoneout, init, forget_bias and the others. Masks and
        weights are drawn from PyTorch's generator.

    Notes
    -----
    State dicts are those of torch.nn.LSTM, and `torch.manual_seed` gives the same initial parameters. In evaluation
    mode no gates are kept; a backward pass, where there is one, runs forward again. There are no second derivatives.
    """

    _kind = "LSTM"

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False,
        dropout: float = 0.0, bidirectional: bool = False, proj_size: int = 0, device: Any = None, dtype: Any = None,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(input_size, hidden_size, num_layers, device, dtype, bias=bias, batch_first=batch_first,
                         dropout=dropout, bidirectional=bidirectional, proj_size=proj_size, **options)  # fmt: skip


class GRU(_Sequences):
    """`torch.nn.GRU` on fastlstm's kernels. `options` are the keyword-only arguments of `fastlstm.GRU`; see `LSTM`."""

    _kind = "GRU"

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False,
        dropout: float = 0.0, bidirectional: bool = False, device: Any = None, dtype: Any = None, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(input_size, hidden_size, num_layers, device, dtype, bias=bias, batch_first=batch_first,
                         dropout=dropout, bidirectional=bidirectional, **options)  # fmt: skip


class RNN(_Sequences):
    """`torch.nn.RNN` on fastlstm's kernels. `options` are the keyword-only arguments of `fastlstm.RNN`; see `LSTM`."""

    _kind = "RNN"

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, nonlinearity: str = "tanh", bias: bool = True,
        batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False, device: Any = None,
        dtype: Any = None, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(input_size, hidden_size, num_layers, device, dtype, nonlinearity=nonlinearity, bias=bias,
                         batch_first=batch_first, dropout=dropout, bidirectional=bidirectional, **options)  # fmt: skip


class _Cell(Recurrent):
    """A module that takes one step; not for direct use."""

    _suffix = "_l0"

    def __init__(self, input_size: int, hidden_size: int, device: Any, dtype: Any, **options: Any) -> None:
        super().__init__(input_size, hidden_size, 1, device, dtype, **options)

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """The next state: h of shape (N, H), or (h, c); input of shape (N, D), or (D) without N, as in torch.nn."""
        x, h, c = self._enter(input, hx)
        self._check_shapes(x, h, c, (1, 2), x.shape[:-1])
        single = x.dim() == 1
        if single:
            x, h, c = (None if a is None else a.unsqueeze(0) for a in (x, h, c))
        x, h, c = x.unsqueeze(0), *(None if a is None else a.unsqueeze(0) for a in (h, c))
        _, h, c = self._carry(x, h, c, WHOLE)
        if single:
            h, c = (None if a is None else a.squeeze(0) for a in (h, c))
        return _state(h.squeeze(0), None if c is None else c.squeeze(0))


class LSTMCell(_Cell):
    """`torch.nn.LSTMCell` on fastlstm's kernels."""

    _kind = "LSTM"

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device: Any = None, dtype: Any = None,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(input_size, hidden_size, device, dtype, bias=bias, **options)


class GRUCell(_Cell):
    """`torch.nn.GRUCell` on fastlstm's kernels."""

    _kind = "GRU"

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device: Any = None, dtype: Any = None,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(input_size, hidden_size, device, dtype, bias=bias, **options)


class RNNCell(_Cell):
    """`torch.nn.RNNCell` on fastlstm's kernels."""

    _kind = "RNN"

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, nonlinearity: str = "tanh", device: Any = None,
        dtype: Any = None, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(input_size, hidden_size, device, dtype, bias=bias, nonlinearity=nonlinearity, **options)


def _tensor(name: str, value: Any) -> Tensor | None:
    if value is None or (isinstance(value, Tensor) and value.layout is torch.strided):
        return value
    refuse_sparse(name, value, "a dense tensor")
    return value if isinstance(value, Tensor) else torch.as_tensor(value)


def _state(h: Tensor, c: Tensor | None) -> Any:
    return h if c is None else (h, c)
