"""What one looks at between runs: several side by side, their samples, and the command that runs
after each checkpoint."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

import report
import watch
from bridge import show_samples, side_by_side
from config import Config
from presets import parse_config
from ranks.after_checkpoint import AfterCheckpoint

REPO = Path(__file__).resolve().parent.parent


def run_of(root: Path, name: str, rewards: list[float], **flags) -> Path:
    run = root / name
    run.mkdir(parents=True)
    (run / "config.json").write_text(Config(name=name, **flags).text)
    records = [
        {
            "step": step,
            "train/reward": reward,
            "train/num_valid_samples": 8,
            "timing/train/total_step_time": 1800.0,
        }
        for step, reward in enumerate(rewards)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return run


# ---- too few tokens ------------------------------------------------------------------------------
def test_after_three_steps_that_cut_off_most_samples_the_console_names_the_flag(capsys):
    def said(turns, *shares):
        count = 0
        for share in shares:
            record = {"train/truncation_rate": share, "rollout/turns_per_sample": turns}
            count = report.count_cut_off(record, count, 4)
        return capsys.readouterr().out

    assert said(None, 0.9, 0.9, 0.5, 0.9, 0.9) == ""
    one, several = said(None, *[0.75] * 9), said(1.5, *[0.75] * 9)
    assert one.count("warning") == several.count("warning") == 1
    assert "for 3 steps, 75% of the last one's: --max-new-tokens 4 may be too small" in one
    assert "--max-new-tokens 4, which bounds all turns together and what is put in" in several


# ---- side by side --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("rewards", "says"), [([0.5], "1 step "), ([0.5] * 3, "2 steps "), ([0.5] * 30, "20 steps ")]
)
def test_the_screen_says_of_how_many_steps_its_means_are(tmp_path, rewards, says):
    """The first is left out where there are others."""
    run = run_of(tmp_path, "a", rewards)
    screen = watch.Screen.__new__(watch.Screen)
    screen.run_dir, screen.records, screen.width = run, watch.read_metrics(run), 100
    assert f"mean of {says}" in screen.learning()[1]


def test_runs_are_told_apart_by_what_differs_in_their_flags(tmp_path):
    a = run_of(tmp_path, "a", [0.0], lr=1e-5)
    of_operation = {"keep_checkpoints": 5, "val_timeout_s": 5.0, "log_samples": 9}
    b = run_of(tmp_path, "b", [0.0], lr=1e-6, **of_operation)
    assert side_by_side.names_and_flags([a, b]) == [("a", "lr=1e-05"), ("b", "lr=1e-06")]
    again = run_of(tmp_path / "other", "a", [0.0], lr=1e-5)
    assert side_by_side.names_and_flags([a, again]) == [(str(a), ""), (str(again), "")]


@pytest.mark.parametrize(
    "axis, places", [("step", [0, 1]), ("samples", [8, 16]), ("hours", [0.5, 1])]
)
def test_a_record_stands_at_its_step_its_samples_or_its_hours(tmp_path, axis, places):
    records = watch.read_metrics(run_of(tmp_path, "a", [0.0, 1.0]))
    assert side_by_side.axis_of(records, axis) == places


def test_the_table_has_the_last_mean_and_the_best_of_whole_windows(tmp_path):
    a = run_of(tmp_path, "a", [1.0, 0.0, 0.5, 0.75, 0.25])
    (a / "validation.jsonl").write_text(
        '{"version": 0, "validation/avg@4": 0.5}\n{"version": 5, "validation/avg@4": 0.25}\n'
    )
    b = run_of(tmp_path, "b", [])
    heads, row, empty, *_ = side_by_side.table([a, b], window=2).splitlines()
    assert "reward / best" in heads
    assert row.split()[:7] == ["a", "5", "40", "2.50", "0.5", "/", "0.625"]
    assert row.endswith("0.250 / 0.500") and empty.split()[:5] == ["b", "0", "0", "0.00", "-"]


def test_the_picture_of_several_runs_goes_where_it_is_told(tmp_path):
    runs = [run_of(tmp_path, name, [0.0, 1.0]) for name in "ab"]
    out = tmp_path / "new/out.png"
    assert side_by_side.plot_together(runs, watch.PANELS, "hours", out).stat().st_size > 1000


# ---- samples -------------------------------------------------------------------------------------
SAMPLE = {
    "step": 3, "ordinal": 7, "prompt": "2 + 2", "completion": "x4\x1b[2Jy", "answer": "4",
    "reward": 0.5, "truncated": True, "prompt_tokens": 3, "tokens": 6, "versions": [2, 3],
    "turns": [{"policy": "x"}, {"environment": "4\x1b[2J"}, {"policy": "y"}],
}  # fmt: skip


def samples_of(tmp_path: Path, *flags):
    run = run_of(tmp_path, "a", [0.0])
    (run / "samples.jsonl").write_text(json.dumps(SAMPLE) + "\n")
    command = [sys.executable, str(REPO / "watch.py"), str(run), "--samples", *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_samples_say_who_wrote_what_and_give_a_terminal_no_orders(tmp_path):
    out = samples_of(tmp_path).stdout
    assert "\x1b" not in out
    assert "step 3, prompt 7, 3 tokens" in out and "expected  4" in out
    assert "reward 0.500  6 tokens of v2 to v3, cut off" in out
    said = [line.strip() for line in out.split("cut off\n")[1].splitlines()]
    assert said == ["model:", "x", "environment:", "4\\x1b[2J", "model:", "y"]
    assert show_samples.BLUE in show_samples.as_text([SAMPLE])


def test_a_step_without_samples_is_one_line(tmp_path):
    done = samples_of(tmp_path, "9")
    assert done.returncode == 1 and "--samples 9: " in done.stderr
    assert "steps 3 to 3" in done.stderr and done.stderr.count("\n") == 1


# ---- after a checkpoint --------------------------------------------------------------------------
def test_the_command_gets_directory_and_step_and_its_failure_is_named(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("CISPO_TOKEN", "secret")
    checkpoint = tmp_path / "a b"
    checkpoint.mkdir()
    command = "ls -d {dir}; echo at {step} ${CISPO_TOKEN:-none}; exit {step}"
    with AfterCheckpoint(command, tmp_path) as after:
        for step in (0, 3):
            after(checkpoint, step)
        after(tmp_path / "pruned", 4)
    log = (tmp_path / "after-checkpoint.log").read_text()
    assert log.count(f"\n{checkpoint}\n") == 2 and "\nat 0 none\n" in log
    out = capsys.readouterr().out
    assert "step 0" not in out and "step 3: its command ended with status 3, see" in out
    assert "step 4: not run" in out


def test_a_name_that_is_not_filled_in_is_refused():
    awk = "ls {dir} | awk '{ print }' >${HOME}/{step}"
    assert parse_config(["--after-checkpoint", awk]).after_checkpoint == awk
    with pytest.raises(ValueError, match=r"^--after-checkpoint: \{dirr\} is neither \{dir\} nor "):
        parse_config(["--after-checkpoint", "ls {dirr} {step}"])


@pytest.mark.parametrize("error", [None, RuntimeError("the run")])
def test_a_command_that_does_not_end_is_ended_with_the_run(tmp_path, capsys, error):
    """With what it has started. A run that failed does not wait for it at all."""
    pid_file = tmp_path / "pid"
    after = AfterCheckpoint(
        f"sleep 600 & echo $! >{pid_file}.new; mv {pid_file}.new {pid_file}; wait",
        tmp_path,
        0.1 if error is None else 600.0,
    )
    start = time.monotonic()
    after.__enter__()
    after(tmp_path, 1)
    after(tmp_path, 2)
    pause = threading.Event()
    while not pid_file.exists() and time.monotonic() < start + 60:
        pause.wait(0.01)
    after.__exit__(error and type(error), error, None)
    assert not psutil.pid_exists(int(pid_file.read_text())) and not after._thread.is_alive()
    assert time.monotonic() < start + 100
    assert "not run for steps 2" in capsys.readouterr().out
