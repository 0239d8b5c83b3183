"""waits.py: each named wait is made to fire, and what it says is read."""

import asyncio
import json
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from published import publish, write_version

from bridge.client import ask
from bridge.hub import Hub
from bridge.ledger import Ledger
from bridge.processes import LocalRollout
from bridge.reward_pool import RewardWorkers
from bridge.rollouts import wait_for_batch, wait_for_validation
from bridge.vllm import VLLM
from bridge.waits import WAITS, Signals, Wait, WaitOver, agree
from bridge.weights import digest
from config import Config, RolloutConfig
from model import ModelConfig, Qwen3MoE
from ranks import parallel
from ranks.checkpoint import Checkpointer, CheckpointError
from ranks.parallel import ShardedAdamW

RUN = {
    "dtype": "float32",
    "max_model_len": 64,
    "seed": 0,
    "num_generations": 2,
    "max_new_tokens": 8,
}


def says(message, name, who, whom):
    """Whether the line names the wait, who waits for whom, since when, how long, and what
    follows."""
    since = r"since \d\d:\d\d:\d\d, [\d.]+ s of [\d.]+ s"
    return re.search(
        rf"wait '{name}': {who} waits for {whom} {since}; {re.escape(WAITS[name][2])}", message
    )


@pytest.fixture
def hub(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    write_version(tmp_path / "weights", 0, [("w", torch.arange(4.0))], static=tmp_path)
    prompts = [{"prompt": "ab>", "answer": "ba"}] * 100
    hub = Hub(
        Ledger(2, 1, 10, 600.0), prompts, lambda e: [2, 3, 4], tmp_path / "weights", 32, "t", RUN
    )
    hub.start("127.0.0.1", 0)
    publish(hub, 0)
    yield hub
    hub.close(patience_s=0.0)


@pytest.fixture
def process_group():
    """A group of one, whose store the waits of ranks for each other use."""
    parallel.join_ranks(60)
    yield
    torch.distributed.destroy_process_group()


def post(hub, route, **body):
    async def request():
        import aiohttp

        async with aiohttp.ClientSession(hub.url, headers={"Authorization": "Bearer t"}) as session:
            return await ask(session, "POST", route, 5.0, json=body)

    return asyncio.run(request())


def join(hub, node="n"):
    post(hub, "/receipts", node=node, version=0, digest=digest(hub.manifest), timing={})


def test_batch(hub, process_group):
    cfg = Config(batch_timeout_s=0.2)
    groups, word = wait_for_batch(hub, 0, cfg, None)
    assert groups is None and says(
        word, "batch", "trainer rank 0", "groups from the rollout nodes"
    ), word
    assert '"leased": 0' in word and '"nodes": {}' in word  # what is known of the other side


def test_validation(hub, capsys):
    """Nobody answers the last one: the run ends without its score, and says so."""
    hub.validation.examples = [{}]
    hub.begin_validation(3)
    wait_for_validation(hub, Config(val_timeout_s=0.2), None)
    said = capsys.readouterr().out
    assert says(said, "validation", "trainer rank 0", "answers to the last validation"), said
    assert '"version": 3' in said and '"of": 1' in said


def test_turn(process_group):
    with pytest.raises(WaitOver) as e:
        agree(3, None, rank=1, deadline_s=0.1, stop=lambda: "")
    assert says(
        str(e.value), "turn", "trainer rank 1", "rank 0's word on the next step"
    ) and "step 3" in str(e.value)


def test_a_signal_at_one_rank_becomes_the_word_of_all(hub, process_group):
    with pytest.raises(WaitOver):
        agree(0, None, rank=1, deadline_s=0.1, stop=lambda: "SIGTERM")
    assert wait_for_batch(hub, 0, Config(), None) == (None, "SIGTERM on rank 1")
    assert agree(0, "SIGTERM on rank 1", 0, 1.0, lambda: "") == agree(0, None, 1, 1.0, lambda: "")
    agree(1, "a judge said é\ud83d", 0, 1.0, lambda: "")  # half of a character, which UTF-8 lacks
    assert agree(1, None, 1, 1.0, lambda: "") == "a judge said é\\ud83d"


def test_hub_thread(hub):
    with pytest.raises(WaitOver) as e:
        hub._call(asyncio.sleep(5), 0.1)
    assert says(str(e.value), "hub thread", "trainer rank 0", "the hub's thread")


def test_a_save_after_sigterm_ends_before_torchrun_kills(monkeypatch):
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)  # launch.sh sets it
    assert Signals.save_within_s() == float("inf")  # nobody kills
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert Signals.save_within_s() == 20.0
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    monkeypatch.setattr(Signals, "since", time.monotonic() - 100)  # the step has taken its part
    assert 299 < Signals.save_within_s() <= 300


