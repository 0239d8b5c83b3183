"""What a layout costs, by arithmetic alone: no GPU, no weights, no process group. (What it takes in
seconds is in speed.py; dry_run.py prints both.)

All is per rank. Letters as in model.py, and: T tokens of a micro-batch, t = T/tp those that a rank
holds between the seams (sequence parallelism), a bytes of an activation. A parameter is held by
`replicas` ranks, which add up their gradients and share its optimizer state (ZeRO-1), so that state
is 12 * numel / replicas bytes: fp32 master, m and v.

Parameters, gradients, their sums, optimizer state, bytes on the wire and FLOPs are exact.
Activations are what autograd keeps when the model runs eagerly (a compiled block keeps less).
"""

import dataclasses
import functools
import itertools
import math
import os
import re
from typing import NamedTuple

import torch

from ranks import ops
from ranks.parallel import BUCKET_ELEMENTS, BUCKETS_UNDER_WAY

GIB = 2**30
OVERHEAD_GIB = 4.0  # CUDA context, NCCL buffers, fragmentation: from experience, not computed
VLLM_SHARE = 0.92  # of a GPU's memory that vLLM 0.32 takes by default
IMBALANCE = 2.0  # rows of the fullest expert rank, over the mean, that must fit


def check_layout(m, world: int, tp: int, ep: int) -> None:
    """Raises: ValueError for a degree that does not divide a size it cuts; it names both."""
    if min(world, tp, ep) < 1:
        raise ValueError(
            f"--tp {tp}, --ep {ep} and the number of ranks, {world}, must be at least 1"
        )
    if ep > 1 and not m.num_experts:
        raise ValueError(f"--ep {ep}: the model is dense, num_experts=0")
    if ep > 1 and m.num_experts > 256 * ep:
        raise ValueError(
            f"--ep {ep}: {m.num_experts // ep} experts on a rank are above 256, the most that a "
            "row can name in bf16 (ranks/experts.py)"
        )
    has_dense = not all(m.is_moe_layer(i) for i in range(m.num_hidden_layers))
    for flag, degree, what, size in [
        ("--tp", tp, "num_attention_heads", m.num_attention_heads),
        ("--tp", tp, "vocab_size", m.vocab_size),
        ("--tp", tp, "intermediate_size", m.intermediate_size if has_dense else 0),
        ("--tp", tp, "the number of ranks", world),
        ("--ep", ep, "num_experts", m.num_experts),
        ("--ep", ep, "the number of ranks", world),
    ]:
        if size % degree:
            raise ValueError(f"{flag} {degree} does not divide {what}={size}")
    if m.num_key_value_heads % tp and tp % m.num_key_value_heads:
        raise ValueError(
            f"--tp {tp} neither divides num_key_value_heads={m.num_key_value_heads} "
            "nor is a multiple"
        )


# ---- parameters ----------------------------------------------------------------------------------
class ParamClass(NamedTuple):
    """Parameters that are cut and reduced alike."""

    name: str
    tensors: int  # experts of a layer are stacked: one tensor a projection
    numel: int  # on one rank, all tensors
    replicas: int  # ranks that hold the same slice
    trained: bool = True


CLASSES = {  # of parameters, by the module that they belong to; all others are norms
    "embedding and head": ("embed_tokens", "lm_head"),
    "q and o projections": ("q_proj", "o_proj"),
    "k and v projections": ("k_proj", "v_proj"),
    "norms": (),
    "dense MLPs": ("gate_proj", "up_proj", "down_proj"),
    "routers": ("gate",),
    "experts": ("experts",),
}


def class_of(name: str) -> str:
    modules = name.split(".")
    if "experts" in modules:
        return "experts"
    return next((kind for kind, of in CLASSES.items() if modules[-2] in of), "norms")


@functools.lru_cache
def slices(m, tp: int, ep: int) -> dict[str, tuple[int, int, int]]:
    """Per class: tensors on a rank, their elements, slices that each is cut into. The model itself
    is counted, on the meta device."""
    found = {}
    model = m.on_meta(tp, ep)
    for name, p in model.named_parameters():
        tensors, numel, _ = found.get(class_of(name), (0, 0, 0))
        found[class_of(name)] = (tensors + 1, numel + p.numel(), model.split_of(name).count)
    return found


