"""What only a GPU can show: every operation of the CUDA path in bf16 against fp64 or fp32, a whole
update, the weights' way to the host, a checkpoint, and a run.

    CISPO_TEST_GPU=1 python -m pytest tests/test_gpu.py

Five minutes on one GPU of 16 GB. The other tests, and this file without that variable, see no GPU.
`python tools/bench.py gpu` runs this first and then measures.
"""

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from batches import unpack_batch

import loss
import train_cispo
from bridge.groups import Group
from bridge.inside_vllm.vllm_tensors import WORDS, tensor_sum
from bridge.publish import host_buffers
from bridge.weights import own_hf
from config import Config
from model import ModelConfig, Qwen3MoE
from ranks import ops
from ranks.batch import pack_batch
from ranks.parallel import Mesh, ShardedAdamW

pytestmark = pytest.mark.gpu

REPO = Path(__file__).resolve().parent.parent
BF16 = torch.bfloat16
MOE = ModelConfig(
    vocab_size=512,
    hidden_size=256,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    intermediate_size=512,
    num_experts=16,
    num_experts_per_tok=4,
    moe_intermediate_size=128,
    norm_topk_prob=True,
    mlp_only_layers=(1,),
    initializer_range=0.06,
)
DENSE = dataclasses.replace(
    MOE, num_experts=0, num_experts_per_tok=0, moe_intermediate_size=0, tie_word_embeddings=True
)


@pytest.fixture(scope="module")
def dev():
    assert torch.cuda.is_available(), "CISPO_TEST_GPU=1, but torch sees no GPU"
    return torch.device("cuda", 0)


def normal(*shape, std=1.0, seed=0, device="cpu"):
    g = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=g) * std).to(device, BF16)


