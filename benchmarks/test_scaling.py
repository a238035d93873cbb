"""The model of scaling.py, held to values computed by hand, and plan() to that model."""

from dataclasses import replace

import pytest
from scaling import Machine, call_time

fastlstm = pytest.importorskip("fastlstm")
engine = fastlstm.engine

# An operation, a byte and an update take a second each.
ONE = Machine(peak=1, read=lambda size: 1, update=1, start=0, meet=0)
SMALL_CACHE = replace(ONE, read=lambda size: 1 if size < 1280 else 0.5)
# T,N,D,H = 10,6,2,8 in blocks of 2 units: 512 operations and 1024 bytes for the state, 128 and 256 for x.
SHAPE = 10, 6, 2, 8

HAND = {
    "one core": (1, False, ONE, {}, 10 * (6 * 512 + 6 * 128 + 48)),
    "one core pays for no team": (1, False, replace(ONE, start=9, meet=9), {}, 10 * (6 * 512 + 6 * 128 + 48)),
    "the thread with most sequences is the last": (4, False, ONE, {}, 10 * (2 * 512 + 2 * 128 + 16)),
    "one sequence waits for the weights": (6, False, ONE, {}, 10 * (1024 + 256 + 8)),
    "those of x are not read if they went ahead": (6, False, ONE, {"ahead": True}, 10 * (1024 + 128 + 8)),
    "a team starts": (4, False, replace(ONE, start=7, meet=5), {}, 10 * (2 * 512 + 2 * 128 + 16) + 28),
    "half of the units": (2, True, ONE, {}, 10 * (6 * 256 + 6 * 64 + 24)),
    "four blocks over three cores: two for the first": (3, True, ONE, {}, 10 * (6 * 256 + 6 * 64 + 24)),
    "a team meets at every step": (
        2, True, replace(ONE, start=7, meet=5), {}, 10 * (6 * 256 + 6 * 64 + 24) + 2 * (7 + 10 * 5)),
    "weights beyond the cache": (6, False, SMALL_CACHE, {}, 10 * (2048 + 512 + 8)),
    "half of them fit it": (2, True, replace(SMALL_CACHE, peak=8), {}, 10 * (512 + 128 + 24)),
    "a core slower than its limits": (
        2, True, replace(ONE, meet=5), {"slow": 3}, 3 * 10 * (6 * 256 + 6 * 64 + 24) + 2 * 10 * 5),
}  # fmt: skip


@pytest.mark.parametrize("what", HAND)
def test_by_hand(what):
    cores, by_units, machine, options, seconds = HAND[what]
    assert call_time(*SHAPE, cores, by_units, machine, 2, **options) == pytest.approx(seconds, rel=1e-12)


def machine_of(tuned):
    """plan()'s constants, in seconds of a core that does one operation in each."""

    def read(size):
        return 4 / tuned["near" if size <= tuned["cache"] else "far"]

    return Machine(1, read, 4 * tuned["update"], tuned["start"], tuned["meet"])


@pytest.mark.parametrize("cache", [2e5, 4e6])
@pytest.mark.parametrize("cores", [1, 2, 3, 8, 64])
def test_plan_takes_the_team_of_the_least_time(cores, cache):
    before = engine.tune()
    machine = machine_of(engine.tune(cache=cache))
    try:
        for T, N, D, H in [(10, 1, 16, 64), (100, 1, 64, 128), (50, 20, 200, 200), (100, 64, 256, 256), (9, 3, 8, 32),
                           (25, 16, 1024, 1024), (1000, 1, 1, 32), (256, 256, 1, 64), (15, 130, 30, 500)]:  # fmt: skip
            blocks = -(-H // 16)
            alone = engine.plan(T, N, D, H, 4, 4, 1, 1, blocks)
            times = {(1, False): call_time(T, N, D, H, 1, False, machine, 16, alone[2] > 0)}
            for n in range(2, cores + 1):
                if n <= N:
                    times[n, False] = call_time(T, N, D, H, n, False, machine, 16)
                if n <= blocks:
                    times[n, True] = call_time(T, N, D, H, n, True, machine, 16, alone[2] > 0)
            team, by_units, ahead = engine.plan(T, N, D, H, 4, 4, 1, cores, blocks)
            assert times[team, by_units] == pytest.approx(min(times.values()), rel=1e-12)
            assert team == min(n for (n, _), t in times.items() if t <= min(times.values()) * (1 + 1e-12))
            assert ahead == (alone[2] if by_units or team == 1 else 0)
    finally:
        engine.tune(**before)


def test_a_measurement_leaves_the_constants_as_they_were():
    """Also that the way to force a team forces it."""
    import scaling
    from cases import Case

    before = engine.tune()
    times = scaling.Calls(fastlstm, Case("3,4,5,40")).seconds([(1, False), (2, True), (2, False)], 2)
    fastlstm.set_num_threads(None)
    assert engine.tune() == before
    assert all(0 < t < 60 for t in times.values())
    try:
        for threads in (2, 3):
            for by_units in (False, True):
                scaling.force(engine, by_units)
                assert engine.plan(3, 4, 5, 40, 4, 4, 1, threads, 3)[:2] == (threads, by_units)
    finally:
        engine.tune(**before)