def parameter_classes(m, world: int, tp: int, ep: int, freeze_router=True) -> list[ParamClass]:
    cut = slices(m, tp, ep)
    return [
        ParamClass(
            kind, tensors, numel, world // count, trained=kind != "routers" or not freeze_router
        )
        for kind in CLASSES
        if kind in cut
        for tensors, numel, count in [cut[kind]]
    ]


def static_memory(
    m, world: int, tp: int, ep: int, param_bytes: int, grad_bytes: int, freeze_router=True
) -> dict:
    """Bytes that a rank holds throughout, the gradients while micro-batches add them up."""
    classes = parameter_classes(m, world, tp, ep, freeze_router)
    return {
        "parameters": param_bytes * sum(c.numel for c in classes),
        "gradients": grad_bytes * sum(c.numel for c in classes if c.trained),
        "optimizer state": 12 * sum(c.numel / c.replicas for c in classes if c.trained),
    }


def summed_gradients(m, cfg, world: int) -> float:
    """Bytes of a rank's shard of the gradients' sums over ranks, in fp32. They are made while the
    last backward pass gives up its activations, and stay until the update is done. fp32 gradients
    of parameters that no other rank holds are their own sums."""
    classes = parameter_classes(m, world, cfg.tp, cfg.ep, cfg.freeze_moe_router)
    return 4 * sum(c.numel / c.replicas for c in classes if c.trained)


def one_micro_batch(cfg, world: int) -> bool:
    """Whether a rank's share of an update is one micro-batch whatever the lengths of its samples
    (batch.assign_rows)."""
    samples = cfg.max_tokens_per_micro_batch // cfg.max_total_sequence_length
    return cfg.train_global_batch_size <= world // cfg.tp * samples


def gradients_under_way(m, cfg, world: int) -> tuple[float, float]:
    """Bytes of gradients that a last backward pass holds at most, beside their sums, when it begins
    and when it ends: the head's or the embedding's, those whose sum is under way, and at first a
    layer's in the making (parallel.Bucket). fp32 gradients that no other rank has are not sent."""
    classes = parameter_classes(m, world, cfg.tp, cfg.ep, cfg.freeze_moe_router)
    ends, *layers = [c for c in classes if c.trained]
    layer = sum(c.numel for c in layers) / m.num_hidden_layers
    sent = sum(c.numel for c in (ends, *layers) if c.replicas > 1)
    # of a MoE layer two projections of experts and the rest make a bucket each
    bucket = max(BUCKET_ELEMENTS, layer / (3 if m.num_experts else 1))
    sent = min(BUCKETS_UNDER_WAY * bucket, sent)
    end, grad = m.vocab_size * m.hidden_size / cfg.tp, dtype_bytes(cfg)[1]
    return grad * (end + sent + layer), grad * (sent + end * (ends.replicas > 1))


# ---- activations ---------------------------------------------------------------------------------
def dtype_bytes(cfg) -> tuple[int, int]:
    """Of a parameter or activation, and of a gradient. "auto" is what it is on CUDA."""
    return 4 if cfg.param_dtype == "float32" else 2, 2 if cfg.grad_dtype == "bfloat16" else 4


