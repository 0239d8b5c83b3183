"""Every layout computes what one process computes: loss, every gradient, the clipped norm and the
weights after AdamW.

The oracle is the same code on one rank, which test_model.py compares with transformers and
test_loss.py with closed forms. A rank compares its own ZeRO shard of every gradient and all of its
weights with its slice of the oracle's, so between them the ranks check every element. Weights have
the checkpoint's names; each rank reads its slice of it.

fp32: 1e-5 of a tensor's largest value, sums in another order. fp64: 1e-10, which no forgotten
factor or rank hides in.
"""

import collections
import dataclasses
import json
import os
import random
import time
from unittest import mock

import pytest
import torch
from batches import unpack_batch
from on_ranks import on_ranks
from safetensors.torch import load_file, save_file
from test_train import random_groups

import loss
from bridge.weights import load_hf, own_hf
from config import Config
from model import ModelConfig, Qwen3MoE, expert_load
from ranks import parallel
from ranks.batch import Batch, pack_batch
from ranks.checkpoint import MANIFEST, CheckpointError, Pieces, load_state_tensors, state_tensors
from ranks.parallel import Mesh, ShardedAdamW, Split, join_ranks, make_mesh, reduce_metrics
from ranks.replay import give_experts
from train_cispo import micro_batch_logprobs, train_update

# No two widths agree; 2 kv heads, so that tp 4 has to replicate them; a dense layer between two
# with experts.
MODEL = ModelConfig(
    vocab_size=32,
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=12,
    intermediate_size=40,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=20,
    norm_topk_prob=True,
    mlp_only_layers=(1,),
)
RUN = dataclasses.replace(
    Config(),
    num_prompts_per_step=4,
    num_generations_per_prompt=4,
    train_global_batch_size=16,
    max_new_tokens=8,
    max_total_sequence_length=16,
    max_tokens_per_micro_batch=48,
    logprob_chunk_size=16,
    compile=False,
    freeze_moe_router=False,
    max_grad_norm=0.1,
    lr=1e-2,
)
# the two-pass loss
GSPO = {"use_cispo": False, "token_level_loss": False, "sequence_level_importance_ratios": True}
CASES = {
    "random": {},
    "all tokens to two experts": {"steered": True},  # the ranks of the other six get no row
    "one short sample": {"samples": 1},  # all other ranks run a masked one
    "tied": {"tied": True},
    "replayed": {"run": {"router_replay": "sampler"}},  # experts that no router would choose
    "sequence weights, recompute": {"run": GSPO | {"activation_checkpointing": True}},
}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def model_config(case):
    return dataclasses.replace(MODEL, tie_word_embeddings=case.get("tied", False))


@torch.no_grad()
def write_checkpoint(path, case):
    """Weights at std 0.3 (0.02 would hide errors behind the residual stream), in fp64."""
    model, g = Qwen3MoE(model_config(case)).double(), torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.normal_(0.0, 0.3, generator=g) if p.dim() > 1 else p.uniform_(0.5, 1.5, generator=g)
    # feature 0 is the same in every token and layer, and the routers look at nothing else
    if case.get("steered"):
        for name, p in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")):
                p.select(-2, 0).zero_()
            elif name.endswith("mlp.gate.weight"):
                p.zero_()[:, 0] = torch.tensor([0.0, 3, 0, 0, 0, 0, 4, 0])
        model.model["embed_tokens"].weight[:, 0] = 1.0
    path.mkdir()
    save_file({name: t.clone() for name, t in model.hf_tensors()}, path / "model.safetensors")


