"""Age 0 against a plain synchronous loop, and runs that end before their time: bit for bit, on the
fake vLLM."""

import asyncio
import dataclasses
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import fake_vllm
import psutil
import pytest
import torch
from batches import unpack_batch
from published import write_version

import loss
from bridge import weights
from bridge.groups import Group, pack_group, parse_group
from bridge.logs import how_it_ended
from bridge.sample import Sample
from config import Config
from model import ModelConfig
from prepare import load_examples, load_prompts
from ranks.batch import pack_batch
from ranks.parallel import Mesh, ShardedAdamW
from rewards import exact_match
from task import eos_token_ids
from train_cispo import build_model, micro_batch_logprobs, train_update

REPO = Path(__file__).resolve().parent.parent


SMALL = {
    "num_prompts_per_step": 8,
    "num_generations_per_prompt": 8,
    "train_global_batch_size": 32,
    "cpu_threads": 1,
    "max_trajectory_age_steps": 0,
    "compile": False,
}


def start(
    cwd, tiny_checkpoint, fake_vllm_command, steps, *flags, launcher=(sys.executable,), env=None
):
    """A training run; `compile` is off since what is compiled depends on the shapes that a process
    meets first."""
    command = [
        *launcher,
        str(REPO / "train_cispo.py"),
        "--model",
        str(tiny_checkpoint),
        "--max-num-steps",
        str(steps),
        "--num-prompts-per-step",
        "8",
        "--num-generations-per-prompt",
        "8",
        "--train-global-batch-size",
        "32",
        "--cpu-threads",
        "1",
        "--max-trajectory-age-steps",
        "0",
        "--no-compile",
        f"--rollout-args=--vllm-command '{fake_vllm_command}'",
        *flags,
    ]
    with open(cwd / "out", "a") as out:
        return subprocess.Popen(command, cwd=cwd, stdout=out, stderr=out, env=env)


def finish(process, cwd, status=0, within_s=240):
    assert process.wait(within_s) == status, (cwd / "out").read_text()[-3000:]


def wait_for(cwd, process, condition, within_s=120):
    deadline = time.monotonic() + within_s
    while not condition((cwd / "out").read_text()):
        assert time.monotonic() < deadline and process.poll() is None, (cwd / "out").read_text()[
            -3000:
        ]
        time.sleep(0.05)  # polling what another program prints


def trained(cwd):
    records = [
        json.loads(line) for line in (cwd / "runs/tiny/metrics.jsonl").read_text().splitlines()
    ]
    assert [r["step"] for r in records] == list(range(len(records)))
    return [r["ordinals"] for r in records]


def final(cwd, steps):
    return dict(weights.read_tensors(cwd / f"runs/tiny/weights/v{steps}"))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def plain_loop(tiny_checkpoint, tmp_path, steps):
    """Generate, score, train, one after the other in one process: no hub, no node, no buffer.
    Returns the tensors."""
    cfg = dataclasses.replace(Config(), model=str(tiny_checkpoint), max_num_steps=steps, **SMALL)
    prompts, codec, _ = load_prompts(cfg, tiny_checkpoint, load_examples(cfg))
    model = build_model(cfg, ModelConfig.from_dir(tiny_checkpoint), Mesh(), tiny_checkpoint)
    optimizer = ShardedAdamW(
        model,
        cfg.max_grad_norm,
        lr=cfg.lr,
        betas=(cfg.adam_beta1, cfg.adam_beta2),
        eps=cfg.adam_eps,
        weight_decay=cfg.weight_decay,
    )
    sampling = {
        "n": 8,
        "temperature": 1.0,
        "max_tokens": 8,
        "stop_token_ids": eos_token_ids(tiny_checkpoint),
    }

    async def generate(step):
        policy = fake_vllm.Policy(
            write_version(tmp_path, step, list(model.hf_tensors()), tiny_checkpoint)
        )
        groups = []
        for ordinal in range(step * 8, step * 8 + 8):
            example = prompts[ordinal]
            request = fake_vllm.Request(codec.encode(example), sampling, cfg.seed, str(step))
            while not request.done.done():
                request.step(policy, str(step))
            choices = request.done.result()
            rewards = [exact_match(codec.decode(c["token_ids"]), example) for c in choices]
            samples = [Sample(request.prompt, sampling, cfg.max_new_tokens, None) for _ in choices]
            for sample, choice in zip(samples, choices):
                sample.add([], choice)
            _, tensors = parse_group(bytearray(pack_group(samples, rewards, "")))
            groups.append(Group(ordinal, codec.encode(example), **tensors))
        return groups

    for step in range(steps):
        blob = pack_batch(asyncio.run(generate(step)), cfg)
        updates, counts = unpack_batch(blob, cfg, 0, 1, torch.device("cpu"))
        with torch.no_grad():
            for mb in (mb for micro_batches in updates for mb in micro_batches):
                mb.age = step - mb.versions
                mb.prev_logprobs = micro_batch_logprobs(model, mb, cfg)[0]
        for micro_batches, update_counts in zip(updates, counts):
            train_update(model, optimizer, micro_batches, update_counts, cfg, loss.policy_loss)
    return {name: t.clone() for name, t in model.hf_tensors()}


