"""Router replay with vLLM's experts: from vLLM's answer to the trainer's layers."""

import base64
import dataclasses
import io
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from batches import unpack_batch
from published import publish
from safetensors.torch import save_file
from test_episodes import with_env
from test_failures import SAMPLES, groups, make_hub, run_node, until

import loss
from bridge import weights
from bridge.groups import NOT_SAMPLED, Experts, Refused, check_group
from bridge.sample import Damaged, experts_of
from bridge.vllm import no_replay
from config import Config
from model import ModelConfig, Qwen3MoE
from prepare import check_replay
from presets import parse_config
from ranks.batch import Batch, pack_batch
from ranks.parallel import Mesh
from ranks.replay import give_experts, of_row
from report import read_jsonl
from train_cispo import micro_batch_logprobs, train_update

REPO = Path(__file__).resolve().parent.parent
PLAY = """
async def play(sample, example):
    await sample(max_tokens=3)
    await sample("fgh>")
    return 1.0
"""


def found_with(tmp_path, checkpoint, command, play=True, update=False):
    """Groups of a run with router replay, of samples of two turns."""
    reward = with_env(tmp_path, PLAY) if play else "exact"
    prompts = [{"prompt": p, "answer": "x"} for p in ("abcde>", "vwxyzabc>")] * 1000
    hub = make_hub(tmp_path, checkpoint, reward, prompts)
    hub.run |= {"plays": play, "max_new_tokens": 16, "experts": [2, 2, 8]}
    hub.experts = Experts(2, 2, 8)

    async def scenario(node):
        await groups(hub, 4)
        if update:
            publish(hub, 1)
            await until(lambda: node.version == 1)
            await groups(hub, 4)

    try:
        run_node(hub, tmp_path, command, scenario)
        return list(hub.ledger.buffer)
    finally:
        hub.close(patience_s=0.0)


def model_of(checkpoint):
    model = Qwen3MoE(ModelConfig.from_dir(checkpoint))
    weights.load_hf(model, checkpoint)
    return model


def replayed(found, model, replay="sampler"):
    """The micro-batch of these groups, with vLLM's experts."""
    cfg = dataclasses.replace(
        Config(),
        num_prompts_per_step=len(found),
        num_generations_per_prompt=SAMPLES,
        train_global_batch_size=len(found) * SAMPLES,
        logprob_chunk_size=16,
        router_replay=replay,
        compile=False,
    )
    blob = pack_batch(found, cfg)
    updates, counts = unpack_batch(blob, cfg, 0, 1, torch.device("cpu"))
    give_experts(found, Batch.unpack(blob), updates, cfg, Mesh(), model.cfg)
    ((mb,),) = updates
    return mb, counts[0], cfg


def test_experts_are_those_that_the_model_s_own_routers_choose_over_several_turns(
    tmp_path, tiny_checkpoint, fake_vllm_command
):
    """Row i of a sample is of the pass that predicts its token i, put in or sampled."""
    found, model = (
        found_with(tmp_path, tiny_checkpoint, fake_vllm_command),
        model_of(tiny_checkpoint),
    )
    assert any((g.versions == NOT_SAMPLED).any() for g in found)
    for group in found:
        for s in range(len(group.lengths)):
            end = int(group.lengths[: s + 1].sum())
            own = group.token_ids[end - int(group.lengths[s]) : end].tolist()
            tokens = torch.tensor([*group.prompt_ids, *own])
            cu_seqlens = torch.tensor([0, len(tokens)], dtype=torch.int32)
            with torch.no_grad():
                _, chosen_LtK = model(tokens, cu_seqlens, len(tokens))
            told = of_row(group, s).transpose(0, 1)
            same = (told[:, :-1].sort(-1)[0] == chosen_LtK[:, :-1].sort(-1)[0]).all(-1)
            assert told.shape == chosen_LtK.shape and same.float().mean() == 1.0
    mb, counts, cfg = replayed(found, model)
    assert mb.expert_ids.dtype == torch.uint8
    with torch.no_grad():
        mb.prev_logprobs, mb.age = micro_batch_logprobs(model, mb, cfg)[0], 0 * mb.versions

    class Nothing:
        zero_grad = expect_last = step = staticmethod(lambda: torch.tensor(0.0))
        grad_so_far = staticmethod(torch.zeros_like)

    model.head_weight.main_grad = model.head_weight
    stats, _ = train_update(model, Nothing, [mb], counts, cfg, loss.policy_loss)
    assert stats["router_agreement"] == pytest.approx(1.0, abs=1e-6)


def test_replay_takes_a_perturbed_router_s_mismatch_away(
    tmp_path, tiny_checkpoint, fake_vllm_command
):
    """Experts that are nearly as likely as others change places where the trainer's routers alone
    are moved by a little; their weights hardly change. That is what the mismatch is made of."""
    checkpoint = tmp_path / "undecided"
    shutil.copytree(tiny_checkpoint, checkpoint)
    tensors = dict(weights.read_tensors(tiny_checkpoint))
    tensors = {n: t * 1e-3 if n.endswith("mlp.gate.weight") else t for n, t in tensors.items()}
    (file,) = checkpoint.glob("*.safetensors")
    save_file(tensors, file)
    found, model = found_with(tmp_path, checkpoint, fake_vllm_command), model_of(checkpoint)
    g, kl = torch.Generator().manual_seed(0), {}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                p += 0.1 * p.std() * torch.randn(p.shape, generator=g)
    for replay in ("off", "sampler"):
        mb, _, cfg = replayed(found, model, replay)
        with torch.no_grad():
            logprobs = micro_batch_logprobs(model, mb, cfg)[0]
        kl[replay] = loss.mismatch(logprobs, mb.gen_logprobs)["gen_kl_error"][mb.mask].mean().item()
    assert kl["off"] > 10 * kl["sampler"], kl