def train(case, dtype, checkpoint, mesh, num_updates=3):
    """num_updates of a fixed batch. Returns the model, the optimizer, per-update metrics and, by
    parameter name, this rank's pieces of the first update's gradient as (range in the local
    parameter, values)."""
    cfg = dataclasses.replace(RUN, tp=mesh.tp, ep=mesh.ep, **case.get("run", {}))
    model = Qwen3MoE(model_config(case), mesh, cfg.activation_checkpointing).to(dtype)
    load_hf(model, checkpoint)
    # several buckets, so that sums and gathers run beside the passes
    with mock.patch.object(parallel, "BUCKET_ELEMENTS", 1000):
        optimizer = ShardedAdamW(
            model, cfg.max_grad_norm, lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.01
        )
    assert len(optimizer.buckets) > 8
    groups = random_groups()
    if samples := case.get("samples"):
        keep = int(groups[0].lengths[:samples].sum())
        flat = {n: getattr(groups[0], n)[:keep] for n in ("token_ids", "logprobs", "versions")}
        rows = {n: getattr(groups[0], n)[:samples] for n in ("lengths", "rewards", "truncated")}
        groups = [dataclasses.replace(groups[0], **flat, **rows)]
        groups[0].rewards[:] = 1.0
    for group in groups:
        group.token_ids %= 32
        group.prompt_ids = [t % 32 for t in group.prompt_ids]
    if cfg.router_replay == "sampler":
        with_experts(groups)
    blob = pack_batch(groups, cfg)
    updates, counts = unpack_batch(blob, cfg, mesh.dp_rank, mesh.dp, mesh.device, mesh.tp)
    give_experts(None if mesh.rank else groups, Batch.unpack(blob), updates, cfg, mesh, model.cfg)
    metrics, grads = [], {}
    with torch.no_grad():
        for mb in updates[0]:
            mb.prev_logprobs = micro_batch_logprobs(model, mb, cfg)[0] + 0.5 * torch.sin(
                mb.gen_logprobs
            )
            mb.age = 1 - mb.versions
            mb.advantages = torch.ones_like(mb.advantages) if case.get("samples") else mb.advantages
    for update in range(num_updates):
        if update == 0:
            for bucket in optimizer.buckets:
                keep_grads(bucket, grads)
        stats, norm = train_update(model, optimizer, updates[0], counts[0], cfg, loss.policy_loss)
        for bucket in optimizer.buckets:
            bucket.__dict__.pop("reduce_grads", None)
        stats = expert_load(reduce_metrics(stats, mesh.dp_group))
        metrics.append({name: value.tolist() for name, value in {**stats, "norm": norm}.items()})
    model.await_values()
    return model, optimizer, metrics, grads


def with_experts(groups):
    """Two different ones for each token and layer, those of the dense layer among them."""
    g, (L, E) = torch.Generator().manual_seed(3), (MODEL.num_hidden_layers, MODEL.num_experts)
    for group in groups:
        rows = (len(group.prompt_ids) - 1, len(group.token_ids))
        group.prompt_experts, group.experts = (
            torch.rand(n, L, E, generator=g).argsort(-1)[..., :2].to(torch.uint8) for n in rows
        )


def keep_grads(bucket, grads):
    """Look at the reduced gradient between reduction and clipping."""
    reduce_grads = bucket.reduce_grads

    def and_keep():
        reduce_grads()
        for name, local, shard in bucket.pieces():
            grads[name] = (local, bucket.master.grad[slice(*shard)].clone())

    bucket.reduce_grads = and_keep


def stacked(model, checkpoint_file):
    """Tensors with the names of the checkpoint, as whole parameters of the model."""
    tensors, whole = load_file(checkpoint_file), Qwen3MoE(model.cfg)
    return {
        name: torch.stack([tensors[hf] for hf, _ in whole.hf_views(name, p)]).view(p.shape)
        for name, p in whole.named_parameters()
    }


def write_oracle(path, case, dtype):
    """What one process computes, as files."""
    model, _, metrics, grads = train(case, dtype, path, Mesh())
    assert not case.get("steered") or metrics[0]["moe_idle_share"] == 6 / 8
    whole = {name: grads[name][1].view_as(p) for name, p in model.named_parameters()}
    for file, tensors in (("grads", whole), ("after", dict(model.named_parameters()))):
        views = [view for name, t in tensors.items() for view in model.hf_views(name, t.detach())]
        save_file({name: t.clone() for name, t in views}, path / f"{file}.safetensors")
    return metrics


def relative(found, wanted, scale):
    """Largest difference, of the scale's largest value; infinite where something is NaN."""
    error = (
        (found - wanted).abs().max().item() / max(scale.abs().max().item(), 1e-30)
        if found.numel()
        else 0.0
    )
    return error if error == error else float("inf")


