"""How long an update and a batch of samples take, by arithmetic: amounts of work over rates.

A `Term` is an amount (FLOP, bytes, rows, ...) and the name of a rate; its seconds are their
quotient. All rates stand in RATES; a measurement replaces one there. Letters as in model.py, and
N: tokens of a data-parallel rank in an update, n = N / tp, a: bytes of an activation.

Not in it: uneven experts, uneven lengths, the tail of a batch of samples, and anything that
overlaps without being named in `Code`.
"""

import math
from collections import defaultdict
from typing import NamedTuple

from ranks.plan import (
    VLLM_SHARE,
    dtype_bytes,
    flops_per_token,
    parameter_classes,
    ranks_of_a_token,
    slices,
)

GPUS_A_NODE = 8


class Rate(NamedTuple):
    value: float  # amount a second
    unit: str
    source: str


# "measured" is on an H200, 2026-11-27 (BENCHMARKS.md), whose arithmetic is that of an H100.
RATES = {
    "dense GEMM": Rate(700e12, "FLOP/s", "measured, bf16, 16k x 2,048 x 4,096; datasheet 989"),
    "grouped GEMM": Rate(650e12, "FLOP/s", "measured: 600 to 710, forward and backward"),
    "attention": Rate(315e12, "FLOP/s", "measured: FlashAttention 2, 4 sequences of 4,096"),
    "attention backward": Rate(270e12, "FLOP/s", "measured: the same"),
    "copies": Rate(3.0e12, "B/s", "seen on an H100 80GB, reads and writes; datasheet 3.35"),
    "sort": Rate(1.19e9, "row/s", "measured: 131,072 int64 in 110 us"),
    "top-k": Rate(1.2e8, "token/s", "measured: 16,384 tokens in 135 us"),
    "wait": Rate(1e4, "wait/s", "measured: 20 us; assumed until the device is busy again: 0.1 ms"),
    "NVLink all-to-all": Rate(340e9, "B/s", "assumed, of 450 each way by datasheet"),
    "NVLink ring": Rate(300e9, "B/s", "assumed for NCCL, also across nodes with a NIC a GPU"),
    "InfiniBand": Rate(45e9, "B/s", "assumed for a NIC of 400 Gbit/s a GPU; datasheet 50"),
    "prefill": Rate(400e12, "FLOP/s", "assumed for vLLM; not measured"),
    "decode": Rate(0.6 * 3.0e12, "B/s", "assumed for vLLM: 0.6 of the copies; not measured"),
    "all-reduce": Rate(1 / 15e-6, "call/s", "assumed: 15 us each in a decode step; not measured"),
    "step of vLLM": Rate(1 / 4e-3, "step/s", "assumed: 4 ms on the host; not measured"),
    "reload": Rate(1 / 3.0, "version/s", "assumed: vLLM stands still 3 s; not measured"),
}
# FLOP/s in dense bf16, datasheets. The first name that is in the device's is the one.
PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
}
PROMPT_TOKENS = 256  # of a prompt, assumed; a sample's other tokens are its answer
VLLM_GROUPS = 64  # rollout.py's --max-groups: prompts in flight on a node
VLLM_OTHER = 6 * 2**30  # bytes of vLLM's share of a GPU without weights and cache


def peak_flops(device: str) -> float | None:
    """Of a device by its name, as torch.cuda.get_device_name gives it; None: not in PEAKS."""
    return next((flops for name, flops in PEAKS.items() if name in device), None)


def trained(m, lengths: list[int], ranks: int, busy_s: float, device: str) -> dict:
    """What a step says of the trainer's speed. lengths: tokens of each trained sample with its
    prompt; busy_s: seconds of the step without the wait for rollouts; device: of a rank, all
    have the same. The utilization is of its peak in PEAKS, recomputed work not counted; None
    without one."""
    flop, peak = sum(n * flops_per_token(m, n) for n in lengths), peak_flops(device)
    return {
        "train/tokens_per_s_per_gpu": sum(lengths) / (ranks * busy_s),
        "train/mfu": flop / (ranks * busy_s * peak) if peak else None,
    }


class Code(NamedTuple):
    """What the trainer's code does, where it changes the time."""

    head_rows: int = 2048  # of logits at once, where --logprob-chunk-size is 0
    sorts: float = 0.5  # of int64, a MoE layer and pass. Of bytes: an eighth; an inverse: too
    waits: float = 1.0  # of the host, a MoE layer and pass; once 16, the further ones 12 us each
    attention_kept: bool = True  # recompute does not run attention again
    results_left_out: bool = True  # nor what only a block's result needs
    once_a_rank: bool = True  # a token is sent once to each rank with experts of it
    first_prev_spared: bool = True  # a batch's first update is its own prev
    gradients_overlap: bool = True  # their reduce-scatter goes on under the last backward
    parameters_overlap: bool = True  # and they are gathered under the next forward
    gradients_written: bool = True  # the first micro-batch's are not added to zeros
    # gate and up are one GEMM, kv heads are not repeated, and an expert's weight is applied before
    # the GEMM that makes F values to D
    lean_rows: bool = True


