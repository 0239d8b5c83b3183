"""What a rank reads, holds and keeps: bytes of the checkpoint, optimizer state, gradients,
activations; replayed routing. Exact numbers, against counts made by other means than the code's
own.

A fake Mesh (rank and degrees, no groups) is enough where no rank talks to another; the rest runs
on real gloo ranks.
"""

import dataclasses
from types import SimpleNamespace
from unittest import mock

import pytest
import test_train
import torch
import torch.nn.functional as F
from batches import unpack_batch
from on_ranks import on_ranks
from safetensors import safe_open
from safetensors.torch import save_file
from test_parallel import MODEL

import loss
from bridge import weights
from bridge.weights import load_hf
from model import MoE, Qwen3MoE
from ranks import ops, parallel
from ranks.batch import pack_batch
from ranks.parallel import Mesh, ShardedAdamW, join_ranks, make_mesh
from ranks.plan import static_memory
from train_cispo import build_model, micro_batch_logprobs, train_update

torch.set_num_threads(1)

LAYOUTS = [(1, 1, 1), (4, 1, 1), (4, 2, 4), (4, 4, 2), (8, 4, 8)]  # world, tp, ep


def seeded(cfg, mesh=None, recompute=False):
    """Weights at std 0.3: the default 0.02 hides errors behind the residual stream."""
    model, g = Qwen3MoE(cfg, mesh, recompute), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, 0.3, generator=g) if p.dim() > 1 else p.uniform_(0.5, 1.5, generator=g)
    return model


def packed(num_tokens=24, seed=1):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randint(32, (num_tokens,), generator=g),
        torch.tensor([0, 7, 8, num_tokens], dtype=torch.int32),
        16,
    )


# ---- loading -------------------------------------------------------------------------------------
class CountingFile:
    """safe_open, with the bytes counted of every tensor it hands out."""

    materialised = 0

    def __init__(self, *args, **kwargs):
        self.file = safe_open(*args, **kwargs)

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *error):
        return self.file.__exit__(*error)

    def keys(self):
        return self.file.keys()

    def get_slice(self, name):
        return CountingSlice(self.file.get_slice(name))


class CountingSlice:
    def __init__(self, stored):
        self.stored, self.get_shape, self.get_dtype = stored, stored.get_shape, stored.get_dtype

    def __getitem__(self, index):
        part = self.stored[index]
        # a view of the mapped file, yet unread
        CountingFile.materialised += part.numel() * part.element_size()
        return part


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("world", "tp", "ep"), LAYOUTS)
def test_each_rank_reads_the_bytes_of_its_own_slices_and_no_others(
    world, tp, ep, tied, tmp_path, monkeypatch
):
    cfg = dataclasses.replace(MODEL, tie_word_embeddings=tied)
    whole = dict(seeded(cfg).hf_tensors())
    save_file(
        {name: t.detach().clone() for name, t in whole.items()}, tmp_path / "model.safetensors"
    )
    monkeypatch.setattr(weights, "safe_open", CountingFile)
    read = []
    for rank in range(world):
        model = Qwen3MoE(cfg, Mesh(rank=rank, world_size=world, tp=tp, ep=ep))
        CountingFile.materialised = 0
        read.append(load_hf(model, tmp_path))
        assert (
            read[-1] == CountingFile.materialised == 4 * sum(p.numel() for p in model.parameters())
        )
        # by the rule of model.split_of, in one line a kind, written again
        for name, view in model.hf_tensors():
            t = whole[name]
            if (
                ".experts." not in name
                and name.split(".")[-2] not in ("gate", "norm")
                and "norm" not in name
            ):
                dim = int("o_proj" in name or "down_proj" in name)
                count = (
                    min(tp, cfg.num_key_value_heads) if "k_proj" in name or "v_proj" in name else tp
                )
                t = t.chunk(count, dim)[rank % tp * count // tp]
            assert torch.equal(view, t), name
    sizes = {"experts": 0, "kv": 0, "norms and routers": 0, "others": 0}
    for name, t in whole.items():
        kind = "kv" if "k_proj" in name or "v_proj" in name else "others"
        kind = "norms and routers" if "norm" in name or name.endswith("mlp.gate.weight") else kind
        sizes["experts" if ".experts." in name else kind] += 4 * t.numel()
    copies = {
        "experts": world // ep,
        "kv": world // min(tp, 2),
        "norms and routers": world,
        "others": world // tp,
    }
    assert sum(read) == sum(sizes[kind] * copies[kind] for kind in sizes)


# ---- parameters, gradients, optimizer state ------------------------------------------------------
def storage_bytes(tensors):
    """Of distinct storages, so that views count once and what they are views of counts whole."""
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
    )