def compare(path, case, dtype, wanted_metrics, mesh):
    """This rank against the oracle: {what: largest relative error}."""
    # In fp32 one update: AdamW divides by the gradient's size, so where that is about 0, rounding
    # decides the next.
    model, _, metrics, grads = train(
        case, dtype, path, mesh, num_updates=3 if dtype == torch.float64 else 1
    )
    errors = collections.defaultdict(list)
    for found, wanted in zip(metrics, wanted_metrics):
        for name in found:
            a, b = torch.tensor(found[name]), torch.tensor(wanted[name])
            errors[name if name in ("loss", "norm") else "metrics"].append(
                relative(a, b, b.abs().clamp(min=1e-3))
            )
    wanted_grads, wanted_after = (
        stacked(model, path / f"{f}.safetensors") for f in ("grads", "after")
    )
    for name, p in model.named_parameters():
        part = model.split_of(name).of(wanted_after[name].shape)
        whole, kind = wanted_grads[name], name.split(".")[-2 + (".experts." in name)]
        if name in grads:  # some of it lies in this rank's shard
            (low, high), values = grads[name]
            errors[f"gradient of {kind}"].append(
                relative(values, whole[part].flatten()[low:high], whole)
            )
        if dtype == torch.float64:
            errors["weights after 3 steps"].append(
                relative(p.detach(), wanted_after[name][part], wanted_after[name])
            )
    if dtype == torch.float64:  # the whole model again, each tensor from one rank
        after, own = load_file(path / "after.safetensors"), dict(own_hf(model, dtype))
        names: list = [None] * mesh.world_size
        torch.distributed.all_gather_object(names, list(own))
        assert sorted(name for of_rank in names for name in of_rank) == sorted(after)
        errors["published"] = [
            relative(tensor, after[name], after[name]) for name, tensor in own.items()
        ] or [0.0]
    return {what: max(found) for what, found in errors.items()}


# ---- sabotage: each collective taken away --------------------------------------------------------
def without(what):
    """(owner, attribute, what stands in for it), for mock.patch.object."""
    size, me = torch.distributed.get_world_size, torch.distributed.get_rank
    mine = lambda x, group: x.chunk(size(group))[me(group)].clone()
    repeated = lambda x, group: torch.cat([x] * size(group))
    of_my_own = lambda x, receive, group: torch.cat([x, x.new_zeros(sum(receive), *x.shape[1:])])[
        : sum(receive)
    ]
    if what in ("all-gather, forward", "reduce-scatter, forward"):
        owner, result = {
            "all": (parallel._AllGather, repeated),
            "red": (parallel._ReduceScatter, mine),
        }[what[:3]]
        return (
            owner,
            "forward",
            lambda ctx, x, group, *_: (setattr(ctx, "group", group), result(x, group))[1],
        )
    if what in ("all-gather, backward", "reduce-scatter, backward"):
        owner, result = {
            "all": (parallel._AllGather, mine),
            "red": (parallel._ReduceScatter, repeated),
        }[what[:3]]
        return owner, "backward", lambda ctx, grad: (result(grad, ctx.group), None, None)
    if what == "all-to-all, forward":
        real = parallel._AllToAll.forward

        def forward(ctx, x, receive, send, group, is_read):
            if x.shape[1] < MODEL.hidden_size:  # which experts a row is for: without, no row is any
                return real(ctx, x, receive, send, group, is_read)
            ctx.receive, ctx.send, ctx.group = receive, send, group
            return of_my_own(x, receive, group)

        return parallel._AllToAll, "forward", forward
    if what == "all-to-all, backward":
        back = lambda ctx, grad: (of_my_own(grad, ctx.send, ctx.group), *[None] * 4)
        return parallel._AllToAll, "backward", back
    if what == "sum of the norm":
        all_reduce = parallel.all_reduce
        return (
            parallel,
            "all_reduce",
            lambda x, group, *op: x if x.ndim == 0 else all_reduce(x, group, *op),
        )
    if what == "all-gather of the new values":
        return (
            parallel.Bucket,
            "gather_values",
            lambda self: self.my_shard(self.values).copy_(self.master),
        )
    parameter = {
        "experts": "gate_up_proj",
        "kv heads": "k_proj",
        "dense": "q_proj",
        "replicated": "model.norm",
    }[what]
    end_reducing = parallel.Bucket.end_reducing

    def keep_mine(self):
        mine = self.my_shard(self.grads).to(self.master.dtype, copy=True)
        end_reducing(self)  # what has begun must end, and is not looked at
        if any(parameter in name for name in self.names):
            self.master.grad = mine

    return parallel.Bucket, "end_reducing", keep_mine


