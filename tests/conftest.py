"""`pytest` runs what takes seconds or one vLLM start; `pytest --slow` adds whole training runs."""

import sys
from pathlib import Path

import pytest
import torch

# several processes on two cores: more threads only get in each other's way
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """A tiny Qwen3-MoE that has half learned to reverse words, as the default run starts from."""
    import task

    path = tmp_path_factory.mktemp("checkpoints") / "tiny"
    task.warm_start(path, "reverse", seed=0, until=0.36, progress=lambda message: None)
    return path


@pytest.fixture(scope="session")
def fake_vllm_command():
    """What stands in vLLM's place: `--vllm-command`."""
    return f"{sys.executable} {Path(__file__).with_name('fake_vllm.py')}"
