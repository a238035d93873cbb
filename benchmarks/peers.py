"""fastlstm beside PyTorch, ONNX Runtime, JAX and Keras on TensorFlow: the same job, in turn, on this machine.

    python benchmarks/peers.py --mode both --threads 1 2 --json peers.json --plot peers.png
    python benchmarks/peers.py --from-json peers.json --plot peers.png --markdown peers.md    # measures nothing

Each library runs in a process of its own (_peer_worker.py), pinned to as many cores as it may use, and is
stopped while it is not its turn, so that its spinning threads disturb nobody.  All get the same weights and
inputs and hand over their outputs and gradients before anything is timed; who differs from the subject gets
no time, and the program ends with exit code 1.  Then every round asks each in turn, and medians are quoted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import pickle
import platform
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import geometric_mean, median

import numpy as np
from cases import GROUPS, NAMES, SHAPES, Case
from limit import Core, least_time

PEERS = ["fastlstm", "fastlstm-blas", "before", "torch", "torch-packed", "ort", "jax", "keras"]
EXTRA = ("fastlstm-blas", "before", "torch-packed")  # not among the peers unless asked for
TOLERANCE = {"float32": 1e-4, "float64": 1e-10, "bfloat16": 2e-2}  # of |a - b| / |b|, 2-norm of each array
COLUMNS = """columns: threads, who, median time, speed, share of the FMA peak of so many cores, share of the limit
(limit.py: the least time for the products, the activations and the reading of the weights at every step, from what
the cores do in the same seconds, over the time), x = its time over the subject's, diff = largest difference before
timing.  Allowed there, of each array's norm:"""
LEAST_READ = 4096  # bytes at which a bandwidth can be measured


class Refused(Exception):
    """A peer that does not run this case, with the reason."""


class Broken(Exception):
    """A peer that failed at this case."""


class Worker:
    """A peer with so many threads in a process of its own, asleep between calls.

    before: the folder of another checkout of fastlstm, built in place, which the peer "before" is.
    """

    def __init__(self, peer, threads, before=None):
        cpus = sorted(os.sched_getaffinity(0))[:threads]
        if len(cpus) < threads:
            raise SystemExit(f"--threads {threads}: this process may use {len(cpus)} CPUs")
        names = ["OMP", "OPENBLAS", "MKL", "TF"]
        env = os.environ | {f"{name}_NUM_THREADS": str(threads) for name in names}
        env |= {
            "JAX_PLATFORMS": "cpu",
            "KERAS_BACKEND": "tensorflow",
            "CUDA_VISIBLE_DEVICES": "",
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }
        if peer == "before":
            env["PYTHONPATH"] = str(before)
        env["FASTLSTM_PRODUCTS"] = "blas" if peer == "fastlstm-blas" else "own"
        if threads == 1:
            env["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
        self.peer, self.threads, self.why, self.info = peer, threads, None, {}
        self.noise = tempfile.TemporaryFile()  # noqa: SIM115
        command = [
            sys.executable,
            str(Path(__file__).with_name("_peer_worker.py")),
            peer,
            str(threads),
            ",".join(map(str, cpus)),
        ]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.noise, env=env
        )
        try:
            self.info = self.answer()
        except (Refused, Broken) as error:
            self.why = str(error)

    def __call__(self, *request):
        if self.why:
            raise Refused(self.why)
        self.process.send_signal(signal.SIGCONT)
        pickle.dump(request, self.process.stdin)
        self.process.stdin.flush()
        return self.answer()

    def answer(self):
        try:
            kind, value = pickle.load(self.process.stdout)
        except (EOFError, pickle.UnpicklingError):
            self.noise.seek(max(0, self.noise.seek(0, 2) - 400))
            last_words = self.noise.read().decode(errors="replace")
            self.why = f"process died with {self.process.wait()}: {last_words}"
            raise Broken(self.why) from None
        self.process.send_signal(signal.SIGSTOP)
        if kind == "ok":
            return value
        raise (Refused if kind == "skip" else Broken)(value.strip())

    def close(self):
        if self.process.poll() is None:
            self.process.kill()  # works on a stopped process too
        self.process.wait()


def mismatch(a, b, tolerance):
    """Largest norm-relative difference over what both have, and a word about it if it is too large."""
    worst, where = 0.0, "y"
    for name in b.keys() & a.keys():
        if a[name].shape != b[name].shape:
            return math.inf, f"{name} has shape {a[name].shape}, expected {b[name].shape}"
        diff = float(np.linalg.norm(a[name] - b[name]) / max(float(np.linalg.norm(b[name])), 1e-30))
        if not diff <= worst:
            worst, where = diff, name
    bad = f"{where} differs by {worst:.1e} of its norm, allowed {tolerance:.0e}"
    return worst, None if worst <= tolerance else bad


