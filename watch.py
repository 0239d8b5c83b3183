"""Look at a run, while it goes or afterwards, from the files in its directory.

    python watch.py runs/NAME          one screen for trainer and rollouts, until Ctrl-C
    python watch.py runs/NAME --once   the same, once
    python watch.py runs/NAME --png    its curves, to runs/NAME/curves.png

The first line under the title says what holds the run back, and which flag would help.
"""

import argparse
import json
import math
import shutil
import sys
import textwrap
import time
from pathlib import Path

WINDOW = 20  # steps that a value is the mean of


def read_jsonl(path: Path) -> list[dict]:
    """One record a line. A last line that is still being written is left out."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def read_metrics(run_dir: Path) -> list[dict]:
    return read_jsonl(run_dir / "metrics.jsonl")


# ---- the bottleneck ------------------------------------------------------------------------------
def mean(records: list[dict], name: str) -> float | None:
    """Mean over the last steps that have the metric. The first step is left out where there are
    others: it holds vLLM's start and the compilation."""
    values = [r[name] for r in records[1:][-WINDOW:] or records if r.get(name) is not None]
    return sum(values) / len(values) if values else None


def load(records: list[dict]) -> tuple[float, float]:
    """Of the rollout nodes over the last steps: share of the time in which vLLM had nothing to do,
    and tokens a second of a node. From sums, since a node's beats and the trainer's steps do not
    keep time with each other."""
    total = lambda name: sum(
        r.get(f"rollout/{name}", 0.0) for r in records[1:][-WINDOW:] or records
    )
    node_s = total("node_s") or math.inf
    return total("idle_s") / node_s, total("tokens") / node_s


def bottleneck(records: list[dict], config: dict) -> tuple[str, str]:
    """What holds the run back ("generation", "trainer", "weights" or "lockstep"), and a sentence
    that says so with the flag that would help. Who never waits is the bottleneck; where both wait,
    it is what lies between them."""
    get = lambda name: mean(records, name) or 0.0
    step_s, wait_s = get("timing/train/total_step_time"), get("timing/train/exposed_generation")
    idle = load(records)[0]
    parts = {
        "writing": (
            get("timing/train/publish_total"),
            "--publish-dtype bfloat16 or a faster disk under runs/",
        ),
        "fetching": (
            get("timing/rollout/fetch_s"),
            "--publish-dtype bfloat16 or a faster link to the rollout nodes",
        ),
        "patching": (
            get("timing/rollout/patch_s") + get("timing/rollout/verify_s"),
            "rollout.py's --dir in RAM",
        ),
        "loading": (get("timing/rollout/load_s"), "rollout.py's --dir in RAM"),
    }
    part = max(parts, key=lambda name: parts[name][0])
    broadcast_s, age = (
        sum(seconds for seconds, _ in parts.values()),
        config["max_trajectory_age_steps"],
    )
    waits = f"the trainer waits {wait_s:.2f} of {step_s:.2f} s a step"
    if wait_s < 0.15 * step_s:
        prev_s, update_s = (
            get("timing/train/policy_and_reference_logprobs"),
            get("timing/train/policy_training"),
        )
        helps = "more ranks (torchrun --nproc-per-node) or a larger --max-tokens-per-micro-batch"
        if prev_s > 0.3 * step_s:
            helps = (
                "--ratio-anchor sampler --no-use-importance-sampling-correction spares the first, "
                "more ranks both"
            )
        return "trainer", (
            f"The trainer is the bottleneck: {waits} for samples, prev log-probs take "
            f"{prev_s:.2f} s and "
            f"updates {update_s:.2f} s, and vLLM has nothing to do {idle:.0%} of the time; {helps}."
        )
    if idle < 0.3:
        return "generation", (
            f"Generation is the bottleneck: {waits} for samples while vLLM is busy {1 - idle:.0%} "
            "of "
            "the time; start python rollout.py on more machines, or give vLLM more by "
            "--rollout-args."
        )
    if broadcast_s > 0.3 * step_s:
        return "weights", (
            f"The way of the weights is the bottleneck: {waits} while vLLM has nothing to do "
            f"{idle:.0%} "
            f"of the time, and a version takes {broadcast_s:.2f} s to arrive, "
            f"{parts[part][0]:.2f} s of "
            f"it in {part}; {parts[part][1]}, or --max-trajectory-age-steps {age + 1} to hide it."
        )
    return "lockstep", (
        f"Trainer and rollouts wait for each other: {waits}, and vLLM has nothing to do "
        f"{idle:.0%} of "
        f"the time; --max-trajectory-age-steps {age + 1} lets them overlap."
    )