def activation_memory(m, cfg) -> dict[str, float]:
    """Bytes, for a micro-batch that fills the token budget. "all layers" is what they save without
    recompute, "kept" with it, inputs and attention's output; of one layer: what attention and norms
    save, and what the MLP saves plus its gradients at their largest."""
    a, T = dtype_bytes(cfg)[0], cfg.max_tokens_per_micro_batch
    D, F = m.hidden_size, m.moe_intermediate_size
    t, heads, I_ = T / cfg.tp, m.num_attention_heads / cfg.tp, m.intermediate_size / cfg.tp
    kv_heads, v = max(1, m.num_key_value_heads / cfg.tp), m.vocab_size // cfg.tp
    rows = t * m.num_experts_per_tok
    moe = sum(m.is_moe_layer(i) for i in range(m.num_hidden_layers))
    dense, gathered = m.num_hidden_layers - moe, T * D * a * (cfg.tp > 1)
    # RMSNorm saves its input in fp32, that normed, and the product: two norms of t tokens, q and k
    # of T.
    attention = 2 * t * D * (4 + 2 * a) + T * m.head_dim * (heads + kv_heads) * (4 + a)
    output = T * heads * (m.head_dim * a + 4)  # and the log-sum-exp in fp32
    # q and k after RoPE, v
    attention += gathered + T * m.head_dim * (heads + 2 * kv_heads) * a + output
    # SwiGLU saves gate, up, silu(gate) and their product; MoE also its rows as they arrive, and
    # the product times their weights.
    saved_dense, saved_moe = gathered + T * I_ * 4 * a, rows * (D + 5 * F) * a
    peak_dense, peak_moe = saved_dense + gathered + T * I_ * 3 * a, rows * (2 * D + 6 * F) * a
    chunk = cfg.logprob_chunk_size or ops.chunk_rows(v, many=cfg.compile)
    return {
        "kept": m.num_hidden_layers * (t * D * a + output),
        "all layers": (moe + dense) * attention + moe * saved_moe + dense * saved_dense,
        "attention": attention,
        "dense MLP": peak_dense * (dense > 0),
        "MoE": peak_moe * (moe > 0),
        "MoE, fullest rank": IMBALANCE * peak_moe * (moe > 0),
        # fp32 logits and their gradient; hidden, its loss rows, its gradient
        "loss": chunk * v * (4 + a) + 3 * T * D * a,
    }


def vllm_share(cfg, world: int) -> float:
    """The share of rank 0's GPU that this machine's vLLM takes. It is 0 where there are more GPUs
    than ranks: vLLM then runs on the others. A plan made without GPUs assumes one GPU a rank, or
    as many as CUDA_VISIBLE_DEVICES names."""
    under_torchrun = int(os.environ.get("WORLD_SIZE", 1)) > 1
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", world)) if under_torchrun else world
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    gpus = len(named.split(",")) if named else torch.cuda.device_count()
    if not cfg.local_rollout or gpus > ranks or not (torch.cuda.is_available() or cfg.dry_run):
        return 0.0
    return vllm_value(cfg, "--gpu[-_]memory[-_]utilization", VLLM_SHARE)


def vllm_value(cfg, names: str, unset: float) -> float:
    """Of a flag for the vLLM that is started here. names: a pattern of its spellings."""
    given = re.findall(rf"(?:{names})[ =]+([\d.]+)", cfg.rollout_args)
    return float(given[-1]) if given else unset


def memory(m, cfg, world: int) -> dict[str, float]:
    """All terms in GiB, in the order in which they are allocated, vLLM's last. Their sum is the
    peak."""
    terms = static_memory(m, world, cfg.tp, cfg.ep, *dtype_bytes(cfg), cfg.freeze_moe_router)
    if cfg.reference_policy_kl_penalty:
        terms["reference model"] = terms["parameters"]
    act, recompute = activation_memory(m, cfg), cfg.activation_checkpointing
    if cfg.router_replay != "off":
        terms["experts to replay"] = replayed_bytes(m, cfg) * cfg.samples_per_step / world
    terms["saved activations"] = act["kept" if recompute else "all layers"]
    # The backward of one layer, or the loss. Without recompute most of the layer is in the term
    # above already.
    layer = max(act["dense MLP"], act["MoE, fullest rank"] - (0 if recompute else act["MoE"]))
    layer += act["attention"] * recompute
    terms["live layer or loss"] = max(layer, act["loss"])
    # In the last backward pass gradients are given up as they are summed, and the sums take the
    # place of the saved activations. In the only one gradients have never been there as a whole.
    first, last = gradients_under_way(m, cfg, world)
    if one_micro_batch(cfg, world):
        terms["gradients"] = min(first, terms["gradients"])
    before = sum(terms[n] for n in ("gradients", "saved activations", "live layer or loss"))
    if (more := last + summed_gradients(m, cfg, world) + layer - before) > 0:
        terms["sums of gradients"] = more
    gib = {"CUDA and NCCL": OVERHEAD_GIB, **{name: size / GIB for name, size in terms.items()}}
    if share := vllm_share(cfg, world):
        gib["vLLM on the same GPU"] = share * cfg.gpu_memory_gib
    return gib


