"""launch.sh by itself, with stand-ins for Python and ssh: what it calls, from where, and what it
says."""

import os
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
SAYS = """#!/bin/bash
echo "in $PWD: ${0##*/} $* (leash ${CISPO_LEASH:-none}, token ${CISPO_TOKEN:-none})"
"""


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def program(tmp_path):
    """launch.sh in a directory of its own, whose Python says how it was called. Tests call it from
    tmp_path."""
    (tmp_path / "program/bridge/inside_vllm").mkdir(parents=True)
    for name in ("launch.sh", "pyproject.toml"):
        shutil.copy(REPO / name, tmp_path / "program")
    for name in ("train_cispo.py", "bridge/inside_vllm/vllm_engine.py"):
        (tmp_path / "program" / name).touch()
    script(tmp_path / "program/.venv/bin/python", SAYS)
    stamp = subprocess.run(
        "cksum <pyproject.toml", shell=True, cwd=REPO, capture_output=True, text=True, check=True
    )
    (tmp_path / "program/.venv/installed").write_text(f"cpu {stamp.stdout}")
    return tmp_path / "program"


def environment(program: Path, **env) -> dict:
    """Without a GPU, wherever the test runs."""
    script(program.parent / "bin/nvidia-smi", "#!/bin/sh\nexit 1\n")
    return {**os.environ, "PATH": f"{program.parent / 'bin'}:{os.environ['PATH']}", **env}


def launch(program: Path, *args, **env):
    return subprocess.run(
        ["bash", str(program / "launch.sh"), *args],
        cwd=program.parent,
        text=True,
        timeout=60,
        env=environment(program, **env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
    )


@pytest.mark.parametrize(
    ("args", "env"),
    [
        (["--data", "mine.jsonl"], {}),
        (["--data", "mine.jsonl"], {"NPROC": "2"}),
        (["trainer", "--data", "mine.jsonl"], {"MASTER_ADDR": "127.0.0.1", "CISPO_TOKEN": "x"}),
        (
            ["rollout"],
            {
                "MASTER_ADDR": "127.0.0.1",
                "CISPO_TOKEN": "x",
                "ROLLOUT_ARGS": "--vllm-args '--c mine.jsonl'",
            },
        ),
    ],
)
def test_relative_paths_mean_the_caller_s_directory(program, args, env):
    done = launch(program, *args, **env)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("in ")]
    assert line.startswith(f"in {program.parent}: python ") and "mine.jsonl" in line
    assert f" {program}/{'rollout' if args == ['rollout'] else 'train_cispo'}.py " in line


def test_the_tests_run_beside_launch_sh(program):
    (said,) = re.findall(r"^in .*", launch(program, "test", "-x").stdout, re.M)
    assert re.match(rf"in {program}: python -m pytest -n auto .* -x\b", said)


def test_over_ssh_relative_paths_mean_each_node_s_directory_which_is_said(program, tmp_path):
    ssh = script(tmp_path / "ssh", '#!/bin/bash\nshift\nexec "$@"\n')
    script(program / ".venv/bin/python", SAYS + "[ ! -p /dev/stdin ] || read -r -t 20 line\n")
    done = launch(program, "--data", "mine.jsonl", NODES="127.0.0.1 localhost", SSH=str(ssh))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"[127.0.0.1] in {program}: python -P -m torch.distributed.run" in done.stdout
    assert f"relative paths of the flags mean {program} on each node" in done.stdout
    assert len(list(tmp_path.glob("runs/logs/*/*.log"))) == 2 and not (program / "runs").exists()


@pytest.mark.parametrize("greeting", ["echo Welcome", "printf 'Welcome to '"])
def test_a_greeting_of_a_node_s_shell_is_no_other_version(program, tmp_path, greeting):
    ssh = script(tmp_path / "ssh", f'#!/bin/bash\nshift\n{greeting}\nexec "$@"\n')
    done = launch(program, NODES="127.0.0.1 localhost", SSH=str(ssh))
    assert "has ended with status 0" in done.stdout and "warning" not in done.stdout
    shutil.copytree(program, tmp_path / "other", symlinks=True)
    (tmp_path / "other/train_cispo.py").write_text("# forked\n")
    done = launch(
        program, NODES="127.0.0.1 localhost", SSH=str(ssh), CISPO_DIR=str(tmp_path / "other")
    )
    assert done.stdout.count("has another version") == 2


