"""What a run shows of itself: Prometheus, TensorBoard, W&B, the screen; and the bottleneck named
right in real runs."""

import asyncio
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import types
from pathlib import Path

import psutil
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

import report
import watch
from bridge import console, logs
from bridge.groups import NOT_SAMPLED, Group
from bridge.prometheus import prometheus_text
from config import Config
from presets import parse_config
from report import Trackers

REPO = Path(__file__).resolve().parent.parent


def test_prometheus_reads_every_value_that_is_shown_names_with_quotes_too():
    status = {
        "version": 7,
        "published": 6,
        "handed_out": 9,
        "taken": 4,
        "buffered": 3,
        "leased": 2,
        "returned": 0,
        "set_aside": 0,
        "skipped": 0,
        "counts": {"leases_expired": 2},
        "validation": {"rounds": [{"version": 5, "of": 9, "answered": 4}]},
        "nodes": {
            'a"b\\c\nd': {"version": 6, "last_seen_s": 0.5, "vllm": {"kv": 0.25}},
            "n": {"version": 5},
        },
    }
    record = {
        "step": 6,
        "train/reward": 0.75,
        "train/grad_norms": [1.0],
        "train/gen_kl_error": math.nan,
        "hub": {},
    }
    text = prometheus_text(status, record)
    families = {f.name: f for f in text_string_to_metric_families(text)}
    value = lambda name, **labels: {
        tuple(s.labels.items()): s.value for s in families[name].samples
    }[tuple(labels.items())]
    assert value("cispo_version") == 7 and value("cispo_prompts", state="taken") == 4
    assert (
        families["cispo_events"].type == "counter"
        and value("cispo_events", event="leases_expired") == 2
    )
    assert (
        value("cispo_node_version", node='a"b\\c\nd') == 6
        and value("cispo_node_kv", node='a"b\\c\nd') == 0.25
    )
    assert value("cispo_validation_open_prompts") == 5 and value("cispo_train_reward") == 0.75
    assert (
        math.isnan(value("cispo_train_gen_kl_error")) and "cispo_train_grad_norms" not in families
    )
    assert all(f.documentation and f.type in ("gauge", "counter") for f in families.values())


