"""A gradient that is not finite changes nothing, on any rank; three in a row end the run with its
last sound state."""

import dataclasses
import itertools
import json
import math
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from batches import unpack_batch
from on_ranks import on_ranks
from safetensors.torch import load_file
from test_parallel import MODEL, RUN
from test_train import SMALL, TINY, random_groups

import loss
import report
from loss import clip_diagnostics
from model import Qwen3MoE
from ranks import parallel
from ranks.batch import pack_batch
from ranks.parallel import Mesh, ShardedAdamW, join_ranks, make_mesh, reduce_metrics
from report import skipped_in_a_row
from train_cispo import fix_for_the_step, micro_batch_logprobs, train_update

REPO = Path(__file__).resolve().parent.parent


def everything(model, optimizer):
    """Copies of all that an update may change."""
    model.await_values()
    state = {n: p.detach().clone() for n, p in model.named_parameters()}
    for i, bucket in enumerate(optimizer.buckets):
        state[f"{i}/weight"] = bucket.master.detach().clone()
        state |= {f"{i}/{n}": x.clone() for n, x in optimizer.state[bucket.master].items()}
    return state


def updates_with_a_bad_one(layout, value):
    """Two good updates, a bad one between them: an advantage of one rank's samples is no number."""
    mesh = Mesh()
    if layout:
        join_ranks(60)
        mesh = make_mesh(*layout, MODEL.num_key_value_heads)
    cfg = dataclasses.replace(RUN, tp=mesh.tp, ep=mesh.ep)
    model = Qwen3MoE(MODEL, mesh)
    model.init_weights(torch.Generator().manual_seed(0))
    optimizer = ShardedAdamW(model, cfg.max_grad_norm, lr=cfg.lr)
    updates, counts = unpack_batch(
        pack_batch(random_groups(), cfg), cfg, mesh.dp_rank, mesh.dp, mesh.device, mesh.tp
    )
    fix_for_the_step(updates, 1, model, None, cfg)
    update = lambda: train_update(model, optimizer, updates[0], counts[0], cfg, loss.policy_loss)
    norms = [update()[1].item()]
    before, good = everything(model, optimizer), [mb.advantages for mb in updates[0]]
    if mesh.dp_rank == mesh.dp - 1:  # rank 0's samples are sound where there is another
        for mb in updates[0]:
            mb.advantages = torch.full_like(mb.advantages, value)
    stats, norm = update()
    norms.append(norm.item())
    after = everything(model, optimizer)
    for mb, advantages in zip(updates[0], good):
        mb.advantages = advantages
    norms.append(update()[1].item())
    stats = {n: x.tolist() for n, x in reduce_metrics(stats, mesh.dp_group).items()}
    changed = [n for n in before if not torch.equal(before[n], after[n])]
    moved = not torch.equal(optimizer.buckets[0].master, after["0/weight"])
    return norms, changed, moved, stats


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize(
    "layout", [None, (1, 1), (2, 2)], ids=["1 rank", "dp 2", "tp 2, ep 2, dp 2"]
)
def test_a_gradient_that_is_not_finite_on_one_rank_changes_no_bit_on_any(layout, value):
    world = {None: 1, (1, 1): 2, (2, 2): 4}[layout]
    found = (
        on_ranks(world, updates_with_a_bad_one, layout, value)
        if layout
        else [updates_with_a_bad_one(None, value)]
    )
    for norms, changed, moved, stats in found:
        assert [math.isfinite(n) for n in norms] == [True, False, True]
        # weights, moments and the count of updates; the next one goes on
        assert not changed and moved
        sums = [x for n, x in stats.items() if not n.endswith(("_min", "_max"))]
        assert not any(torch.tensor(x).any() for x in sums)


def test_a_log_ratio_that_is_no_number_is_in_no_histogram_and_ends_nothing():
    curr, anchor = torch.tensor([-1.0, math.nan, math.inf, -math.inf]), torch.full((4,), -1.0)
    mean = lambda x: x.sum()
    found = clip_diagnostics(curr, anchor, torch.ones(4), torch.ones(4, dtype=torch.bool), mean)[
        "ratio_histogram"
    ]
    assert found.sum() == 4 and found.isfinite().all()


