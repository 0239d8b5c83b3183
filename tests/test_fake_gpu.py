"""The GPU's path on a fake H100 (tests/fake_gpu): the CUDA builds of torch and vLLM, allocator,
compiler and Triton are real, kernels compute nothing. So nothing here says that a value is right or
how long it takes; what a layer launches, waits for, moves and keeps is counted. Copies are real, so
what is inside vLLM after a weight update is compared, byte for byte.

    CISPO_CUDA_VENV=DIRECTORY python -m pytest --slow tests/test_fake_gpu.py

`bash .ci/cuda_venv DIRECTORY` makes the environment. Without one this file is skipped.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_gpu import fake

import task

# A layer of Qwen3-30B-A3B, 16,384 tokens, ep 8. These may fall, not grow: what was measured, and
# for bytes a percent more.
LAUNCHES = {
    "compiled": {"forward": 58, "backward": 50, "again": 108, "no_grad": 54},
    "eager": {"forward": 202, "backward": 234, "again": 377, "no_grad": 202},
}
SYNCS = {"forward": 1, "backward": 0, "again": 1, "no_grad": 1}
TRITON_GB = {"forward": 4.2, "backward": 6.35, "again": 8.99, "no_grad": 4.11}
# Sends and receives of 8 ranks: counts, notes, rows and the way back; notes, rows and the way back.
# Again, the way back is left out.
NCCL = {"forward": 64, "backward": 48, "again": 96, "no_grad": 64}
MEMORY_MARGIN = 0.03  # of the plan, either way
# In the optimizer's step, and of the update.
STEP_GIB = {"qwen3-30b-a3b": 40.2, "qwen3-0.6b": 10.1}
PEAK_GIB = {"qwen3-30b-a3b": 45.5, "qwen3-0.6b": 11.6}
# Of a whole update, in eager mode: of each of 48 layers the splits, forward and again for backward.
# Without experts there is none.
UPDATE_SYNCS = {"qwen3-30b-a3b": 96, "qwen3-0.6b": 0}

pytestmark = pytest.mark.slow
REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", autouse=True)
def cuda_venv():
    try:
        return fake.venv()
    except RuntimeError as e:
        pytest.skip(str(e))


PROGRAM = """
import ctypes, torch
mark = ctypes.CDLL("libfakecuda.so").fake_mark
x = torch.ones(1024, 64, device="cuda")
mark(b"begin")
(x @ x.t()).add_(1)
x.sum().item()
mark(b"end")
kept = torch.empty(70 * 2**30, dtype=torch.uint8, device="cuda")
try:
    torch.empty(20 * 2**30, dtype=torch.uint8, device="cuda")
except torch.OutOfMemoryError:
    print("out of memory")
"""


def test_the_fake_gpu_logs_what_a_program_does_and_has_an_h100s_memory(cuda_venv, tmp_path):
    fake.build(tmp_path)
    command = [str(cuda_venv / "bin/python"), "-c", PROGRAM]
    env = fake.environment(tmp_path, tmp_path / "log")
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.stdout == "out of memory\n", done.stderr
    counted = fake.sections(tmp_path / "log")["begin"]
    assert [counted[kind] for kind in ("GEMM", "KERNEL", "SYNC")] == [1, 2, 1]


def measured(script: str, *flags: str) -> dict:
    """What a script of fake_gpu prints last."""
    command = [sys.executable, str(fake.HERE / script), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "FAKE CUDA" not in done.stderr, done.stdout + done.stderr
    print(script, *flags, done.stdout.splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", ["compiled", "eager"])
def test_a_layer_launches_waits_for_and_moves_no_more_than_before(kind):
    found = measured("count.py", *["--eager"] * (kind == "eager"))
    for part, counted in found.items():
        assert counted["launches"] <= LAUNCHES[kind][part], part
        assert counted["syncs"] <= SYNCS[part] and counted["nccl"] == NCCL[part], part
        gigabytes = counted["triton_bytes"] / 1e9
        assert (kind == "eager") == (gigabytes == 0) and gigabytes <= TRITON_GB[part], part


@pytest.mark.parametrize("preset", ["qwen3-30b-a3b", "qwen3-0.6b"])
def test_a_ranks_memory_is_what_the_dry_run_says_and_its_step_is_no_peak(preset):
    """Compiled, as presets run."""
    found = measured("memory.py", "--preset", preset, "--compile")
    assert found["forward and backward"] == pytest.approx(found["plan"], rel=MEMORY_MARGIN)
    assert found["prev"] < found["forward and backward"]
    assert found["optimizer step"] <= STEP_GIB[preset]
    assert found["forward and backward"] <= PEAK_GIB[preset]


def test_an_eager_update_waits_no_more_than_before():
    """Compiled, waits of the compiler itself are among those counted."""
    for preset, most in UPDATE_SYNCS.items():
        assert measured("memory.py", "--preset", preset)["syncs"] <= most


@pytest.mark.parametrize(
    "flags, stacks",
    [
        (["--args", '{"enable_return_routed_experts": true}'], [2]),
        (["--dense"], [0]),
        (["--gpus", "2"], [2, 2]),
        (["--gpus", "2", "--args", '{"enable_expert_parallel": true}'], [2, 2]),
    ],
    ids=["router replay", "dense and tied", "tensor parallel", "expert parallel"],
)
def test_weights_are_inside_vllm_as_if_it_had_started_on_them(flags, stacks):
    """Each where it was before, since CUDA graphs know its address; the 2 layers' experts as stacks
    in the first of 4 updates, and the others by copies alone."""
    found = measured("vllm_weights.py", *flags)
    assert found["reload changes nothing"] and found["as a vLLM that starts on them"]
    assert found["stay where they are"] and found["stacks"] == stacks and all(found["copies"])
    assert min(found["changed"]) > 10


@pytest.fixture
def directory(tmp_path, tiny_checkpoint):
    """A caller's directory that has the warm start already."""
    name = f"tiny-reverse-{task.task_digest('reverse')}-0.36-seed0"
    shutil.copytree(tiny_checkpoint, tmp_path / "checkpoints" / name)
    return tmp_path


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_tiny_run_goes_through(directory, cuda_venv, compiled):
    """Sampled by the stand-in for vLLM: two steps, weights published and loaded, a checkpoint; and
    two more from there."""
    fake.build(directory)
    env = fake.environment(directory, directory / "log", item=0, flag=1)
    python = str(cuda_venv / "bin/python")
    stand_in = f"--vllm-command '{python} {REPO / 'tests/fake_vllm.py'}'"
    flags = ["--name=fake", "--resume=auto", f"--rollout-args={stand_in}", "--val-every-steps=0"]
    flags += ["--checkpoint-every-steps=2"] + ["--no-compile"] * (not compiled)
    for steps in (2, 4):
        command = [python, str(REPO / "train_cispo.py"), *flags, f"--max-num-steps={steps}"]
        done = subprocess.run(command, cwd=directory, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        for noise in ("FAKE CUDA", "FutureWarning", "Guessing device ID"):
            assert noise not in done.stderr, done.stderr
        # vLLM is on the same GPU, and measures its memory while it starts
        assert "compiling the update" not in done.stdout, done.stdout
        records = (directory / "runs/fake/metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in records] == list(range(steps))
        assert (directory / f"runs/fake/checkpoints/step-{steps:06}").is_dir()
    kinds = sum(fake.sections(directory / "log").values(), fake.Counter())
    assert kinds["KERNEL"] and kinds["GEMM"] and kinds["HOSTREG"]
    assert bool(kinds["TRITON"]) == compiled
    print(dict(kinds))
