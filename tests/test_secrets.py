"""Where the token must not be, and who may speak to vLLM."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from bridge.files import FileServer, has_token
from bridge.routes import Routes

REPO = Path(__file__).resolve().parent.parent


def test_the_token_is_compared_in_constant_time():
    assert "compare_digest" in has_token.__code__.co_names
    for server in (Routes.authorize, FileServer._file):
        assert "has_token" in server.__code__.co_names


def test_a_run_shows_its_token_nowhere_and_vllm_only_to_this_machine(
    tmp_path, tiny_checkpoint, fake_vllm_command
):
    """No log, no file, no process list; only the processes that need it have it. vLLM's port is
    closed to others."""
    token = "token-that-nobody-may-see"
    command = [
        sys.executable,
        str(REPO / "train_cispo.py"),
        "--model",
        str(tiny_checkpoint),
        "--max-num-steps",
        "500",
        "--no-compile",
        "--checkpoint-every-steps",
        "1",
        f"--rollout-args=--vllm-command '{fake_vllm_command}'",
    ]
    with open(tmp_path / "out", "w") as out:
        run = subprocess.Popen(
            command, cwd=tmp_path, stdout=out, stderr=out, env={**os.environ, "CISPO_TOKEN": token}
        )
    try:
        deadline = time.monotonic() + 200
        while "step    2 " not in (tmp_path / "out").read_text():
            assert time.monotonic() < deadline and run.poll() is None, (
                tmp_path / "out"
            ).read_text()[-3000:]
            time.sleep(0.1)  # polling what another program prints
        processes = [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]
        assert not [p for p in processes if token in " ".join(p.cmdline())]
        holders = {
            next((Path(x).name for x in p.cmdline() if x.endswith(".py")), "")
            for p in processes
            if p.environ().get("CISPO_TOKEN")
        }
        assert holders == {"train_cispo.py", "rollout.py"}
        (port,) = re.findall(
            r"vLLM is up .* port (\d+)", (tmp_path / "runs/tiny/rollout.log").read_text()
        )
        listening = [
            c.laddr
            for p in processes
            for c in p.net_connections("tcp")
            if c.status == psutil.CONN_LISTEN
        ]
        assert int(port) in {address.port for address in listening}
        # the hub, too, unless --hub-host says otherwise
        assert {address.ip for address in listening} == {"127.0.0.1"}
        for address in {
            a.address
            for found in psutil.net_if_addrs().values()
            for a in found
            if a.family == socket.AF_INET
        }:
            if not address.startswith("127."):  # where another host would come in
                with (
                    pytest.raises(OSError),
                    socket.create_connection((address, int(port)), timeout=5),
                ):
                    pass
    finally:
        run.terminate()
        assert run.wait(90) == 0
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) > 10 and not [p for p in files if token.encode() in p.read_bytes()]
