"""Several nodes: launch.sh over a remote shell, and machines that share no disk
(tests/hosts.py)."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hosts import REPO, Hosts, copy_program
from on_ranks import on_ranks

import prepare
from bridge import weights
from ranks import run_dir
from ranks.parallel import join_ranks, make_mesh


def launch(*args, **env):
    env = {**{k: v for k, v in os.environ.items() if k != "CISPO_TOKEN"}, **env}
    command = ["bash", str(REPO / "launch.sh"), *args]
    return subprocess.run(command, cwd=REPO, env=env, text=True, capture_output=True, timeout=60)


# ---- the commands --------------------------------------------------------------------------------
def test_print_shows_what_each_node_would_run_and_starts_nothing():
    done = launch(
        "--print",
        "--preset",
        "tiny",
        "--name",
        "a b",
        NODES="me@h0 h1 h2",
        SSH="false",
        CISPO_TOKEN="never-shown",
        ROLLOUT_ARGS="--max-groups 8",
    )
    lines = done.stdout.splitlines()
    assert (
        done.returncode == 0 and len(lines) == 3 and "never-shown" not in done.stdout + done.stderr
    )
    for i, (line, host, role) in enumerate(
        zip(lines, ("me@h0", "h1", "h2"), ("trainer", "trainer", "rollout"))
    ):
        assert f"false {host} bash -s" in line and f"NNODES=2 NODE_RANK={i} MASTER_ADDR=h0" in line
        assert f"bash launch.sh {role}" in line
        assert ("--preset tiny --name a\\ b" in line) == (role == "trainer")


def test_by_hand_a_node_s_command_names_the_others():
    trainer = launch(
        "--print",
        "trainer",
        "--lr",
        "1e-5",
        MASTER_ADDR="127.0.0.1",
        NNODES="2",
        NODE_RANK="1",
        NPROC="4",
    )
    assert (
        "--nnodes 2 --node-rank 1 --nproc-per-node 4 --master-addr 127.0.0.1 --master-port 29500"
        in trainer.stdout
    )
    assert "--no-local-rollout --hub-host 127.0.0.1 --hub-port 8790 --lr 1e-5" in trainer.stdout
    rollout = launch(
        "--print",
        "rollout",
        MASTER_ADDR="127.0.0.1",
        HUB_PORT="9000",
        ROLLOUT_ARGS="--vllm-args '-tp 8'",
    )
    assert "rollout.py http://127.0.0.1:9000 --vllm-args -tp\\ 8" in rollout.stdout


def test_in_a_slurm_allocation_a_step_is_made_and_each_task_finds_its_part(tmp_path):
    (tmp_path / "scontrol").write_text("#!/bin/sh\nprintf 'h0\\nh1\\nh2\\n'\n")
    (tmp_path / "scontrol").chmod(0o755)
    slurm = {
        "SLURM_NNODES": "3",
        "SLURM_JOB_NODELIST": "h[0-2]",
        "SLURM_JOB_ID": "1",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    job = launch("--print", "--seed", "1", **slurm)
    assert (
        "srun --nodes 3 --ntasks-per-node 1" in job.stdout
        and f"bash {REPO}/launch.sh --seed 1" in job.stdout
    )
    (tmp_path / "getent").write_text("#!/bin/sh\necho 10.77.0.1\n")  # h0 is nobody's name here
    (tmp_path / "getent").chmod(0o755)
    tasks = [
        launch("--print", "--seed", "1", **slurm, SLURM_STEP_NUM_NODES="3", SLURM_NODEID=str(i))
        for i in range(3)
    ]
    assert "--nnodes 2 --node-rank 0" in tasks[0].stdout and "--master-addr h0" in tasks[0].stdout
    assert "--nnodes 2 --node-rank 1" in tasks[1].stdout and "--seed 1" in tasks[1].stdout
    assert "rollout.py http://h0:8790" in tasks[2].stdout and "--seed" not in tasks[2].stdout


@pytest.mark.parametrize(
    "env, args, why",
    [
        ({"NODES": "h0"}, [], "1 node (h0): it takes two"),
        ({"NODES": "h0 h1", "ROLLOUT_NODES": "2"}, [], "ROLLOUT_NODES=2 of 2 nodes"),
        ({"NODES": "h0 h1", "ROLLOUT_NODES": "0"}, [], "ROLLOUT_NODES=0 of 2 nodes"),
        ({"NODES": "h0 h1", "SSH": "false"}, [], "h0: 'false' does not reach it"),
        ({}, ["rollout"], "MASTER_ADDR is not set"),
        ({"MASTER_ADDR": "127.0.0.1"}, ["trainer"], "CISPO_TOKEN is not set"),
        (
            {"MASTER_ADDR": "no-such-host.invalid", "CISPO_TOKEN": "x"},
            ["rollout"],
            "no-such-host.invalid: no such host",
        ),
    ],
)
def test_what_cannot_work_is_one_line_before_anything_starts(env, args, why):
    done = launch(*args, **env)
    assert done.returncode == 2 and why in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_trainer_node_that_fails_ends_all_and_other_files_on_a_node_are_warned_of(tmp_path):
    """On a stand-in for ssh, whose nodes do nothing until their stdin ends, but for h1, which
    fails."""
    copy_program(tmp_path / "launcher")
    (tmp_path / "ssh").write_text("""#!/bin/bash