def test_the_experts_of_a_token_are_of_the_weights_that_read_it_first(
    tmp_path, tiny_checkpoint, fake_vllm_command
):
    """Across an update in mid-sample every row is there."""
    found = found_with(tmp_path, tiny_checkpoint, fake_vllm_command, play=False, update=True)
    assert {int(v) for g in found for v in g.versions} == {0, 1}
    assert all(g.experts.shape == (len(g.token_ids), 2, 2) for g in found)
    assert all(g.prompt_experts.shape == (len(g.prompt_ids) - 1, 2, 2) for g in found)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, ""),
        ({"experts": None}, "experts: missing"),
        ({"experts": torch.zeros(3, 2, 2).byte()}, "[3, 2, 2], expected torch.uint8 [4, 2, 2]"),
        ({"experts": torch.zeros(4, 2, 2).short()}, "torch.int16 [4, 2, 2], expected torch.uint8"),
        ({"experts": torch.full((4, 2, 2), 8).byte()}, "experts names an expert outside 0..7"),
        ({"prompt_experts": torch.zeros(3, 2, 2).byte()}, "expected torch.uint8 [2, 2, 2]"),
    ],
)
def test_the_hub_takes_experts_of_the_right_shape_and_range_alone(change, said):
    ints = lambda *x: torch.tensor(x, dtype=torch.int32)
    group = {
        "lengths": ints(2, 2),
        "token_ids": ints(1, 2, 3, 4),
        "logprobs": torch.zeros(4),
        "versions": ints(0, 0, 0, 0),
        "rewards": torch.zeros(2),
        "truncated": torch.zeros(2).byte(),
        "experts": torch.zeros(4, 2, 2).byte(),
        "prompt_experts": torch.zeros(2, 2, 2).byte(),
        **change,
    }
    group = {name: t for name, t in group.items() if t is not None}
    check = (group, (2, 2), 8, 32, (0, 0), 0, 3)
    if not said:
        check_group(*check, Experts(2, 2, 8))
        with pytest.raises(Refused, match="the run has no use for it"):
            check_group(*check)
        return
    with pytest.raises(Refused) as refused:
        check_group(*check, Experts(2, 2, 8))
    assert said in refused.value.reason


def npy(array) -> str:
    file = io.BytesIO()
    np.save(file, array)
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (None, "cannot be read"),
        ("AAAA", "cannot be read"),
        (npy(np.array([{}], dtype=object)), "cannot be read"),  # a pickle
        (npy(np.zeros((3, 2, 2), np.uint8)), "shape [3, 2, 2], expected 4 rows"),
        (npy(np.zeros(4, np.uint8)), "shape [4], expected 4 rows"),
    ],
)
def test_experts_that_are_not_there_cost_the_sample(told, said):
    with pytest.raises(Damaged) as damaged:
        experts_of({"routed_experts": told}, 4)
    assert said in str(damaged.value)


def test_what_cannot_be_replayed_is_refused_in_one_line(tmp_path):
    """Two of them from outside, the others by the same check."""
    for flags, said in [
        (["--rollout-args", "--vllm-args '-pp 2'"], "--pipeline-parallel-size"),
        (
            ["--model", "Qwen/Qwen3-0.6B", "--dry-run"],
            "--router-replay sampler: the model is dense",
        ),
    ]:
        done = subprocess.run(
            [sys.executable, REPO / "train_cispo.py", "--router-replay", "sampler", *flags],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2 and said in done.stderr.splitlines()[-1]
    for given, said in [
        ("--pipeline-parallel-size=2", "--pipeline-parallel-size"),
        ("--no-enable-prefix-caching", "its prefix cache"),
    ]:
        flags = ["--router-replay", "sampler", "--rollout-args", f"--vllm-args {given}"]
        with pytest.raises(ValueError, match=f"^--router-replay sampler: .*{said}.*$"):
            check_replay(parse_config(flags))
    assert not no_replay("--pipeline-parallel-size 1 --tensor-parallel-size 2")


@pytest.mark.slow
def test_a_run_replays_the_experts_of_a_real_vllm(tmp_path):
    """Synchronous, one update a step: the weights are those that sampled, in float32."""
    command = f"{sys.executable} {REPO / 'tests/vllm_cpu.py'}"
    flags = {
        "--preset": "rounds",
        "--router-replay": "sampler",
        "--max-num-steps": "4",
        "--max-trajectory-age-steps": "0",
        "--num-prompts-per-step": "8",
        "--num-generations-per-prompt": "8",
        "--train-global-batch-size": "64",
        "--rollout-args": f"--vllm-command '{command}'",
        "--name": "replay",
    }
    words = [word for pair in flags.items() for word in pair]
    subprocess.run([sys.executable, REPO / "train_cispo.py", *words], cwd=tmp_path, check=True)
    records = read_jsonl(tmp_path / "runs/replay/metrics.jsonl")
    assert [r["train/router_agreement"] for r in records] == pytest.approx([1.0] * 4, abs=1e-6)
    assert max(r["train/gen_kl_error"] for r in records) < 1e-5
    assert all(r["rollout/turns_per_sample"] == 3.0 for r in records)