def test_a_printed_line_can_be_given_by_hand(program, tmp_path):
    ssh = script(tmp_path / "ssh", '#!/bin/bash\nshift\nexec "$@"\n')
    words = ["--name", "a b", "--prompt-template", '{problem} in \\boxed{} for $5, "it\'s"']
    printed = launch(
        program, "--print", *words, NODES="127.0.0.1 localhost", SSH=str(ssh)
    ).stdout.splitlines()
    by_hand = printed[0].split("launch: ", 1)[1]
    env = {k: v for k, v in os.environ.items() if k != "CISPO_TOKEN"}
    without = subprocess.run(
        ["bash", "-c", by_hand], env=env, text=True, capture_output=True, timeout=60
    )
    assert without.returncode != 0 and "CISPO_TOKEN: one for all nodes" in without.stderr
    env = environment(program, CISPO_TOKEN="secret")
    done = subprocess.run(
        ["bash", "-c", by_hand], env=env, text=True, capture_output=True, timeout=60
    )
    assert done.returncode == 0 and " ".join(words) in done.stdout.splitlines()[-1]
    assert done.stdout.rstrip().endswith("(leash none, token secret)")


def test_a_leash_that_is_gone_at_the_start_is_named(program):
    done = launch(program, "rollout", MASTER_ADDR="127.0.0.1", CISPO_TOKEN="x", CISPO_LEASH="1")
    assert done.returncode == 2 and "CISPO_LEASH is set, and stdin has ended already" in done.stderr
    assert "in " + str(program.parent) not in done.stdout


@pytest.mark.parametrize("master", ["::1", "[::1]"])
def test_a_master_of_ipv6_has_its_brackets_in_the_url_only(program, master):
    assert "http://[::1]:8790" in launch(
        program, "--print", "rollout", MASTER_ADDR=master
    ).stdout.replace("\\", "")
    trainer = launch(program, "--print", "trainer", MASTER_ADDR=master).stdout
    assert "--master-addr ::1 " in trainer and "--hub-host ::1 " in trainer


def test_nodes_may_be_of_ipv6(program):
    printed = launch(program, "--print", NODES="me@2001:db8::1 2001:db8::2").stdout
    assert "me@2001:db8::1 bash -s" in printed and printed.count("MASTER_ADDR=2001:db8::1 ") == 2


@pytest.mark.parametrize("name", ["NPROC", "ROLLOUT_NODES", "HUB_PORT"])
def test_a_number_that_is_none_is_one_line(program, name):
    done = launch(program, NODES="h0 h1", **{name: "two"})
    assert done.returncode == 2 and done.stderr.endswith(f"error: {name}=two is not a number\n")


@pytest.mark.parametrize("args", [[], ["test"], ["install"], ["--flags", "--preset", "add"]])
def test_print_installs_nothing(program, args):
    shutil.rmtree(program / ".venv")
    done = launch(program, "--print", *args, PYTHON="false")
    assert done.returncode == 0 and not (program / ".venv").exists() and not done.stderr


def test_flags_are_those_of_a_preset_too_and_of_this_machine(program):
    done = launch(program, "--flags", "--preset", "add", NODES="h0 h1")
    assert f"python {program}/train_cispo.py --help --preset add" in done.stdout


# ---- installing ----------------------------------------------------------------------------------
PIP = """#!/bin/bash
case "$*" in
  "-c "*) ;;
  "-m venv .venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
  "-m pip install "*) echo begins >>{log}; read -r line <{gate}; echo ends >>{log} ;;
  *) echo "called: $*" ;;
esac
"""


@pytest.fixture
def installer(program):
    """A Python that makes a .venv, and a function that lets one call of its pip end."""
    shutil.rmtree(program / ".venv")
    os.mkfifo(program.parent / "gate")
    (program.parent / "pip.log").touch()
    # so that nobody has to wait for the other end
    gate = os.open(program.parent / "gate", os.O_RDWR)
    pip = PIP.format(log=program.parent / "pip.log", gate=program.parent / "gate")
    yield str(script(program.parent / "bin/python-to-be", pip)), lambda: os.write(gate, b"go\n")
    os.close(gate)


