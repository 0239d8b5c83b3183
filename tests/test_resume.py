"""Age 0 against a plain synchronous loop, and runs that end before their time: bit for bit, on the fake vLLM."""

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
from collections import Counter
from pathlib import Path

import fake_vllm
import psutil
import pytest
import torch
from published import write_version
from ranks import on_ranks

import checkpoint
import loss
import parallel
import weights
from batch import pack_batch, unpack_batch
from hub import parse_group
from ledger import Group, Ledger
from model import ModelConfig, Qwen3MoE
from parallel import Mesh, ShardedAdamW
from rewards import exact_match
from rollout import pack_group
from task import eos_token_ids
from train_cispo import Config, build_model, load_examples, load_prompts, micro_batch_logprobs, train_update

REPO = Path(__file__).resolve().parent.parent
SMALL = {"num_prompts_per_step": 8, "num_generations_per_prompt": 8, "train_global_batch_size": 32, "cpu_threads": 1,
         "max_trajectory_age_steps": 0, "compile": False}  # fmt: skip


def start(cwd, tiny_checkpoint, fake_vllm_command, steps, *flags, launcher=(sys.executable,), env=None):
    """A training run; `compile` is off since what is compiled depends on the shapes that a process meets first."""
    command = [*launcher, str(REPO / "train_cispo.py"), "--model", str(tiny_checkpoint), "--max-num-steps", str(steps),
               "--num-prompts-per-step", "8", "--num-generations-per-prompt", "8", "--train-global-batch-size", "32",
               "--cpu-threads", "1", "--max-trajectory-age-steps", "0", "--no-compile",
               f"--rollout-args=--vllm-command '{fake_vllm_command}'", *flags]  # fmt: skip
    with open(cwd / "out", "a") as out:
        return subprocess.Popen(command, cwd=cwd, stdout=out, stderr=out, env=env)


def finish(process, cwd, status=0, within_s=240):
    assert process.wait(within_s) == status, (cwd / "out").read_text()[-3000:]


def wait_for(cwd, process, condition, within_s=120):
    deadline = time.monotonic() + within_s
    while not condition((cwd / "out").read_text()):
        assert time.monotonic() < deadline and process.poll() is None, (cwd / "out").read_text()[-3000:]
        time.sleep(0.05)  # polling what another program prints