def test_the_records_of_skipped_updates_are_json_and_their_step_is_said(capsys):
    assert skipped_in_a_row([1.0, math.nan, 2.0, math.inf], 7, 2) == (1, "")
    assert "step 7: update 2, 4 of 4 is skipped" in capsys.readouterr().out
    assert skipped_in_a_row([1.0, 2.0], 8, 1) == (0, "") and not capsys.readouterr().out
    in_a_row, why = skipped_in_a_row([math.nan, 1.0], 9, 2)  # over the step's end
    assert in_a_row == 0 and "3 updates in a row" in why and "--lr" in why
    record = report.gradient_metrics([1.0, math.nan, 2.0])
    assert record == {
        "train/grad_norm": 1.5,
        "train/grad_norms": [1.0, None, 2.0],
        "train/updates_skipped": 1,
    }
    assert report.update_metrics({"loss": 0.0, "ratio_histogram": [0.0]}, [])["train/loss"] is None


@pytest.mark.parametrize("replay", ["trainer", "sampler"])
def test_the_reference_of_the_kl_penalty_chooses_its_own_experts(replay):
    cfg = dataclasses.replace(
        SMALL, reference_policy_kl_penalty=0.1, router_replay=replay, freeze_moe_router=False
    )
    model, reference = Qwen3MoE(TINY), Qwen3MoE(TINY)
    for seed, m in enumerate((model, reference)):
        m.init_weights(torch.Generator().manual_seed(seed))
    updates, _ = unpack_batch(pack_batch(random_groups(), cfg), cfg, 0, 1, torch.device("cpu"))
    with torch.no_grad():
        wanted = [micro_batch_logprobs(reference, mb, cfg)[0] for mbs in updates for mb in mbs]
    for mb in itertools.chain(*updates) if replay == "sampler" else ():
        shape = (len(TINY.moe_layers), len(mb.tokens_T), TINY.num_experts_per_tok)
        mb.expert_ids = torch.randint(TINY.num_experts, shape, dtype=torch.uint8)
    fix_for_the_step(updates, 1, model, reference, cfg)
    fix_for_the_step(updates, 1, model, reference, cfg)  # now the policy's experts are there
    for mb, logprobs in zip(itertools.chain(*updates), wanted):
        assert torch.equal(mb.ref_logprobs, logprobs) and mb.expert_ids is not None


def test_three_skipped_updates_in_a_row_stop_the_run_with_a_sound_state(
    tiny_checkpoint, tmp_path, fake_vllm_command
):
    """A learning rate of 1e30: the first update is finite, and no forward pass after it."""
    reward = tmp_path / "of_letters.py"
    reward.write_text("def score(text, example):\n    return sum(map(ord, text)) % 97 / 97\n")
    command = [
        sys.executable,
        str(REPO / "train_cispo.py"),
        "--name",
        "guard",
        "--model",
        str(tiny_checkpoint),
        "--no-compile",
        "--max-num-steps",
        "3",
        "--val-every-steps",
        "0",
        "--checkpoint-every-steps",
        "0",
        "--num-prompts-per-step",
        "4",
        "--num-generations-per-prompt",
        "4",
        "--train-global-batch-size",
        "4",
        # so that every group has a signal, whichever comes first
        "--reward",
        f"{reward}:score",
        "--lr",
        "1e30",
        "--rollout-args",
        f"--vllm-command '{fake_vllm_command}'",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stdout + done.stderr
    assert "step 0: update 2, 3, 4 of 4 is skipped" in done.stdout
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .startswith("train_cispo.py: rank 0: stopped at step 1: the gradients of 3")
    )
    end = json.loads((tmp_path / "runs/guard/ended.json").read_text())
    assert end["step"] == 1 and end["why"].startswith("the gradients of 3")
    (record,) = (tmp_path / "runs/guard/metrics.jsonl").read_text().splitlines()
    assert json.loads(record, parse_constant=pytest.fail)["train/updates_skipped"] == 3
    files = [
        *tmp_path.glob("runs/guard/checkpoints/step-000001/*.safetensors"),
        *tmp_path.glob("runs/guard/weights/v*/*.safetensors"),
    ]
    assert len(files) >= 2
    assert all(
        x.isfinite().all()
        for file in files
        for x in load_file(file).values()
        if x.is_floating_point()
    )


# ---- names ---------------------------------------------------------------------------------------
def collectives():
    join_ranks(60)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gathered = parallel.all_gather(torch.arange(4.0), dist.group.WORLD)
        return parallel.reduce_scatter(gathered, dist.group.WORLD).tolist()


def test_no_collective_is_called_by_a_name_that_torch_warns_of():
    assert on_ranks(1, collectives) == [[0.0, 1.0, 2.0, 3.0]]