def run_controls(path, controls, wanted):
    """On every rank: {control: largest error}."""
    found = {}
    for what, tp, ep in controls:
        owner, name, stand_in = without(what)
        with mock.patch.object(owner, name, staticmethod(stand_in) if "ward" in name else stand_in):
            (errors,) = run_layouts(path, [(tp, ep)], wanted).values()
        found[what] = max(errors.values())
    return found


def run_layouts(path, layouts, wanted):
    """On every rank: {layout and case: errors}."""
    if not torch.distributed.is_initialized():
        join_ranks(120)
    found = {}
    for tp, ep in layouts:
        mesh = make_mesh(tp, ep, MODEL.num_key_value_heads)
        for (name, dtype_name), metrics in wanted.items():
            dtype = getattr(torch, dtype_name)
            found[tp, ep, name, dtype_name] = compare(
                path / name / dtype_name, CASES[name], dtype, metrics, mesh
            )
    return found


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    path, metrics = tmp_path_factory.mktemp("oracle"), {}
    for name, case in CASES.items():
        (path / name).mkdir()
        for dtype in TOLERANCE:
            dtype_name = str(dtype).removeprefix("torch.")
            write_checkpoint(path / name / dtype_name, case)
            metrics[name, dtype_name] = write_oracle(path / name / dtype_name, case, dtype)
    return path, metrics


LAYOUTS = {
    world: [(tp, ep) for tp in (1, 2, 4) for ep in (1, 2, 4) if max(tp, ep) <= world]
    for world in (1, 2, 4, 8)
}


# Two of four ranks: the others with --slow. Below all of them are compared with transformers.
QUICK = [(1, [(1, 1)]), (2, LAYOUTS[2]), (4, [(2, 2), (4, 4)])]
REST = [layout for layout in LAYOUTS[4] if layout not in QUICK[-1][1]]
SLOW = [(4, REST), (8, LAYOUTS[8]), (16, [(2, 8)])]