def test_rollout_end(capfd):
    deaf = (
        "import signal, sys; signal.signal(15, signal.SIG_IGN); print('up', flush=True); "
        "signal.pause()"
    )
    rollout = LocalRollout.__new__(LocalRollout)
    rollout.process = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE)
    assert rollout.process.stdout.readline() == b"up\n"
    rollout.stop(patience_s=0.2)
    pid = rollout.process.pid
    assert says(
        capfd.readouterr().out, "rollout end", "trainer rank 0", f"its rollout process, pid {pid},"
    )
    assert rollout.process.returncode == -9


def test_checkpoint(process_group, tmp_path):
    """Of two ranks the other never writes its part."""
    saver = Checkpointer(tmp_path, rank=0, world_size=2, keep=1)
    saver.deadline_s = 0.2
    model = Qwen3MoE(ModelConfig(16, 8, 1, 2, 1, 4, 8))
    saver.save(7, model, ShardedAdamW(model, 1.0), {"ledger": {}})
    with pytest.raises(CheckpointError) as e:
        saver.wait()
    assert says(str(e.value), "checkpoint", "trainer rank 0", "every rank's part of a checkpoint")
    assert "missing: checkpoint/7/1" in str(e.value) and not list(tmp_path.glob("step-000007"))


def test_lease():
    ledger = Ledger(2, 1, 10, lease_timeout_s=5.0)
    ledger.grant("node-a", 0, now=time.monotonic() - 6)
    ledger.expire(time.monotonic())
    (news,) = ledger.news
    assert says(news, "lease", r"hub \(prompt 0\)", "node-a") and ledger.returned == [0]


def test_node(hub):
    join(hub)
    assert len(json.loads(post(hub, "/lease", node="n", max=2))["leases"]) == 2
    hub.node_timeout_s = 0.1
    deadline = time.monotonic() + 20
    news = []
    while not any("wait" in line for line in news):
        assert time.monotonic() < deadline
        news += hub.take_news()
    assert says(news[-1], "node", "hub", "n") and news[-1].endswith("2 prompts")
    status = hub.status()
    assert (
        status["returned"] == 2
        and status["leased"] == 0
        and status["counts"]["leases_of_lost_nodes"] == 2
    )


def test_body(hub):
    hub.body_timeout_s = 0.3
    host, port = hub.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as s:
        s.sendall(
            b"POST /groups HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer t\r\nContent-Length: 500\r\n\r\nxyz"
        )
        answer = s.recv(4096).decode()
    assert answer.startswith("HTTP/1.1 408") and says(
        answer, "body", "hub", "the body of /groups from 127.0.0.1"
    )


def test_hub():
    async def run():
        import aiohttp

        async with aiohttp.ClientSession("http://127.0.0.1:9") as nowhere:
            await ask(nowhere, "POST", "/lease", 0.2)

    with pytest.raises(WaitOver) as e:
        asyncio.run(run())
    assert says(
        str(e.value), "hub", "rollout node", "the hub's answer to /lease"
    ) and "Connect" in str(e.value)


def vllm(tmp_path, command, **flags):
    return VLLM(RolloutConfig(hub="", vllm_command=command, **flags), RUN, tmp_path / "vllm.log")