def test_age_0_equals_a_plain_synchronous_loop_bit_for_bit(
    tmp_path, tiny_checkpoint, fake_vllm_command, plain
):
    run = start(tmp_path, tiny_checkpoint, fake_vllm_command, 20)
    expected = plain(20)
    finish(run, tmp_path)
    assert same(final(tmp_path, 20), expected)
    assert trained(tmp_path) == [list(range(8 * step, 8 * step + 8)) for step in range(20)]
    before = dict(weights.read_tensors(tiny_checkpoint))
    # it has been trained at all
    assert not torch.equal(before["lm_head.weight"], expected["lm_head.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random_moments_a_run_goes_on_bit_for_bit(
    seed, tmp_path, tiny_checkpoint, fake_vllm_command, plain
):
    """Five times each, so 20 in all: kill -9 of the trainer, then the same command with --resume
    auto."""
    rng, steps = random.Random(seed), 30
    flags = ["--resume", "auto", "--checkpoint-every-steps", "2"]
    for kill in range(5):
        run = start(tmp_path, tiny_checkpoint, fake_vllm_command, steps, *flags)
        before = (tmp_path / "out").read_text().count("  reward ")
        more = rng.randint(1, 5)
        wait_for(tmp_path, run, lambda out, n=before + more: out.count("  reward ") >= n)
        time.sleep(rng.random() * 0.3)  # the moment is what is random here
        run.send_signal(signal.SIGKILL)
        run.wait()
        assert (tmp_path / "out").read_text().count("going on from") <= kill
    finish(start(tmp_path, tiny_checkpoint, fake_vllm_command, steps, *flags), tmp_path)
    ordinals = trained(tmp_path)
    assert ordinals == [list(range(8 * step, 8 * step + 8)) for step in range(steps)]
    assert same(final(tmp_path, steps), plain(steps))


@pytest.mark.slow
def test_sigterm_saves_and_exits_0_and_the_run_goes_on_where_it_was(
    tmp_path, tiny_checkpoint, fake_vllm_command, plain
):
    flags = ["--resume", "auto", "--checkpoint-every-steps", "0"]
    run = start(tmp_path, tiny_checkpoint, fake_vllm_command, 12, *flags)
    wait_for(tmp_path, run, lambda out: "step    3 " in out)
    children = psutil.Process(run.pid).children(recursive=True)
    run.send_signal(signal.SIGTERM)
    finish(run, tmp_path)
    assert not psutil.wait_procs(children, timeout=20)[1]
    (stop,) = re.findall(
        r"stopped at step (\d+), its state is in runs/tiny/checkpoints .*: SIGTERM",
        (tmp_path / "out").read_text(),
    )
    assert f"at step {stop}: SIGTERM" in how_it_ended(tmp_path / "runs/tiny")
    finish(start(tmp_path, tiny_checkpoint, fake_vllm_command, 12, *flags), tmp_path)
    assert not (tmp_path / "runs/tiny/ended.json").exists()
    assert (
        f"going on from runs/tiny/checkpoints/step-{int(stop):06d}: step {stop}, "
        in (tmp_path / "out").read_text()
    )
    assert trained(tmp_path) == [list(range(8 * step, 8 * step + 8)) for step in range(12)]
    assert same(final(tmp_path, 12), plain(12))


@pytest.mark.slow
def test_a_run_goes_on_under_another_layout(tmp_path, tiny_checkpoint, fake_vllm_command, plain):
    run = start(tmp_path, tiny_checkpoint, fake_vllm_command, 12)
    wait_for(tmp_path, run, lambda out: "step    3 " in out)
    run.send_signal(signal.SIGTERM)
    finish(run, tmp_path)
    launcher = [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node 2".split()]
    flags = ["--resume", "auto", "--tp", "2", "--ep", "2"]
    finish(
        start(tmp_path, tiny_checkpoint, fake_vllm_command, 12, *flags, launcher=launcher), tmp_path
    )
    assert "going on from runs/tiny/checkpoints/step-" in (tmp_path / "out").read_text()
    assert trained(tmp_path) == [list(range(8 * step, 8 * step + 8)) for step in range(12)]
    expected, found = plain(12), final(tmp_path, 12)
    # One layout computes another's sums in another order, and a sample may then come out otherwise:
    # close, not equal.
    assert max((found[name] - expected[name]).abs().max() for name in expected) < 0.02


@pytest.mark.slow
def test_when_a_rank_dies_torchrun_starts_the_job_again_and_it_resumes_by_itself(
    tmp_path, tiny_checkpoint, fake_vllm_command
):
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 2"
    launcher = [sys.executable, *torchrun.split()]
    run = start(
        tmp_path,
        tiny_checkpoint,
        fake_vllm_command,
        12,
        "--checkpoint-every-steps",
        "2",
        launcher=launcher,
    )
    wait_for(tmp_path, run, lambda out: "step    5 " in out)
    ranks = [
        p
        for p in psutil.Process(run.pid).children(recursive=True)
        if p.environ().get("RANK") == "1"
    ]
    ranks[0].send_signal(signal.SIGKILL)
    finish(run, tmp_path)
    assert "going on from" in (tmp_path / "out").read_text()
    assert trained(tmp_path) == [list(range(8 * step, 8 * step + 8)) for step in range(12)]


@pytest.mark.slow
def test_a_node_keeps_trying_while_the_trainer_is_away_and_keeps_its_vllm(
    tmp_path, tiny_checkpoint, fake_vllm_command, plain
):
    """kill -9 of the trainer, then another on the same port: the node's prompts are void, its vLLM
    goes on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    env = {**os.environ, "CISPO_TOKEN": "shared"}
    flags = [
        "--no-local-rollout",
        "--hub-port",
        port,
        "--resume",
        "auto",
        "--checkpoint-every-steps",
        "2",
    ]
    node_command = [
        sys.executable,
        str(REPO / "rollout.py"),
        f"http://127.0.0.1:{port}",
        "--vllm-command",
        fake_vllm_command,
    ]
    with open(tmp_path / "node", "w") as out:
        node = subprocess.Popen(node_command, env=env, stdout=out, stderr=out)
    try:
        run = start(tmp_path, tiny_checkpoint, fake_vllm_command, 12, *flags, env=env)
        wait_for(tmp_path, run, lambda out: "step    5 " in out)
        run.send_signal(signal.SIGKILL)
        run.wait()
        finish(start(tmp_path, tiny_checkpoint, fake_vllm_command, 12, *flags, env=env), tmp_path)
        assert node.wait(60) == 0
    finally:
        node.kill()
    log = (tmp_path / "node").read_text()
    assert (
        log.count("vLLM is up") == 1
        and "the trainer was started again" in log
        and "stopped: RunOver" in log
    )
    assert trained(tmp_path) == [list(range(8 * step, 8 * step + 8)) for step in range(12)]
    assert same(final(tmp_path, 12), plain(12))