def held_after_a_step(layouts):
    """On every rank, by layout: bytes of parameters, gradients and optimizer state, what
    static_memory says, the same summed over parameters, and how many of the bytes are padding of
    the shards at most."""
    join_ranks(120)
    world, found = torch.distributed.get_world_size(), []
    for tp, ep in layouts:
        mesh = make_mesh(tp, ep, MODEL.num_key_value_heads)
        model = seeded(MODEL, mesh)
        for name, p in model.named_parameters():
            p.requires_grad_(not name.endswith("mlp.gate.weight"))  # as by default
        optimizer = ShardedAdamW(model, 1.0, lr=1e-3)
        for p in model.parameters():
            if p.requires_grad:
                optimizer.grad_so_far(p).fill_(0.1)
        gradients = storage_bytes(bucket.grads for bucket in optimizer.buckets)
        optimizer.step()
        moments = [
            optimizer.state[b.master][kind]
            for b in optimizer.buckets
            for kind in ("exp_avg", "exp_avg_sq")
        ]
        state = [*(b.master.detach() for b in optimizer.buckets), *moments]
        assert all(t.dtype == torch.float32 for t in state)
        trained = [
            (p.numel(), parallel.group_size(model.split_of(n).replicas))
            for n, p in model.named_parameters()
            if p.requires_grad
        ]
        found.append(
            {
                "parameters": storage_bytes(p.detach() for p in model.parameters()),
                "gradients": gradients,
                "gradients afterwards": storage_bytes(b.grads for b in optimizer.buckets),
                "optimizer state": storage_bytes(state),
                "predicted": static_memory(MODEL, world, tp, ep, 4, 4),
                "by parameter": sum(12 * numel / replicas for numel, replicas in trained),
                "padding": 12 * len(optimizer.buckets),  # a shard is rounded up to a whole element
                "left": [p.grad is not None for p in model.parameters()].count(True),
            }
        )
    return found


@pytest.mark.parametrize(
    ("world", "layouts"), [(2, [(1, 1), (2, 1), (1, 2)]), (4, [(1, 1), (2, 2), (4, 2), (1, 4)])]
)
def test_a_rank_holds_12_bytes_per_parameter_over_replicas_and_what_the_dry_run_predicts(
    world, layouts
):
    for rank, layouts_found in enumerate(on_ranks(world, held_after_a_step, layouts)):
        for layout, held in zip(layouts, layouts_found):
            where = f"rank {rank} of {world}, tp and ep {layout}: {held}"
            assert 0 <= held["optimizer state"] - held["by parameter"] < held["padding"], where
            assert held["by parameter"] == pytest.approx(
                held["predicted"]["optimizer state"], rel=1e-12
            ), where
            for kind in ("parameters", "gradients", "optimizer state"):
                # 5 % are promised
                assert held[kind] == pytest.approx(held["predicted"][kind], rel=0.01), where
            assert held["left"] == held["gradients afterwards"] == 0, where


