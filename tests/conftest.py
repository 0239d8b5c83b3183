"""`pytest` runs what takes seconds or one vLLM start; `pytest --slow` adds whole training runs.
`bash launch.sh test` runs several files at once (pytest-xdist), each of them in one process.
With CISPO_TEST_GPU=1 the tests marked "gpu" run, and only these; else no test sees a GPU, since
they start several ranks on any machine and compare in fp32."""

import fcntl
import functools
import os
import signal
import sys
from pathlib import Path

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # begun in the background of a shell; what tests start would ignore their Ctrl-C as well
    signal.signal(signal.SIGINT, signal.default_int_handler)

ON_GPU = os.environ.get("CISPO_TEST_GPU") == "1"
if not ON_GPU:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks, and for all that tests start

import pytest
import torch

# several processes on two cores: more threads only get in each other's way
torch.set_num_threads(1)


# Whole runs, layouts, a server: begun first, so that none is left alone at the end.
LONG = ("parallel", "run", "checkpoint", "failures", "vllm", "resume", "nodes", "train", "chaos")


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
    long = [f"test_{name}.py" for name in LONG]
    items.sort(key=lambda item: long.index(item.path.name) if item.path.name in long else len(long))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """For `-n auto`, as launch.sh says it: one worker more than cores, since many tests wait for a
    process or a deadline, and 8 at most. A single file is one worker's work, and a whole run takes
    all cores."""
    from bridge.processes import cores

    if config.getoption("--slow") or all(Path(arg.split("::")[0]).suffix for arg in config.args):
        return 0
    return min(8, cores() + 1)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """A tiny Qwen3-MoE that has half learned to reverse words, as the default run starts from."""
    import task

    directory = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        directory = directory.parent  # of all workers: the first one makes it
    path = directory / "tiny"
    with open(directory / "tiny.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            task.warm_start(path, "reverse", seed=0, until=0.36, progress=lambda message: None)
    return path


@pytest.fixture(scope="session")
def plain(tiny_checkpoint, tmp_path_factory):
    """test_resume.plain_loop's tensors after so many steps, which several tests compare their run
    with: computed once for each number of steps."""
    from test_resume import plain_loop

    return functools.cache(
        lambda steps: plain_loop(tiny_checkpoint, tmp_path_factory.mktemp("plain"), steps)
    )


@pytest.fixture(scope="session")
def fake_vllm_command():
    """What stands in vLLM's place: `--vllm-command`."""
    return f"{sys.executable} {Path(__file__).with_name('fake_vllm.py')}"
