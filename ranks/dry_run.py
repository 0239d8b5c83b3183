"""What `--dry-run` prints: memory and traffic of a layout (plan.py), the time of an update, and how
to divide nodes between training and rollouts (speed.py).

    python train_cispo.py --preset qwen3-30b-a3b --dry-run
    python train_cispo.py --preset qwen3-30b-a3b --dry-run --nodes 3
"""

import dataclasses
from typing import NamedTuple

from ranks import speed
from ranks.plan import (
    GIB,
    IMBALANCE,
    activation_memory,
    as_flags,
    check_layout,
    check_memory,
    check_model,
    collective_bytes,
    fitting,
    flops_per_token,
    memory,
    parameter_classes,
    replayed_bytes,
    vllm_share,
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
    """Raises: ValueError for an impossible layout, and for one that does not fit, with what
    would."""
    cfg = dataclasses.replace(cfg, dry_run=True)
    if not cfg.nodes:
        check_layout(m, world, cfg.tp, cfg.ep)
    check_model(m, cfg)
    cfg.validate()
    if cfg.nodes:
        return print_splits(m, cfg)
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
        "saved activations": f"{act['kept']:.1f} with recompute, {act['all layers']:.1f} without",
        "live layer or loss": f"attention {act['attention']:.1f}, dense MLP "
        f"{act['dense MLP']:.1f}, MoE {act['MoE']:.1f} ({act['MoE, fullest rank']:.1f} with "
        f"{IMBALANCE:g} x the rows), loss {act['loss']:.1f}",
        "vLLM on the same GPU": (
            f"{vllm_share(cfg, world):g} of it, by --rollout-args; with a GPU more than ranks it "
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
    if cfg.model:  # what takes a tiny one's time is none of these terms
        print_speed(m, cfg, world)
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