def held_in_an_update(counts):
    """On every rank, by number of micro-batches: the most bytes of gradients at once in the last
    backward pass, and what they are at first; and of three buckets, and of all."""
    join_ranks(120)
    mesh = make_mesh(1, 1, MODEL.num_key_value_heads)
    model = seeded(MODEL, mesh)
    begin, seen = parallel.Bucket.begin_reducing, []

    def begin_reducing(bucket):
        begin(bucket)
        seen.append(storage_bytes(b.grads for b in optimizer.buckets))

    small = {"BUCKET_ELEMENTS": 1, "BUCKETS_UNDER_WAY": 2}  # each parameter is a bucket
    found = []
    tokens, cu_seqlens = torch.arange(40) % 32, torch.tensor([0, 10, 40], dtype=torch.int32)
    with mock.patch.multiple(parallel, **small):
        optimizer = ShardedAdamW(model, 1.0, lr=1e-3)
        with mock.patch.object(parallel.Bucket, "begin_reducing", begin_reducing):
            for micro_batches in counts:
                seen.clear()
                optimizer.zero_grad()
                for i in range(micro_batches):
                    if i == micro_batches - 1:
                        optimizer.expect_last()
                    model(tokens, cu_seqlens, 30)[0].pow(2).sum().backward()
                found.append((max(seen), seen[0]))
                optimizer.step()
    sizes = sorted(4 * bucket.values.numel() for bucket in optimizer.buckets)
    return found, sum(sizes[-3:]), sum(sizes)


def test_gradients_are_given_up_as_they_are_summed_and_one_micro_batchs_are_never_all_there():
    for found, three, everything in on_ranks(2, held_in_an_update, (1, 2, 1)):
        head = 4 * MODEL.vocab_size * MODEL.hidden_size  # is not in this backward pass
        one, several, again = found
        assert one == again and 0 < one[0] <= three < 0.5 * everything, (found, three, everything)
        assert several == (everything - head, everything - head), (found, everything)


def norms_over_used_memory():
    """On every rank: the gradient's norm in two updates of 5 parameters, whose sum over 2 ranks is
    2 each; what memory holds beforehand is NaN."""
    join_ranks(120)
    mesh, p = make_mesh(1, 1, 1), torch.nn.Parameter(torch.zeros(5))
    model = SimpleNamespace(mesh=mesh, named_parameters=lambda: [("p", p)])
    model.split_of = lambda name: parallel.Split(0, 0, 1, mesh.dp_group)
    resize = torch.UntypedStorage.resize_

    def used(storage, size):
        resize(storage, size)
        if size:
            storage.fill_(255)

    with mock.patch.object(torch.UntypedStorage, "resize_", used):
        optimizer, found = ShardedAdamW(model, 1e9, lr=1e-3), []
        for _ in range(2):
            optimizer.zero_grad()
            p.sum().backward()
            found.append(optimizer.step().item())
    return found


def test_memory_that_was_used_before_is_in_no_gradient_and_no_norm():
    """A shard of 5 over 2 ranks is padded to 3."""
    for found in on_ranks(2, norms_over_used_memory):
        assert found == pytest.approx([20**0.5] * 2)


def test_optimizer_state_is_exactly_12_bytes_per_parameter_where_the_replicas_divide_it():
    model = SimpleNamespace(mesh=Mesh(), split_of=lambda name: parallel.Split(0, 0, 1, "8 ranks"))
    p = torch.nn.Parameter(torch.randn(16, 10))
    model.named_parameters = lambda: [("p", p)]
    with (
        mock.patch.multiple(parallel, group_size=lambda group: 8),
        mock.patch("torch.distributed.get_rank", lambda g: 3),
    ):
        optimizer = ShardedAdamW(model, 1.0, lr=1e-3)
    (bucket,) = optimizer.buckets
    # exp_avg and exp_avg_sq are made of its size
    assert bucket.master.untyped_storage().nbytes() == 4 * 160 // 8
    assert torch.equal(bucket.master, p.detach().flatten()[60:80])