def test_vllm_start(tmp_path):
    server = vllm(
        tmp_path,
        f"{sys.executable} -c 'import signal; print(7); signal.pause()'",
        vllm_start_timeout_s=0.3,
    )
    with pytest.raises(RuntimeError) as e:
        asyncio.run(server.start(tmp_path))
    assert (
        says(str(e.value), "vllm start", "rollout node", "vLLM to come up")
        and server.process is None
    )


def test_weight_update(tmp_path, tiny_checkpoint, fake_vllm_command):
    async def run():
        server = vllm(tmp_path, fake_vllm_command, load_timeout_s=0.5)
        try:
            await server.start(tiny_checkpoint)
            await server.load(tiny_checkpoint, 0)
            await server.post("/fault", {"kind": "stall_update"})
            with pytest.raises(WaitOver) as e:
                await server.load(tiny_checkpoint, 1)
            return str(e.value)
        finally:
            await server.stop(kill=True)

    message = asyncio.run(run())
    assert says(
        message, "weight update", "rollout node", "vLLM to load weights"
    ) and message.endswith("; v1")


def test_reward(tmp_path):
    (tmp_path / "slow.py").write_text(
        "import signal\ndef score(completion, example):\n"
        "    return 0.5 if completion == 'quick' else signal.pause()\n"
    )

    async def run():
        workers = RewardWorkers(f"{tmp_path / 'slow.py'}:score", 1, timeout_s=2.0)
        try:
            return await workers.score(["quick", "hang", "quick"], {})
        finally:
            await workers.close()

    first, second, third = asyncio.run(run())
    assert (first, third) == (0.5, 0.5) and says(
        second, "reward", "rollout node", "the reward function"
    )


def test_reward_start(tmp_path):
    (tmp_path / "slow.py").write_text("import signal\nsignal.pause()\n")

    async def run():
        workers = RewardWorkers(
            f"{tmp_path / 'slow.py'}:score", 1, timeout_s=60.0, start_timeout_s=0.5
        )
        try:
            await workers.start()
        finally:
            await workers.close()

    with pytest.raises(ValueError) as e:
        asyncio.run(run())
    assert says(
        str(e.value), "reward start", "rollout node", "the reward function's file to be imported"
    ), e.value
    assert "slow.py:score'" in str(e.value)


def test_reward_away(tmp_path, capsys):
    """A service is asked again and again, by name, until the run cannot wait any longer."""
    text = (
        "def score(completion, example):\n    raise ConnectionRefusedError('nobody at judge:80')\n"
    )
    (tmp_path / "judge.py").write_text(text)

    async def run():
        workers = RewardWorkers(
            f"{tmp_path / 'judge.py'}:score", 1, timeout_s=60.0, away_timeout_s=3.0
        )
        try:
            await workers.score(["a", "b"], {})
        finally:
            assert workers.failed["away"] > 4 and workers.failed.keys() == {"away"}
            await workers.close()

    with pytest.raises(ValueError) as e:
        asyncio.run(run())
    assert says(
        str(e.value), "reward away", "rollout node", "the service that the reward function asks"
    ), e.value
    assert str(e.value).endswith(
        "it raised ConnectionRefusedError: nobody at judge:80 (judge.py line 2)"
    )
    assert "the reward function's service is away for " in capsys.readouterr().out


def test_every_wait_of_the_table_has_its_test():
    """And "vllm progress" has its own in test_failures.py, "generation" in test_nodes.py, those of
    weights in test_weights.py."""
    files = ("test_waits.py", "test_failures.py", "test_failed_rewards.py", "test_weights.py")
    files += ("test_receive.py", "test_checkpoint.py", "test_nodes.py")
    text = "".join((Path(__file__).parent / name).read_text() for name in files)
    assert [
        name for name in WAITS if not re.search(rf'(says\([^,]*, |wait )[\'"]{name}[\'"]', text)
    ] == []


def test_a_wait_that_is_not_over_says_nothing():
    wait = Wait("batch", 60.0)
    wait.check("fine")
    assert not wait.over and SimpleNamespace(**vars(wait)).name == "batch"