def trained(cwd):
    records = [json.loads(line) for line in (cwd / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == list(range(len(records)))
    return [r["ordinals"] for r in records]


def final(cwd, steps):
    return dict(weights.read_tensors(cwd / f"runs/tiny/weights/v{steps}"))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def plain_loop(tiny_checkpoint, tmp_path, steps):
    """Generate, score, train, one after the other in one process: no hub, no node, no buffer. Returns the tensors."""
    cfg = dataclasses.replace(Config(), model=str(tiny_checkpoint), max_num_steps=steps, **SMALL)
    prompts, codec, _ = load_prompts(cfg, tiny_checkpoint, load_examples(cfg))
    model = build_model(cfg, ModelConfig.from_dir(tiny_checkpoint), Mesh(), tiny_checkpoint)
    optimizer = ShardedAdamW(
        model, cfg.max_grad_norm, lr=cfg.lr, betas=(cfg.adam_beta1, cfg.adam_beta2), eps=cfg.adam_eps,
        weight_decay=cfg.weight_decay,
    )  # fmt: skip
    sampling = {"n": 8, "temperature": 1.0, "max_tokens": 8, "stop_token_ids": eos_token_ids(tiny_checkpoint)}

    async def generate(step):
        policy = fake_vllm.Policy(write_version(tmp_path, step, list(model.hf_tensors()), tiny_checkpoint))
        groups = []
        for ordinal in range(step * 8, step * 8 + 8):
            example = prompts[ordinal]
            request = fake_vllm.Request(codec.encode(example), sampling, cfg.seed, str(step))
            while not request.done.done():
                request.step(policy, str(step))
            choices = request.done.result()
            rewards = [exact_match(codec.decode(c["token_ids"]), example) for c in choices]
            _, tensors = parse_group(pack_group(choices, rewards, "", 0.0))
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


def test_age_0_equals_a_plain_synchronous_loop_bit_for_bit(tmp_path, tiny_checkpoint, fake_vllm_command):
    run = start(tmp_path, tiny_checkpoint, fake_vllm_command, 20)
    expected = plain_loop(tiny_checkpoint, tmp_path / "plain", 20)
    finish(run, tmp_path)
    assert same(final(tmp_path, 20), expected)
    assert trained(tmp_path) == [list(range(8 * step, 8 * step + 8)) for step in range(20)]
    before = dict(weights.read_tensors(tiny_checkpoint))
    assert not torch.equal(before["lm_head.weight"], expected["lm_head.weight"])  # it has been trained at all


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random_moments_a_run_goes_on_bit_for_bit(seed, tmp_path, tiny_checkpoint, fake_vllm_command):
    """Five times each, so 20 in all: kill -9 of the trainer, then the same command with --resume auto."""
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
    assert same(final(tmp_path, steps), plain_loop(tiny_checkpoint, tmp_path / "plain", steps))


@pytest.mark.slow
def test_sigterm_saves_and_exits_0_and_the_run_goes_on_where_it_was(tmp_path, tiny_checkpoint, fake_vllm_command):
    flags = ["--resume", "auto", "--checkpoint-every-steps", "0"]
    run = start(tmp_path, tiny_checkpoint, fake_vllm_command, 12, *flags)
    wait_for(tmp_path, run, lambda out: "step    3 " in out)
    children = psutil.Process(run.pid).children(recursive=True)
    run.send_signal(signal.SIGTERM)
    finish(run, tmp_path)
    assert not psutil.wait_procs(children, timeout=20)[1]
    (stop,) = re.findall(
        r"stopped at step (\d+), its state is in runs/tiny/checkpoints .*: SIGTERM", (tmp_path / "out").read_text()
    )
    finish(start(tmp_path, tiny_checkpoint, fake_vllm_command, 12, *flags), tmp_path)
    assert f"going on from runs/tiny/checkpoints/step-{int(stop):06d}: step {stop}, " in (tmp_path / "out").read_text()
    assert trained(tmp_path) == [list(range(8 * step, 8 * step + 8)) for step in range(12)]
    assert same(final(tmp_path, 12), plain_loop(tiny_checkpoint, tmp_path / "plain", 12))


@pytest.mark.slow
def test_a_run_goes_on_under_another_layout(tmp_path, tiny_checkpoint, fake_vllm_command):
    run = start(tmp_path, tiny_checkpoint, fake_vllm_command, 12)
    wait_for(tmp_path, run, lambda out: "step    3 " in out)
    run.send_signal(signal.SIGTERM)
    finish(run, tmp_path)
    launcher = [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node 2".split()]
    flags = ["--resume", "auto", "--tp", "2", "--ep", "2"]
    finish(start(tmp_path, tiny_checkpoint, fake_vllm_command, 12, *flags, launcher=launcher), tmp_path)
    assert "going on from runs/tiny/checkpoints/step-" in (tmp_path / "out").read_text()
    assert trained(tmp_path) == [list(range(8 * step, 8 * step + 8)) for step in range(12)]
    expected, found = plain_loop(tiny_checkpoint, tmp_path / "plain", 12), final(tmp_path, 12)
    # One layout computes another's sums in another order, and a sample may then come out otherwise: close, not equal.
    assert max((found[name] - expected[name]).abs().max() for name in expected) < 0.02


@pytest.mark.slow
def test_when_a_rank_dies_torchrun_starts_the_job_again_and_it_resumes_by_itself(
    tmp_path, tiny_checkpoint, fake_vllm_command
):
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 2"
    launcher = [sys.executable, *torchrun.split()]
    run = start(tmp_path, tiny_checkpoint, fake_vllm_command, 12, "--checkpoint-every-steps", "2", launcher=launcher)
    wait_for(tmp_path, run, lambda out: "step    5 " in out)
    ranks = [p for p in psutil.Process(run.pid).children(recursive=True) if p.environ().get("RANK") == "1"]
    ranks[0].send_signal(signal.SIGKILL)
    finish(run, tmp_path)
    assert "going on from" in (tmp_path / "out").read_text()
    assert trained(tmp_path) == [list(range(8 * step, 8 * step + 8)) for step in range(12)]


@pytest.mark.slow
def test_a_node_keeps_trying_while_the_trainer_is_away_and_keeps_its_vllm(tmp_path, tiny_checkpoint, fake_vllm_command):
    """kill -9 of the trainer, and another on the same port: what the node held is void, its vLLM is not."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    env = {**os.environ, "CISPO_TOKEN": "shared"}
    flags = ["--no-local-rollout", "--hub-port", port, "--resume", "auto", "--checkpoint-every-steps", "2"]
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
    assert log.count("vLLM is up") == 1 and "the trainer was started again" in log and "stopped: RunOver" in log
    assert trained(tmp_path) == [list(range(8 * step, 8 * step + 8)) for step in range(12)]
    assert same(final(tmp_path, 12), plain_loop(tiny_checkpoint, tmp_path / "plain", 12))


# ---- checkpoints ---------------------------------------------------------------------------------------------
def small(hidden_size=8, mesh=Mesh()):  # noqa: B008
    cfg = ModelConfig(
        vocab_size=16, hidden_size=hidden_size, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=4, intermediate_size=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8,
    )  # fmt: skip
    model = Qwen3MoE(cfg, mesh)
    model.init_weights(torch.Generator().manual_seed(0))
    return model, ShardedAdamW(model, 1.0, lr=0.1)


def one_update(model, optimizer):
    optimizer.zero_grad()
    model(torch.arange(6), torch.tensor([0, 2, 6], dtype=torch.int32), 4)[0].square().sum().backward()
    optimizer.step()


@pytest.fixture
def saved(tmp_path):
    """Checkpoints of steps 2, 4, 6, 8 of a small model, two kept; the best reward was at step 4."""
    parallel.join_ranks(60)
    model, optimizer = small()
    saver, scores = checkpoint.Checkpointer(tmp_path, 0, 1, keep=2), {}
    for step in (2, 4, 6, 8):
        one_update(model, optimizer)
        scores[step] = 0.9 if step == 4 else 0.5
        saver.save(step, model, optimizer, {"ledger": {}, "scores": scores, "unscored": []})
    saver.wait()
    yield tmp_path, model, optimizer
    torch.distributed.destroy_process_group()


def test_the_last_checkpoints_and_the_best_are_kept(saved):
    assert sorted(p.name for p in saved[0].iterdir()) == ["step-000004", "step-000006", "step-000008"]


def test_a_checkpoint_brings_back_parameters_and_optimizer(saved):
    root, model, optimizer = saved
    manifest = checkpoint.verify(root / "step-000008", 0, 1)
    assert manifest["files"]["state-00000.safetensors"]["updates"] == 4
    twin, fresh = small()
    checkpoint.load_state_tensors(root / "step-000008", twin, fresh, updates=4)
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), model.parameters()))
    for m, o in ((model, optimizer), (twin, fresh)):
        one_update(m, o)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))
    assert not torch.equal(model.head_weight, small()[0].head_weight)
    with pytest.raises(checkpoint.CheckpointError, match=r"step-000008: weight of model\.embed_tokens\.weight, part 1"):
        checkpoint.load_state_tensors(root / "step-000008", *small(hidden_size=12), updates=4)


def damage(file):
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_taken(saved):
    root, said = saved[0], []
    choose = lambda: checkpoint.choose(checkpoint.whole(root), Mesh(), said.append)[0].name
    assert choose() == "step-000008" and not said
    damage(root / "step-000008/state-00000.safetensors")
    (root / "step-000009.tmp").mkdir()  # one that was never finished
    (root / "step-000010").mkdir()  # one without a manifest
    assert choose() == "step-000006"
    assert "step-000010 is incomplete" in said[0] and "step-000008/state-00000.safetensors is damaged" in said[1]


def save_damage_and_choose(root):
    """A rank with a disk of its own: what it says and chooses after each damage, and what is left in its directory."""
    parallel.join_ranks(60)
    mesh = parallel.make_mesh(1, 1, 1)
    os.chdir(root / f"host{mesh.rank}")
    model, optimizer = small(mesh=mesh)
    saver, said, chosen = checkpoint.Checkpointer(Path("c"), mesh.rank, 2, keep=9), [], []
    for step in (2, 4, 6, 8):
        run = {"ledger": {}, "scores": {step: 0.5}, "unscored": []}
        saver.save(step, model, optimizer, run if mesh.rank == 0 else None)
    saver.wait()
    if mesh.rank == 1:
        damage(Path("c/step-000008/state-00001.safetensors"))
        manifest = Path("c/step-000006/checkpoint.json")  # of another run that had the same steps
        manifest.write_text(manifest.read_text().replace("0.5", "0.6"))
    chosen = checkpoint.choose(checkpoint.whole(Path("c")), mesh, said.append)
    checkpoint.Checkpointer(Path("c"), mesh.rank, 2, keep=9, start=chosen[1]["step"])
    return chosen[0].name, said, sorted(p.name for p in Path("c").iterdir())


def test_every_rank_passes_over_a_checkpoint_that_is_not_whole_on_one_of_them(tmp_path):
    """Two hosts with disks of their own. What was passed over is kept, under a name that no run goes on from."""
    for rank in (0, 1):
        (tmp_path / f"host{rank}").mkdir()
    (chosen_0, said_0, left_0), (chosen_1, said_1, left_1) = on_ranks(2, save_damage_and_choose, tmp_path)
    assert chosen_0 == chosen_1 == "step-000004"
    assert left_0 == left_1 == ["step-000002", "step-000004", "step-000006.passed1", "step-000008.passed1"]
    (line,) = said_1
    assert "rank 1" in line and "c/step-000008/state-00001.safetensors is damaged" in line
    assert [line.split(":")[0] for line in said_0] == ["passing over c/step-000008", "passing over c/step-000006"]


def test_a_ledger_restored_from_any_moment_trains_every_prompt_once():
    """Stop at random steps with leases, buffer and holes; what was in flight is leased again, in order."""
    for seed in range(20):
        rng, done = random.Random(seed), []
        ledger, version, held = Ledger(4, 2, 40, 30.0, max_failures=3), 0, []
        while version < 40:
            while granted := ledger.grant("n", rng.randint(max(0, version - 2), version), 0.0):
                held.append(granted)
            rng.shuffle(held)
            for _ in range(min(len(held), 3)):
                one = held.pop()
                if one.id in ledger.leases and one.ordinal % 37 == 5:
                    ledger.give_back(one.id, "leases_returned", failure="it never works")
                elif one.id in ledger.leases:
                    t = torch.full((2,), version, dtype=torch.int32)
                    ledger.accept(one.id, Group(one.ordinal, [1], t, t, t.float(), t, t.float(), t.to(torch.uint8)))
            if batch := ledger.take(version):
                done.append([g.ordinal for g in batch])
                version += 1
                if rng.random() < 0.2:  # the trainer dies here, and with it all but the checkpoint
                    state = json.loads(json.dumps(ledger.state()))
                    ledger, held = Ledger(4, 2, 40, 30.0, max_failures=3), []
                    ledger.restore(state)
                    assert ledger.state() == state
            ledger.check()
        counts = Counter(ordinal for batch in done for ordinal in batch)
        assert counts.total() == len(counts) == 160 and set(ledger.set_aside) == {
            o for o in range(max(counts)) if o % 37 == 5
        }
        assert set(counts) == {o for o in range(max(counts) + 1) if o % 37 != 5} or ledger.frontier <= max(counts)


def test_a_checkpoint_of_another_sequence_of_prompts_is_refused(tmp_path, tiny_checkpoint):
    manifest = {"step": 3, "world_size": 1, "files": {}, "config": {**dataclasses.asdict(Config()), "seed": 7}}
    (tmp_path / "step-000003").mkdir()
    (tmp_path / "step-000003/checkpoint.json").write_text(json.dumps(manifest))
    command = [sys.executable, str(REPO / "train_cispo.py"), "--model", str(tiny_checkpoint), "--resume", "step-000003"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 2 and "was made with seed = 7, this run has 0" in done.stderr


@pytest.mark.slow
def test_a_disk_that_fills_up_under_the_weights_stops_the_run_with_its_state_saved(
    tmp_path, tiny_checkpoint, fake_vllm_command
):
    """ENOSPC of a real file system, which a full version does not fit on; mended, the run goes on where it was."""
    flags = ["--checkpoint-every-steps", "0", "--resume", "auto", "--full-version-every", "1"]
    run = start(tmp_path, tiny_checkpoint, fake_vllm_command, 12, *flags)
    directory = tmp_path / "runs/tiny/weights"
    wait_for(tmp_path, run, lambda out: "step    2 " in out)
    run.send_signal(signal.SIGSTOP)
    while not all((version / "manifest.json").exists() for version in directory.glob("v*")):
        run.send_signal(signal.SIGCONT)  # a version half written would lose its directory, and not its room
        time.sleep(0.05)
        run.send_signal(signal.SIGSTOP)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(directory)], check=True)
    run.send_signal(signal.SIGCONT)
    try:
        finish(run, tmp_path, status=1)
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)
    out = (tmp_path / "out").read_text()
    (stop, why) = re.findall(r"stopped at step (\d+), its state is in runs/tiny/checkpoints .*?: (.*)", out)[0]
    assert re.match(r"publishing v\d+ to runs/tiny/weights failed: .*No space left on device", why)
    finish(start(tmp_path, tiny_checkpoint, fake_vllm_command, 12, *flags), tmp_path)
    assert f"going on from runs/tiny/checkpoints/step-{int(stop):06d}" in (tmp_path / "out").read_text()
    assert trained(tmp_path) == [list(range(8 * step, 8 * step + 8)) for step in range(12)]
    assert same(final(tmp_path, 12), plain_loop(tiny_checkpoint, tmp_path / "plain", 12))
