"""A progress bar where the output is a terminal and tqdm is installed, else nothing."""

from __future__ import annotations

from typing import Any, Self


class progress_bar:
    """Context manager; `update` moves the bar and writes a text behind it.

    Parameters
    ----------
    total : int
        Units of the whole.
    label : str
        Before the bar.
    shown : bool
        False: nothing.
    """

    def __init__(self, total: int, label: str, shown: bool = True) -> None:
        self._bar: Any = None
        if not shown:
            return
        try:
            from tqdm import tqdm
        except ImportError:
            return
        form = "{desc}: {percentage:3.0f} %|{bar}| {n_fmt}/{total_fmt}{postfix}"
        # disable=None: nothing is written where stderr is no terminal
        self._bar = tqdm(
            total=total, desc=label, leave=False, mininterval=0.2, dynamic_ncols=True, bar_format=form, disable=None
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, n: int = 1, text: str = "") -> None:
        if self._bar is not None and not self._bar.disable:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(n)