@pytest.mark.parametrize(
    ("world", "layouts"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_every_layout_computes_what_one_process_computes(world, layouts, oracle):
    path, metrics = oracle
    for rank, found in enumerate(
        on_ranks(world, run_layouts, path, layouts, metrics, timeout_s=600)
    ):
        assert len(found) == len(layouts) * len(metrics)
        for (tp, ep, case, dtype_name), errors in found.items():
            for what, error in errors.items():
                # those are fp32 sums
                limit = 1e-5 if what == "metrics" else TOLERANCE[getattr(torch, dtype_name)]
                if what in ("weights after 3 steps", "published"):
                    limit = 1e-9
                assert error <= limit, (
                    f"rank {rank}, tp {tp} ep {ep}, {case}, {dtype_name}: {what} off by {error:.1e}"
                )


CONTROLS = {
    2: [
        ("all-gather, forward", 2, 1),
        ("all-gather, backward", 2, 1),
        ("reduce-scatter, forward", 2, 1),
        ("reduce-scatter, backward", 2, 1),
        ("all-to-all, forward", 1, 2),
        ("all-to-all, backward", 1, 2),
        ("sum of the norm", 1, 1),
        ("all-gather of the new values", 1, 1),
    ],
    4: [("experts", 2, 2), ("kv heads", 4, 1), ("dense", 2, 1), ("replicated", 2, 1)],
}


@pytest.mark.parametrize("world", CONTROLS)
def test_without_any_one_collective_the_layouts_do_differ(world, oracle):
    """The control of the test above. World 2: each collective; world 4: the sum over each kind of
    replicas."""
    path, metrics = oracle
    wanted = {("random", "float64"): metrics["random", "float64"]}
    ranks = on_ranks(world, run_controls, path, CONTROLS[world], wanted)
    for what, _, _ in CONTROLS[world]:
        assert max(found[what] for found in ranks) > 1e-3, f"nothing changes without {what}"


# ---- against transformers ------------------------------------------------------------------------
def against_transformers(path, layouts):
    """On every rank: {layout: {what: largest relative error}}. Only dp rank 0 has a loss, so all
    sums are its."""
    join_ranks(120)
    batch, found = load_file(path / "batch.safetensors"), {}
    for tp, ep in layouts:
        mesh = make_mesh(tp, ep, MODEL.num_key_value_heads)
        model = Qwen3MoE(ModelConfig.from_dir(path / "weights"), mesh)
        load_hf(model, path / "weights")
        optimizer = ShardedAdamW(model, 1.0, lr=0.0)
        words = Split(1, mesh.tp_rank, tp, None).of(batch["probe"].shape)
        hidden_TD, _ = model(batch["tokens"], batch["cu_seqlens"], 12)
        logits_Tv = hidden_TD @ model.head_weight.t()
        (logits_Tv * batch["probe"][words]).sum().mul(mesh.dp_rank == 0).backward()
        errors = {"logits": relative(logits_Tv.detach(), batch["logits"][words], batch["logits"])}
        wanted, grads = stacked(model, path / "gradients/model.safetensors"), {}
        for bucket in optimizer.buckets:
            keep_grads(bucket, grads)
        optimizer.step()
        for name, ((low, high), values) in grads.items():
            part = wanted[name][model.split_of(name).of(wanted[name].shape)].flatten()[low:high]
            errors[name] = relative(values, part, wanted[name])
        found[tp, ep] = errors
    return found


@pytest.mark.parametrize("world", [2, 4, 8])
def test_every_layout_matches_transformers(world, tmp_path):
    """Logits and every gradient. Our side of it on one rank is test_model.py's."""
    import transformers

    hf = {**MODEL.to_hf(1), "mlp_only_layers": [1], "attn_implementation": "eager"}
    hf = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**hf))
    g = torch.Generator().manual_seed(0)
    for p in hf.parameters():
        p.data = (
            torch.randn(p.shape, generator=g) * 0.3
            if p.dim() > 1
            else torch.rand(p.shape, generator=g) + 0.5
        )
    hf.save_pretrained(tmp_path / "weights")
    # 24 tokens: a multiple of every tp
    sequences = [torch.randint(32, (n,), generator=g) for n in (7, 1, 12, 4)]
    logits = torch.cat([hf(s[None]).logits[0] for s in sequences])
    probe = torch.randn(logits.shape, generator=g)
    (logits * probe).sum().backward()
    for p in hf.parameters():
        p.data = p.grad
    hf.save_pretrained(tmp_path / "gradients")
    cu_seqlens = torch.tensor([0, 7, 8, 20, 24], dtype=torch.int32)
    batch = {
        "tokens": torch.cat(sequences),
        "cu_seqlens": cu_seqlens,
        "probe": probe,
        "logits": logits.detach(),
    }
    save_file(batch, tmp_path / "batch.safetensors")
    for rank, found in enumerate(on_ranks(world, against_transformers, tmp_path, LAYOUTS[world])):
        for layout, errors in found.items():
            assert max(errors.values()) < 1e-5, f"rank {rank}, tp and ep {layout}: {errors}"


# ---- torch.compile -------------------------------------------------------------------------------
def compiled_against_eager(tp, ep, recompute, num_batches):
    """On every rank: largest relative error of outputs and gradients, seconds of the first batch,
    and the graphs compiled by the end of the second batch and of the last."""
    if int(os.environ["WORLD_SIZE"]) > 1:
        join_ranks(300)
    mesh = (
        make_mesh(tp, ep, MODEL.num_key_value_heads)
        if torch.distributed.is_initialized()
        else Mesh()
    )
    eager, compiled = (Qwen3MoE(MODEL, mesh, recompute) for _ in range(2))
    g = torch.Generator().manual_seed(mesh.rank)
    for p, q in zip(eager.parameters(), compiled.parameters()):
        p.data = (
            torch.randn(p.shape, generator=g) * 0.3
            if p.dim() > 1
            else torch.rand(p.shape, generator=g) + 0.5
        )
        q.data = p.data.clone()
    compiled.compile_blocks()
    graphs, errors, seconds = [], [], []
    for batch in range(num_batches):
        r = random.Random(batch)
        lengths = [r.randint(1, 30) for _ in range(r.randint(1, 20))]
        lengths.append(4 - sum(lengths) % 4)
        tokens = torch.randint(32, (sum(lengths),), generator=torch.Generator().manual_seed(batch))
        args = tokens, torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths)
        results = []
        for model in (eager, compiled):
            model.zero_grad()
            start = time.perf_counter()
            with torch.no_grad():
                model(*args)
            hidden_TD, _ = model(*args)
            hidden_TD.pow(2).sum().backward()
            seconds.append(time.perf_counter() - start)
            grads = [p.grad for name, p in model.named_parameters() if name != "lm_head.weight"]
            results.append([hidden_TD.detach(), *grads])
        errors += [relative(b, a, a) for a, b in zip(*results)]
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    return max(errors), seconds[1], graphs[1], graphs[-1]


