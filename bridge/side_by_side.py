"""Several runs in one picture and one table, for watch.py: the curves of each, what differs in
their flags, and where each one is."""

import itertools
import json
import math
import os
from pathlib import Path

from bridge.logs import read_jsonl

WINDOW = 20  # steps that a value is the mean of
AXES = ("step", "samples", "hours")
TABLE = {  # column: metric, and which value is the best
    "reward": ("train/reward", max),
    "entropy": ("train/entropy", None),
    "tokens": ("train/mean_gen_tokens_per_sample", None),
    "KL to sampler": ("train/gen_kl_error", None),
    "s a step": ("timing/train/total_step_time", min),
}
# Flags that change neither what is learned nor how fast; nor do those that end in _timeout_s.
NOT_SHOWN = set(
    """
    name resume hub_host hub_port wandb_project tensorboard log_samples log_tokens dry_run
    dry_run_ranks gpu_memory_gib nodes mean_length checkpoint_every_steps keep_checkpoints
    keep_versions after_checkpoint
    """.split()
)


def axis_of(records: list[dict], axis: str) -> list[float]:
    """Where each record stands: its step, or the samples or hours up to its end. Hours are the sum
    of the steps' own: what lies between two attempts is not counted."""
    if axis == "step":
        return [r["step"] for r in records]
    name = {"samples": "train/num_valid_samples", "hours": "timing/train/total_step_time"}[axis]
    sums = itertools.accumulate(r.get(name) or 0.0 for r in records)
    return [x / 3600 if axis == "hours" else x for x in sums]


def names_and_flags(run_dirs: list[Path]) -> list[tuple[str, str]]:
    """Each run's name, and the flags in which the runs differ, as "lr=1e-05"."""
    configs = [json.loads((d / "config.json").read_text()) for d in run_dirs]
    flags = dict.fromkeys(n for c in configs for n in c if n not in NOT_SHOWN)
    flags = [n for n in flags if not n.endswith("_timeout_s")]
    differ = [n for n in flags if len({json.dumps(c.get(n)) for c in configs}) > 1]
    shown = [
        "  ".join(f"{n}={c[n]:g}" if type(c.get(n)) is float else f"{n}={c.get(n)}" for n in differ)
        for c in configs
    ]
    names = [d.resolve().name for d in run_dirs]
    if len({*names}) < len(names):  # of two with one name, the path
        names = [os.path.normpath(d) for d in run_dirs]
    return list(zip(names, shown))


def values_of(records: list[dict], metric: str) -> list[float]:
    return [v for r in records if (v := r.get(metric)) is not None and math.isfinite(v)]


def smoothed(values: list[float], window: int) -> list[float]:
    """Each value's mean with those before it, `window` in all."""
    parts = (values[max(0, i - window) : i] for i in range(1, len(values) + 1))
    return [sum(part) / len(part) for part in parts]


def scores_of(run_dir: Path) -> list[tuple[int, float]]:
    """avg@k of each validation, with its version; k as in the newest."""
    rounds = read_jsonl(run_dir / "validation.jsonl")
    name = next((n for n in (rounds or [{}])[-1] if "avg@" in n), "")
    return [(r["version"], r[name]) for r in rounds if values_of([r], name)]


def table(run_dirs: list[Path], window: int = WINDOW) -> str:
    """A row a run: its last values, each the mean of `window` steps, and after a slash the best of
    such means; of validation the newest score and the best."""
    heads = ["run", "steps", "samples", "hours", *TABLE]
    heads = [f"{h} / best" if h in TABLE and TABLE[h][1] else h for h in heads]
    rows = [[*heads, "validation / best"]]
    named = names_and_flags(run_dirs)
    for run_dir, (label, _) in zip(run_dirs, named):
        records = read_jsonl(run_dir / "metrics.jsonl")
        place = [axis_of(records, axis)[-1] if records else 0 for axis in AXES]
        row = [label, f"{place[0] + bool(records)}", f"{place[1]:,.0f}", f"{place[2]:.2f}"]
        for metric, best in TABLE.values():
            means = smoothed(values_of(records, metric), window)
            shown = (
                [means[-1], best(means[window - 1 :] or means)] if means and best else means[-1:]
            )
            row.append(" / ".join(f"{v:.3g}" for v in shown) or "-")
        scores = [score for _, score in scores_of(run_dir)]
        row.append(f"{scores[-1]:.3f} / {max(scores):.3f}" if scores else "-")
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        f"{row[0]:{widths[0]}}  " + "  ".join(f"{x:>{w}}" for x, w in zip(row[1:], widths[1:]))
        for row in rows
    ]
    flags = [f"{name:{widths[0]}}  {flags}" for name, flags in named if flags]
    return "\n".join([*lines, *(["", "what differs:"] if flags else []), *flags])


def plot_together(run_dirs: list[Path], panels, axis: str, path: Path) -> Path:
    """Write a picture: of each of watch.py's panels the first curve, a colour a run. Thin: the
    steps; thick: the mean of WINDOW. Returns its path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = math.ceil(len(panels) / 3)
    fig, axes = plt.subplots(rows, 3, figsize=(15, 4 * rows), layout="constrained")
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    handles, labels = [], [f"{name}  {flags}" for name, flags in names_and_flags(run_dirs)]
    seconds = []
    for i, run_dir in enumerate(run_dirs):
        records = read_jsonl(run_dir / "metrics.jsonl")
        at, color = axis_of(records, axis), f"C{i % 10}"
        handles.append(plt.Line2D([], [], color=color, lw=2))
        seconds += values_of(records[1:], "timing/train/total_step_time")
        for ax, (title, unit, log, curves) in zip(axes.flat, panels):
            legend, metric = next(iter(curves.items()))
            points = [(x, r[metric]) for x, r in zip(at, records) if r.get(metric) is not None]
            if metric.startswith("timing/"):  # the first step holds vLLM's start
                points = points[1:] or points
            if points:
                xs, ys = zip(*points)
                ax.plot(xs, ys, color=color, alpha=0.25, lw=0.8)
                ax.plot(xs, smoothed(ys, WINDOW), color=color, lw=1.8)
            title = title if legend in title.lower() else f"{title}: {legend}"
            ax.set(title=title, xlabel=axis, ylabel=unit, yscale="log" if log else "linear")
            ax.grid(alpha=0.3)
        # A version is the weights after as many steps.
        place = {0: 0} | dict(zip((r["step"] + 1 for r in records), at))
        for version, score in scores_of(run_dir):
            if version in place:
                axes.flat[0].plot(place[version], score, "o", color=color, mec="black", ms=5)
    if seconds:  # a rare long step must not flatten all others
        axes.flat[5].set_ylim(0, 1.5 * sorted(seconds)[int(0.95 * (len(seconds) - 1))])
    fig.legend(handles, labels, loc="outside upper left", ncols=1, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=100)
    plt.close(fig)
    return path
