"""checkpoint.py and run_dir.py: a checkpoint is whole and verified, and a run goes on from it only
where it may."""

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from on_ranks import on_ranks
from programs import run_program
from safetensors.torch import load_file, save_file
from test_resume import REPO, final, finish, same, start, trained, wait_for

from bridge import weights
from bridge.groups import Group
from bridge.ledger import Ledger
from config import Config
from model import ModelConfig, Qwen3MoE
from presets import parse_config
from ranks import checkpoint, parallel
from ranks.parallel import Mesh, ShardedAdamW
from task import task_examples


# ---- checkpoints ---------------------------------------------------------------------------------
def small(hidden_size=8, mesh=Mesh()):  # noqa: B008
    cfg = ModelConfig(
        vocab_size=16,
        hidden_size=hidden_size,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        intermediate_size=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
    )
    model = Qwen3MoE(cfg, mesh)
    model.init_weights(torch.Generator().manual_seed(0))
    return model, ShardedAdamW(model, 1.0, lr=0.1)


def one_update(model, optimizer):
    optimizer.zero_grad()
    model(torch.arange(6), torch.tensor([0, 2, 6], dtype=torch.int32), 4)[
        0
    ].square().sum().backward()
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
    assert sorted(p.name for p in saved[0].iterdir()) == [
        "step-000004",
        "step-000006",
        "step-000008",
    ]


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
    with pytest.raises(
        checkpoint.CheckpointError,
        match=r"step-000008: weight of model\.embed_tokens\.weight, part 1",
    ):
        checkpoint.load_state_tensors(root / "step-000008", *small(hidden_size=12), updates=4)


def damage(file):
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_taken(saved):
    root, said = saved[0], []

    def choose():
        return checkpoint.choose(checkpoint.whole(root), Mesh(), said.append)[0].name

    assert choose() == "step-000008" and not said
    damage(root / "step-000008/state-00000.safetensors")
    (root / "step-000009.tmp").mkdir()  # one that was never finished
    (root / "step-000010").mkdir()  # one without a manifest
    assert choose() == "step-000006"
    assert (
        "step-000010 is incomplete" in said[0]
        and "step-000008/state-00000.safetensors is damaged" in said[1]
    )


def save_damage_and_choose(root):
    """A rank with a disk of its own: what it says and chooses after each damage, and what is left
    in its directory."""
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
    """Two hosts with disks of their own. What was passed over is kept, under a name that no run
    goes on from."""
    for rank in (0, 1):
        (tmp_path / f"host{rank}").mkdir()
    (chosen_0, said_0, left_0), (chosen_1, said_1, left_1) = on_ranks(
        2, save_damage_and_choose, tmp_path
    )
    assert chosen_0 == chosen_1 == "step-000004"
    assert (
        left_0
        == left_1
        == ["step-000002", "step-000004", "step-000006.passed1", "step-000008.passed1"]
    )
    (line,) = said_1
    assert "rank 1" in line and "c/step-000008/state-00001.safetensors is damaged" in line
    assert [line.split(":")[0] for line in said_0] == [
        "passing over c/step-000008",
        "passing over c/step-000006",
    ]


def test_a_ledger_restored_from_any_moment_trains_every_prompt_once():
    """Stop at random steps with leases, buffer and holes; what was in flight is leased again, in
    order."""
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
                    ledger.accept(
                        one.id,
                        Group(one.ordinal, [1], t, t, t.float(), t, t.float(), t.to(torch.uint8)),
                    )
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
        assert set(counts) == {
            o for o in range(max(counts) + 1) if o % 37 != 5
        } or ledger.frontier <= max(counts)


def test_a_checkpoint_of_another_sequence_of_prompts_is_refused(tmp_path, tiny_checkpoint):
    manifest = {
        "step": 3,
        "world_size": 1,
        "files": {},
        "config": {**dataclasses.asdict(Config()), "seed": 7},
    }
    (tmp_path / "step-000003").mkdir()
    (tmp_path / "step-000003/checkpoint.json").write_text(json.dumps(manifest))
    command = [
        sys.executable,
        str(REPO / "train_cispo.py"),
        "--model",
        str(tiny_checkpoint),
        "--resume",
        "step-000003",
    ]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=os.environ, check=False
    )
    assert done.returncode == 2 and "was made with seed = 7, this run has 0" in done.stderr