def test_two_installs_into_one_venv_come_one_after_the_other_and_the_second_says_whom_it_waits_for(
    program, installer
):
    python, let_end = installer
    start = lambda: subprocess.Popen(
        ["bash", str(program / "launch.sh"), "install"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment(program, PYTHON=python),
    )
    with start() as first, start() as second:
        try:
            said, deadline = "", time.monotonic() + 60
            while "waiting for" not in said:  # whichever comes second
                ready, _, _ = select.select(
                    [first.stdout, second.stdout], [], [], max(0, deadline - time.monotonic())
                )
                assert ready and said.count("installing") < 5, f"both install:\n{said}"
                said += os.read(ready[0].fileno(), 10000).decode()
            assert re.search(r"waiting for pid \d+ on \S+, which installs into", said)
        finally:
            let_end()
            let_end()
        assert first.wait(60) == 0 and second.wait(60) == 0
        said += first.stdout.read().decode() + second.stdout.read().decode()
    assert said.count("making .venv") == 1
    assert (program.parent / "pip.log").read_text() == "begins\nends\n"


def test_without_flock_the_install_goes_on_and_says_so(program, installer):
    script(program.parent / "bin/flock", "#!/bin/sh\nexit 127\n")
    python, let_end = installer
    let_end()
    done = launch(program, "install", PYTHON=python)
    assert (
        done.returncode == 0
        and "warning: no lock on" in done.stdout
        and "installed in" in done.stdout
    )


def test_white_space_in_the_path_is_warned_of_in_one_line(program, installer):
    python, let_end = installer
    let_end()
    moved = program.parent / "a b/program"
    shutil.copytree(program, moved)
    done = launch(moved, "install", PYTHON=python)
    (warning,) = [line for line in done.stdout.splitlines() if "warning" in line]
    assert "no white space in a path" in warning and str(moved) in warning and done.returncode == 0


def test_an_environment_of_ones_own_is_taken_as_it_is(program):
    """CISPO_PYTHON: nothing is installed into it; what it lacks is one line."""
    own = script(program.parent / "conda/bin/python", SAYS)
    shutil.rmtree(program / ".venv")
    done = launch(program, "--lr", "1", CISPO_PYTHON=str(own))
    assert done.returncode == 0 and "train_cispo.py --lr 1" in done.stdout, done.stderr
    assert not (program / ".venv").exists()
    script(own, "#!/bin/sh\necho torch vllm\nexit 1\n")
    done = launch(program, CISPO_PYTHON=str(own))
    assert done.returncode == 2 and f"CISPO_PYTHON={own} lacks: torch vllm; " in done.stderr
    done = launch(program, "install", CISPO_PYTHON=sys.executable)  # a real one, which has all
    assert done.returncode == 0 and not done.stderr


# ---- GPUs ----------------------------------------------------------------------------------------
EIGHT_GPUS = """#!/bin/sh
case "$*" in
  *driver_version*) for i in 0 1 2 3 4 5 6 7; do echo {driver}; done ;;
  *) for i in 0 1 2 3 4 5 6 7; do echo "GPU $i: NVIDIA H100"; done ;;
esac
"""


def with_gpus(program: Path, *args, driver="580.65.06", **env):
    """launch.sh on a machine of eight GPUs."""
    env = environment(program, **env)
    script(program.parent / "bin/nvidia-smi", EIGHT_GPUS.format(driver=driver))
    return subprocess.run(
        ["bash", str(program / "launch.sh"), *args],
        cwd=program.parent,
        text=True,
        timeout=60,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
    )


@pytest.mark.parametrize(
    ("visible", "ranks"),
    [(None, 8), ("0,1", 2), ("3", 1), ("", 1), ("-1", 1), ("0,-1,2", 1), ("GPU-a,GPU-b,GPU-c", 3)],
)
def test_a_rank_for_each_gpu_that_cuda_visible_devices_leaves(program, visible, ranks, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    env = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    done = with_gpus(program, "--print", "trainer", MASTER_ADDR="127.0.0.1", **env)
    assert f"--nproc-per-node {ranks} " in done.stdout, done.stderr


@pytest.mark.parametrize("args", [["install"], ["--preset", "add"]])
def test_a_driver_older_than_cuda_13_is_one_line_before_anything_is_installed(program, args):
    shutil.rmtree(program / ".venv")
    done = with_gpus(program, *args, driver="575.57.08", PYTHON="false")
    assert done.returncode == 2 and not (program / ".venv").exists() and not done.stdout
    (line,) = done.stderr.splitlines()
    assert "driver here is 575.57.08" in line and "580 or newer" in line
    done = with_gpus(program, *args, PYTHON="false")
    assert "driver" not in done.stderr and "older than 3.11" in done.stderr