def test_tensorboard_gets_steps_and_validations(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    trackers = Trackers(Config(tensorboard=True))
    trackers.log({"step": 5, "train/reward": 0.5, "ordinals": [1]}, "step")
    trackers.log({"version": 4, "validation/avg@4": 0.25}, "version")
    trackers.close()
    events = EventAccumulator(str(tmp_path / "runs/tiny/tensorboard"))
    events.Reload()
    read = {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }
    assert read == {"train/reward": [(5, 0.5)], "validation/avg@4": [(4, 0.25)]}


def test_wandb_gets_steps_and_validations(tmp_path, monkeypatch):
    """Offline, which is the same but for the upload; its file holds the names as they are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / "runs/tiny").mkdir(parents=True)
    trackers = Trackers(Config(wandb_project="p"))
    trackers.log({"step": 5, "train/reward": 0.53125, "ordinals": [1]}, "step")
    trackers.log({"version": 4, "validation/avg@4": 0.28125}, "version")
    trackers.close()
    (file,) = (tmp_path / "runs/tiny/wandb").glob("offline-run-*/*.wandb")
    held = file.read_bytes()
    for written in (
        b"train/reward",
        b"0.53125",
        b"validation/avg@4",
        b"0.28125",
        b"ratio_clip_max",
    ):
        assert written in held
    assert b"ordinals" not in held
    # W&B's own process has ended: nothing is left that could still have to be written.
    assert not [p for p in psutil.Process().children(recursive=True) if "wandb" in p.name()]


def test_a_resumed_run_goes_on_in_the_same_wandb_run_and_sends_nothing_twice(tmp_path, monkeypatch):
    reward = lambda step: 0.1259765625 + step  # no clock and no version number has these digits
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / "runs/tiny").mkdir(parents=True)
    # the first was killed after step 3, its last checkpoint is that of step 2
    for start, end in ((0, 4), (2, 6)):
        trackers = Trackers(Config(wandb_project="p"), start)
        for step in range(start, end):
            trackers.log({"step": step, "train/reward": reward(step)}, "step")
        trackers.log({"version": 2, "validation/avg@4": 0.28125}, "version")
        trackers.close()
    files = [
        p.read_bytes() for p in sorted((tmp_path / "runs/tiny/wandb").glob("offline-run-*/*.wandb"))
    ]
    # run-ID.wandb
    (name,) = {p.name for p in (tmp_path / "runs/tiny/wandb").glob("offline-run-*/*.wandb")}
    assert json.loads((tmp_path / "runs/tiny/wandb.json").read_text())["id"] in name
    steps = [[s for s in range(6) if str(reward(s)).encode() in held] for held in files]
    assert sorted(steps) == [[0, 1, 2, 3], [4, 5]]
    assert sum(b"0.28125" in held for held in files) == 1 and all(b"tiny" in held for held in files)


def test_a_resumed_run_is_in_tensorboard_once(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    validated = {"version": 2, "validation/avg@4": 0.25}
    for start, end in ((0, 4), (2, 6)):
        trackers = Trackers(Config(tensorboard=True), start)
        for step in range(start, end):
            trackers.log({"step": step, "train/reward": float(step)}, "step")
        if not start:  # what is validated is not asked again: it stands in the file
            trackers.log(validated, "version")
            (tmp_path / "runs/tiny/validation.jsonl").write_text(json.dumps(validated) + "\n")
        trackers.close()
    events = EventAccumulator(str(tmp_path / "runs/tiny/tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/reward")] == list(range(6))
    assert [(e.step, e.value) for e in events.Scalars("validation/avg@4")] == [(2, 0.25)]


LOGIN = """
import os, sys
import wandb  # four seconds: once, and then a process for each mode
from presets import parse_config
for mode in sys.argv[1:]:
    os.environ["WANDB_MODE"] = mode
    if not os.fork():
        try:
            parse_config(["--wandb-project", "p"])
        except ValueError as e:
            sys.exit(f"{mode}: {e}")
        sys.exit(0)
    print(mode, os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def test_a_missing_login_is_found_before_anything_starts(tmp_path):
    unset = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "NETRC", "WANDB_BASE_URL")
    env = {**{n: v for n, v in os.environ.items() if n not in unset}, "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", LOGIN, "online", "offline", "disabled"],
        cwd=REPO,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.split("\n") == ["online 1", "offline 0", "disabled 0", ""], done.stderr
    assert "online: --wandb-project p: there is no login" in done.stderr
    assert "WANDB_MODE=offline" in done.stderr


def test_help_names_the_choices_of_a_flag_that_may_be_unset(capsys):
    with pytest.raises(SystemExit):
        parse_config(["--help"])
    text = capsys.readouterr().out
    assert (
        "tis | icepop | seq-mask-tis: " in text and "typing." not in text and "NoneType" not in text
    )


def test_a_tracker_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    for flags, why in [
        (["--tensorboard"], "--tensorboard: the package tensorboard is not installed"),
        (["--wandb-project", "p"], "--wandb-project: the package wandb is not installed"),
    ]:
        with pytest.raises(ValueError, match=re.escape(why + "; pip install '.[track]'")):
            parse_config(flags)


def screen(run_dir: Path, *flags: str) -> str:
    done = subprocess.run(
        [sys.executable, str(REPO / "watch.py"), str(run_dir), *(flags or ["--once"])],
        capture_output=True,
        text=True,
        check=True,
        cwd=run_dir.parent.parent,
        timeout=60,
    )
    return re.sub(r"\x1b\[\d*m", "", done.stdout)


def test_a_directory_that_is_no_run_is_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, str(REPO / "watch.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (
        done.returncode == 1
        and done.stderr.count("\n") == 1
        and "has no config.json" in done.stderr
    )
    (tmp_path / "config.json").write_text("{}")
    assert "no step yet; no word from a rollout node" in screen(tmp_path)


def test_into_a_pipe_the_table_of_runs_goes_once(tmp_path):
    """Nobody sees it redrawn there, and the command behind it would wait for ever."""
    (tmp_path / "config.json").write_text("{}")
    text = screen(tmp_path, str(tmp_path))
    assert text.count("steps  samples") == 1 and "\x1b" not in text


def step_record(step: int, reward: float = 0.5, without_signal: float = 0.0) -> dict:
    ledger = dict.fromkeys(
        "handed_out taken buffered leased returned set_aside in_flight waiting".split(), 0
    )
    return {
        "step": step,
        "train/reward": reward,
        "train/groups_without_signal": without_signal,
        "train/max_trajectory_age": 0,
        "train/avg_trajectory_age": 0.0,
        "train/mean_gen_tokens_per_sample": 4.0,
        "timing/train/total_step_time": 1.0,
        "hub": {**ledger, "published": step + 1, "nodes": {}, "counts": {}},
    }


def test_the_screen_shows_the_speed_of_a_gpu_on_both_sides_where_it_is_known(tmp_path):
    run = run_of(tmp_path, (0, 1))
    assert "of a GPU" not in screen(run)
    speed = {"train/tokens_per_s_per_gpu": 5391.4, "train/mfu": 0.126}
    record = step_record(1) | speed | {"rollout/tokens_per_s_per_gpu": 3702.0}
    (run / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    left, right = "tokens/s of a GPU   5,391   MFU 12.6%", "tokens/s of a GPU   3,702"
    assert re.search(rf"{left} +(?:\x1b\S*)?{right}", screen(run)), screen(run)
    record |= {"train/mfu": None, "rollout/tokens_per_s_per_gpu": None}  # as on a CPU
    (run / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    assert "5,391" in screen(run) and "MFU" not in screen(run)


@pytest.mark.parametrize(("mfu", "says"), [(0.1264, " (MFU 0.126)"), (None, "")])
def test_the_console_says_tokens_a_second_and_mfu_where_it_is_known(tmp_path, capsys, mfu, says):
    names = "entropy probs_ratio_min probs_ratio_max gen_kl_error grad_norm".split()
    record = step_record(4) | {f"train/{name}": 1.0 for name in names}
    record |= {"timing/train/exposed_generation": 0.0, "train/tokens_per_s_per_gpu": 5391.4}
    report.log_step(record | {"train/mfu": mfu}, tmp_path)
    assert capsys.readouterr().out.rstrip().endswith(f"5,391 tokens/s/GPU{says}")


def run_of(tmp_path: Path, steps) -> Path:
    run = tmp_path / "runs/other"
    run.mkdir(parents=True)
    (run / "config.json").write_text(Config(max_num_steps=6).text)
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps(step_record(step)) + "\n" for step in steps)
    )
    return run


def test_a_run_that_goes_on_under_another_name_is_at_the_step_that_it_is_at(tmp_path, capsys):
    """Its first record is of step 4: two records, and all six steps are done."""
    run = run_of(tmp_path, [4, 5])
    (run / "weights/v6").mkdir(parents=True)
    assert "step 6 of 6" in screen(run) and "finished" in screen(run)
    report.sum_up(run, 6, {})
    assert f"weights: {run / 'weights/v6'} " in capsys.readouterr().out
    (run / "metrics.jsonl").write_text(json.dumps(step_record(4)) + "\n")
    assert "step 5 of 6" in screen(run) and "0.0 min left" in screen(run)


def test_the_screen_shows_what_foretells_a_collapse(tmp_path):
    """The trust region where there is one; a record of before there was the metric is no error."""
    run = run_of(tmp_path, [0, 1])
    plain = re.sub(r"\x1b\[\d+m", "", screen(run))
    assert re.search(r"effective sample size +- ", plain) and "trust region" not in plain
    shares = {"train/effective_sample_size": 0.875, "train/trust_masked": 0.0125}
    records = [step_record(step) | shares for step in (0, 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    plain = re.sub(r"\x1b\[\d+m", "", screen(run))
    assert re.search(r"effective sample size +87\.5% ", plain)
    assert re.search(r"tokens out of trust region +1\.25% ", plain)


def test_a_validation_that_ended_after_the_last_step_is_not_shown_as_open(tmp_path):
    run = run_of(tmp_path, [])
    record = step_record(5)
    rounds = [{"version": v, "of": 64, "answered": 0} for v in (5, 6)]
    record["hub"]["validation"] = {"rounds": rounds}
    (run / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    (run / "validation.jsonl").write_text(json.dumps({"version": 5}) + "\n")
    assert "VALIDATION of v6" in screen(run) and "VALIDATION of v5" not in screen(run)


def test_a_run_without_a_step_left_ends_well(tmp_path, capsys):
    run = run_of(tmp_path, [])
    report.sum_up(run, 4, {4: 0.5})
    out = capsys.readouterr().out
    assert "no step was left to train" in out and f"weights: {run / 'weights/v4'} " in out
    assert watch.plot(run).exists()  # python watch.py RUN --png before the first step


def test_a_seventh_panel_has_a_row_of_its_own(tmp_path, monkeypatch):
    import matplotlib.image

    run, heights = run_of(tmp_path, [0, 1]), []
    for more in ([], [("Weight", "share", False, {"above 2": "train/would_clip"})]):
        monkeypatch.setattr(watch, "PANELS", watch.PANELS + more)
        heights.append(len(matplotlib.image.imread(watch.plot(run))))
    assert heights == [800, 1200]


def test_a_logged_sample_shows_the_template_the_answer_the_counts_and_what_was_inserted(tmp_path):
    group = Group(
        3,
        [1, 2],
        torch.tensor([4, 2]),
        torch.tensor([5, 6, 7, 8, 5, 9]),
        torch.zeros(6),
        torch.tensor([3, NOT_SAMPLED, NOT_SAMPLED, 4, 3, 3]),
        torch.tensor([1.0, 0.0]),
        torch.tensor([1, 0], dtype=torch.uint8),
    )
    decode = lambda ids: "".join(f"<{i}>" for i in ids)
    report.log_samples([group], 4, {3: {"answer": "42"}}, decode, tmp_path)
    best, worst = watch.read_jsonl(tmp_path / "samples.jsonl")
    assert best == {
        "step": 4,
        "ordinal": 3,
        "prompt": "<1><2>",
        "completion": "<5><6><7><8>",
        "answer": "42",
        "reward": 1.0,
        "truncated": True,
        "prompt_tokens": 2,
        "tokens": 4,
        "versions": [3, 4],
        "turns": [{"policy": "<5>"}, {"environment": "<6><7>"}, {"policy": "<8>"}],
    }
    assert worst["tokens"] == 2 and worst["versions"] == [3, 3] and "turns" not in worst


@pytest.mark.parametrize("most, prompts", [(0, []), (3, [0, 0, 1]), (9, [0, 0, 1, 1, 2, 2])])
def test_as_many_samples_are_kept_as_asked_for(tmp_path, most, prompts):
    groups = [
        Group(
            ordinal,
            [1],
            torch.tensor([1, 1]),
            torch.tensor([5, 6]),
            torch.zeros(2),
            torch.zeros(2, dtype=torch.int32),
            torch.tensor([1.0, 0.0]),
            torch.zeros(2, dtype=torch.uint8),
        )
        for ordinal in range(3)
    ]
    kept = report.log_samples(groups, 0, {n: {} for n in range(3)}, str, tmp_path, most)
    assert [s["ordinal"] for s in kept] == prompts
    assert watch.read_jsonl(tmp_path / "samples.jsonl") == kept


def test_wandb_gets_the_samples_as_a_table(tmp_path):
    sample = dict.fromkeys(["step", "tokens", "reward"], 1) | {"answer": 4, "truncated": False}
    table = Trackers._table([sample | {"prompt": "2 + 2", "completion": "4"}])
    assert table.data == [[1, "2 + 2", "4", "4", 1, 1, False]]


@pytest.mark.parametrize(
    "flags, name",
    [
        ({"use_cispo": True}, "CISPO"),
        ({"use_cispo": False}, "PPO clip"),
        ({"use_cispo": False, "disable_ppo_ratio": True}, "REINFORCE"),
        ({"use_cispo": False, "force_on_policy_ratio": True}, "on-policy gradient"),
    ],
)
def test_the_title_names_the_loss(flags, name):
    assert watch.loss_of(flags) == name


def test_signs_of_life_state_the_present_and_tell_news_once(tmp_path, monkeypatch, capsys):
    """A part of a step that takes 100 s, in which a rollout node writes one line, at 20 s."""
    clock, log = [1000.0], tmp_path / "rollout.log"
    now = lambda form="": f"{clock[0] - 1000:.0f} s" if form else clock[0]
    for module in (report, console, logs):
        monkeypatch.setattr(
            module, "time", types.SimpleNamespace(monotonic=now, time=now, strftime=now)
        )

    class Stop:
        def wait(self, s):
            clock[0] += s
            if clock[0] in (1000.5, 1020.0):
                log.write_text(
                    "[23:13:15] rollout: v0 is loaded\n"
                    if clock[0] < 1010
                    else "[1] rollout: v1 came\n"
                )
                os.utime(log, (clock[0], clock[0]))
            return clock[0] > 1100

    monkeypatch.setattr(report.say, "last", clock[0], raising=False)
    report.say_something(lambda: "step 1, updates", log, Stop())
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        "[10 s] step 1, updates; rollout: v0 is loaded",
        "[20 s] step 1, updates; rollout: v1 came",
    ]
    assert len(lines) == 4 and set(line.partition("] ")[2] for line in lines[2:]) == {
        "step 1, updates"
    }


def test_after_three_steps_without_signal_the_console_says_so_once(tmp_path, capsys):
    count = 0
    for step, without in enumerate([1.0, 1.0, 0.9, 1.0, 1.0, 1.0, 1.0, 1.0]):
        count = report.count_without_signal(
            step_record(step, 0.0, without), count, "math", tmp_path
        )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "no signal for 3 steps" in lines[0] and "0.000" in lines[0]
    assert f"--reward math read what is in {tmp_path / 'samples.jsonl'}" in lines[0]


# ---- three runs, each held back by another part --------------------------------------------------
async def throttle(listen: int, connect: int, bytes_per_s: float):
    """A link from port `listen` to port `connect` of this machine that is so slow towards the
    caller."""

    async def pump(reader, writer, rate):
        try:
            while data := await reader.read(16384):
                writer.write(data)
                await writer.drain()
                if rate:
                    await asyncio.sleep(len(data) / rate)  # the slowness itself
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def link(reader, writer):
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", connect)
        await asyncio.gather(pump(reader, up_writer, 0), pump(up_reader, writer, bytes_per_s))

    async with await asyncio.start_server(link, "127.0.0.1", listen) as server:
        await server.serve_forever()


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


STAGED = [
    # each engine step of the stand-in for vLLM takes 0.6 s longer; 8 make a sample
    ("generation", {"kind": "slow", "s": 0.6}, [], None, "Generation is the bottleneck"),
    # an update for every 4 of 64 samples, each in a forward of its own
    (
        "trainer",
        None,
        ["--train-global-batch-size", "4", "--max-tokens-per-micro-batch", "64"],
        None,
        "The trainer is the bottleneck",
    ),
    # 2 MB a version through 0.7 MB/s
    ("weights", None, [], 0.7e6, "The way of the weights is the bottleneck"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "fault", "flags", "bytes_per_s", "says"), STAGED, ids=[case[0] for case in STAGED]
)
def test_the_bottleneck_is_named_right_in_a_run_that_it_holds_back(
    kind, fault, flags, bytes_per_s, says, tmp_path, tiny_checkpoint, fake_vllm_command
):
    hub_port, link_port = free_ports(2)
    train = [
        sys.executable,
        str(REPO / "train_cispo.py"),
        "--model",
        str(tiny_checkpoint),
        "--max-num-steps",
        "10",
        "--num-prompts-per-step",
        "8",
        "--num-generations-per-prompt",
        "8",
        "--train-global-batch-size",
        "32",
        "--cpu-threads",
        "1",
        "--no-compile",
        "--val-every-steps",
        "0",
        "--no-local-rollout",
        "--hub-port",
        str(hub_port),
        *flags,
    ]
    port = hub_port if bytes_per_s is None else link_port
    node = [
        sys.executable,
        str(REPO / "rollout.py"),
        f"http://127.0.0.1:{port}",
        "--beat-s",
        "0.5",
        "--vllm-command",
        fake_vllm_command,
    ]
    env = {
        **os.environ,
        "CISPO_TOKEN": "t",
        **({"FAKE_VLLM_FAULT": json.dumps(fault)} if fault else {}),
    }
    started = []
    if bytes_per_s is not None:
        code = (
            f"import asyncio, test_watch; asyncio.run(test_watch.throttle({link_port}, "
            f"{hub_port}, {bytes_per_s}))"
        )
        path = f"{REPO}{os.pathsep}{REPO / 'tests'}"
        started.append(
            subprocess.Popen([sys.executable, "-c", code], env={**env, "PYTHONPATH": path})
        )
    try:
        for name, command in (("node", node), ("out", train)):
            with open(tmp_path / name, "w") as out:
                started.append(
                    subprocess.Popen(command, cwd=tmp_path, env=env, stdout=out, stderr=out)
                )
        assert started[-1].wait(200) == 0, (tmp_path / "out").read_text()[-3000:]
    finally:
        for process in started:
            process.send_signal(signal.SIGTERM)
        for process in started:
            process.wait(30)
    run = tmp_path / "runs/tiny"
    found, sentence = watch.bottleneck(
        watch.read_metrics(run), json.loads((run / "config.json").read_text())
    )
    shown = screen(run)
    print(shown)
    assert found == kind and says in sentence and "--" in sentence, sentence
    assert says in shown and "in the last step: 80 prompts handed out = 80 taken" in shown
    assert all(
        word in shown
        for word in ("LEARNING", "TRAINER", "ROLLOUTS", "BROADCAST", "KV cache", "tokens/s")
    )
