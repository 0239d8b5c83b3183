"""`pytest` runs what takes seconds or one vLLM start; `pytest --slow` adds whole training runs.
With CISPO_TEST_GPU=1 the tests marked "gpu" run, and only these; else no test sees a GPU, since
they start several ranks on any machine and compare in fp32."""

import os
import sys
from pathlib import Path

ON_GPU = os.environ.get("CISPO_TEST_GPU") == "1"
if not ON_GPU:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks, and for all that tests start

import pytest
import torch

# several processes on two cores: more threads only get in each other's way
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_collection_modifyitems(config, items):
    def runs(item):
        marked = {mark.name for mark in item.iter_markers()}
        if ON_GPU or "gpu" in marked:
            return ON_GPU and "gpu" in marked
        return config.getoption("--slow") or "slow" not in marked

    config.hook.pytest_deselected(items=[item for item in items if not runs(item)])
    items[:] = [item for item in items if runs(item)]


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
