"""Inference over a Dask bag: partitions of sequences of different lengths go to the workers of a cluster, each of which
reads the layer's file once.

Run it:

    pip install dask
    python examples/batch_dask.py

With the scheduler of processes here, with `dask.distributed` on many machines by making a Client first; the function
stays as it is. A worker that runs several tasks in threads shares one layer between them.
"""

import functools
import tempfile
from pathlib import Path

import dask.bag
import numpy as np

import fastlstm


@functools.cache
def layer_of(path):
    """Read once a process; frozen, so that its weights stay packed."""
    return fastlstm.load(path).freeze()


def last_outputs(sequences, path):
    """The last output of each sequence (T_i, D) of a partition."""
    layer = layer_of(path)
    fastlstm.set_num_threads(1)  # the workers are as many as the processors
    _, (h_n, _) = layer(list(sequences))
    return list(h_n[-1])


def main(count=400, partitions=4, scheduler="processes"):
    rng = np.random.default_rng(0)
    sequences = [rng.standard_normal((rng.integers(5, 60), 8)).astype(np.float32) for _ in range(count)]
    lstm = fastlstm.LSTM(8, 32, rng=1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.safetensors"
        lstm.save(path)
        bag = dask.bag.from_sequence(sequences, npartitions=partitions)
        found = np.array(bag.map_partitions(last_outputs, path).compute(scheduler=scheduler))
    want = lstm(sequences)[1][0][-1]
    print(f"{len(found)} sequences in {partitions} partitions, equal to one call: {np.array_equal(found, want)}")
    return found, want


if __name__ == "__main__":
    main()