def run_case(case, workers, subject, args, outputs=None):
    """Compare, then time in turn: a record per worker (its figures, or why there are none), and the outputs.

    All are held to ``outputs``, or to the subject's, or to the first that has any.
    """
    request, records, calls = dataclasses.asdict(case), {}, {}
    tolerance = TOLERANCE[case.weights or case.dtype]
    for w in sorted(workers, key=lambda w: w.peer != subject):  # the subject first: others are held to it
        key = (w.peer, w.threads)
        records[key] = request | {"peer": w.peer, "threads": w.threads}
        try:
            got = w("prepare", request)
            if outputs is None:
                outputs = got
            else:
                records[key]["difference"], bad = mismatch(got, outputs, tolerance)
                if bad:
                    raise Broken(bad)
            calls[key] = w("calls", args.min_time)
        except Refused as error:
            records[key]["skip"] = str(error)
        except Broken as error:
            records[key]["error"] = str(error)
    times, cores = {key: [] for key in calls}, {}
    for _ in range(args.rounds):
        for w in workers:
            key = (w.peer, w.threads)
            if key not in calls:
                continue
            try:
                times[key].append(w("measure", calls[key]))
                if w.peer == subject:  # what the machine does at this very moment
                    size = max(LEAST_READ, case.step_bytes // (case.layers * case.dirs * w.threads))
                    cores.setdefault(w.threads, []).append(w("limits", case.dtype, size))
            except (Refused, Broken) as error:
                records[key]["error"] = str(error)
                del calls[key]
    for key, count in calls.items():
        threads, rec, ms = key[1], records[key], 1e3 * median(times[key])
        rec |= {"ms": ms, "gflops": case.flops / ms / 1e6, "calls": count}
        rec["spread"] = (max(times[key]) - min(times[key])) * 1e3 / ms
        found = [core for core in cores.get(threads, []) if core]
        if found:
            rec["core"] = {name: median(core[name] for core in found) for name in found[0]}
            rec["fma_share"] = rec["gflops"] / (rec["core"]["peak"] * threads)
            rec["limit_ms"] = 1e3 * least_time(case, threads, Core(**rec["core"]))
            rec["limit_share"] = rec["limit_ms"] / ms
    for key, rec in records.items():
        own = records.get((subject, key[1]), {}).get("ms")
        if own and "ms" in rec and key[0] != subject:
            rec["ratio"] = rec["ms"] / own
    return list(records.values()), outputs


def describe(rec):
    if "ms" not in rec:
        return f"  {rec['threads']}  {rec['peer']:<13}" + (
            f"ERROR: {rec['error']}" if "error" in rec else f"not run: {rec['skip']}"
        )
    unit = f"{1e3 * rec['ms']:10.2f} us" if rec["mode"] == "stream" else f"{rec['ms']:10.3f} ms"
    line = f"  {rec['threads']}  {rec['peer']:<13}{unit}{rec['gflops']:8.1f} GFLOP/s"
    line += f"{100 * rec['fma_share']:6.1f} % FMA" if "fma_share" in rec else " " * 12
    line += f"{100 * rec['limit_share']:6.1f} % limit" if "limit_share" in rec else " " * 14
    line += f"  x {rec['ratio']:.2f}" if "ratio" in rec else ""
    return line + (f"  (diff {rec['difference']:.0e})" if rec.get("difference") else "")


def title(rec):
    return (
        f"{rec['cell']} {rec['mode']} {rec['dtype']}"
        + (" ragged" if rec["ragged"] else "")
        + (f" {rec['weights']} weights" if rec["weights"] else "")
    )


def summary(records, subject):
    """Lines of geometric mean and minimum ratios, per job and thread count."""

    def line(label, ratios):
        if ratios:
            least = min(ratios, key=ratios.get)
            yield (
                f"  {label:<31} geometric mean {geometric_mean(ratios.values()):5.2f}   "
                f"minimum {ratios[least]:5.2f} at {least}   ({len(ratios)} shape{'s' * (len(ratios) > 1)})"
            )

    timed = [r for r in records if "ms" in r]
    for job in dict.fromkeys(map(title, timed)):
        here = [r for r in timed if title(r) == job]
        own = {(r["shape"], r["threads"]): r["ms"] for r in here if r["peer"] == subject}
        yield f"{subject}, {job}"
        threads = sorted({r["threads"] for r in here})
        for n in threads:
            best, found = {}, {}
            for r in here:
                if "ratio" in r and r["threads"] == n:
                    found.setdefault(r["peer"], {})[r["shape"]] = r["ratio"]
                    best[r["shape"]] = min(r["ratio"], best.get(r["shape"], math.inf))
            yield from line(f"{n} thread{'s' * (n > 1)}, over the best peer", best)
            own_share = {r["shape"]: r["limit_share"] for r in here if r["peer"] == subject and "limit_share" in r
                         and r["threads"] == n}  # fmt: skip
            yield from line(f"{n} thread{'s' * (n > 1)}, share of the limit", own_share)
            for peer, ratios in found.items():
                yield from line(f"{n} thread{'s' * (n > 1)}, over {peer}", ratios)
        for n in threads[1:]:
            few = {s: ms for (s, t), ms in own.items() if t == threads[0]}
            yield from line(
                f"{n} threads over {threads[0]}",
                {s: few[s] / ms for (s, t), ms in own.items() if t == n and s in few},
            )
        for word, plain in ((" ragged", "over full length"), (" bfloat16 weights", "over full weights")):
            if word in job:
                whole = {
                    (r["shape"], r["threads"]): r["ms"]
                    for r in timed
                    if r["peer"] == subject and title(r) == job.replace(word, "")
                }
                for n in threads:
                    yield from line(
                        f"{n} thread{'s' * (n > 1)}, {plain}",
                        {s: whole[s, t] / ms for (s, t), ms in own.items() if t == n and (s, t) in whole},
                    )


def markdown(records, subject):
    """Tables of the subject's speed and of the others' times over its own, for docs/benchmarks.md."""
    timed = [r for r in records if "ms" in r]
    for job in dict.fromkeys(map(title, timed)):
        here = {(r["shape"], r["threads"], r["peer"]): r for r in timed if title(r) == job}
        threads = sorted({n for _, n, _ in here})
        peers = [p for p in dict.fromkeys(p for _, _, p in here) if p != subject]
        shares = {"% of peak": "fma_share", "% of limit": "limit_share"}
        heads = [f"{n} thread{'s' * (n > 1)}: {what}" for n in threads for what in ("ms", *shares, *peers)]
        yield f"\n{job}:\n\n| shape | T,N,D,H | {' | '.join(heads)} |\n|---|---{'|--:' * len(heads)}|"
        for shape in dict.fromkeys(s for s, _, _ in here):
            cells = [NAMES.get(shape, ""), shape]
            for n in threads:
                own = here.get((shape, n, subject), {})
                cells.append(f"{own['ms']:.3g}" if own else "")
                cells += [f"{100 * own[key]:.0f}" if key in own else "" for key in shares.values()]
                cells += [f"{here[shape, n, p].get('ratio', 0):.2f}" if (shape, n, p) in here else "" for p in peers]
            yield f"| {' | '.join(cells)} |"


def stream_cases(cells, dtypes):
    for cell in cells:
        yield from (Case("8,1,64,64", "stream", cell, dtype) for dtype in dtypes)
        if "float32" in dtypes:
            yield from (Case("8,1,512,512", "stream", cell, weights=w) for w in ("", "bfloat16"))


def all_cases(args):
    modes = {"both": ["forward", "training"], "none": []}.get(args.mode, [args.mode])
    shapes = [s for word in args.shapes for s in GROUPS.get(word, [word])]
    for cell in args.cells:
        for dtype in args.dtype:
            for mode in modes:
                for shape in dict.fromkeys(shapes):
                    for ragged in {None: [False], "only": [True], "also": [False, True]}[args.ragged]:
                        case = Case(shape, mode, cell, dtype, ragged)
                        if not (ragged and case.N == 1):  # one row is never ragged
                            yield case
    if args.stream:
        yield from stream_cases(args.cells, args.dtype)


def processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def parse(argv):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog="Shapes: " + "  ".join(SHAPES))
    p.add_argument("--mode", choices=["forward", "training", "both", "none"], default="both")
    p.add_argument("--threads", type=int, nargs="+", default=[1])
    p.add_argument("--shapes", nargs="+", default=["all"], help="T,N,D,H[,bi][,layers] or " + ", ".join(GROUPS))
    p.add_argument("--cells", nargs="+", choices=["lstm", "gru", "rnn"], default=["lstm"])
    p.add_argument("--dtype", nargs="+", choices=["float32", "float64"], default=["float32"])
    p.add_argument(
        "--ragged",
        nargs="?",
        const="only",
        choices=["only", "also"],
        help="lengths uniform in 1..T: only these, or also (beside full length)",
    )
    p.add_argument("--stream", action="store_true", help="also one step at a time from Python")
    p.add_argument("--subject", choices=PEERS, default="fastlstm", help="who is compared with the others")
    p.add_argument("--peers", nargs="*", choices=PEERS, default=[n for n in PEERS if n not in EXTRA])
    p.add_argument("--before", metavar="DIR", help="another checkout of fastlstm, built in place: the peer 'before'")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--min-time", type=float, default=0.02, help="seconds that one measurement lasts at least")
    p.add_argument("--quick", action="store_true", help="3 rounds of 5 ms, and the basic shapes unless given")
    p.add_argument("--markdown", metavar="FILE")
    p.add_argument("--json", metavar="FILE")
    p.add_argument("--from-json", metavar="FILE", help="report what --json wrote, and measure nothing")
    p.add_argument("--plot", metavar="FILE.png", help="a dot per library; beside it FILE-dark.png for dark pages")
    args = p.parse_args(argv)
    if args.quick:
        args.rounds, args.min_time = min(args.rounds, 3), min(args.min_time, 0.005)
        args.shapes = ["basic"] if args.shapes == ["all"] else args.shapes
    if args.before:
        args.peers = ["before"] if args.peers == p.get_default("peers") else ["before", *args.peers]
    if args.rounds < 1 or min(args.threads) < 1:
        p.error("--rounds and --threads start at 1")
    try:
        args.cases = list(all_cases(args))
    except ValueError as error:
        p.error(str(error))
    return args


