"""The quick run for whoever changes the loop: tools/quick.py, as `bash launch.sh --quick`."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_vllm import Policy
from safetensors.torch import load_file, save_file

import task
from tools.quick import STEPS, faults

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture
def directory(tmp_path, tiny_checkpoint):
    """A caller's directory that has the warm start already."""
    name = f"tiny-reverse-{task.task_digest('reverse')}-0.36-seed0"
    shutil.copytree(tiny_checkpoint, tmp_path / "checkpoints" / name)
    return tmp_path


def quick(directory, *flags):
    return subprocess.run(
        [sys.executable, str(REPO / "tools/quick.py"), *flags],
        cwd=directory,
        capture_output=True,
        text=True,
    )


def test_the_quick_run_is_a_whole_run_and_keeps_only_its_last_results(directory):
    (directory / "runs/quick/code").mkdir(parents=True)  # of an earlier quick run
    (directory / "runs/mine.1").mkdir()
    done = quick(directory)
    assert done.returncode == 0 and "quick: passed" in done.stdout, done.stdout + done.stderr
    for words in ("v0 landed on 1/1 engines, digest ok", f"validation of v{STEPS}", "curves: runs"):
        assert words in done.stdout
    assert {p.name for p in (directory / "runs").glob("[!.]*")} == {"quick", "mine.1"}
    assert (directory / f"runs/quick/checkpoints/step-{STEPS:06d}").is_dir()
    records = [json.loads(line) for line in (directory / "runs/quick/metrics.jsonl").open()]
    found, documented = set().union(*records), documented_metrics()
    # of --truncated-importance-sampling-*, --router-replay and --trust-region
    unset = {"train/is_oob_ratio", "train/router_agreement"}
    unset |= {f"train/trust_masked{end}" for end in ("", "_pos", "_neg")}
    assert documented - found == unset
    assert {n for n in found - documented if not n.startswith("train/tokens_age_")} == {"step"}


def documented_metrics() -> set[str]:
    """Those of a step's record, from the first column of the tables of docs/metrics.md."""
    page = (REPO / "docs/metrics.md").read_text().partition("## All metrics")[2]
    cells = "".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| `"))
    return {n for n in re.findall(r"`([\w/]+)`", cells) if n[-1] != "N" and n[-4:] != "NAME"}


def test_a_quick_run_that_does_not_start_is_a_failure(directory):
    done = quick(directory, "--lr", "-1")
    assert done.returncode == 2 and "quick: failed: the run ended with status 2" in done.stdout
    assert "quick:" not in quick(directory, "--help").stdout


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, ""),
        ({"step": 0}, "records of 12 steps"),
        (
            {"train/gen_kl_error_same_version": 1e-3},
            "KL between trainer and sampler 1.0e-03, above 1e-05: a wrong weight update, or model.py",
        ),
        ({"train/reward": 0.4}, "the reward did not rise"),
    ],
)
def test_a_quick_run_fails_by_what_a_broken_loop_would_show(tmp_path, change, fault):
    record = {"train/reward": 0.0, "train/gen_kl_error_same_version": None}
    records = [{**record, "step": i, "train/reward": 0.1 * i} for i in range(STEPS)]
    records[-1].update(change)
    if "train/reward" in change:
        records = [{**r, "train/reward": 0.4} for r in records]
    (tmp_path / "config.json").write_text(
        json.dumps({"max_num_steps": STEPS, "publish_dtype": "auto"})
    )
    lines = "".join(json.dumps(r) + "\n" for r in records)
    (tmp_path / "metrics.jsonl").write_text(lines)
    found = faults(tmp_path)
    assert bool(found) == bool(fault) and fault in "".join(found)


def test_the_stand_in_refuses_a_tensor_that_it_does_not_compute(tmp_path, tiny_checkpoint):
    """Else a fork's new parameter would be sampled without, and only a KL would tell."""
    shutil.copytree(tiny_checkpoint, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tiny_checkpoint / "model.safetensors")
    assert Policy(tmp_path).w.keys() > tensors.keys()
    bias = "model.layers.0.self_attn.q_proj.bias"
    save_file({**tensors, bias: torch.zeros(64)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"^tests/fake_vllm\.py does not compute {bias}$"):
        Policy(tmp_path)