@pytest.mark.slow
def test_a_disk_that_fills_up_under_the_weights_stops_the_run_with_its_state_saved(
    tmp_path, tiny_checkpoint, fake_vllm_command, plain
):
    """A whole version does not fit on the file system (ENOSPC). With room again the run goes on
    where it was."""
    flags = ["--checkpoint-every-steps", "0", "--resume", "auto", "--full-version-every", "1"]
    run = start(tmp_path, tiny_checkpoint, fake_vllm_command, 12, *flags)
    directory = tmp_path / "runs/tiny/weights"
    wait_for(tmp_path, run, lambda out: "step    2 " in out)
    run.send_signal(signal.SIGSTOP)
    while not all((version / "manifest.json").exists() for version in directory.glob("v*")):
        # a version half written would lose its directory, and not its room
        run.send_signal(signal.SIGCONT)
        time.sleep(0.05)
        run.send_signal(signal.SIGSTOP)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(directory)], check=True)
    run.send_signal(signal.SIGCONT)
    try:
        finish(run, tmp_path, status=1)
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)
    out = (tmp_path / "out").read_text()
    (stop, why) = re.findall(
        r"stopped at step (\d+), its state is in runs/tiny/checkpoints .*?: (.*)", out
    )[0]
    assert re.match(r"publishing v\d+ to runs/tiny/weights failed: .*No space left on device", why)
    finish(start(tmp_path, tiny_checkpoint, fake_vllm_command, 12, *flags), tmp_path)
    assert (
        f"going on from runs/tiny/checkpoints/step-{int(stop):06d}"
        in (tmp_path / "out").read_text()
    )
    assert trained(tmp_path) == [list(range(8 * step, 8 * step + 8)) for step in range(12)]
    assert same(final(tmp_path, 12), plain(12))


# ---- one process, one attempt, one origin --------------------------------------------------------
def refused(cwd, tiny_checkpoint, *flags):
    """The one line with which a run ends at its start."""
    done = run_program(REPO / "train_cispo.py", "--model", tiny_checkpoint, *flags, cwd=cwd)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr[-2000:]
    return done.stderr


def test_a_second_run_of_a_name_is_refused_until_the_first_has_ended_however(
    tmp_path, tiny_checkpoint, fake_vllm_command
):
    """Two terminals, or a requeued job beside the old one. kill -9 frees the name; a run that was
    moved aside is still held."""
    (tmp_path / "runs/tiny/code").mkdir(parents=True)  # goes aside
    flags = ["--checkpoint-every-steps", "2"]
    run = start(tmp_path, tiny_checkpoint, fake_vllm_command, 500, *flags)
    wait_for(tmp_path, run, lambda out: "step    3 " in out)
    run.send_signal(signal.SIGSTOP)
    for more in ([], ["--resume", "auto"], ["--name", "tiny", "--seed", "3"]):
        said = refused(tmp_path, tiny_checkpoint, *more)
        assert (
            f"--name tiny: {tmp_path}/runs/tiny is in use by pid {run.pid} on "
            f"{socket.gethostname()}" in said
        )
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == [".tiny.lock", "tiny", "tiny.1"]
    run.send_signal(signal.SIGKILL)
    run.wait()
    finish(
        start(tmp_path, tiny_checkpoint, fake_vllm_command, 10, *flags, "--resume", "auto"),
        tmp_path,
    )
    assert trained(tmp_path) == [list(range(8 * step, 8 * step + 8)) for step in range(10)]


@pytest.mark.parametrize("name", ["", ".", "..", "../up", "/tmp/keep", "a/b", "a\nb", "x" * 300])
def test_a_name_that_is_no_directory_of_its_own_is_refused(name):
    with pytest.raises(ValueError, match=r"--name .*must be the name of one directory"):
        parse_config(["--name", name])


def test_a_directory_that_is_no_run_s_is_never_moved(tmp_path, tiny_checkpoint):
    (tmp_path / "runs/mine").mkdir(parents=True)
    (tmp_path / "runs/mine/thesis.txt").write_text("all of it")
    assert "is no run's directory" in refused(tmp_path, tiny_checkpoint, "--name", "mine")
    (tmp_path / "runs/file").write_text("")
    assert "is no run's directory" in refused(tmp_path, tiny_checkpoint, "--name", "file")
    assert (tmp_path / "runs/mine/thesis.txt").read_text() == "all of it"