def measure(args, command):
    """Run all: what is known of the machine, and the records."""
    peers = list(dict.fromkeys([args.subject, *args.peers]))
    if args.ragged and "torch" in peers and "torch-packed" not in peers:
        peers.insert(peers.index("torch") + 1, "torch-packed")
    machine = {
        "cpu": processor(),
        "cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "command": command,
        "rounds": args.rounds,
        "subject": args.subject,
    }
    print("{cpu}, {cpus} CPUs, Python {python}, NumPy {numpy}\n{command}".format(**machine))
    workers, records, outputs = [], [], None
    try:
        for threads in sorted(set(args.threads)):
            for peer in peers:
                workers.append(Worker(peer, threads, args.before))
                if threads == min(args.threads):
                    w = workers[-1]
                    print(f"  {peer:<13}{w.why or w.info['version']}  {w.info.get('isa') or ''}")
        if why := workers[0].why:
            raise SystemExit(f"{args.subject}, the subject, does not run: {why}")
        machine["versions"] = {w.peer: w.info.get("version", w.why) for w in workers}
        machine["isa"] = workers[0].info.get("isa")
        print(COLUMNS, ", ".join(f"{name} {value:.0e}" for name, value in TOLERANCE.items()))
        for case in args.cases:
            here = workers
            if not case.ragged:
                here = [w for w in workers if w.peer != "torch-packed"]
            if case.weights:
                here = [w for w in here if w.peer == "fastlstm"]
            # a stream with packed weights follows the one with full weights, and is held to that
            found, outputs = run_case(case, here, args.subject, args, outputs if case.weights else None)
            records += found
            if found:
                print(f"\n{title(found[0])}  T,N,D,H = {case.shape}  ({case.rows} rows)")
                print(*map(describe, sorted(found, key=lambda r: r["threads"])), sep="\n", flush=True)
    finally:
        for w in workers:
            w.close()
    return {"machine": machine, "records": records}


def main(argv=None):
    args = parse(argv)
    if args.from_json:
        run = json.loads(Path(args.from_json).read_text())
        print("{cpu}, {cpus} CPUs, Python {python}, NumPy {numpy}\n{command}".format(**run["machine"]))
    else:
        run = measure(args, "python benchmarks/peers.py " + " ".join(sys.argv[1:] if argv is None else argv))
    records, subject = run["records"], run["machine"]["subject"]
    print(*["", *summary(records, subject)], sep="\n")
    if args.markdown:
        Path(args.markdown).write_text("\n".join(markdown(records, subject)) + "\n")
    if args.json:
        Path(args.json).write_text(json.dumps(run, indent=1))
    if args.plot:
        from dots import draw

        draw(records, subject, Path(args.plot))
    broken = [r for r in records if "error" in r]
    if broken:
        print(f"\n{len(broken)} errors above: who differs or fails has no time")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