# ---- ZeRO-1 --------------------------------------------------------------------------------------
ADAMW = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def zero_against_plain(steps=5):
    """On every rank: names of parameters that differ in any bit from plain AdamW's on whole
    tensors, after each step, and of moments at the end. Both get the same reduced gradient and the
    same clipping factor.

    Tensors here have multiples of 8 elements. torch's fused kernel takes the last size % 8 elements
    of what it is given one by one, and rounds their exp_avg_sq once less: there a 12-element q_norm
    alone and one inside a flat shard differ by one unit in the last place, in the moment though not
    in the weight."""
    join_ranks(120)
    mesh = make_mesh(1, 1, MODEL.num_key_value_heads)
    model = Qwen3MoE(dataclasses.replace(MODEL, hidden_size=32, head_dim=16), mesh)
    assert all(p.numel() % 8 == 0 for p in model.parameters())
    model.init_weights(torch.Generator().manual_seed(0))
    whole = {name: torch.nn.Parameter(p.detach().clone()) for name, p in model.named_parameters()}
    plain = torch.optim.AdamW(whole.values(), fused=True, **ADAMW)
    optimizer = ShardedAdamW(model, 0.5, **ADAMW)
    differ, norms = [], []
    for step in range(steps):
        draw = lambda rank, p: torch.randn(
            p.shape,
            generator=torch.Generator().manual_seed(100 * step + rank),  # noqa: B023
        )
        optimizer.zero_grad()
        for p in model.parameters():
            optimizer.grad_so_far(p).add_(draw(mesh.rank, p))
        norm = optimizer.step()
        model.await_values()
        norms.append(norm.item())
        scale = (0.5 / (norm + 1e-6)).clamp(max=1.0).float()
        for p in whole.values():
            p.grad = (draw(0, p) + draw(1, p)) * scale  # of two addends the sum has one order
        plain.step()
        differ.append([n for n, p in model.named_parameters() if not torch.equal(p, whole[n])])
    (bucket,) = optimizer.buckets
    assert bucket.shard_size % 8 == 0, bucket.shard_size
    state = optimizer.state[bucket.master]
    for name, (low, high), (a, b) in bucket.pieces():
        for kind in ("exp_avg", "exp_avg_sq"):
            if not torch.equal(
                state[kind][a:b], plain.state[whole[name]][kind].flatten()[low:high]
            ):
                differ.append(f"{kind} of {name}")
    return differ, norms


def test_zero_1_equals_plain_adamw_bit_for_bit():
    for differ, norms in on_ranks(2, zero_against_plain):
        assert differ == [[]] * 5 and min(norms) > 0.5, differ  # it did clip


# ---- gradients in another dtype than parameters --------------------------------------------------
def test_bf16_micro_batches_add_up_in_fp32():
    """bf16 keeps 8 bits: adding 16 gradients up in it is off by percents; in fp32 the sum of what
    autograd gave is exact to fp32's rounding, whatever the order."""
    model, g = MoE(MODEL, Mesh()).to(torch.bfloat16), torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data.normal_(0.0, 0.3, generator=g)
    model.mesh, model.split_of = Mesh(), lambda name: parallel.Split(0, 0, 1, None)
    optimizer = ShardedAdamW(model, 1.0, lr=1e-3)
    assert {b.values.dtype for b in optimizer.buckets} == {torch.bfloat16}
    assert {b.grads.dtype for b in optimizer.buckets} | {
        b.master.dtype for b in optimizer.buckets
    } == {torch.float32}
    exact = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
    coarse = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    trained = dict(model.named_parameters())
    for _ in range(16):
        x_TD = torch.randn(6, 24, generator=g).bfloat16()
        run = lambda: model(x_TD)[0].float().square().sum()  # noqa: B023
        for name, grad in zip(trained, torch.autograd.grad(run(), trained.values())):
            assert grad.dtype == torch.bfloat16
            exact[name] += grad.double()
            coarse[name] += grad
        run().backward()
    errors = {"ours": 0.0, "bf16": 0.0}
    for name, p in trained.items():
        assert p.grad is None
        scale = exact[name].abs().max()
        errors["ours"] = max(
            errors["ours"], ((p.main_grad - exact[name]).abs().max() / scale).item()
        )
        errors["bf16"] = max(
            errors["bf16"], ((coarse[name] - exact[name]).abs().max() / scale).item()
        )
    # 16 roundings of 6e-8; a rounding of bf16
    assert errors["ours"] < 2e-6 and errors["bf16"] > 2e-3, errors


