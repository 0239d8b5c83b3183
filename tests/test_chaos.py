"""Whole runs on the fake vLLM (`--slow`): under faults, killed and resumed, and for a thousand steps."""

import pytest
from chaos import chaos

pytestmark = pytest.mark.slow


def test_under_random_faults_no_prompt_is_lost_or_trained_twice_and_the_run_learns():
    """20 faults, each kind once; `python tests/chaos.py --faults 200` is the long form."""
    rows, verdicts = chaos(seed=0, faults=20, per_run=20)
    assert len(rows) == 20 and max(seconds for _, _, seconds in rows) <= 60
    for verdict in verdicts:
        assert verdict["lost"] == verdict["twice"] == verdict["too_old"] == verdict["set_aside"] == 0
        assert verdict["reward"] >= 0.9