REWARD = "def score(completion, example):\n    return {} + 0.01 * len(completion)\n"


def test_a_run_goes_on_by_what_data_and_model_are_and_says_what_else_is_other(
    tmp_path, tiny_checkpoint, fake_vllm_command
):
    """Rows that moved and other weights are refused under the same name, the same ones taken under
    another. Other flags, texts and rewards are said, each in a line; what the run was made with is
    kept; scores of two rewards are not compared. A `latest` link does as a checkpoint."""
    rows = [json.dumps(example) + "\n" for example in task_examples("reverse", 60, seed=7)]
    (tmp_path / "d.jsonl").write_text("".join(rows))
    (tmp_path / "template.txt").write_text("{problem}")
    (tmp_path / "my.py").write_text(REWARD.format(0.7))
    shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    flags = [
        "--val-every-steps",
        "0",
        "--checkpoint-every-steps",
        "2",
        "--reward",
        "my.py:score",
        "--prompt-template",
        "template.txt",
    ]
    finish(
        start(tmp_path, tiny_checkpoint, fake_vllm_command, 4, "--data", "d.jsonl", *flags),
        tmp_path,
    )
    flags = [*flags, "--num-prompts-per-step", "8", "--resume", "auto"]

    (tmp_path / "d.jsonl").write_text("".join(rows[30:] + rows[:30]))
    assert "was made with other rows than 'd.jsonl'" in refused(
        tmp_path, tiny_checkpoint, "--data", "d.jsonl", *flags
    )
    (tmp_path / "d.jsonl").write_text("".join(rows))
    tensors = load_file(tiny_checkpoint / "model.safetensors")
    save_file({name: t * 0.5 for name, t in tensors.items()}, tmp_path / "copy/model.safetensors")
    said = refused(tmp_path, tmp_path / "copy", "--data", "d.jsonl", *flags)
    assert f"was made from another model than --model '{tmp_path}/copy'" in said
    assert "no checkpoint.json in it" in refused(
        tmp_path, tiny_checkpoint, "--data", "d.jsonl", *flags[:-1], "runs/tiny"
    )

    save_file(tensors, tmp_path / "copy/model.safetensors")
    (tmp_path / "template.txt").write_text("{problem}\n")  # the same: an end of line does not count
    (tmp_path / "my.py").write_text(REWARD.format(0.1))
    (tmp_path / "latest").symlink_to("runs/tiny/checkpoints/step-000004")
    flags = [*flags[:-1], "latest", "--data", str(tmp_path / "d.jsonl"), "--lr", "1e-3"]
    finish(start(tmp_path, tmp_path / "copy", fake_vllm_command, 6, *flags), tmp_path)
    lines = (tmp_path / "out").read_text().splitlines()
    told = [line.split("resumes with ")[1] for line in lines if "resumes with " in line]
    assert told == [
        "--max-num-steps 6, was 4",
        f"--model {str(tmp_path / 'copy')!r}, was {str(tiny_checkpoint)!r}",
        f"--data {str(tmp_path / 'd.jsonl')!r}, was 'd.jsonl'",
        "--reward 'my.py:score', which has another content now",
        "--lr 0.001, was 0.0001",
    ]
    assert len(trained(tmp_path)) == 6 and not (tmp_path / "runs/tiny.1").exists()
    configs = [tmp_path / "runs/tiny" / name for name in ("config-000004.json", "config.json")]
    assert [json.loads(path.read_text())["lr"] for path in configs] == [1e-4, 1e-3]
    (best,) = [line for line in lines[-5:] if "best checkpoint" in line]
    assert "step-000006" in best and "are of another reward or validation" in "".join(lines)


def test_a_run_without_a_step_says_so_and_resume_auto_that_there_is_nothing(
    tmp_path, tiny_checkpoint, fake_vllm_command
):
    env = {**os.environ, "FAKE_VLLM_FAULT": '{"kind": "hang"}'}
    flags = ["--resume", "auto", "--batch-timeout-s", "2", "--val-every-steps", "0"]
    finish(
        start(tmp_path, tiny_checkpoint, fake_vllm_command, 4, *flags, env=env), tmp_path, status=1
    )
    out = (tmp_path / "out").read_text()
    assert (
        "--resume auto: no whole checkpoint in runs/tiny/checkpoints, so the run starts anew" in out
    )
    assert "stopped at step 0, before any was trained, so there is no state to go on from: " in out
    assert "its state is in" not in out