def replayed_bytes(m, cfg) -> int:
    """Of the experts of one sample of the longest kind."""
    per_token = len(m.moe_layers) * m.num_experts_per_tok * m.expert_dtype.itemsize
    return cfg.max_total_sequence_length * per_token


# ---- traffic and work ----------------------------------------------------------------------------
def ranks_of_a_token(m, ep: int) -> float:
    """How many ranks have any of a token's K experts, on average, if all sets of K are alike: of E
    experts, E/ep are on a rank, and none of the K is among them by a draw without replacement."""
    E, K = m.num_experts, m.num_experts_per_tok
    return ep * (1 - math.comb(E - E // ep, K) / math.comb(E, K))


def collective_bytes(m, cfg, world: int) -> dict[str, tuple[float, str]]:
    """Bytes that a rank sends for one layer in each pass or update, and which."""
    T, D = cfg.max_tokens_per_micro_batch, m.hidden_size
    tp, ep, (a, grad) = cfg.tp, cfg.ep, dtype_bytes(cfg)
    again = cfg.activation_checkpointing
    passes = "forward, recompute, backward" if again else "forward, backward"
    seam, rows = T * D * a * (tp - 1) / tp, T / tp * ranks_of_a_token(m, ep) * a * (ep - 1) / ep
    classes = [c for c in parameter_classes(m, world, tp, ep, cfg.freeze_moe_router) if c.trained]
    with_ends = "GB with embedding and head"
    whole = sum(c.numel * (c.replicas - 1) / c.replicas for c in classes)
    layer = (whole - classes[0].numel * (1 - 1 / classes[0].replicas)) / m.num_hidden_layers
    return {
        "TP/SP all-gather": (seam, f"{passes}; twice where the MLP is dense"),
        "TP/SP reduce-scatter": (seam, "the same" + ", a dense MLP's not in recompute" * again),
        # with a row go its K weights and K experts
        "EP dispatch": (rows * (D + 2 * m.num_experts_per_tok), passes),
        "EP combine": (rows * D, "forward, backward"),
        "gradient reduce-scatter": (
            layer * grad,
            f"an update; {whole * grad / 1e9:.2f} {with_ends}",
        ),
        "parameter all-gather": (layer * a, f"an update; {whole * a / 1e9:.2f} {with_ends}"),
    }


def flops_per_token(m, length: int) -> float:
    """Forward and backward, in a sequence of that length; causal attention counts half; recompute
    does not count."""
    D, L = m.hidden_size, m.num_hidden_layers
    H, G, C = m.num_attention_heads, m.num_key_value_heads, m.head_dim
    moe = sum(m.is_moe_layer(i) for i in range(L))
    active = L * 2 * D * (H + G) * C + m.vocab_size * D + (L - moe) * 3 * D * m.intermediate_size
    active += moe * D * (m.num_experts + m.num_experts_per_tok * 3 * m.moe_intermediate_size)
    return 6 * active + 6 * L * H * C * length


# ---- what fits -----------------------------------------------------------------------------------
def fitting(m, cfg, world: int, further: int = 7) -> list[tuple[int, dict, float]]:
    """The fewest ranks, doubled at most `further` times, and for these the smallest sets of changed
    flags, that fit: of each its ranks, flags and peak in GiB."""
    budgets = [cfg.max_tokens_per_micro_batch >> i for i in range(1, 16)]
    changes = [
        ("activation_checkpointing", True),
        ("param_dtype", "bfloat16"),
        ("grad_dtype", "bfloat16"),
    ]
    changes += [
        ("max_tokens_per_micro_batch", n) for n in budgets if n >= cfg.max_total_sequence_length
    ]
    changes += [("local_rollout", False)] * (vllm_share(cfg, world) > 0)
    changes += [("tp", n) for n in (2, 4, 8) if n > cfg.tp] + [
        ("ep", n) for n in (2, 4, 8, 16, 32) if n > cfg.ep
    ]
    for ranks, size in itertools.product([world << i for i in range(further + 1)], range(4)):
        found = []
        for flags in itertools.combinations(changes, size):
            changed = dataclasses.replace(cfg, **dict(flags))
            try:
                check_layout(m, ranks, changed.tp, changed.ep)
            except ValueError:
                continue
            if (peak := sum(memory(m, changed, ranks).values())) <= cfg.gpu_memory_gib and len(
                dict(flags)
            ) == size:
                found.append((ranks, dict(flags), peak))
        if found:
            return found
    return []


def as_flags(changes: dict) -> str:
    """As one types them."""
    words = []
    for name, value in changes.items():
        word = ("--no-" if value is False else "--") + name.replace("_", "-")
        words.append(word if isinstance(value, bool) else f"{word} {value}")
    return " ".join(words)


def what_would_fit(m, cfg, world: int) -> list[str]:
    """What is `fitting`, each as "flags (peak)"."""
    found = [
        f"{f'{ranks} ranks ' * (ranks > world)}{as_flags(flags)}".strip() + f" ({peak:.1f})"
        for ranks, flags, peak in fitting(m, cfg, world)
    ]
    return found or ["a smaller model"]


def check_memory(m, cfg, world: int) -> None:
    """Raises: ValueError for a layout that does not fit, with the term that breaks it and what
    would fit."""
    terms = memory(m, cfg, world)
    if (peak := sum(terms.values())) > cfg.gpu_memory_gib:
        sums = zip(terms, itertools.accumulate(terms.values()))
        culprit = next(name for name, total in sums if total > cfg.gpu_memory_gib)
        parts = " + ".join(f"{name} {gib:.1f}" for name, gib in terms.items())
        advice = what_would_fit(m, cfg, world)[:4]
        if (room := 1 - (peak - terms.get("vLLM on the same GPU", 0.0)) / cfg.gpu_memory_gib) >= 0:
            advice.append("a GPU more, which vLLM then has alone")
            if room > 0.1:  # less holds no model and its cache
                advice.append(
                    "--rollout-args=\"--vllm-args '--gpu-memory-utilization "
                    f"{int(100 * room) / 100:g}'\""
                )
        raise ValueError(
            f"{peak:.1f} GiB are above --gpu-memory-gib {cfg.gpu_memory_gib:g}. What breaks it: "
            f"{culprit} (in {parts}). What fits: {'; or '.join(advice)}"
        )


def check_model(m, cfg) -> None:
    """Raises: ValueError for samples longer than the model's positions, which vLLM would refuse at
    its start, and for router replay without experts."""
    if cfg.max_total_sequence_length > m.max_position_embeddings:
        raise ValueError(
            f"--max-total-sequence-length {cfg.max_total_sequence_length} is above the model's "
            f"max_position_embeddings={m.max_position_embeddings} (its config.json)"
        )
    if cfg.router_replay != "off" and not m.num_experts:
        raise ValueError(f"--router-replay {cfg.router_replay}: the model is dense, num_experts=0")


def check_cuda(m, cfg) -> None:
    """Raises: ValueError for what the GPU's kernels do not take: they want bf16, rows of whole 16
    bytes, heads of at most 256 values, and at most 1,024 experts a rank."""
    if cfg.param_dtype == "float32":
        raise ValueError(
            "--param-dtype float32: attention and experts on a GPU take bfloat16 alone, which auto "
            "is there; CUDA_VISIBLE_DEVICES= trains on the CPU"
        )
    limits = [
        ("hidden_size", m.hidden_size, 8, None),
        ("head_dim", m.head_dim, 8, 256),
        ("moe_intermediate_size", m.moe_intermediate_size, 8, None),
        ("experts of a rank (--ep)", m.num_experts // cfg.ep, 1, 1024),
    ]
    for name, size, multiple, most in limits:
        if size % multiple or (most and size > most):
            bound = f" and at most {most}" if most else ""
            raise ValueError(
                f"the model's {name}={size}: a GPU's kernels take multiples of {multiple}{bound}"
            )


def check(m, cfg, world: int) -> None:
    """Raises: ValueError for a layout that is impossible, or does not fit, and for samples that are
    too long."""
    check_layout(m, world, cfg.tp, cfg.ep)
    check_model(m, cfg)
    if torch.cuda.is_available():
        check_cuda(m, cfg)
        # a plan for larger GPUs than these is none
        here = int(torch.cuda.get_device_properties(0).total_memory / GIB * 10) / 10
        cfg = dataclasses.replace(cfg, gpu_memory_gib=min(cfg.gpu_memory_gib, here))
    check_memory(m, cfg, world)
