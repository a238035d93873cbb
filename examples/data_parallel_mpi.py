"""Data-parallel training over MPI: each process takes its share of the sequences of a batch, one Allreduce sums the
gradients, which are one flat array, and every process makes the same step.

Run it:

    pip install mpi4py mpich                        (or a system's MPI)
    mpiexec -n 2 python examples/data_parallel_mpi.py

The weights stay equal to the bit on all processes, since all add the same sum to the same weights. The loss curve is
that of one process with the whole batch, up to the rounding of a sum in another order: below 1e-10 with float64, as
here. The second line says what the Allreduce costs beside the step.
"""

import hashlib
import time

import numpy as np
from mpi4py import MPI

import fastlstm
from fastlstm import nn

T, BATCH, STEPS = 20, 256, 60


def data(rng):
    """Numbers, and the mean of those that a flag marks."""
    x = rng.standard_normal((T, BATCH, 2))
    x[:, :, 1] = rng.random((T, BATCH)) < 0.2
    marked = x[:, :, 1]
    return x, ((x[:, :, 0] * marked).sum(0) / np.maximum(marked.sum(0), 1))[:, None]


def main(comm=MPI.COMM_WORLD, steps=STEPS):
    rank, size = comm.Get_rank(), comm.Get_size()
    fastlstm.set_num_threads(max(1, fastlstm.get_num_threads() // size))  # the processes share the processors
    lstm = fastlstm.LSTM(2, 36, dtype=np.float64, rng=0)  # the same seed everywhere, the same weights
    head = nn.Linear(36, 1, dtype=np.float64, rng=1)
    summing, begin = [], time.perf_counter()
    adam, rng, losses = nn.Adam([lstm, head], lr=0.01), np.random.default_rng(2), []
    for _ in range(steps):
        x, target = data(rng)
        mine = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
        _, (h_n, _), tape = lstm.forward(x[:, mine])
        prediction, kept = head.forward(h_n[0])
        loss, gradient = nn.mse(prediction, target[mine])
        share = prediction.shape[0] / BATCH  # the loss is a mean: weigh each process by its sequences
        adam.zero_grad()
        dh = head.backward(kept, gradient * share)[None]
        lstm.backward(tape, None, (dh, None), need_dx=False)
        before = time.perf_counter()
        for module in (lstm, head):
            comm.Allreduce(MPI.IN_PLACE, module.flat_grads)
        summing.append(time.perf_counter() - before)
        adam.step()
        losses.append(comm.allreduce(loss * share))
    weights = hashlib.sha256(lstm.flat_params.tobytes() + head.flat_params.tobytes()).hexdigest()
    assert len(set(comm.allgather(weights))) == 1, "the weights of the processes differ"
    if rank == 0:
        print(f"{size} processes, loss {losses[0]:.6f} to {losses[-1]:.6f}, weights {weights[:16]} on all of them")
        print(f"a step {(time.perf_counter() - begin) / steps * 1e3:.2f} ms, of it Allreduce of {lstm.num_params} and "
              f"{head.flat_params.size} numbers {np.median(summing) * 1e3:.3f} ms")  # fmt: skip
    return losses


if __name__ == "__main__":
    losses = main()
    if MPI.COMM_WORLD.Get_rank() == 0:
        print(" ".join(f"{loss:.12f}" for loss in losses))