PLANNED = Code()
CODE = Code(first_prev_spared=False)  # that of this repository


class Term(NamedTuple):
    part: str  # "training", "prev pass", "update"; or of the rollouts
    name: str
    amount: float
    rate: str

    @property
    def seconds(self) -> float:
        return self.amount / RATES[self.rate].value


def seconds(terms: list[Term], *parts: str) -> float:
    """Of all terms, or of those of some parts."""
    return sum(t.seconds for t in terms if not parts or t.part in parts)


# ---- training ------------------------------------------------------------------------------------
class Work(NamedTuple):
    """Amounts of a pass through all layers."""

    name: str
    rate: str
    forward: float
    backward: float
    left_out: float = 0.0  # of a forward pass that is a recompute


def layers(m, cfg, N: float, length: float, code: Code) -> list[Work]:
    a, tp, ep = dtype_bytes(cfg)[0], cfg.tp, cfg.ep
    D, F, I_, H, G = m.hidden_size, m.moe_intermediate_size, m.intermediate_size, *heads(m, tp)
    n, C, L, K = N / tp, m.head_dim, m.num_hidden_layers, m.num_experts_per_tok
    moe, E = len(m.moe_layers), m.num_experts
    dense = L - moe
    gemm = L * 4 * N * D * (H + G) * C + moe * 2 * n * D * E + dense * 6 * N * D * I_ / tp
    attention = L * 2 * N * H * C * length
    experts = moe * 6 * n * K * D * F
    # Elementwise, norms, moving of rows: as counted in the compiled block of Qwen3-30B-A3B at ep 8,
    # 4.15 and 6.28 GB a layer of 16k tokens, and 2.61 for a recompute (once 4.80 and 7.09, with a
    # token sent once an expert, and 5.13 and 8.06 if not lean either), divided into shapes.
    # d: rows of a token that are sent.
    d = ranks_of_a_token(m, ep) if moe and ep > 1 and code.once_a_rank else K
    around, rows, of_d, of_K, of_F = (2.5, 9, 4, 4.1, 6) if code.lean_rows else (4, 10, 4, 6, 5)
    around *= L * a * N * (H + G) * C
    forward = L * a * rows * n * D + moe * a * n * ((4 * d + 2 * K) * D + 3 * K * F)
    forward += dense * a * 3 * N * I_ / tp
    backward = L * a * 16 * n * D + dense * a * 5 * N * I_ / tp
    backward += moe * a * n * ((of_d * d + of_K * K) * D + of_F * K * F)
    # What only the result needs: the last GEMM of each block, and what follows it.
    out = code.results_left_out
    down, third = out * dense * 2 * N * D * I_ / tp, out * experts / 3
    sums = out * a * n * D * (3 * L + moe * (2 * d + K))
    found = [
        Work("projections, routers, dense MLPs", "dense GEMM", gemm, 2 * gemm, down),
        Work("experts", "grouped GEMM", experts, 2 * experts, third),
        Work("attention", "attention", attention, 0.0, code.attention_kept * attention),
        Work("attention's backward", "attention backward", 0.0, 2.5 * attention),
        Work("elementwise, norms, rows", "copies", forward + around, backward + around, sums),
    ]
    if tp > 1:
        seam = N * D * a * (tp - 1) / tp
        both = 2 * (L + dense) * seam
        found.append(Work("tensor parallel", "NVLink ring", both, both, out * dense * seam))
    if moe and ep > 1:
        sent, near = moe * 2 * n * d * D * a, min(ep, GPUS_A_NODE)
        ways = [("all-to-all", "NVLink all-to-all", near - 1)]
        ways += [("all-to-all across nodes", "InfiniBand", ep - near)] * (ep > near)
        for name, rate, ranks in ways:
            both = sent * ranks / ep
            found.append(Work(name, rate, both, both, out * both / 2))
    if moe:
        found.append(Work("sorts", "sort", moe * code.sorts * n * K, 0.0))
        found.append(Work("top-k", "top-k", moe * n, 0.0))
    return found


def heads(m, tp: int) -> tuple[float, float]:
    """Query and kv heads of a rank."""
    return m.num_attention_heads / tp, max(1, m.num_key_value_heads / tp)