@pytest.mark.parametrize(
    ("world", "tp", "ep", "recompute", "batches"),
    [(1, 1, 1, False, 100), pytest.param(2, 2, 2, True, 100, marks=pytest.mark.slow)],
)
def test_compiled_blocks_equal_eager_ones_and_a_hundred_batches_compile_nothing_new(
    world, tp, ep, recompute, batches
):
    for error, first_s, warm, end in on_ranks(
        world, compiled_against_eager, tp, ep, recompute, batches, timeout_s=500
    ):
        assert error < 1e-5
        assert warm == end == 4  # blocks with experts and dense ones, with and without gradient
        print(f"first batch, compiled: {first_s:.1f} s")


# ---- training state ------------------------------------------------------------------------------
def save_state(path, layout, case):
    """Train under one layout and write this rank's state."""
    join_ranks(120)
    mesh = make_mesh(*layout, MODEL.num_key_value_heads)
    model, optimizer, *_ = train(CASES[case], torch.float32, path / case / "float32", mesh)
    write_state(path, "saved", model, optimizer, mesh)


def write_state(path, name, model, optimizer, mesh):
    (path / name).mkdir(exist_ok=True)
    tensors, extra = state_tensors(model, optimizer)
    assert extra == {"updates": 3}
    save_file(dict(tensors), path / name / f"state-{mesh.rank:05d}.safetensors")
    files = {f"state-{rank:05d}.safetensors": {} for rank in range(mesh.world_size)}
    (path / name / f"manifest-{mesh.rank}").write_text(json.dumps({"files": files}))
    (path / name / f"manifest-{mesh.rank}").replace(path / name / MANIFEST)
    assert len(dict(tensors)) == len(tensors)


def load_and_save_state(path, layout, case):
    """Resume under another layout, write its state; then one more update, whose norm tells that all
    is in place."""
    join_ranks(120)
    mesh = make_mesh(*layout, MODEL.num_key_value_heads)
    model, optimizer, *_ = train(
        CASES[case], torch.float32, path / case / "float32", mesh, num_updates=0
    )
    load_state_tensors(path / "saved", model, optimizer, updates=3)
    write_state(path, "again", model, optimizer, mesh)
    assert all(int(state["step"]) == 3 for state in optimizer.state.values())
    return {name: p.detach().double().sum().item() for name, p in model.named_parameters()}


def whole_state(path, cfg):
    pieces = Pieces(path, cfg.checkpoint_shapes())
    return {key: pieces.whole(*key) for key in pieces.pieces}


@pytest.mark.parametrize(
    ("saved", "resumed"), [((4, (4, 2)), (2, (1, 2))), ((2, (2, 1)), (4, (1, 4)))]
)
@pytest.mark.parametrize("case", ["random", "tied"])
def test_a_state_saved_under_one_layout_resumes_under_another_bit_for_bit(
    case, saved, resumed, oracle, tmp_path
):
    path, cfg = tmp_path, model_config(CASES[case])
    (path / case).symlink_to(oracle[0] / case)
    on_ranks(saved[0], save_state, path, saved[1], case)
    on_ranks(resumed[0], load_and_save_state, path, resumed[1], case)
    before, after = whole_state(path / "saved", cfg), whole_state(path / "again", cfg)
    assert before.keys() == after.keys() and len(before) == 3 * len(cfg.checkpoint_shapes())
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert sum(t.abs().sum() > 0 for (kind, _), t in before.items() if kind == "exp_avg") > 20

    (path / "saved/state-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"a rank's file is missing|has no weight of"):
        whole_state(path / "saved", cfg)
