"""What `--dry-run` prints: memory and traffic of a layout (plan.py), the time of an update, how to
divide nodes between training and rollouts (speed.py), and which GPUs train a model at all.

    python train_cispo.py --preset qwen3-30b-a3b --dry-run
    python train_cispo.py --preset qwen3-30b-a3b --dry-run --nodes 3
    python train_cispo.py --model Qwen/Qwen3-8B --dry-run
"""

import dataclasses
import itertools
from typing import NamedTuple

from ranks import speed
from ranks.plan import (
    GIB,
    IMBALANCE,
    VLLM_SHARE,
    activation_memory,
    as_flags,
    check_layout,
    check_memory,
    check_model,
    collective_bytes,
    fitting,
    flops_per_token,
    memory,
    one_micro_batch,
    parameter_classes,
    replayed_bytes,
    vllm_share,
    vllm_value,
)


def how_to_start(cfg, world: int) -> str:
    """The command for this many ranks, and where the rollout nodes come from."""
    if cfg.local_rollout:
        ranks = f"NPROC={world} " * (world > 1)
        return (
            f"to start it on one machine: {ranks}bash launch.sh FLAGS; its vLLM gets the GPUs that "
            "no rank has"
        )
    return (
        f"to start it: {world} rank{'s' * (world > 1)} on trainer nodes and rollout nodes of your "
        'own, both by NODES="h0 h1 ..." bash launch.sh FLAGS (docs/nodes.md)'
    )