# ---- router replay -------------------------------------------------------------------------------
def replayed_by_hand(moe, x_TD, ids_TK):
    """One token and one given expert at a time."""
    experts, rows = moe.experts, []
    for x, ids in zip(x_TD, ids_TK):
        probs = (moe.gate.weight @ x).softmax(0)
        total = probs[ids].sum() if moe.norm_topk_prob else 1.0
        row = 0
        for e in ids:
            gate, up = experts.gate_up_proj[e].chunk(2)
            hidden = F.silu(gate @ x) * (up @ x)
            row = row + probs[e] / total * (experts.down_proj[e] @ hidden)
        rows.append(row)
    return torch.stack(rows)


def close(found, wanted, what):
    error, scale = (found - wanted).abs().max().item(), wanted.abs().max().item()
    # fp32 sums, reordered
    assert error <= 1e-5 * scale, f"{what}: off by {error:.2e} on a scale of {scale:.2e}"


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_given_experts_are_used_with_weights_from_the_full_softmax(norm_topk_prob):
    moe, g = (
        MoE(dataclasses.replace(MODEL, norm_topk_prob=norm_topk_prob), Mesh()),
        torch.Generator().manual_seed(0),
    )
    for p in moe.parameters():
        p.data.normal_(0.0, 0.3, generator=g)
    x_TD = torch.randn(16, 24, generator=g).requires_grad_()
    free_TD, chosen_TK = moe(x_TD)
    given_TD, own_TK = moe(x_TD, chosen_TK)
    assert torch.equal(free_TD, given_TD) and torch.equal(own_TK, chosen_TK)

    # the likeliest experts or not
    ids_TK = torch.stack([torch.randperm(8, generator=g)[:2] for _ in range(16)])
    assert (ids_TK.sort(1).values != chosen_TK.sort(1).values).any(1).sum() > 8
    ids_TK[ids_TK == 5] = 4  # nobody gets expert 5; a token may have one expert twice
    replayed_TD, own_TK = moe(x_TD, ids_TK)
    assert torch.equal(own_TK, chosen_TK)  # what the router would have chosen
    by_hand_TD, probe_TD = replayed_by_hand(moe, x_TD, ids_TK), torch.randn(16, 24, generator=g)
    close(replayed_TD, by_hand_TD, "output")
    inputs = {"x": x_TD, **dict(moe.named_parameters())}
    mine, theirs = (
        torch.autograd.grad((y * probe_TD).sum(), inputs.values())
        for y in (replayed_TD, by_hand_TD)
    )
    for name, a, b in zip(inputs, mine, theirs):
        close(a, b, f"gradient of {name}")
        assert b.abs().max() > 0, name
        assert "experts" not in name or ((a[5] == 0).all() and (a[4] != 0).any())


# ---- recompute -----------------------------------------------------------------------------------
def run_saving(model, given_ids_LtK=None):
    """Output, gradients, experts, and the bytes of distinct tensors that autograd held when
    backward began."""
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr(), t.storage_offset(), t.shape] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        hidden_TD, ids_LtK = model(*packed(), given_ids_LtK)
        held = {p.untyped_storage().data_ptr() for p in model.parameters()}
        num_bytes = sum(
            t.untyped_storage().nbytes()
            for t in {t.untyped_storage().data_ptr(): t for t in saved.values()}.values()
            if t.untyped_storage().data_ptr() not in held
        )
    probe_TD = torch.randn(hidden_TD.shape, generator=torch.Generator().manual_seed(2))
    trained = {name: p for name, p in model.named_parameters() if "lm_head" not in name}
    model.zero_grad()
    (hidden_TD * probe_TD).sum().backward()
    return hidden_TD, {name: p.grad for name, p in trained.items()}, ids_LtK, num_bytes