def head(m, cfg, N: float, code: Code, train: bool) -> tuple[str, float]:
    """Rate and amount of the slower of its GEMMs and its bytes. A chunk reads the weight and writes
    fp32 logits (4 bytes); the body reads them three times and writes bf16 (2); two GEMMs read
    that, and one of them reads and writes the fp32 gradient of the weight (8)."""
    D, V = m.hidden_size, m.vocab_size / cfg.tp
    rows = cfg.logprob_chunk_size or code.head_rows
    chunks, flop = N / rows, (6 if train else 2) * N * D * V
    moved = N * V * (4 + 12) + chunks * V * D * 2
    if train:
        moved += N * V * (2 + 2 + 2) + chunks * V * D * (2 + 8)
    found = [("dense GEMM", flop), ("copies", moved)]
    return max(found, key=lambda work: work[1] / RATES[work[0]].value)


def ring(replicas: int, world: int) -> tuple[str, float]:
    """Between ranks that hold the same slice: the rate, and over how many NICs of a node their
    bytes go. Those of a whole node have NICs enough for the ring's rate."""
    nodes = -(-world // GPUS_A_NODE)
    nics = max(1.0, replicas / nodes)
    slow = nodes > 1 and nics * RATES["InfiniBand"].value < RATES["NVLink ring"].value
    return ("InfiniBand", nics) if slow else ("NVLink ring", 1.0)


def update(m, cfg, world: int, code: Code = CODE) -> list[Term]:
    """Gradients, AdamW, parameters. The passes over a rank's shard: AdamW 28 bytes an element, norm
    and clipping 12, cast 6. Zeroing, where the code does it, is of all its gradients."""
    a, grad = dtype_bytes(cfg)
    held = parameter_classes(m, world, cfg.tp, cfg.ep, cfg.freeze_moe_router)
    terms, shard = [], sum(c.numel / c.replicas for c in held if c.trained)
    sizes = defaultdict(float)  # elements that a rank sends, over a NIC, by kind and rate
    for c in held:
        if c.trained and c.replicas > 1:
            rate, nics = ring(c.replicas, world)
            kind = "experts" if c.name == "experts" else "others"
            sizes[kind, rate] += c.numel * (c.replicas - 1) / c.replicas / nics
    for what, size in (("gradients", grad), ("parameters", a)):
        terms += [
            Term("update", f"{what}, {kind}", size * numel, rate)
            for (kind, rate), numel in sizes.items()
        ]
    passes = shard * (28 + 12 + 6)
    if not code.gradients_written:
        passes += grad * sum(c.numel for c in held if c.trained)
    return [*terms, Term("update", "AdamW and its passes", passes, "copies")]


def training(m, cfg, world: int, length: float, N: float, code: Code = CODE) -> list[Term]:
    """The terms of an update of N tokens a data-parallel rank, in sequences of `length`."""
    micro = math.ceil(N / cfg.max_tokens_per_micro_batch)
    updates = cfg.samples_per_step / cfg.train_global_batch_size
    again, terms, passes = cfg.activation_checkpointing, [], 0.0
    if cfg.algorithm.needs_prev:
        passes += 1 - code.first_prev_spared / updates
    passes += cfg.reference_policy_kl_penalty > 0
    work = layers(m, cfg, N, length, code)
    if m.moe_layers:
        waits = len(m.moe_layers) * micro * code.waits
        work.append(Work("waits for the experts' counts", "wait", waits, 0.0))
    for name, rate, forward, backward, left_out in work:
        recompute = again * (forward - left_out)
        terms.append(Term("training", name, forward + recompute + backward, rate))
    rate, amount = head(m, cfg, N, code, train=True)
    terms.append(Term("training", "head", amount, rate))
    a, grad = dtype_bytes(cfg)
    own = slices(m, cfg.tp, cfg.ep)
    numel = sum(numel for kind, (_, numel, _) in own.items() if kind != "routers")
    numel -= m.vocab_size * m.hidden_size / cfg.tp  # the head adds its own
    of_one = micro * (a + 2 * grad) - grad * code.gradients_written  # bytes
    terms.append(Term("training", "adding up gradients", numel * of_one, "copies"))
    if passes:
        rate, amount = head(m, cfg, N, code, train=False)
        forward = [(w.name, w.rate, w.forward) for w in work if w.forward]
        forward.append(("head", rate, amount))
        terms += [Term("prev pass", name, passes * f, rate) for name, rate, f in forward]
    after, pass_s = update(m, cfg, world, code), seconds(terms, "training") / micro / (3 + again)
    if code.gradients_overlap:
        after = list(_hidden(after, "gradients", 2 * pass_s, m.num_hidden_layers))
    if code.parameters_overlap:
        after = list(_hidden(after, "parameters", pass_s, m.num_hidden_layers))
    return [t for t in terms + after if t.amount]


def _hidden(after: list[Term], what: str, behind_s: float, num_layers: int):
    """What is left of the gradients' or parameters' way beside a pass: one layer's, or what takes
    longer than that pass."""
    sent = sum(t.seconds for t in after if t.name.startswith(what))
    left = max(1 / num_layers, 1 - behind_s / sent) if sent else 1.0
    for t in after:
        if t.name.startswith(what):
            t = t._replace(name=f"{t.name}, not hidden", amount=left * t.amount)
        yield t


# ---- rollouts ------------------------------------------------------------------------------------
class Engine(NamedTuple):
    """A vLLM engine of tp GPUs."""

    tp: int
    sequences: float  # decoded at once
    terms: list[Term]  # of one decode step

    @property
    def tokens_per_s(self) -> float:
        """Of a GPU, while it decodes."""
        return self.sequences / self.tp / seconds(self.terms)


def vllm_weights(m, fp8: bool) -> dict[str, int]:
    """Bytes by class. FP8: the weights of experts and projections have a byte; embedding, head,
    router and keys stay."""
    wide = ("embedding and head", "routers", "norms")
    return {
        kind: n * (1 if fp8 and kind not in wide else 2)
        for kind, (_, n, _) in slices(m, 1, 1).items()
    }


def vllm_keys(m, tp: int) -> int:
    """Bytes of keys and values of a token, on all tp GPUs."""
    return 2 * m.num_hidden_layers * max(m.num_key_value_heads, tp) * m.head_dim * 2


def cached(
    m, cfg, length: float, tp: int, gpus: int, share: float, fp8=False, other=VLLM_OTHER
) -> float:
    """Sequences whose keys and values an engine of tp GPUs holds beside its weights, in a share of
    each GPU's memory; below 0 where these alone are too much. gpus: of all engines, over which the
    experts are cut."""
    size = vllm_weights(m, fp8)
    weights = sum(size.values()) - size.get("experts", 0) * (1 - tp / gpus)
    room = tp * (share * cfg.gpu_memory_gib * 2**30 - other) - weights
    return room / (vllm_keys(m, tp) * length)


def engine(m, cfg, length: float, tp: int, in_flight: float, fp8: bool) -> Engine | None:
    """An engine that has in_flight sequences a GPU at most; None where its weights do not fit."""
    size, kv = vllm_weights(m, fp8), vllm_keys(m, tp)
    L, D = m.num_hidden_layers, m.hidden_size
    context = (length + min(PROMPT_TOKENS, length / 2)) / 2  # mean over a sample's decoding
    B = min(tp * in_flight, cached(m, cfg, length, tp, tp, VLLM_SHARE, fp8))
    if B < 1:
        return None
    experts, K, E = size.get("experts", 0), m.num_experts_per_tok, max(1, m.num_experts)
    touched = experts * (1 - (1 - K / E) ** B)
    embedding = 0 if m.tie_word_embeddings else m.vocab_size * D * 2
    others = sum(size.values()) - experts - embedding
    terms = [
        Term("decode", "weights", (others + touched) / tp, "decode"),
        Term("decode", "keys and values", B * context * kv / tp, "decode"),
        Term("decode", "all-reduce", 2 * L * (tp > 1), "all-reduce"),
        Term("decode", "host", 1, "step of vLLM"),
    ]
    return Engine(tp, B, terms)


def best_engine(m, cfg, nodes: int, length: float, fp8: bool) -> Engine | None:
    """The tensor parallel degree of vLLM that decodes fastest; all engines of a node share its
    prompts in flight."""
    at_once = min(
        nodes * VLLM_GROUPS * cfg.num_generations_per_prompt,
        cfg.samples_per_step * (1 + cfg.max_trajectory_age_steps),
    )
    in_flight = at_once / nodes / GPUS_A_NODE
    found = [engine(m, cfg, length, tp, in_flight, fp8) for tp in (1, 2, 4, 8)]
    fitting = [e for e in found if e]
    return max(fitting, key=lambda e: e.tokens_per_s, default=None)


def generation(m, cfg, nodes: int, length: float, vllm: Engine) -> list[Term]:
    """The terms of a GPU for its share of a step's samples. Prompts are read once a group. Keys and
    values that are made again after an update are those of all sequences in flight."""
    gpus, prompt = nodes * GPUS_A_NODE, min(PROMPT_TOKENS, length / 2)
    answers = cfg.samples_per_step * (length - prompt) / gpus
    steps = answers / (vllm.sequences / vllm.tp)
    read = cfg.num_prompts_per_step * prompt / gpus
    terms = [t._replace(amount=steps * t.amount) for t in vllm.terms]
    flop = flops_per_token(m, prompt) / 3
    terms.append(Term("prefill", "prompts", read * flop, "prefill"))
    if cfg.recompute_kv_cache_after_weight_updates and cfg.max_trajectory_age_steps:
        held = vllm.sequences / vllm.tp * (length + prompt) / 2
        flop = flops_per_token(m, length / 2) / 3
        terms.append(Term("prefill", "keys and values again", held * flop, "prefill"))
    return [*terms, Term("load", "weights", 1, "reload")]