def print_report(m, cfg, world: int) -> None:
    """world: ranks of the layout; 0: which GPUs would do. Raises: ValueError for an impossible
    layout, and for one that does not fit, with what would."""
    cfg = dataclasses.replace(cfg, dry_run=True)
    if world and not cfg.nodes:
        check_layout(m, world, cfg.tp, cfg.ep)
    check_model(m, cfg)
    cfg.validate()
    if cfg.nodes:
        return print_splits(m, cfg)
    if not world:
        return print_gpus(m, cfg)
    print(cfg.text + "\n")
    terms = memory(m, cfg, world)
    act = {name: size / GIB for name, size in activation_memory(m, cfg).items()}
    peak = sum(terms.values())
    print(
        f"{cfg.model} on {world} ranks: tp {cfg.tp}, ep {cfg.ep}, data parallel "
        f"{world // cfg.tp}, micro-batches of {cfg.max_tokens_per_micro_batch} tokens"
    )
    print(f"\n{'parameters of a rank':26}{'millions':>9}  ranks that hold the same")
    for c in (classes := parameter_classes(m, world, cfg.tp, cfg.ep, cfg.freeze_moe_router)):
        print(f"  {c.name:24}{c.numel / 1e6:9.1f}  {c.replicas}{'' if c.trained else ', frozen'}")
    remarks = {
        "gradients": "those under way: an update is one micro-batch"
        if one_micro_batch(cfg, world)
        else "all, which several micro-batches may add up",
        "saved activations": f"{act['kept']:.1f} with recompute, {act['all layers']:.1f} without",
        "live layer or loss": f"attention {act['attention']:.1f}, dense MLP "
        f"{act['dense MLP']:.1f}, MoE {act['MoE']:.1f} ({act['MoE, fullest rank']:.1f} with "
        f"{IMBALANCE:g} x the rows), loss {act['loss']:.1f}",
        "sums of gradients": "in fp32, what they take beyond the activations that they replace",
        "vLLM on the same GPU": (
            f"{vllm_share(cfg, world):g} of it, by --rollout-args: room for "
            f"{shared_samples(m, cfg, world):.0f} samples at once; with a GPU more than ranks it "
            "has that"
        ),
    }
    print(f"\n{'memory of a rank':26}{'GiB':>9}")
    for name, gib in terms.items():
        print(f"  {name:24}{gib:9.2f}  {remarks.get(name, '')}".rstrip())
    print(f"  {'peak':24}{peak:9.2f}  of {cfg.gpu_memory_gib:g}")
    print(f"\n{'a rank sends, per layer':26}{'MB':>9}  in")
    for name, (size, when) in collective_bytes(m, cfg, world).items():
        print(f"  {name:24}{size / 1e6:9.1f}  {when}")
    total = sum(c.numel * world // c.replicas for c in classes)
    size = total * (4 if cfg.publish_dtype == "float32" else 2)
    print(
        f"  {'weights to rollouts':24}{size / m.num_hidden_layers / 1e6:9.1f}  a version, of all "
        f"ranks; {total:,} parameters are {size / 1e9:.2f} GB"
    )
    if cfg.router_replay == "sampler":
        sent = replayed_bytes(m, cfg) * cfg.samples_per_step
        print(f"  {'experts to rank 0':24}{sent / 1e6:9.1f}  a step, with all layers, at most")
    check_memory(m, cfg, world)
    check_sampler(m, cfg, world)
    if cfg.model:  # what takes a tiny one's time is none of these terms
        print_speed(m, cfg, world)
    if cfg.data:
        print("\nnot opened for this plan: the data sets; a run reads them first of all")
    print(f"\n{how_to_start(cfg, world)}")


# ---- time ----------------------------------------------------------------------------------------
def mean_length(cfg) -> int:
    return cfg.mean_length or cfg.max_total_sequence_length


def amount(term: speed.Term) -> str:
    """As "12.3 TFLOP at 650 TFLOP/s"."""
    rate = speed.RATES[term.rate]
    scales = {"FLOP": ("T", 1e12), "B": ("G", 1e9), "row": ("M", 1e6), "token": ("M", 1e6)}
    letter, scale = scales.get(rate.unit.removesuffix("/s"), ("", 1))

    def number(x):
        return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"

    of, per_s = letter + rate.unit.removesuffix("/s"), letter + rate.unit
    return f"{number(term.amount / scale)} {of} at {number(rate.value / scale)} {per_s}"


def update_tokens(cfg, world: int) -> float:
    """Of a data-parallel rank."""
    return cfg.train_global_batch_size * mean_length(cfg) / (world // cfg.tp)


def print_speed(m, cfg, world: int) -> None:
    """An update's time, term by term, and what the code could still spare."""
    length, N = mean_length(cfg), update_tokens(cfg, world)

    def total(code):
        return speed.seconds(speed.training(m, cfg, world, length, N, code))

    terms, all_s = speed.training(m, cfg, world, length, N, speed.CODE), total(speed.CODE)
    print(f"\n{'an update takes':46}{'ms':>7}  on H100s, by arithmetic: see ranks/speed.py")
    for t in terms:
        print(f"  {t.part:10}{t.name:34}{1e3 * t.seconds:7.1f}  {amount(t)}")
    print(f"  {'total':44}{1e3 * all_s:7.1f}  {', '.join(by_part(terms))}")
    rate = N / cfg.tp / all_s
    mfu = rate * flops_per_token(m, length) / speed.PEAKS["H100"]
    print(
        f"  {rate:,.0f} tokens/s per GPU, MFU {mfu:.3f}: {N:,.0f} tokens of a data-parallel rank, "
        f"sequences of {length}, {flops_per_token(m, length) / 1e9:.1f} GFLOP a token"
    )
    spared = {
        name: all_s - total(speed.CODE._replace(**{name: value}))
        for name, value in speed.PLANNED._asdict().items()
    }
    if any(s > 0 for s in spared.values()):
        print("  not in this code yet, and what each alone would spare, in ms:")
        print("   ", ", ".join(f"{n} {1e3 * s:.0f}" for n, s in spared.items() if s > 0))
        print(f"    all together: {N / cfg.tp / total(speed.PLANNED):,.0f} tokens/s per GPU")


def by_part(terms: list[speed.Term]) -> list[str]:
    parts = dict.fromkeys(t.part for t in terms)
    return [f"{part} {1e3 * speed.seconds(terms, part):.0f}" for part in parts]


# ---- how to divide nodes -------------------------------------------------------------------------
class Split(NamedTuple):
    """A step on some nodes for training and others for rollouts."""

    train_nodes: int
    rollout_nodes: int
    weights: str  # of the rollouts: bf16 or FP8
    flags: str  # further ones, which the trainer needs to fit
    vllm: speed.Engine
    train_s: float
    rollout_s: float
    step_s: float
    tokens_per_s: float  # of a GPU, all nodes

    @property
    def bottleneck(self) -> str:
        return "training" if self.train_s > self.rollout_s else "rollouts"


def fastest_trainer(m, cfg, world: int) -> tuple[float, str] | None:
    """Seconds of a step's updates, and the flags that the layout needs to fit, if it can."""
    found = []
    for _, flags, _ in fitting(m, cfg, world, further=0):
        changed = dataclasses.replace(cfg, **flags)
        N = update_tokens(changed, world)
        terms = speed.training(m, changed, world, mean_length(cfg), N, speed.CODE)
        updates = cfg.samples_per_step / cfg.train_global_batch_size
        found.append((updates * speed.seconds(terms), as_flags(flags)))
    return min(found, default=None)


def splits(m, cfg) -> list[Split]:
    """All splits of --nodes in which both sides fit, the fastest first. With a trajectory age of 0
    the two sides take turns, else the slower one sets the pace."""
    found, length = [], mean_length(cfg)
    tokens = cfg.samples_per_step * length / (cfg.nodes * speed.GPUS_A_NODE)
    for nodes in range(1, cfg.nodes):
        trainer = fastest_trainer(m, cfg, nodes * speed.GPUS_A_NODE)
        rollout_nodes = cfg.nodes - nodes
        for weights in ("bf16", "FP8"):
            vllm = speed.best_engine(m, cfg, rollout_nodes, length, weights == "FP8")
            if not (trainer and vllm):
                continue
            train_s, flags = trainer
            rollout_s = speed.seconds(speed.generation(m, cfg, rollout_nodes, length, vllm))
            together = max if cfg.max_trajectory_age_steps else lambda a, b: a + b
            step_s = together(train_s, rollout_s)
            found.append(
                Split(
                    nodes, rollout_nodes, weights, flags, vllm,
                    train_s, rollout_s, step_s, tokens / step_s,
                )
            )  # fmt: skip
    return sorted(found, key=lambda s: -s.tokens_per_s)


def print_splits(m, cfg) -> None:
    """Raises: ValueError when no split fits."""
    best = splits(m, cfg)
    if not best:
        raise ValueError(
            f"--nodes {cfg.nodes}: no split of {cfg.nodes} nodes of {speed.GPUS_A_NODE} GPUs with "
            f"--tp {cfg.tp} --ep {cfg.ep} fits --gpu-memory-gib {cfg.gpu_memory_gib:g}"
        )
    print(
        f"\na step of {cfg.samples_per_step} samples of {mean_length(cfg)} tokens on {cfg.nodes} "
        f"nodes of {speed.GPUS_A_NODE} H100s"
    )
    print(
        "nodes that train + sample, vLLM          training s  rollouts s  step s  tokens/s per GPU"
        "  bottleneck"
    )
    for s in best:
        vllm = f"{s.weights}, tp {s.vllm.tp}, {s.vllm.sequences:.0f} at once"
        print(
            f"{s.train_nodes} + {s.rollout_nodes}   {vllm:33}{s.train_s:11.1f}{s.rollout_s:12.1f}"
            f"{s.step_s:8.1f}{s.tokens_per_s:18,.0f}  {s.bottleneck}"
        )
    needed = {s.train_nodes: s.flags for s in best if s.flags}
    for nodes, flags in sorted(needed.items()):
        print(f"to fit on {nodes} node{'s' * (nodes > 1)} the trainer needs {flags}")
    one = best[0]
    print(
        f"\nthe fastest: a GPU of its rollout nodes decodes {one.vllm.tokens_per_s:,.0f} tokens/s"
    )
    for t in speed.generation(m, cfg, one.rollout_nodes, mean_length(cfg), one.vllm):
        print(f"  {t.part:10}{t.name:34}{t.seconds:7.1f} s  {amount(t)}")


# ---- which GPUs ----------------------------------------------------------------------------------
SIZES = {"24 GB": 23.0, "80 GB": 79.6, "141 GB": 139.8}  # GiB of such a GPU
MARGIN = 0.03  # of it stays free: so much a plan has been off (tests/test_fake_gpu.py)


def shared_samples(m, cfg, world: int, **other) -> float:
    """Of the longest kind, whose keys and values all engines hold that share GPUs with ranks."""
    tp = int(vllm_value(cfg, "--tensor[-_]parallel[-_]size|-tp", 1))
    engines = int(vllm_value(cfg, "--data[-_]parallel[-_]size|-dp", 1))
    share = vllm_share(cfg, world)
    fp8 = "--quantization fp8" in cfg.rollout_args.replace("=", " ")
    length = cfg.max_total_sequence_length
    each = speed.cached(m, cfg, length, tp, tp * engines, share, fp8, **other)
    return engines * max(0.0, each)


def check_sampler(m, cfg, world: int) -> None:
    """Raises: ValueError for a vLLM on a rank's GPU that has no room for one sample there, whatever
    else it needs."""
    share = vllm_share(cfg, world)
    if share and shared_samples(m, cfg, world, other=0) < 1:
        raise ValueError(
            f"--rollout-args {cfg.rollout_args!r}: vLLM's {share:g} of {cfg.gpu_memory_gib:g} GiB "
            "do not hold its weights and the keys and values of one sample"
        )


class Way(NamedTuple):
    """To train a model on GPUs of a size."""

    ranks: int
    sample: str  # GPUs of vLLM: a number of its own, or "same"
    peak: float  # GiB of a rank's GPU
    flags: dict  # of the trainer
    vllm_args: list[str]


def layouts(m, cfg, ranks: int) -> list[tuple[float, dict]]:
    """All that fit without vLLM, the fastest first: the peak of a rank and flags of each."""
    tokens = [cfg.max_tokens_per_micro_batch >> i for i in range(16)]
    tokens = [n for n in tokens if n >= cfg.max_total_sequence_length]
    found = []
    for tp, ep, budget in itertools.product((1, 2, 4, 8), [1 << i for i in range(8)], tokens):
        flags = {"tp": tp, "ep": ep, "max_tokens_per_micro_batch": budget}
        changed = dataclasses.replace(cfg, **flags, local_rollout=False)
        try:
            check_layout(m, ranks, tp, ep)
        except ValueError:
            continue
        peak = sum(memory(m, changed, ranks).values())
        if peak <= (1 - MARGIN) * cfg.gpu_memory_gib:
            N = update_tokens(changed, ranks)
            terms = speed.training(m, changed, ranks, mean_length(cfg), N, speed.CODE)
            found.append((speed.seconds(terms), peak, flags))
    return [(peak, flags) for _, peak, flags in sorted(found, key=lambda layout: layout[:2])]


def holds_group(m, cfg, tp: int, gpus: int, share: float) -> bool:
    """Whether an engine on tp of vLLM's GPUs has room for all samples of a prompt at once."""
    length = cfg.max_total_sequence_length
    return speed.cached(m, cfg, length, tp, gpus, share) >= cfg.num_generations_per_prompt


def engines(tp: int, gpus: int) -> list[str]:
    """vLLM's flags for engines of tp GPUs on all of some."""
    sizes = {"--tensor-parallel-size": tp, "--data-parallel-size": gpus // tp}
    return [f"{name} {size}" for name, size in sizes.items() if size > 1]


def own_gpus(m, cfg) -> Way | None:
    """The fewest GPUs that train it, beside as few as vLLM needs."""
    tp = next((tp for tp in (1, 2, 4, 8) if holds_group(m, cfg, tp, tp, VLLM_SHARE)), None)
    for ranks in (1 << i for i in range(10)):
        if tp and (found := layouts(m, cfg, ranks)):
            peak, flags = found[0]
            flags["local_rollout"] = ranks + tp <= speed.GPUS_A_NODE
            return Way(ranks, str(tp), peak, flags, engines(tp, tp))
    return None


def same_gpus(m, cfg) -> Way | None:
    """The fewest GPUs of one machine that train it with vLLM on all of them."""
    for ranks in (1, 2, 4, 8):
        for peak, flags in layouts(m, cfg, ranks):
            share = int(100 * (1 - MARGIN - peak / cfg.gpu_memory_gib)) / 100
            for tp in (n for n in (1, 2, 4, 8) if ranks % n == 0):
                if holds_group(m, cfg, tp, ranks, share):
                    args = [f"--gpu-memory-utilization {share:g}", *engines(tp, ranks)]
                    peak += share * cfg.gpu_memory_gib
                    return Way(ranks, "same", peak, {**flags, "local_rollout": True}, args)
    return None


def print_gpus(m, cfg) -> None:
    """How many GPUs of which size train the model, and with which flags."""
    print(
        f"{cfg.model}: {m.num_parameters:,} parameters. The fewest GPUs of a size that train it on "
        f"samples of {cfg.max_total_sequence_length} tokens, by arithmetic\n"
    )
    given = f"flags beside --preset {cfg.preset} --model {cfg.model}"
    print(f"{'GPUs of':10}{'train':>6}{'sample':>8}{'GiB':>8}  {given}")
    for name, gib in SIZES.items():
        sized = dataclasses.replace(cfg, gpu_memory_gib=gib)
        ways = [way for way in (own_gpus(m, sized), same_gpus(m, sized)) if way]
        for way in ways:
            flags = {"gpu_memory_gib": gib, **way.flags}
            words = [as_flags({n: x for n, x in flags.items() if x != getattr(cfg, n)})]
            if flags["local_rollout"]:
                inner = f"--vllm-args '{' '.join(way.vllm_args)}'" if way.vllm_args else ""
                words.append(f'--rollout-args="{inner}"')
            print(
                f"{name:10}{way.ranks:6}{way.sample:>8}{way.peak:8.1f}  "
                f"{' '.join(filter(None, words))}"
            )
        if not ways:
            print(f"{name:10}  none of up to 512")
    print(
        "\nGiB: the peak of a GPU that trains; sample: the GPUs of one vLLM, by its "
        "--tensor-parallel-size\nto see a row in full, with its FLAGS: CUDA_VISIBLE_DEVICES=(all "
        "GPUs of it, as 0,1,2) python train_cispo.py FLAGS --dry-run --dry-run-ranks "
        "GPUS_THAT_TRAIN\nto start it on one machine: NPROC=GPUS_THAT_TRAIN bash launch.sh "
        "FLAGS; on several: docs/nodes.md"
    )