read -r line
case "$1 $line" in h2\\ cd*) echo 1 2; exit ;; *\\ cd*) eval "$line"; exit ;; esac
[ "$1" != h1 ] || exit 3
cat >/dev/null
echo "$1 is let go"
""")
    (tmp_path / "ssh").chmod(0o755)
    env = {**os.environ, "NODES": "h0 h1 h2", "SSH": str(tmp_path / "ssh")}
    command = ["bash", str(tmp_path / "launcher/launch.sh"), "--preset", "tiny"]
    done = subprocess.run(
        command, cwd=tmp_path, env=env, text=True, capture_output=True, timeout=60
    )
    assert done.returncode == 3 and "trainer node h1 has ended with status 3" in done.stdout
    assert "[h0] h0 is let go" in done.stdout and "[h2] h2 is let go" in done.stdout
    assert (
        done.stdout.count("warning") == 1
        and "warning: h2 has another version of these files" in done.stdout
    )
    (log,) = tmp_path.glob("runs/logs/*/h0.log")  # in the directory that it was called from
    assert log.read_text().endswith("h0 is let go\n")


# ---- disks of their own --------------------------------------------------------------------------
def _share(directory, name, handed_out):
    os.chdir(Path(directory) / f"disk{os.environ['RANK']}")
    join_ranks(60)
    try:
        run_dir.share_model(Path(name), handed_out, prepare.model_digest)
    except SystemExit as e:
        return str(e)
    return {p.name: weights.digest(p.read_bytes()) for p in Path(name).iterdir()}


def test_the_tiny_checkpoint_reaches_a_node_with_a_disk_of_its_own_byte_for_byte(
    tmp_path, tiny_checkpoint
):
    """Also where an earlier run, or one that was cut off, has left another one."""
    for disk in ("disk0", "disk1", "disk2"):
        (tmp_path / disk).mkdir()
    shutil.copytree(tiny_checkpoint, tmp_path / "disk0/checkpoints/tiny")
    shutil.copytree(tiny_checkpoint, tmp_path / "disk2/checkpoints/tiny")
    damaged = tmp_path / "disk2/checkpoints/tiny/model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\1")
    first, *others = on_ranks(3, _share, str(tmp_path), "checkpoints/tiny", True)
    assert len(first) >= 4 and others == [first, first]


def test_a_model_that_is_another_one_on_a_node_is_refused_with_rank_and_host(
    tmp_path, tiny_checkpoint
):
    for disk in ("disk0", "disk1"):
        shutil.copytree(tiny_checkpoint, tmp_path / disk / "mine")
    config = tmp_path / "disk1/mine/config.json"
    config.write_text(config.read_text().replace("10000", "20000"))
    same, other = on_ranks(2, _share, str(tmp_path), "mine", False)
    assert (
        isinstance(same, dict)
        and f"rank 1 on {socket.gethostname()}: mine is not what rank 0 has" in other
    )


def _begin(directory):
    os.chdir(Path(directory) / f"disk{os.environ['RANK']}")
    join_ranks(60)
    cfg = SimpleNamespace(
        run_dir=Path("runs/x"), resume="off", text="{}", reward="exact", val_reward=""
    )
    run_dir.begin(cfg, [], make_mesh(1, 1, 2), lambda line: None)
    return sorted(str(p) for p in Path("runs").glob("*/checkpoints/*"))


def test_what_an_earlier_run_left_on_any_node_s_disk_goes_aside(tmp_path):
    """Else its later steps would be taken for this run's, and this run's own be pruned."""
    for disk in ("disk0", "disk1"):
        (tmp_path / disk / "runs/x/checkpoints/step-000160").mkdir(parents=True)
        (tmp_path / disk / "runs/x/code").mkdir()
    assert on_ranks(2, _begin, str(tmp_path)) == [["runs/x.1/checkpoints/step-000160"]] * 2


# ---- three hosts, no shared disk -----------------------------------------------------------------
class Launcher:
    """launch.sh on a fifth machine, so to say: in a directory of its own, with the hosts behind
    `ssh`."""

    def __init__(self, hosts: Hosts, directory: Path, *flags, **env):
        copy_program(directory / "launcher")
        self.directory, self.out = directory / "launcher", directory / "out"
        env = {
            **os.environ,
            "NODES": "host0 host1 host2",
            "SSH": str(hosts.ssh),
            "CISPO_DIR": "/mnt/cispo",
            **env,
        }
        with open(self.out, "w") as out:
            self.process = subprocess.Popen(
                ["bash", "launch.sh", *flags],
                cwd=self.directory,
                env=env,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.process.poll() is None:
            self.process.kill()

    def wait_for(self, pattern: str, timeout_s: float) -> re.Match:
        deadline = time.monotonic() + timeout_s
        while not (found := re.search(pattern, self.out.read_text())):
            assert time.monotonic() < deadline and self.process.poll() is None, (
                f"no {pattern}:\n{self.text()}"
            )
            time.sleep(0.2)  # polling what another program prints
        return found

    def text(self) -> str:
        return self.out.read_text()[-6000:]


def left_over(hosts, timeout_s: float = 30.0) -> list:
    """Processes that are still on the hosts after a while."""
    deadline = time.monotonic() + timeout_s
    while (left := [p for host in hosts for p in host.processes()]) and time.monotonic() < deadline:
        time.sleep(0.2)  # polling the process table
    return [" ".join(p.cmdline()) for p in left]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_the_end_of_the_launcher_ends_everything_on_every_host(
    tmp_path, tiny_checkpoint, fake_vllm_command, how
):
    """Ctrl-C, and kill -9 of the launcher too. Meanwhile the token is in no command line, log or
    file."""
    flags = ["--model", str(tiny_checkpoint), "--no-compile", "--ep", "2", "--max-num-steps", "500"]
    machines = Hosts(3, tmp_path)
    with (
        machines as hosts,
        Launcher(
            machines, tmp_path, *flags, ROLLOUT_ARGS=f"--vllm-command '{fake_vllm_command}'"
        ) as launcher,
    ):
        launcher.wait_for(r"\[host0\] .* step    2 ", 150)
        running = {host.name: [" ".join(p.cmdline()) for p in host.processes()] for host in hosts}
        assert all(
            any("train_cispo.py" in line for line in running[host]) for host in ("host0", "host1")
        )
        assert any("fake_vllm.py" in line for line in running["host2"])
        tokens = {
            p.environ()["CISPO_TOKEN"]
            for host in hosts
            for p in host.processes()
            if "CISPO_TOKEN" in p.environ()
        }
        assert len(tokens) == 1 and len(token := tokens.pop()) == 64
        assert not [line for lines in running.values() for line in lines if token in line]
        launcher.process.send_signal(how)
        assert launcher.process.wait(60) == (130 if how == signal.SIGINT else -9)
        assert left_over(hosts) == []
        for place in (*(host.disk for host in hosts), launcher.directory, tmp_path):
            for file in place.rglob("*"):
                assert (
                    file.is_symlink()
                    or not file.is_file()
                    or token.encode() not in file.read_bytes()
                ), file
        logs = sorted(path.name for path in launcher.directory.glob("runs/logs/*/*"))
        assert logs == ["host0.log", "host1.log", "host2.log"]


@pytest.mark.slow
def test_three_hosts_without_a_shared_disk_learn_and_a_fourth_comes_and_goes(
    tmp_path, fake_vllm_command
):
    """Two hosts train, experts across both, and one generates with a real vLLM. In mid-run a fourth
    joins from nothing (on the stand-in: two real ones are too much for two cores), contributes, and
    is killed by -9."""
    token = "a-token-for-four-hosts"
    machines = Hosts(4, tmp_path)
    with (
        machines as hosts,
        Launcher(
            machines,
            tmp_path,
            "--no-compile",
            "--ep",
            "2",
            "--max-num-steps",
            "110",
            CISPO_TOKEN=token,
        ) as launcher,
    ):
        for host in hosts:  # no two see each other's files, and none can write where all can read
            assert (
                host.run(["touch", f"/mnt/of-{host.name}", f"/dev/shm/of-{host.name}"]).returncode
                == 0
            )
            assert host.run(["touch", str(REPO / "shared")]).returncode != 0
        for host in hosts:
            seen = host.run(["bash", "-c", "ls -d /mnt/of-* /dev/shm/of-*"]).stdout.split()
            assert seen == [f"/dev/shm/of-{host.name}", f"/mnt/of-{host.name}"]

        port = launcher.wait_for(r"\[host2\] .*vLLM is up .* port (\d+)", 200)[1]
        connect = f"import socket; socket.create_connection(('%s', {port}), 5)"
        assert hosts[2].run([sys.executable, "-c", connect % "127.0.0.1"]).returncode == 0
        # from another machine, and from its own by the address that others use
        for host in (hosts[0], hosts[2]):
            refused = host.run([sys.executable, "-c", connect % "host2"])
            assert "ConnectionRefusedError" in refused.stderr

        metrics = hosts[0].disk / "cispo/runs/tiny/metrics.jsonl"

        def records():
            lines = metrics.read_text().splitlines(keepends=True)
            return [json.loads(line) for line in lines if line.endswith("\n")]

        def groups(record):
            nodes = record["hub"]["nodes"].items()
            found = [node.get("groups", 0) for name, node in nodes if name.startswith("host3:")]
            return max(found, default=0)

        launcher.wait_for(r"\[host0\] .* step   15 ", 150)
        slow = json.dumps({"kind": "slow", "s": 0.3})  # so that it holds prompts when it is killed
        environment = {
            **os.environ,
            "CISPO_TOKEN": token,
            "MASTER_ADDR": "host0",
            "HOME": "/mnt/home",
            "FAKE_VLLM_FAULT": slow,
            "ROLLOUT_ARGS": f"--vllm-command '{fake_vllm_command}'",
        }
        with open(tmp_path / "joiner", "w") as out:
            # elsewhere a host's disk cannot be written to
            by_hand = "cd /mnt/cispo && exec bash launch.sh rollout"
            joiner = subprocess.Popen(
                [*hosts[3].enter, "bash", "-c", by_hand], stdout=out, stderr=out, env=environment
            )
        deadline = time.monotonic() + 120
        while groups(records()[-1]) < 32:
            assert time.monotonic() < deadline and joiner.poll() is None, (
                tmp_path / "joiner"
            ).read_text()[-3000:]
            time.sleep(0.2)  # polling what another program writes
        for process in hosts[3].processes():
            process.kill()
        joiner.wait(10)
        killed_at = len(records())

        assert launcher.process.wait(400) == 0, launcher.text()
        assert "stopped: RunOver" in launcher.text()  # the node was told of the end
        assert "rollout node host2 has ended with status 0" in launcher.text()
        assert "weights/v110 (a share: the other trainer nodes have the rest)" in launcher.text()
        assert left_over(hosts) == []
        done = records()
        longest = max(r["timing/train/exposed_generation"] for r in done[killed_at:])
        print(
            f"joiner: {groups(done[-1])} groups, killed at step {killed_at}; longest wait after "
            f"that {longest:.1f} s"
        )
        assert longest < 25  # its prompts are handed out again after 6 s, and not after 30
        assert [r["step"] for r in done] == list(range(110)) and killed_at < 90
        rewards = [r["train/reward"] for r in done]
        assert sum(rewards[:5]) / 5 <= 0.5 and sum(rewards[-5:]) / 5 >= 0.9, rewards
        for r in done:
            assert r["train/max_trajectory_age"] <= 1
            if r["train/tokens_same_version"]:
                assert r["train/gen_kl_error_same_version"] <= 1e-5
        ordinals = [ordinal for r in done for ordinal in r["ordinals"]]
        # what the dead host held was trained once, by others
        assert len(ordinals) == len(set(ordinals))
        # each trainer's disk has its own rank's share, of state and of weights, and the tiny model
        # that host0 made
        shares, made_by = [set(), set()], {}
        for rank, (host, other) in enumerate(zip(hosts[:2], ("model-00002", "model-00001"))):
            run = host.disk / "cispo/runs/tiny"
            names = {p.name for p in (run / "checkpoints/step-000110").iterdir()}
            assert names == {f"state-{rank:05d}.safetensors", "checkpoint.json"}
            shares[rank] = {p.name for p in run.glob("weights/v*/model-*")}
            assert shares[rank] and not [name for name in shares[rank] if name.startswith(other)]
            (made,) = (host.disk / "cispo/checkpoints").iterdir()
            made_by[host.name] = prepare.model_digest(made)
        assert made_by["host0"] == made_by["host1"]
        # so what vLLM ran on came from both, from the second by its own address
        manifest = json.loads(
            (hosts[0].disk / "cispo/runs/tiny/weights/v110/manifest.json").read_text()
        )
        urls = {file["url"] for shard in manifest["shards"] for file in shard["files"]}
        assert urls == {"", "http://10.77.0.2:8790"}
        (version,) = (
            n["version"]
            for name, n in done[-1]["hub"]["nodes"].items()
            if name.startswith("host2:")
        )
        assert version >= 108
        ram = hosts[2].disk.parent / "dev/shm"
        assert not (hosts[2].disk / "cispo/runs").exists() and not list(ram.glob("cispo-*"))