def test_what_another_attempt_left_is_in_no_checkpoint_and_in_no_export(tmp_path):
    """Four ranks are killed while they write step 2; then one rank writes it. A file that no
    manifest names is not read either."""
    stale = tmp_path / "step-000002.tmp"
    stale.mkdir()
    (stale / "state-00001.safetensors").write_bytes(b"stale")
    parallel.join_ranks(60)
    try:
        model, optimizer = small()
        with checkpoint.Checkpointer(tmp_path, 0, 1, keep=2) as saver:
            saver.save(2, model, optimizer, {"ledger": {}, "scores": {}, "unscored": []})
    finally:
        torch.distributed.destroy_process_group()
    path = tmp_path / "step-000002"
    assert sorted(p.name for p in path.iterdir()) == ["checkpoint.json", "state-00000.safetensors"]
    zeros = {
        name: torch.zeros_like(t) for name, t in load_file(path / "state-00000.safetensors").items()
    }
    save_file(zeros, path / "state-00001.safetensors")
    # sorts before the true one
    (path / "state-00001.safetensors").rename(path / "state-.safetensors")
    twin, fresh = small()
    checkpoint.load_state_tensors(path, twin, fresh, updates=0)
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), model.parameters()))


def test_a_state_that_is_not_finite_is_neither_saved_nor_gone_on_from(saved):
    root, model, optimizer = saved
    (bucket,) = optimizer.buckets
    before, said = bucket.master.detach().clone(), []
    with torch.no_grad():
        bucket.master[3] = torch.nan
    saver = checkpoint.Checkpointer(root, 0, 1, keep=2, start=8)
    saver.save(10, model, optimizer, {"ledger": {}, "scores": {}, "unscored": []})
    with pytest.raises(
        checkpoint.CheckpointError, match=r"no checkpoint in .*: weight/model\.\S+ is not finite"
    ):
        saver.wait()
    with torch.no_grad():
        bucket.master.copy_(before)
    file = root / "step-000008/state-00000.safetensors"  # one that an older program wrote
    tensors = load_file(file)
    name = next(name for name in tensors if name.startswith("exp_avg_sq/"))
    tensors[name][0] = torch.inf
    save_file(tensors, file)
    manifest = json.loads((root / "step-000008/checkpoint.json").read_text())
    manifest["files"][file.name] |= {
        "bytes": file.stat().st_size,
        "blake3": weights.digest(file.read_bytes()),
    }
    (root / "step-000008/checkpoint.json").write_text(json.dumps(manifest))
    assert checkpoint.choose(checkpoint.whole(root), Mesh(), said.append)[0].name == "step-000006"
    assert f"{name} is not finite" in said[0]


def test_a_checkpoint_of_another_model_is_refused_by_the_tensor_that_does_not_fit(saved):
    path = saved[0] / "step-000008"
    shapes = dict(small()[0].cfg.checkpoint_shapes())
    narrower = {**shapes, "lm_head.weight": torch.Size((16, 4))}
    tied = {name: shape for name, shape in shapes.items() if name != "lm_head.weight"}
    for wrong, why in [
        (tied, "of lm_head.weight, which this model has no place for"),
        (narrower, "larger than in this"),
    ]:
        with pytest.raises(checkpoint.CheckpointError, match=why):
            checkpoint.Pieces(path, wrong)


def save_where_one_cannot(root):
    parallel.join_ranks(60)
    mesh = parallel.make_mesh(1, 1, 1)
    model, optimizer = small(mesh=mesh)
    saver = checkpoint.Checkpointer(root / f"disk{mesh.rank}", mesh.rank, 2, keep=9)
    saver.deadline_s = 60.0
    saver.save(
        2,
        model,
        optimizer,
        {"ledger": {}, "scores": {}, "unscored": []} if mesh.rank == 0 else None,
    )
    try:
        saver.wait()
    except checkpoint.CheckpointError as e:
        return str(e)


def test_a_rank_that_cannot_write_tells_the_others_why(tmp_path):
    (tmp_path / "disk1").write_text("a file where its directory should be")
    first, second = on_ranks(2, save_where_one_cannot, tmp_path)
    assert (
        "rank 0: no checkpoint" in first
        and "rank 1: [Errno" in first
        and "rank 1: no checkpoint" in second
    )
    assert not list((tmp_path / "disk0").glob("step-000002"))
