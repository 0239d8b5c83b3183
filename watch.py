"""Look at a run, while it goes or afterwards, from the files in its directory.

    python watch.py runs/NAME          one screen for trainer and rollouts, until Ctrl-C
    python watch.py runs/NAME --once   the same, once
    python watch.py runs/NAME --png    its curves, to runs/NAME/curves.png
    python watch.py runs/NAME --samples [STEP]      prompts and answers of a step, the last if unset
    python watch.py runs/A runs/B --png out.png     several runs side by side; without --png a table

The first line under the title says what holds the run back, and which flag would help.
"""

import argparse
import itertools
import json
import math
import shutil
import sys
import textwrap
import time
from pathlib import Path

from bridge.logs import how_it_ended, last_line, read_jsonl
from bridge.show_samples import COLOURS, page, show_samples
from bridge.side_by_side import AXES, WINDOW, plot_together, table


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

    def total(name):
        return sum(r.get(f"rollout/{name}", 0.0) for r in records[1:][-WINDOW:] or records)

    node_s = total("node_s") or math.inf
    return total("idle_s") / node_s, total("tokens") / node_s


def bottleneck(records: list[dict], config: dict) -> tuple[str, str]:
    """What holds the run back ("generation", "trainer", "weights" or "lockstep"), and a sentence
    that says so with the flag that would help. Who never waits is the bottleneck; where both wait,
    it is what lies between them."""

    def get(name: str) -> float:
        return mean(records, f"timing/{name}") or 0.0

    step_s, wait_s = get("train/total_step_time"), get("train/exposed_generation")
    idle, _ = load(records)
    age = config["max_trajectory_age_steps"]
    waits = f"the trainer waits {wait_s:.2f} of {step_s:.2f} s a step"
    idles = f"vLLM has nothing to do {idle:.0%} of the time"
    if wait_s < 0.15 * step_s:
        prev_s = get("train/policy_and_reference_logprobs")
        helps = "more ranks (torchrun --nproc-per-node) or a larger --max-tokens-per-micro-batch"
        if prev_s > 0.3 * step_s:
            helps = (
                "--ratio-anchor sampler --no-use-importance-sampling-correction spares the first, "
                "more ranks both"
            )
        return "trainer", (
            f"The trainer is the bottleneck: {waits} for samples, prev log-probs take "
            f"{prev_s:.2f} s and updates {get('train/policy_training'):.2f} s, and {idles}; "
            f"{helps}."
        )
    if idle < 0.3:
        return "generation", (
            f"Generation is the bottleneck: {waits} for samples while vLLM is busy {1 - idle:.0%} "
            "of the time; start python rollout.py on more machines, or give vLLM more by "
            "--rollout-args."
        )
    faster = "--publish-dtype bfloat16 or a faster"
    parts = {
        "writing": (get("train/publish_total"), f"{faster} disk under runs/"),
        "fetching": (get("rollout/fetch_s"), f"{faster} link to the rollout nodes"),
        "patching": (get("rollout/patch_s") + get("rollout/verify_s"), "rollout.py's --dir in RAM"),
        "loading": (get("rollout/load_s"), "rollout.py's --dir in RAM"),
    }
    part = max(parts, key=lambda name: parts[name][0])
    part_s, helps = parts[part]
    broadcast_s = sum(seconds for seconds, _ in parts.values())
    if broadcast_s > 0.3 * step_s:
        return "weights", (
            f"The way of the weights is the bottleneck: {waits} while {idles}, and a version takes "
            f"{broadcast_s:.2f} s to arrive, {part_s:.2f} s of it in {part}; {helps}, or "
            f"--max-trajectory-age-steps {age + 1} to hide it."
        )
    return "lockstep", (
        f"Trainer and rollouts wait for each other: {waits}, and {idles}; "
        f"--max-trajectory-age-steps {age + 1} lets them overlap."
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


def loss_of(config: dict) -> str:
    """The loss in a word or two; config.json of older runs lacks some of its flags."""
    if config["use_cispo"]:
        return "CISPO"
    if config.get("disable_ppo_ratio"):
        return "REINFORCE"
    return "on-policy gradient" if config.get("force_on_policy_ratio") else "PPO clip"


def bar(share: float, width: int = 14) -> str:
    full = round(width * min(1.0, max(0.0, share)))
    return "█" * full + "░" * (width - full)


def show(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


# ---- the screen ----------------------------------------------------------------------------------
BUSY = {  # parts of a step, as the screen calls them
    "waits for a batch": "exposed_generation",
    "prev log-probs": "policy_and_reference_logprobs",
    "updates": "policy_training",
    "packing": "data_processing",
    "copying weights": "publish_copy",
}


def frame(run_dir: Path, width: int = 100) -> str:
    """The screen of a run as text with ANSI colours."""
    records = read_metrics(run_dir)
    if not records:
        word = last_line(run_dir / "rollout.log") or "no word from a rollout node"
        return f"{BOLD}{run_dir}{OFF}   no step yet; {how_it_ended(run_dir) or word}\n"
    screen = Screen(run_dir, records, width)
    blocks = (screen.head, screen.learning, screen.mismatch, screen.speed, screen.books)
    return "\n".join(line for block in blocks for line in block()) + "\n"


class Screen:
    """A run at a moment; each method gives the lines of a block."""

    def __init__(self, run_dir: Path, records: list[dict], width: int):
        self.run_dir, self.records, self.width = run_dir, records, width
        self.config = json.loads((run_dir / "config.json").read_text())
        self.now, self.hub = records[-1], records[-1]["hub"]
        self.nodes = self.hub["nodes"].values()
        finished = self.now["step"] + 1 >= self.config["max_num_steps"]
        self.ended = "" if finished else how_it_ended(run_dir)
        # in a word; "" while it goes on
        self.over = "ended" if self.ended else "finished" if finished else ""

    def train(self, name: str) -> float | None:
        return mean(self.records, f"train/{name}")

    def seconds(self, name: str) -> float:
        return mean(self.records, f"timing/{name}") or 0.0

    def row(self, label: str, value: str, name: str) -> str:
        """A value and its course over the run."""
        course = spark([r.get(f"train/{name}") for r in self.records])
        return f"  {label:34}{value:>22}   {CYAN}{course}{OFF}"

    def metric(self, label: str, name: str, form: str) -> str:
        return self.row(label, show(self.train(name), form), name)

    def wrapped(self, text: str, colour: str) -> list[str]:
        return [f"{colour}{line}{OFF}" for line in textwrap.wrap(text, self.width)]

    def head(self) -> list[str]:
        steps, step_s = self.config["max_num_steps"], self.seconds("train/total_step_time")
        done = self.now["step"] + 1
        ago = time.time() - (self.run_dir / "metrics.jsonl").stat().st_mtime
        minutes = (steps - done) * step_s / 60
        state = self.over or f"{minutes:.1f} min left, last step {ago:.0f} s ago"
        loss = loss_of(self.config)
        title = f"{BOLD}{self.run_dir}{OFF}  {loss}  step {done} of {steps} "
        progress = f"{GREEN}{bar(done / steps)}{OFF}  {step_s:.2f} s a step, {state}"
        _, sentence = bottleneck(self.records, self.config)
        return [title + progress, *self.wrapped(self.ended, RED), *self.wrapped(sentence, YELLOW)]

    def learning(self) -> list[str]:
        of = min(WINDOW, len(self.records) - 1) or 1  # as `mean` counts
        steps = f"{of} steps" if of > 1 else "1 step"
        return [
            "",
            f"{BOLD}LEARNING{OFF}{DIM}{f'mean of {steps}':>50}   whole run{OFF}",
            self.metric("reward", "reward", ".3f"),
            *(self.metric(f"  {part}", f"reward/{part}", ".3f") for part in parts(self.records)),
            *self.validation(),
            self.metric("groups without signal", "groups_without_signal", ".0%"),
            self.metric("entropy, nats", "entropy", ".3f"),
            self.metric("tokens a sample", "mean_gen_tokens_per_sample", ".1f"),
            self.metric("samples cut off", "truncation_rate", ".1%"),
            self.metric("gradient norm", "grad_norm", ".2f"),
        ]

    def validation(self) -> list[str]:
        """The newest scores and their course."""
        rounds = read_jsonl(self.run_dir / "validation.jsonl")
        newest, lines = rounds[-1] if rounds else {}, []
        for metric in (name for name in newest if "@" in name):
            label = f"{metric.replace('/', ' ', 1)}, v{newest['version']}"
            score, course = show(newest[metric], ".3f"), spark([r.get(metric) for r in rounds])
            lines.append(f"  {label:34}{score:>22}   {GREEN}{course}{OFF}")
        return lines

    def mismatch(self) -> list[str]:
        median, largest = self.train("ratio_p50"), self.train("probs_ratio_max")
        ratio = f"{show(median, '.2f')} {show(largest, '.2f')}"
        oldest = self.now["train/max_trajectory_age"]
        age = f"{self.train('avg_trajectory_age'):.2f} {oldest:.0f}"
        return [
            "",
            f"{BOLD}TRAINER AGAINST SAMPLER{OFF}",
            self.metric("tokens PPO would clip", "would_clip", ".2%"),
            self.row("ratio, median and largest", ratio, "probs_ratio_max"),
            self.metric("effective sample size", "effective_sample_size", ".1%"),
            *self.trust_region(),
            self.metric("KL, same weights", "gen_kl_error_same_version", ".1e"),
            self.metric("KL, older weights", "gen_kl_error_older_version", ".1e"),
            self.row("age in steps, mean and largest", age, "avg_trajectory_age"),
        ]

    def trust_region(self) -> list[str]:
        """How much of the batch it takes, where there is one."""
        masked = "train/trust_masked" in self.now
        return [self.metric("tokens out of trust region", "trust_masked", ".2%")] * masked

    def speed(self) -> list[str]:
        """What trainer and rollout nodes do with their time, side by side."""
        config, hub, step_s = self.config, self.hub, self.seconds("train/total_step_time")
        left = []
        for name, part in BUSY.items():
            part_s = self.seconds(f"train/{part}")
            left.append(f"{name:17} {part_s:7.2f} s {bar(part_s / step_s)}")
        rate, mfu = self.train("tokens_per_s_per_gpu"), self.train("mfu")
        if rate is not None:
            share = f"   MFU {mfu:.1%}" if mfu is not None else ""
            left.append(f"{'tokens/s of a GPU':17} {rate:7,.0f}{share}")
        idle, node_tokens_per_s = load(self.records)
        cache = max((node.get("vllm", {}).get("kv", 0) for node in self.nodes), default=0)
        right = [
            f"{'waits for prompts':17} {idle:7.0%}   {bar(idle)}",
            f"{'samples in flight':17} {hub['in_flight']:7.0f}   and {hub['waiting']:.0f} queued",
            f"{'KV cache':17} {cache:7.0%}",
            f"{'a group in vLLM':17} {self.seconds('rollout/generate_group_s'):7.2f} s",
            f"{'stopped to load':17} {self.seconds('rollout/stopped_s'):7.2f} s an update",
        ]
        if (turns := mean(self.records, "rollout/turns_per_sample") or 1) > 1:
            waited_s = self.seconds("rollout/environment_s")
            right.append(f"{'waits for tools':17} {waited_s:7.2f} s a sample, {turns:.1f} turns")
        if (made := mean(self.records, "rollout/tokens_per_s_per_gpu")) is not None:
            right.append(f"{'tokens/s of a GPU':17} {made:7,.0f}")
        samples = config["num_prompts_per_step"] * config["num_generations_per_prompt"]
        tokens_per_s = samples / step_s * self.train("mean_gen_tokens_per_sample")
        count = len(self.nodes)
        trained = f"{tokens_per_s:,.0f} tokens/s"
        made = f"{node_tokens_per_s * count:,.0f} tokens/s on {count} node{'s' * (count != 1)}"
        title = f"{BOLD}{'TRAINER':14}{OFF}{trained:<34}{BOLD}ROLLOUTS{OFF}      {made}"
        rows = itertools.zip_longest(left, right, fillvalue="")
        return ["", title, *(f"  {a:46}{b}" for a, b in rows)]

    def books(self) -> list[str]:
        """Weights and prompts: where they are, and what did not go straight through."""
        hub, seconds = self.hub, self.seconds
        landed = sum(node["version"] == hub["published"] for node in self.nodes)
        skipped = f" + {hub['skipped']} skipped" if hub.get("skipped") else ""
        validation = hub.get("validation", {})
        scored = {r["version"] for r in read_jsonl(self.run_dir / "validation.jsonl")}
        of_validation = validation.get("counts", {}).items()
        counts = {**hub["counts"], **{f"validation {name}": n for name, n in of_validation}}
        when = "in the last step: " if self.over else ""  # who had prompts then has given them up
        trouble = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in counts.items() if n)
        return [
            "",
            f"{BOLD}BROADCAST{OFF}  v{hub['published']} is on {landed} of {len(self.nodes)} nodes: "
            f"copy {seconds('train/publish_copy'):.2f}, "
            f"encode {seconds('train/publish_encode'):.2f}, "
            f"write {seconds('train/publish_write'):.2f}, fetch {seconds('rollout/fetch_s'):.2f}, "
            f"patch {seconds('rollout/patch_s'):.2f}, load {seconds('rollout/load_s'):.2f} s",
            f"{BOLD}LEDGER{OFF}     {when}{hub['handed_out']:,} prompts handed out = "
            f"{hub['taken']:,} taken + {hub['buffered']} buffered + {hub['leased']} leased + "
            f"{hub['returned']} returned + {hub['set_aside']} set aside{skipped}",
            *self.wrapped(trouble, RED),
            *(
                f"{BOLD}VALIDATION{OFF} of v{r['version']}: {r['answered']} of {r['of']} prompts "
                "answered"
                for r in validation.get("rounds", ())
                if r["version"] not in scored  # since the last step
            ),
        ]


def parts(records: list[dict]) -> list[str]:
    """The parts of the rewards that any step has."""
    found = dict.fromkeys(name for r in records for name in r)
    return [n.removeprefix("train/reward/") for n in found if n.startswith("train/reward/")]


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
            "effective sample size": "train/effective_sample_size",
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


def plot(run_dir: Path, path: Path | None = None) -> Path:
    """Write the picture of a run, curves.png in its directory if not told, and return its path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = read_metrics(run_dir)
    rows = math.ceil(len(PANELS) / 3)
    fig, axes = plt.subplots(rows, 3, figsize=(15, 4 * rows), layout="constrained")
    for ax in axes.flat[len(PANELS) :]:
        ax.set_axis_off()
    for ax, (title, label, log, curves) in zip(axes.flat, PANELS):
        more = {part: f"train/reward/{part}" for part in parts(records) if title == "Reward"}
        for legend, metric in (curves | more).items():
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
    # one after the other, as data sets may have come later
    names = dict.fromkeys(n for r in validations for n in r if "@" in n)
    # colours that the lines of the panel leave
    others = (f"C{i % 10}" for i in itertools.count(len(axes.flat[0].lines)))
    for name, color in zip(names, itertools.chain(("black", "gray"), others)):
        points = [(r["version"], r[name]) for r in validations if name in r]
        axes.flat[0].plot(*zip(*points), "o--", color=color, label=name.replace("/", " "))
    for ax in axes.flat:
        if ax.get_legend_handles_labels()[0]:
            ax.legend()
    # All of 0 to 1, and what is outside: a reward may be negative, a part a number of calls.
    low, high = axes.flat[0].get_ylim()
    axes.flat[0].set_ylim(min(low, -0.02), max(high, 1.02))
    # The first step holds vLLM's start and the compilation; it must not flatten all others.
    seconds = sorted(r["timing/train/total_step_time"] for r in records) or [1.0]
    axes.flat[5].set_ylim(0, 1.5 * seconds[int(0.95 * (len(seconds) - 1))])
    fig.suptitle(str(run_dir))
    path = path or run_dir / "curves.png"
    fig.savefig(path, dpi=100)
    plt.close(fig)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dirs", type=Path, nargs="+", metavar="run_dir")
    parser.add_argument("--once", action="store_true", help="draw the screen once and end")
    parser.add_argument(
        "--png", nargs="?", type=Path, const=Path(), help="write curves.png, or this file, and end"
    )
    parser.add_argument("--x", choices=AXES, default="step", help="several runs are drawn over it")
    parser.add_argument(
        "--samples", nargs="?", type=int, const=-1, help="samples of this step, or of the last"
    )
    parser.add_argument(
        "--colour",
        choices=COLOURS,
        default="",
        help="of the samples' tokens (a run's --log-tokens)",
    )
    args = parser.parse_args()
    for run_dir in args.run_dirs:
        if not (run_dir / "config.json").exists():
            sys.exit(
                f"watch.py: error: {run_dir} is not the directory of a run: it has no config.json"
            )
    several, first = len(args.run_dirs) > 1, args.run_dirs[0]
    try:
        if args.samples is not None:
            page(
                "".join(
                    show_samples(d, None if args.samples < 0 else args.samples, args.colour)
                    for d in args.run_dirs
                ),
                bool(args.colour),
            )
        elif several and args.png is not None:
            out = Path("side_by_side.png") if args.png == Path() else args.png
            print(table(args.run_dirs))
            print(plot_together(args.run_dirs, PANELS, args.x, out))
        elif args.png is not None:
            print(plot(first, None if args.png == Path() else args.png))
        else:
            redraw(args.run_dirs, args.once)
    except ValueError as e:
        sys.exit(f"watch.py: error: {e}")


def redraw(run_dirs: list[Path], once: bool) -> None:
    """The screen of a run, or the table of several, every 2 s until Ctrl-C; into a pipe once."""
    while True:
        width = shutil.get_terminal_size((100, 40)).columns
        text = frame(run_dirs[0], width) if len(run_dirs) == 1 else table(run_dirs) + "\n"
        if once or not sys.stdout.isatty():
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