@pytest.mark.parametrize("replay", [False, True])
def test_recompute_changes_no_bit_and_keeps_a_blocks_input_and_its_attention(replay):
    keeping, again = seeded(MODEL), seeded(MODEL, recompute=True)
    given = None
    if replay:
        g = torch.Generator().manual_seed(3)
        given = torch.stack(
            [torch.stack([torch.randperm(8, generator=g)[:2] for _ in range(24)]) for _ in range(2)]
        )
    (hidden, grads, ids, kept), (hidden_again, grads_again, ids_again, kept_again) = (
        run_saving(model, given) for model in (keeping, again)
    )
    assert torch.equal(hidden, hidden_again) and torch.equal(ids, ids_again)
    assert given is None or not torch.equal(hidden, run_saving(keeping)[0])
    assert grads.keys() == grads_again.keys()
    assert all(torch.equal(grads[name], grads_again[name]) for name in grads)
    assert 0 < kept_again < kept / 4, (kept, kept_again)


def test_attention_is_not_computed_again_and_the_rest_of_a_block_is():
    model, calls = seeded(MODEL, recompute=True), []
    attention, again = ops.attention, ops.attention_again
    with (
        mock.patch.object(ops, "attention", lambda *a: calls.append("new") or attention(*a)),
        mock.patch.object(ops, "attention_again", lambda *a: calls.append("kept") or again(*a)),
    ):
        run_saving(model)
    layers = MODEL.num_hidden_layers
    assert calls == ["new"] * layers + ["kept"] * layers


@pytest.mark.parametrize("recompute", [False, True])
def test_a_frozen_embedding_leaves_the_blocks_trained(recompute):
    model = seeded(MODEL, recompute=recompute)
    model.model["embed_tokens"].weight.requires_grad_(False)
    hidden_TD, _ = model(*packed())
    hidden_TD.square().sum().backward()
    untrained = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert untrained == ["lm_head.weight"]


def test_a_recompute_that_chose_other_experts_would_show():
    """The control: the ids given to the second pass of a block are not those of the first."""
    model = seeded(MODEL, recompute=True)
    wanted = run_saving(model)[1]
    route, calls = MoE.route, []

    def fickle(self, x_tD, given_ids_tK=None):
        weights_tK, ids_tK, chosen_tK = route(self, x_tD, given_ids_tK)
        calls.append(None)
        again = len(calls) > 2  # two MoE layers forward, then again
        return weights_tK, (ids_tK + 1) % 8 if again else ids_tK, chosen_tK

    with mock.patch.object(MoE, "route", fickle):
        found = run_saving(model)[1]
    assert len(calls) == 4
    assert any(not torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("tied", [False, True])
def test_an_fp32_head_in_a_bf16_model_gets_fp32_states_and_trains(tied, tmp_path):
    """Two updates through the training step; bf16 on a CPU is slow, so the model is tiny."""
    cfg = dataclasses.replace(test_train.SMALL, param_dtype="bfloat16", fp32_lm_head=True)
    model_cfg = dataclasses.replace(test_train.TINY, tie_word_embeddings=tied)
    whole = Qwen3MoE(model_cfg)
    whole.init_weights(torch.Generator().manual_seed(0))
    save_file({name: t.clone() for name, t in whole.hf_tensors()}, tmp_path / "model.safetensors")
    model = build_model(cfg, model_cfg, Mesh(), tmp_path)
    assert (
        model.head_weight.dtype == torch.float32
        and model.model["norm"].weight.dtype == torch.bfloat16
    )
    assert torch.equal(model.head_weight, whole.head_weight)
    optimizer, before = ShardedAdamW(model, 1.0, lr=1e-2), model.head_weight.detach().clone()
    updates, counts = unpack_batch(
        pack_batch(test_train.random_groups(), cfg), cfg, 0, 1, torch.device("cpu")
    )
    for micro_batches, update_counts in zip(updates, counts):
        for mb in micro_batches:
            assert model(mb.tokens_T, mb.cu_seqlens, mb.max_seqlen)[0].dtype == torch.float32
            with torch.no_grad():
                mb.prev_logprobs, mb.age = micro_batch_logprobs(model, mb, cfg)[0], 1 - mb.versions
        metrics, norm = train_update(
            model, optimizer, micro_batches, update_counts, cfg, loss.policy_loss
        )
        assert metrics["loss"].isfinite() and norm > 0
    assert not torch.equal(model.head_weight, before) and all(
        p.isfinite().all() for p in model.parameters()
    )
