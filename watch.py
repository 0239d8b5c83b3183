"""Look at a run: `python watch.py runs/NAME` draws its curves from metrics.jsonl to curves.png."""

import json
import sys
from pathlib import Path


def read_metrics(run_dir: Path) -> list[dict]:
    """One record per step. A last line that is still being written is left out."""
    lines = (run_dir / "metrics.jsonl").read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


# Panels: title, axis label, logarithmic?, and {legend: metric}
PANELS = [
    ("Reward", "mean of the step's samples", False,
     {"reward": "train/reward", "groups without signal": "train/groups_without_signal"}),
    ("Entropy", "nats per token", False, {"entropy": "train/entropy"}),
    ("Importance ratio", "pi / pi_prev", True,
     {"max": "train/probs_ratio_max", "mean": "train/probs_ratio", "min": "train/probs_ratio_min"}),
    ("Trainer against sampler", "KL, nats per token", True,
     {"same version": "train/gen_kl_error_same_version", "older version": "train/gen_kl_error_older_version"}),
    ("Staleness", "steps", False, {"mean age": "train/avg_trajectory_age", "max age": "train/max_trajectory_age"}),
    ("Seconds per step", "s", False,
     {"total": "timing/train/total_step_time", "waiting for rollouts": "timing/train/exposed_generation",
      "prev log-probs": "timing/train/policy_and_reference_logprobs", "updates": "timing/train/policy_training",
      "vLLM stopped for weights": "timing/rollout/stopped_s"}),
]  # fmt: skip


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
            if points:  # dots where a metric does not exist at every step: a line would invent the steps between
                ax.plot(*zip(*points), "-" if len(points) == len(records) > 1 else ".", label=legend)
        ax.set(title=title, xlabel="step", ylabel=label, yscale="log" if log else "linear")
        ax.grid(alpha=0.3)
        ax.legend()
    axes.flat[0].set_ylim(-0.02, 1.02)
    # The first step holds vLLM's start and the compilation; it must not flatten all others.
    seconds = sorted(r["timing/train/total_step_time"] for r in records)
    axes.flat[5].set_ylim(0, 1.5 * seconds[int(0.95 * (len(seconds) - 1))])
    fig.suptitle(str(run_dir))
    path = run_dir / "curves.png"
    fig.savefig(path, dpi=100)
    plt.close(fig)
    return path


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "metrics.jsonl").exists():
        sys.exit("usage: python watch.py runs/NAME   (a directory with metrics.jsonl)")
    print(plot(Path(sys.argv[1])))
