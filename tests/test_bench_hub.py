"""tools/bench_hub.py: the real hub, and nodes that speak its protocol."""

import threading

import pytest

from tools.bench_hub import Case, measure


def test_two_simulated_nodes_fill_the_steps_of_a_small_hub():
    """Rank 0 is a thread here. Every group that is sent is taken in, and steps are made of them."""
    small = {"nodes": 2, "in_flight": 8, "samples": 2, "tokens": 3, "prompts_per_step": 4}
    found = measure(Case(**small, replay=True, seconds=3.0), start=threading.Thread)
    assert found["groups"] > 8 and found["refused"] == 0
    assert found["MB a group"] == pytest.approx(6e-6 * (12 + 384))
    for part in ("take ms, most", "unpack s, p50", "/lease ms, p99", "/groups ms, p50"):
        assert 0 < found[part] < 5000, part