def error(found, wanted) -> float:
    """||found - wanted|| / ||wanted||, in fp64; nan is never below a bound."""
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    return ((found - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()


def show(name: str, value) -> None:
    print(f"      {name}: {value:.1e}" if isinstance(value, float) else f"      {name}: {value}")


# ---- one operation -------------------------------------------------------------------------------
def attend_by_hand(q, k, v, cu):
    groups, out = q.shape[1] // k.shape[1], []
    for start, end in itertools.pairwise(cu):
        scores = torch.einsum(
            "qhc,khc->hqk", q[start:end], k[start:end].repeat_interleave(groups, 1)
        )
        later = torch.ones(end - start, end - start, device=q.device).triu(1).bool()
        probs = (scores * q.shape[2] ** -0.5).masked_fill(later, -torch.inf).softmax(-1)
        out.append(torch.einsum("hqk,khc->qhc", probs, v[start:end].repeat_interleave(groups, 1)))
    return torch.cat(out)


@pytest.mark.parametrize(
    "heads, kv_heads, head_dim", [(32, 4, 128), (16, 8, 128), (4, 4, 64), (8, 2, 32)]
)
def test_attention_and_its_gradients_are_those_of_fp64(heads, kv_heads, head_dim, dev):
    cu = [0, 1, 130, 131, 700, 1024]
    leaves = [
        normal(1024, n, head_dim, seed=i, device=dev)
        for i, n in enumerate((heads, kv_heads, kv_heads))
    ]
    exact = [x.double().requires_grad_() for x in leaves]
    for x in leaves:
        x.requires_grad_()
    upstream = normal(1024, heads, head_dim, seed=9, device=dev)
    out, kept = ops.attend(*leaves, torch.tensor(cu, dtype=torch.int32, device=dev), 569)
    out.backward(upstream)
    wanted = attend_by_hand(*exact, cu)
    wanted.backward(upstream.double())
    errors = [error(out, wanted), *(error(x.grad, y.grad) for x, y in zip(leaves, exact))]
    again = [x.detach().clone().requires_grad_() for x in leaves]
    ops.attend(*again, torch.tensor(cu, dtype=torch.int32, device=dev), 569, [x.detach() for x in kept])[0].backward(upstream)  # fmt: skip
    assert (
        max(error(x.grad, y.grad) for x, y in zip(again, leaves)) < 1e-3
    )  # dq adds up in any order
    show("out, dq, dk, dv", max(errors))
    assert max(errors) < 1e-2


@pytest.mark.parametrize(
    "counts", [[256] * 16, [0, 1, 7, 0, 500, 0, 3, 1], [4096, 0, 0, 0], [0] * 8, [1] + [0] * 127]
)
def test_grouped_gemms_and_their_gradients_are_those_of_fp64(counts, dev):
    rows, ends_e = sum(counts), torch.tensor(counts, device=dev).cumsum(0).to(torch.int32)
    x, w = normal(rows, 256, device=dev), normal(len(counts), 128, 256, std=0.06, device=dev)
    upstream = normal(rows, 128, seed=5, device=dev)
    x.requires_grad_()
    w.requires_grad_()
    y = ops.grouped_mm(x, w.transpose(1, 2), ends_e)
    y.backward(upstream)
    parts = list(zip(x.double().split(counts), w.double(), upstream.double().split(counts)))
    wanted = torch.cat([a @ b.t() for a, b, _ in parts])
    dx = torch.cat([g @ b for _, b, g in parts])
    dw = torch.stack([g.t() @ a for a, _, g in parts])
    assert not w.grad[torch.tensor(counts) == 0].any(), "a gradient of an expert without rows"
    errors = [error(y, wanted), error(x.grad, dx), error(w.grad, dw)] if rows else [0.0]
    show("out, dx, dw", max(errors))
    assert max(errors) < 1e-2


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("one_pass", [True, False], ids=["one pass", "two passes"])
@pytest.mark.parametrize("vocab", [512, 151936])
def test_the_head_is_within_bf16_of_fp64(vocab, one_pass, compiled, dev):
    """Log-probs are better than bf16, since logits are fp32; only gradients are rounded to it."""
    N, D = 301, 256
    hidden, weight = normal(N, D, device=dev), normal(vocab, D, std=0.06, device=dev)
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    hidden.requires_grad_()
    weight.requires_grad_()
    g = torch.Generator().manual_seed(0)
    targets = torch.randint(vocab, (N,), generator=g).to(dev)
    advantages = torch.randn(N, generator=g).to(dev)
    added = torch.zeros(vocab, D, device=dev)
    if one_pass:
        head = (1.0, 64, compiled, None, added)
        value, logprobs, _ = ops.fused_head_loss(
            hidden, weight, targets, weighted, (advantages,), *head
        )
    else:
        logprobs, _ = ops.token_logprobs(hidden, weight, targets, 1.0, 64, compiled)
        value = weighted(logprobs[:N], advantages).sum()
    value.backward()
    wanted = (exact[0] @ exact[1].t()).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    weighted(wanted, advantages.double()).sum().backward()
    nats = (logprobs[:N].double() - wanted).abs().max().item()
    dweight = added if one_pass else weight.grad
    errors = [error(hidden.grad, exact[0].grad), error(dweight, exact[1].grad)]
    show("log-probs, nats at most", nats)
    show("dhidden, dweight", max(errors))
    assert nats < 1e-4 and max(errors) < 1e-2


def weighted(logprobs, advantages):
    return -advantages * logprobs


def test_adamw_is_torchs_in_fp32_and_rounds_to_bf16_once(dev):
    model = Qwen3MoE(dataclasses.replace(DENSE, num_hidden_layers=1), Mesh(device=dev)).to(
        dev, BF16
    )
    model.init_weights(torch.Generator(dev).manual_seed(0))
    wanted = [torch.nn.Parameter(p.detach().cpu().float()) for p in model.parameters()]
    adamw = dict(lr=1e-2, weight_decay=0.1)
    ours = ShardedAdamW(model, 1e9, **adamw)
    theirs = torch.optim.AdamW(wanted, **adamw)
    for step in range(3):
        ours.zero_grad()
        for i, (p, w) in enumerate(zip(model.parameters(), wanted)):
            grad = normal(*p.shape, seed=step * 100 + i).float()
            ours.grad_so_far(p).copy_(grad)
            w.grad = grad
        norm = ours.step()
        theirs.step()
    assert norm.isfinite()
    worst = max(error(p, w.to(BF16)) for p, w in zip(model.parameters(), wanted))
    show("parameters after 3 steps", worst)
    assert worst < 1e-3


# ---- the model and an update ---------------------------------------------------------------------
def groups_of(cfg, vocab: int, seed=0):
    """A step's groups with random prompts, samples and rewards."""
    g = torch.Generator().manual_seed(seed)
    S, groups = cfg.num_generations_per_prompt, []
    for _ in range(cfg.num_prompts_per_step):
        lengths = torch.randint(1, cfg.max_new_tokens, (S,), generator=g).int()
        n = int(lengths.sum())
        groups.append(
            Group(
                ordinal=len(groups),
                prompt_ids=torch.randint(vocab, (17,), generator=g).tolist(),
                token_ids=torch.randint(vocab, (n,), generator=g).int(),
                logprobs=-6 - torch.rand(n, generator=g),
                versions=torch.zeros(n, dtype=torch.int32),
                lengths=lengths,
                rewards=torch.rand(S, generator=g),
                truncated=torch.zeros(S, dtype=torch.uint8),
            )
        )
    return groups


CFG = Config(
    num_prompts_per_step=4,
    num_generations_per_prompt=4,
    train_global_batch_size=16,
    max_new_tokens=120,
    max_total_sequence_length=256,
    max_tokens_per_micro_batch=1024,
    logprob_chunk_size=64,
)


def copies(model_cfg, mesh, recompute, compiled):
    """The same model in bf16 on the GPU and in fp32 on the CPU."""
    exact = Qwen3MoE(model_cfg)
    exact.init_weights(torch.Generator().manual_seed(0))
    model = Qwen3MoE(model_cfg, mesh, recompute).to(mesh.device, BF16)
    model.load_state_dict({name: p.to(BF16) for name, p in exact.state_dict().items()})
    exact.load_state_dict({name: p.float() for name, p in model.state_dict().items()})
    if compiled:
        model.compile_blocks()
    return model, exact


GSPO = {"use_cispo": False, "sequence_level_importance_ratios": True, "token_level_loss": False}
FORMS = [  # the second algorithm is for the two-pass head: one form of each model will do
    *itertools.product([{}], ["moe", "dense"], [False, True], [False, True]),
    *itertools.product([GSPO], ["moe", "dense"], [True], [True]),
]


@pytest.mark.parametrize("algorithm, kind, recompute, compiled", FORMS)
def test_an_update_in_bf16_is_that_of_fp32_on_a_cpu(algorithm, kind, recompute, compiled, dev):
    """The CPU's experts are replayed, so that no rounding of a router counts."""
    model_cfg = MOE if kind == "moe" else DENSE
    mesh = Mesh(device=dev)
    model, exact = copies(model_cfg, mesh, recompute, compiled)
    cfg = dataclasses.replace(CFG, compile=compiled, **algorithm)
    blob, found = pack_batch(groups_of(cfg, 512), cfg), {}
    experts, prevs = [], []
    for m, where in ((exact, torch.device("cpu")), (model, dev)):
        one = dataclasses.replace(cfg, compile=cfg.compile and where == dev)
        updates, counts = unpack_batch(blob, one, 0, 1, where)
        for i, mb in enumerate(updates[0]):
            if m is exact:
                with torch.no_grad():
                    logprobs, _, ids = train_cispo.micro_batch_logprobs(m, mb, one)
                experts.append(ids)
                prevs.append(logprobs + 0.3 * torch.sin(37 * mb.gen_logprobs))
            mb.expert_ids = None if experts[i] is None else experts[i].to(where)
            mb.prev_logprobs, mb.age = prevs[i].to(where), 1 - mb.versions
        optimizer = ShardedAdamW(m, 1e9, lr=0.0)
        grads, step = {}, optimizer.step

        def kept_step():  # which gives the gradients up
            grads.update({n: p.main_grad.clone() for n, p in m.named_parameters()})  # noqa: B023
            return step()  # noqa: B023

        optimizer.step = kept_step
        stats, norm = train_cispo.train_update(
            m, optimizer, updates[0], counts[0], one, loss.policy_loss
        )
        found[where.type] = stats, norm, grads
    (stats, norm, grads), (want_stats, want_norm, want_grads) = found["cuda"], found["cpu"]
    errors = {name: error(grads[name], want_grads[name]) for name in want_grads}
    show("largest error of a gradient", max(errors.values()))
    worst = max(errors, key=errors.get)
    assert errors[worst] < 4e-2, worst
    assert norm.item() == pytest.approx(want_norm.item(), rel=2e-2)
    for name in ("loss", "probs_ratio", "gen_kl_error", "entropy"):
        assert stats[name].item() == pytest.approx(want_stats[name].item(), rel=2e-2, abs=2e-3), (
            name
        )
    if kind == "moe":
        assert torch.equal(stats["expert_tokens"].cpu().long(), want_stats["expert_tokens"].long())


def test_an_update_waits_for_the_device_where_it_must_and_nowhere_else(dev):
    """Nothing of a dense model's update does, nor of an MoE's without expert parallelism."""
    for model_cfg in (DENSE, MOE):
        model, _ = copies(model_cfg, Mesh(device=dev), recompute=True, compiled=False)
        cfg = dataclasses.replace(CFG, compile=False)
        updates, counts = unpack_batch(pack_batch(groups_of(cfg, 512), cfg), cfg, 0, 1, dev)
        for mb in updates[0]:
            mb.prev_logprobs, mb.age = mb.gen_logprobs, 1 - mb.versions
        optimizer = ShardedAdamW(model, 1.0, lr=1e-3)
        args = (model, optimizer, updates[0], counts[0], cfg, loss.policy_loss)
        train_cispo.train_update(*args)
        torch.cuda.set_sync_debug_mode("error")
        try:
            train_cispo.train_update(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_one_more_update_of_other_lengths_compiles_nothing_anew(dev):
    model, _ = copies(MOE, Mesh(device=dev), recompute=True, compiled=True)
    torch._dynamo.reset()  # what other tests compiled is not counted
    torch._dynamo.utils.counters.clear()
    compilations = []
    for seed in range(4):
        updates, counts = unpack_batch(pack_batch(groups_of(CFG, 512, seed), CFG), CFG, 0, 1, dev)
        for mb in updates[0]:
            mb.prev_logprobs, mb.age = mb.gen_logprobs, 1 - mb.versions
        optimizer = ShardedAdamW(model, 1.0, lr=1e-4)
        train_cispo.train_update(model, optimizer, updates[0], counts[0], CFG, loss.policy_loss)
        compilations.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    show("graphs after each update", str(compilations))
    assert compilations[-1] == compilations[1]


def test_the_hosts_copy_of_the_weights_is_exact(dev):
    model, _ = copies(MOE, Mesh(device=dev), recompute=False, compiled=False)
    tensors = dict(own_hf(model, BF16))
    views = host_buffers({name: t.shape for name, t in tensors.items()}, BF16, pinned=True)
    for name, tensor in tensors.items():
        views[name].copy_(tensor, non_blocking=True)
    torch.cuda.current_stream().synchronize()
    assert next(iter(views.values())).is_pinned()
    assert all(torch.equal(views[name], tensor.cpu()) for name, tensor in tensors.items())


def test_a_tensor_has_the_sum_that_it_has_on_a_cpu(dev):
    """vLLM's workers make it where the tensor is (bridge/inside_vllm/vllm_tensors.py)."""
    g = torch.Generator().manual_seed(0)
    for size, dtype in ((1, BF16), (3 * WORDS + 5, BF16), (WORDS + 1, torch.float32)):
        tensor = torch.randn(size, generator=g).to(dtype)
        assert tensor_sum(tensor.to(dev)) == tensor_sum(tensor)


# ---- a run ---------------------------------------------------------------------------------------
def train(cwd, model, rollout_args, *flags) -> subprocess.CompletedProcess:
    command = [sys.executable, REPO / "train_cispo.py", "--use-cispo", "--model", model]
    command += [f"--rollout-args={rollout_args}", *flags]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=400)


@pytest.mark.parametrize("compiled", ["--no-compile", "--compile"])
def test_a_run_trains_publishes_verifies_saves_and_goes_on(
    compiled, dev, tmp_path, tiny_checkpoint, fake_vllm_command
):
    """The trainer in bf16 on the GPU, a stand-in for vLLM in fp32 on the CPU: every version is
    proven by its digests, and the mismatch is that of bf16."""
    vllm = f"--vllm-command '{fake_vllm_command}'"
    for steps in (3, 5):
        flags = (compiled, "--max-num-steps", str(steps), "--checkpoint-every-steps", "3")
        done = train(tmp_path, tiny_checkpoint, vllm, *flags, "--resume", "auto")
        print(done.stdout[-1500:])
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        for noise in ("FutureWarning", "UserWarning", "ProcessGroupNCCL"):
            assert noise not in done.stderr, done.stderr[-2000:]
    lines = (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()
    steps = [line for line in map(json.loads, lines) if "step" in line]
    assert [line["step"] for line in steps] == list(range(5))
    kl = [line["train/gen_kl_error_same_version"] for line in steps]
    show("gen_kl_error, same version", str(kl))
    assert all(k is None or k < 5e-3 for k in kl)


def test_fp32_is_refused_before_anything_starts(dev, tmp_path, tiny_checkpoint):
    done = train(tmp_path, tiny_checkpoint, "", "--param-dtype", "float32")
    assert done.returncode != 0 and "--param-dtype float32" in done.stderr
