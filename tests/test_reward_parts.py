"""A reward that is a dict: its parts from the function to the metrics."""

import json
import math
import re

import pytest
import torch
from safetensors.torch import load, save
from test_watch import run_of, screen, step_record

import watch
from bridge.groups import Group, Refused, pack_group, parse_group
from bridge.reward_pool import reward_or_why
from bridge.reward_process import judge
from bridge.sample import Sample
from bridge.validation import Round, readable, score
from report import rollout_metrics


def sample():
    made = Sample([7], {}, 4, None, False)
    made.token_ids, made.logprobs, made.versions, made.turns = [1, 2], [-1.0, -1.0], [0, 0], 1
    return made


def body():
    rewards = [{"reward": 1, "format": True}, {"reward": 0.0, "format": 0.5, "tool": 2.0}, 0.5]
    scores = [reward_or_why(judge(x)) for x in rewards]
    return bytearray(pack_group([sample() for _ in rewards], scores, "l"))


def test_each_part_is_a_metric_over_the_samples_that_have_it():
    _, tensors = parse_group(body())
    group = Group(0, [7], **tensors)
    assert group.rewards.tolist() == [1.0, 0.0, 0.5]
    found = rollout_metrics([group], step=0)
    assert found["train/reward"] == 0.5
    assert found["train/reward/format"] == 0.75 and found["train/reward/tool"] == 2.0
    record = score(Round(0, [], 0.0, groups={0: group}), num_samples=3)
    assert record["validation/reward/format"] == 0.75 and record["validation/avg@3"] == 0.5
    rows = readable(group, range(3), "a", str)
    parts = [row["parts"] for row in rows]
    assert parts == [{"format": 1.0}, {"format": 0.5, "tool": 2.0}, {}]


@pytest.mark.parametrize(
    "value, kind, says",
    [
        ({"format": 1.0}, "wrong_type", "a dict of 'reward'"),
        ({}, "wrong_type", "a dict of 'reward'"),
        ({"reward": "1"}, "wrong_type", "'reward' of what it returned: it returned '1' (str of 1)"),
        ({"reward": 1, "x": math.nan}, "not_finite", "'x' of what it returned"),
        ({"reward": 1, "x": {"y": 1}}, "wrong_type", "'x' of what it returned"),
        ({"reward": 1, "a b": 1}, "wrong_type", "part 'a b'"),
        ({"reward": 1, **{f"p{i}": i for i in range(17)}}, "wrong_type", "at most 16 parts"),
    ],
)
def test_a_part_that_is_no_finite_number_costs_the_sample_and_is_named(value, kind, says):
    found = judge(value)
    assert found["kind"] == kind and says in found["error"] and "reward" not in found


@pytest.mark.parametrize(
    "name, x",
    [
        ("part/x", torch.zeros(2)),
        ("part/x", torch.zeros(3, dtype=torch.int32)),
        ("part/x", torch.tensor([0.0, math.inf, 0.0])),
        ("part/x y", torch.zeros(3)),
        ("part/", torch.zeros(3)),
    ],
)
def test_the_hub_refuses_parts_that_are_none(name, x):
    with pytest.raises(Refused):
        parse_group(bytearray(save({**load(bytes(body())), name: x})))


def test_parts_of_the_reward_are_on_the_screen_and_beside_its_curve(tmp_path, monkeypatch):
    import matplotlib.axes

    run, drawn, draw = run_of(tmp_path, []), [], matplotlib.axes.Axes.plot
    records = [step_record(step) | {"train/reward/format": 0.125 * step} for step in (0, 1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    # the first step is left out, as it compiles
    assert re.search(r"reward +0\.500 .*\n +format +0\.188 ", screen(run))

    def plot(ax, *args, label="", **kwargs):
        drawn.append(label)
        return draw(ax, *args, label=label, **kwargs)

    monkeypatch.setattr(matplotlib.axes.Axes, "plot", plot)
    watch.plot(run)
    assert drawn.count("format") == 1


@pytest.mark.parametrize("reward, part", [(-1.0, 0.5), (0.5, 8.0), (0.5, 0.5)])
def test_the_picture_shows_all_of_a_reward_that_is_negative_and_a_part_above_1(
    tmp_path, monkeypatch, reward, part
):
    import matplotlib.figure

    run, limits = run_of(tmp_path, []), []
    records = [step_record(step) for step in (0, 1, 2)]
    records[1] |= {"train/reward": reward, "train/reward/calls": part}
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))

    def savefig(fig, *args, **kwargs):
        limits.extend(fig.axes[0].get_ylim())

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    watch.plot(run)
    low, high = limits
    assert low < min(reward, 0) and high > max(part, 1) and high - low < 12
    if (reward, part) == (0.5, 0.5):
        assert low > -0.06 and high < 1.06  # 0 to 1, as runs of built-in rewards are compared by


def test_the_curves_of_a_part_and_of_a_data_set_have_colours_of_their_own(tmp_path, monkeypatch):
    import matplotlib.figure
    from matplotlib.colors import to_hex

    run, colours = run_of(tmp_path, []), []
    records = [step_record(step) | {"train/reward/calls": 0.5} for step in (0, 1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    names = [f"validation/{name}" for name in ("avg@4", "pass@4", "hard/avg@4", "hard/pass@4")]
    (run / "validation.jsonl").write_text(
        json.dumps({"version": 0, **dict.fromkeys(names, 0.5)}) + "\n"
    )

    def savefig(fig, *args, **kwargs):
        colours.extend(to_hex(line.get_color()) for line in fig.axes[0].lines)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    watch.plot(run)
    assert len(colours) == len({*colours}) == 7
