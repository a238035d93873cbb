"""What more cores bring: a model of a call's time, beside what this machine's cores measure.

    python benchmarks/scaling.py                       # constants, then the speed-up over one core of each shape
    python benchmarks/scaling.py 100,1,512,512 --cores 2 32

The constants are measured: a core's peak, reading and activations, the start of a team, a meeting.  They are printed
beside those of plan() in fastlstm/engine/planning.pyx, which they are the command for.  Float32 LSTM, inference.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from cases import NAMES, SHAPES, Case

CORES = (2, 4, 8, 16, 64)
LANES = {"baseline": 4, "avx2": 8, "avx512": 16}
FEW = [s for s in SHAPES if "bi" not in s]


@dataclass(frozen=True)
class Machine:
    """Measured constants: operations, bytes and seconds.

    peak: operations of a core in a second.  read: how many bytes a core reads in a second, if it reads so many over
    and over.  update: seconds of a unit's activations.  start, meet: seconds for each thread of a team
    that starts, that meets.
    """

    peak: float
    read: Callable[[float], float]
    update: float
    start: float
    meet: float


def call_time(T, N, D, H, cores, by_units, machine, block, ahead=False, slow=1.0):
    """Seconds of a call on so many cores.

        t = slow T work + s + m T
        work = max(F_h r u, W_h u / read) + max(F_x r u, W_x u / read) + r u H update

    Across the sequences a thread carries r = N / cores of them, rounded up, and all the units, u = 1.  Across the
    units r = N, and u is its blocks (of ``block`` units) of all, rounded up, and the team meets at every step.
    F: seconds of a row at the peak, 8 H H operations for the state and 8 H D for x.  W: bytes of their weights, read at
    every step, the part of x not if it is computed ``ahead``; ``read`` is that of the size of the thread's weights.
    s = cores start and m = cores meet, since lines of memory that all threads write go from core to core one after the
    other; nothing of it on one core.  slow: by how much a core is slower than its limits.

    Each core is taken to read as fast as one alone, and to run at the same clock.
    """
    blocks = -(-H // block)
    rows, share = (N, -(-blocks // cores) / blocks) if by_units else (-(-N // cores), 1)
    read = machine.read(16 * H * (D + H) * share)
    work = rows * share * H * machine.update
    for width, again in ((H, True), (D, not ahead)):
        work += max(8 * H * width * rows * share / machine.peak, again * 16 * H * width * share / read)
    team = cores > 1
    return slow * T * work + team * cores * (machine.start + by_units * T * machine.meet)


def measured_machine(engine, threads):
    """This machine, with a team of so many threads for what a team costs; the least of many measurements."""
    peak = 1e9 * engine.fma_peak()
    start = min(engine.meet(threads, 0) for _ in range(200) if not time.sleep(0.003))  # its threads have gone to sleep
    meet = min(engine.meet(threads, 1000) for _ in range(50)) / 1000
    update = 3e-9 / engine.activation_rate("sigmoid") + 2e-9 / engine.activation_rate("tanh")

    @cache
    def read(nbytes):
        return 1e9 * engine.read_bandwidth(max(4096, int(nbytes)))

    return Machine(peak, read, update, start / threads, meet / threads)


def constants(machine, tuned):
    """Lines: the constants, and the same in operations of a core, as plan() has them."""
    m, size = machine, tuned["cache"]  # what plan() takes for near
    near, far = m.read(size / 4), m.read(size * 2)
    yield f"one core: {m.peak / 1e9:.0f} GFLOP/s; plan() counts in such operations"
    for text, name, operations in (
        (f"start of a team, each thread   {1e6 * m.start:8.2f} us", "start", m.start * m.peak),
        (f"a meeting, each thread         {1e6 * m.meet:8.3f} us", "meet", m.meet * m.peak),
        (f"update of a unit               {1e9 * m.update:8.2f} ns", "update", m.update * m.peak / 4),
        (f"reading, {size / 4e6:5.1f} MB              {near / 1e9:8.0f} GB/s", "near", 4 * m.peak / near),
        (f"reading, {size * 2e-6:5.1f} MB              {far / 1e9:8.0f} GB/s", "far", 4 * m.peak / far),
    ):
        yield f"  {text:<45} {name:<7}{operations:10.3g}   plan() has {tuned[name]:.3g}"


def force(engine, by_units):
    """Make plan() take the largest team: its start is a gain; what the meeting costs decides which."""
    engine.tune(start=-1e30, meet=-1e15 if by_units else 1e15, crowd=0)


class Calls:
    """Calls of one layer, by one core and by teams of either kind, timed in turn."""

    def __init__(self, fastlstm, case):
        x, _, params = case.inputs()
        layer = fastlstm.LSTM(case.D, case.H)
        layer.load_state_dict(params)
        layer.freeze()
        self.lib, self.run = fastlstm, lambda: layer(x)

    def seconds(self, teams, rounds):
        """Least time of a call for each (threads, by_units)."""
        engine, best = self.lib.engine, dict.fromkeys(teams, float("inf"))
        before = engine.tune()
        for _ in range(rounds):
            for threads, by_units in teams:
                force(engine, by_units)
                self.lib.set_num_threads(threads)
                self.run()
                begin = time.perf_counter()
                self.run()
                best[threads, by_units] = min(best[threads, by_units], time.perf_counter() - begin)
        engine.tune(**before)
        return best


def report(fastlstm, shape, machine, cores, own, rounds):
    """Lines of one shape: the speed-up of both ways with ``own`` cores and as predicted, and what plan() takes."""
    case, block = Case(shape), LANES[fastlstm.engine.isa()]
    sizes, blocks = (case.T, case.N, case.D, case.H), -(-case.H // block)
    kinds = {"across sequences": False, "across units": True}
    most = {False: case.N, True: blocks}  # larger teams have threads without work
    teams = [(n, u) for n in own for u in kinds.values() if n <= most[u]]
    times = Calls(fastlstm, case).seconds([(1, False), *teams], rounds)
    plans = {n: fastlstm.engine.plan(*sizes, 4, 4, 1, n, blocks) for n in (1, *cores)}
    ahead = plans[1][2] > 0
    slow = times[1, False] / call_time(*sizes, 1, False, machine, block, ahead)

    def speed_up(n, by_units):
        predicted = call_time(*sizes, n, by_units, machine, block, ahead and (by_units or n == 1), slow)
        return times[1, False] / predicted

    yield f"{NAMES.get(shape, '')}  {shape}: one core {1e3 * times[1, False]:.3g} ms, {slow:.2f} of the model's time"
    for name, by_units in kinds.items():
        cells = [f"{times[1, False] / times[n, by_units]:11.2f}" if (n, by_units) in times else f"{'':11}" for n in own]
        cells += ["  |", *[f"{speed_up(n, by_units):11.2f}" if n <= most[by_units] else f"{'':11}" for n in cores]]
        yield f"  {name:<18}{''.join(cells)}"
    picks = [f"{speed_up(team, by_units):.2f} {team}{'su'[by_units]}" for team, by_units, _ in map(plans.get, cores)]
    yield f"  {'plan() takes':<18}{'':{11 * len(own)}}  |" + "".join(f"{pick:>11}" for pick in picks)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("shapes", nargs="*", default=FEW, metavar="T,N,D,H", help="default: those of peers.py")
    p.add_argument("--cores", type=int, nargs="+", default=CORES, help="to predict for (%(default)s)")
    p.add_argument("--rounds", type=int, default=15, help="calls of each kind, in turn; the fastest counts")
    args = p.parse_args(argv)
    if args.rounds < 1 or min(args.cores) < 2:
        p.error("--rounds starts at 1, --cores at 2")
    try:
        for shape in args.shapes:
            if (case := Case(shape)).dirs > 1 or case.layers > 1:
                raise ValueError(f"shape: expected one layer in one direction, got {shape!r}")
    except ValueError as error:
        p.error(str(error))
    sys.path.append(str(Path(__file__).parents[1]))  # fastlstm in the tree, where none is installed
    import fastlstm

    cpus = len(os.sched_getaffinity(0))
    own = [n for n in args.cores if n <= cpus]
    if not own or not fastlstm.engine.has_openmp():
        raise SystemExit(f"needs two CPUs and OpenMP to measure what a team costs; here: {cpus} CPUs")
    machine = measured_machine(fastlstm.engine, max(own))
    print(
        f"{fastlstm.engine.isa()}, NumPy {np.__version__}, {cpus} CPUs",
        *constants(machine, fastlstm.engine.tune()),
        sep="\n",
    )
    heads = [f"{n:>5} cores" for n in own]
    print(f"\nspeed-up over one core  measured | predicted\n{'':20}" + "".join(heads) + "  |"
          + "".join(f"{n:>5} cores" for n in args.cores))  # fmt: skip
    for shape in args.shapes:
        print(*report(fastlstm, shape, machine, args.cores, own, args.rounds), sep="\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