# ---- one screen ----------------------------------------------------------------------------------
BOLD, DIM, RED, GREEN, YELLOW, CYAN, OFF = (f"\x1b[{code}m" for code in (1, 2, 31, 32, 33, 36, 0))


def spark(values: list[float | None], width: int = 30) -> str:
    """The course of a metric in one line of text."""
    values = [v for v in values if v is not None]
    size = max(1, -(-len(values) // width))
    points = [
        sum(part) / len(part) for i in range(0, len(values), size) if (part := values[i : i + size])
    ]
    low, high = min(points, default=0.0), max(points, default=0.0)
    return "".join(
        "▁▂▃▄▅▆▇█"[round(7 * (p - low) / (high - low))] if high > low else "▁" for p in points
    )


def bar(share: float, width: int = 14) -> str:
    full = round(width * min(1.0, max(0.0, share)))
    return "█" * full + "░" * (width - full)


def show(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def frame(run_dir: Path, width: int = 100) -> str:
    """The screen of a run as text with ANSI colours."""
    config, records = json.loads((run_dir / "config.json").read_text()), read_metrics(run_dir)
    log = run_dir / "rollout.log"
    if not records:
        last = log.read_text(errors="replace").strip().splitlines()[-1:] if log.exists() else []
        return (
            f"{BOLD}{run_dir}{OFF}   no step yet; "
            f"{last[0] if last else 'no word from a rollout node'}\n"
        )
    now, hub, train = records[-1], records[-1]["hub"], lambda name: mean(records, f"train/{name}")
    t = lambda name: mean(records, f"timing/{name}") or 0.0
    steps, step_s = config["max_num_steps"], t("train/total_step_time")
    ago, left = time.time() - (run_dir / "metrics.jsonl").stat().st_mtime, steps - now["step"] - 1
    state = (
        f"{left * step_s / 60:.1f} min left, last step {ago:.0f} s ago" if left > 0 else "finished"
    )
    loss = "CISPO" if config["use_cispo"] else "PPO clip"
    lines = [
        f"{BOLD}{run_dir}{OFF}  {loss}  step {now['step'] + 1} of {steps} "
        f"{GREEN}{bar((now['step'] + 1) / steps)}"
        f"{OFF}  {step_s:.2f} s a step, {state}"
    ]
    _, sentence = bottleneck(records, config)
    lines += [f"{YELLOW}{line}{OFF}" for line in textwrap.wrap(sentence, width)]

    def row(label: str, value: str, name: str = "") -> None:
        course = spark([r.get(f"train/{name}") for r in records]) if name else ""
        lines.append(f"  {label:34}{value:>22}   {CYAN}{course}{OFF}")

    lines += ["", f"{BOLD}LEARNING{OFF}{DIM}{f'mean of {WINDOW} steps':>50}   whole run{OFF}"]
    row("reward", show(train("reward"), ".3f"), "reward")
    validations = read_jsonl(run_dir / "validation.jsonl")
    if validations:
        v = validations[-1]
        names = [name.split("/")[1] for name in v if "@" in name]
        scores = [[r.get(f"validation/{name}") for r in validations] for name in names]
        for name, course in zip(names, scores):
            label = f"validation {name}, v{v['version']}"
            lines.append(f"  {label:34}{show(course[-1], '.3f'):>22}   {GREEN}{spark(course)}{OFF}")
    row(
        "groups without signal",
        show(train("groups_without_signal"), ".0%"),
        "groups_without_signal",
    )
    row("entropy, nats", show(train("entropy"), ".3f"), "entropy")
    row(
        "tokens a sample",
        show(train("mean_gen_tokens_per_sample"), ".1f"),
        "mean_gen_tokens_per_sample",
    )
    row("samples cut off", show(train("truncation_rate"), ".1%"), "truncation_rate")
    row("gradient norm", show(train("grad_norm"), ".2f"), "grad_norm")
    lines += ["", f"{BOLD}TRAINER AGAINST SAMPLER{OFF}"]
    row("tokens PPO would clip", show(train("would_clip"), ".2%"), "would_clip")
    row(
        "ratio, median and largest",
        f"{show(train('ratio_p50'), '.2f')} {show(train('probs_ratio_max'), '.2f')}",
        "probs_ratio_max",
    )
    row(
        "KL, same weights",
        show(train("gen_kl_error_same_version"), ".1e"),
        "gen_kl_error_same_version",
    )
    row(
        "KL, older weights",
        show(train("gen_kl_error_older_version"), ".1e"),
        "gen_kl_error_older_version",
    )
    row(
        "age in steps, mean and largest",
        f"{train('avg_trajectory_age'):.2f} {now['train/max_trajectory_age']:.0f}",
        "avg_trajectory_age",
    )

    busy = {
        "waits for a batch": "exposed_generation",
        "prev log-probs": "policy_and_reference_logprobs",
        "updates": "policy_training",
        "packing": "data_processing",
        "copying weights": "publish_copy",
    }
    left = [
        f"{n:17} {t(f'train/{p}'):7.2f} s {bar(t(f'train/{p}') / step_s)}" for n, p in busy.items()
    ]
    (idle, node_tokens_per_s), nodes = load(records), hub["nodes"].values()
    vllm = [node["vllm"] for node in nodes if "vllm" in node]
    largest = lambda name: max((v.get(name, 0) for v in vllm), default=0)
    right = [
        f"{'waits for prompts':17} {idle:7.0%}   {bar(idle)}",
        f"{'samples in flight':17} {hub['in_flight']:7.0f}   and {hub['waiting']:.0f} queued",
        f"{'KV cache':17} {largest('kv'):7.0%}",
        f"{'a group in vLLM':17} {t('rollout/generate_group_s'):7.2f} s",
        f"{'stopped to load':17} {t('rollout/stopped_s'):7.2f} s an update",
    ]
    tokens_per_s = config["num_prompts_per_step"] * config["num_generations_per_prompt"] / step_s
    tokens_per_s *= train("mean_gen_tokens_per_sample")
    made = (
        f"{node_tokens_per_s * len(nodes):,.0f} tokens/s on {len(nodes)} "
        f"node{'s' * (len(nodes) != 1)}"
    )
    lines += [
        "",
        f"{BOLD}{'TRAINER':14}{OFF}{f'{tokens_per_s:,.0f} tokens/s':<34}{BOLD}ROLLOUTS{OFF}      "
        f"{made}",
    ]
    lines += [f"  {a:46}{b}" for a, b in zip(left, right)]
    landed = sum(node["version"] == hub["published"] for node in nodes)
    lines += [
        "",
        f"{BOLD}BROADCAST{OFF}  v{hub['published']} is on {landed} of {len(nodes)} nodes: "
        f"copy {t('train/publish_copy'):.2f}, encode {t('train/publish_encode'):.2f}, "
        f"write {t('train/publish_write'):.2f}, fetch {t('rollout/fetch_s'):.2f}, "
        f"patch {t('rollout/patch_s'):.2f}, load {t('rollout/load_s'):.2f} s",
        f"{BOLD}LEDGER{OFF}     {hub['handed_out']:,} prompts handed out = {hub['taken']:,} taken "
        f"+ {hub['buffered']} "
        f"buffered + {hub['leased']} leased + {hub['returned']} returned + {hub['set_aside']} set "
        "aside" + (f" + {hub['skipped']} skipped" if hub.get("skipped") else ""),
    ]
    counts = {
        **hub["counts"],
        **{f"validation {k}": n for k, n in hub.get("validation", {}).get("counts", {}).items()},
    }
    if trouble := ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in counts.items() if n):
        lines += [f"{RED}{line}{OFF}" for line in textwrap.wrap(trouble, width)]
    for r in hub.get("validation", {}).get("rounds", ()):
        lines.append(
            f"{BOLD}VALIDATION{OFF} of v{r['version']}: {r['answered']} of {r['of']} prompts "
            "answered"
        )
    return "\n".join(lines) + "\n"


# ---- curves --------------------------------------------------------------------------------------
# Panels: title, axis label, logarithmic?, and {legend: metric}
PANELS = [
    (
        "Reward",
        "mean of the step's samples",
        False,
        {"reward": "train/reward", "groups without signal": "train/groups_without_signal"},
    ),
    ("Entropy", "nats per token", False, {"entropy": "train/entropy"}),
    (
        "Importance ratio",
        "pi / pi_prev",
        True,
        {
            "max": "train/probs_ratio_max",
            "mean": "train/probs_ratio",
            "min": "train/probs_ratio_min",
        },
    ),
    (
        "Trainer against sampler",
        "KL, nats per token",
        True,
        {
            "same version": "train/gen_kl_error_same_version",
            "older version": "train/gen_kl_error_older_version",
        },
    ),
    (
        "Staleness",
        "steps",
        False,
        {"mean age": "train/avg_trajectory_age", "max age": "train/max_trajectory_age"},
    ),
    (
        "Seconds per step",
        "s",
        False,
        {
            "total": "timing/train/total_step_time",
            "waiting for rollouts": "timing/train/exposed_generation",
            "prev log-probs": "timing/train/policy_and_reference_logprobs",
            "updates": "timing/train/policy_training",
            "vLLM stopped for weights": "timing/rollout/stopped_s",
        },
    ),
]


def plot(run_dir: Path) -> Path:
    """Write curves.png of a run and return its path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = read_metrics(run_dir)
    fig, axes = plt.subplots(2, 3, figsize=(15, 8), layout="constrained")
    for ax, (title, label, log, curves) in zip(axes.flat, PANELS):
        for legend, metric in curves.items():
            points = [(r["step"], r[metric]) for r in records if r.get(metric) is not None]
            # dots where a metric does not exist at every step: a line would invent the steps
            # between
            if points:
                ax.plot(
                    *zip(*points), "-" if len(points) == len(records) > 1 else ".", label=legend
                )
        ax.set(title=title, xlabel="step", ylabel=label, yscale="log" if log else "linear")
        ax.grid(alpha=0.3)
    validations = read_jsonl(run_dir / "validation.jsonl")
    for name, color in zip((n for r in validations[:1] for n in r if "@" in n), ("black", "gray")):
        points = [(r["version"], r[name]) for r in validations if name in r]
        axes.flat[0].plot(*zip(*points), "o--", color=color, label=name.replace("/", " "))
    for ax in axes.flat:
        if ax.get_legend_handles_labels()[0]:
            ax.legend()
    axes.flat[0].set_ylim(-0.02, 1.02)
    # The first step holds vLLM's start and the compilation; it must not flatten all others.
    seconds = sorted(r["timing/train/total_step_time"] for r in records) or [1.0]
    axes.flat[5].set_ylim(0, 1.5 * seconds[int(0.95 * (len(seconds) - 1))])
    fig.suptitle(str(run_dir))
    path = run_dir / "curves.png"
    fig.savefig(path, dpi=100)
    plt.close(fig)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--once", action="store_true", help="draw the screen once and end")
    parser.add_argument("--png", action="store_true", help="write curves.png and end")
    args = parser.parse_args()
    if not (args.run_dir / "config.json").exists():
        sys.exit(
            f"watch.py: error: {args.run_dir} is not the directory of a run: it has no config.json"
        )
    if args.png:
        print(plot(args.run_dir))
        return
    while True:
        text = frame(args.run_dir, shutil.get_terminal_size((100, 40)).columns)
        if args.once:
            print(text, end="")
            return
        sys.stdout.write("\x1b[H\x1b[J" + text)  # from the top, and nothing left of the one before
        sys.stdout.flush()
        time.sleep(2.0)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        pass
