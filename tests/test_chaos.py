"""Whole runs on the fake vLLM (`--slow`): under faults, and for long."""

import pytest

from tools.chaos import FAULTS, chaos
from tools.soak import CONNECTIONS, growth, soak

pytestmark = pytest.mark.slow


def test_under_random_faults_no_prompt_is_lost_or_trained_twice_and_the_run_learns():
    """Each kind of fault once; `python tools/chaos.py --faults 200` is the long form."""
    rows, verdicts = chaos(seed=0, faults=len(FAULTS))
    assert len(rows) == len(FAULTS)
    for verdict in verdicts:
        assert (
            verdict["lost"] == verdict["twice"] == verdict["too_old"] == verdict["set_aside"] == 0
        )
        assert verdict["reward"] >= 0.9


def test_memory_handles_and_threads_of_a_long_run_stay_where_they_were():
    """200 steps; `python tools/soak.py --steps 1000` is the long form."""
    for part, (percent, handles, threads, sockets) in growth(soak(200)).items():
        found = (
            f"{part}: {percent:+.1f} % memory, {handles:+d} handles, {threads:+d} threads, "
            f"{sockets} TCP sockets"
        )
        assert percent < 5 and handles <= 4 and threads <= 1 and sockets <= CONNECTIONS, found
