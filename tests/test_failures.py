"""Failures of parts: a rollout node with a fake vLLM, real weights and a real hub, and what breaks
on order."""

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import aiohttp
import psutil
import pytest
import torch
from published import publish, write_version
from torch._inductor import config as inductor

import prepare
from bridge import weights
from bridge.hub import Hub
from bridge.ledger import Ledger
from bridge.reward_process import reward_digest
from bridge.vllm import VLLM, VLLMUnfit
from config import Config, RolloutConfig
from model import ModelConfig, Qwen3MoE
from presets import parse_config
from rollout import Node, next_limit
from task import Codec

REPO = Path(__file__).resolve().parent.parent


SAMPLES = 4


def make_hub(tmp_path, tiny_checkpoint, reward="exact", prompts=None, **ledger):
    """A hub that wants as many groups as it can get; versions 0 to 2 are on disk, 0 is
    published."""
    model = Qwen3MoE(ModelConfig.from_dir(tiny_checkpoint))
    weights.load_hf(model, tiny_checkpoint)
    for version in range(3):
        write_version(tmp_path / "hub", version, list(model.hf_tensors()), tiny_checkpoint)
    sampling = {"n": SAMPLES, "temperature": 1.0, "max_tokens": 8, "stop_token_ids": [1]}
    run = {
        "num_generations": SAMPLES,
        "max_new_tokens": 8,
        "sampling": sampling,
        "dtype": "float32",
        "seed": 0,
        "max_model_len": 64,
        "reward": reward,
        "reward_digest": reward_digest(reward),
    }
    prompts = prompts or [{"prompt": "abcde>", "answer": "edcba"}] * 100_000
    ledger = {
        "prompts_per_step": 1,
        "max_age": 10**6,
        "num_steps": 10**6,
        "lease_timeout_s": 120.0,
        **ledger,
    }
    hub = Hub(
        Ledger(**ledger), prompts, Codec(tiny_checkpoint).encode, tmp_path / "hub", 32, "t", run
    )
    hub.start("127.0.0.1", 0)
    publish(hub, 0)
    return hub


@pytest.fixture
def hub(tmp_path, tiny_checkpoint):
    hub = make_hub(tmp_path, tiny_checkpoint)
    yield hub
    hub.close(patience_s=0.0)


def run_node(hub, tmp_path, command, scenario, **flags):
    """A whole node, until `scenario(node)` returns."""
    flags = {
        "stall_timeout_s": 2.0,
        "load_timeout_s": 5.0,
        "beat_s": 0.2,
        "reward_workers": 1,
        "max_groups": 1,
        **flags,
    }

    async def run():
        async with aiohttp.ClientSession(hub.url, headers={"Authorization": "Bearer t"}) as session:
            node = Node(
                RolloutConfig(hub.url, dir=str(tmp_path / "node"), vllm_command=command, **flags),
                session,
            )
            await node.join()
            tasks = [
                asyncio.create_task(t())
                for t in (node.follow_weights, node.watch_vllm, node.answer_prompts, node.beat)
            ]
            done = asyncio.create_task(scenario(node))
            try:
                await asyncio.wait([done, *tasks], timeout=200, return_when=asyncio.FIRST_COMPLETED)
                for task in tasks:
                    assert not task.done(), task.exception()
                assert done.done(), "the scenario did not end in 200 s"
                return done.result()
            finally:
                for task in (*tasks, done):
                    task.cancel()
                await asyncio.wait([*tasks, done])
                await node.close()

    return asyncio.run(run())


async def until(condition, within_s=60.0):
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.02)  # a short poll of another task's state


async def groups(hub, more):
    """Wait for so many more groups, within a minute: the bound on recovery."""
    target = len(hub.ledger.buffer) + more
    await until(lambda: len(hub.ledger.buffer) >= target)


def test_requests_that_fail_or_come_back_damaged_cost_a_retry_or_a_sample(
    hub, tmp_path, fake_vllm_command, capfd
):
    """A dropped connection or a 500 is repeated; a damaged sample is dropped and counted, its
    siblings are used."""

    async def scenario(node):
        dropped = {}
        await groups(hub, 2)
        for kind in ("drop", "oom", "twice", "nan", "null", "empty", "long"):
            before = hub.ledger.counts["samples_dropped"]
            await node.vllm.post("/fault", {"kind": kind})
            await groups(hub, 3)
            dropped[kind] = hub.ledger.counts["samples_dropped"] - before
        return dropped

    dropped = run_node(hub, tmp_path, fake_vllm_command, scenario)
    assert dropped == {"drop": 0, "oom": 0, "twice": 0, "nan": 1, "null": 1, "empty": 1, "long": 1}
    assert all(len(g.lengths) in (SAMPLES, SAMPLES - 1) for g in hub.ledger.buffer)
    log = capfd.readouterr().out
    assert (
        log.count("generation failed") == 2 and log.count("1 x a log-prob that is not finite") == 2
    )
    assert "1 x no tokens" in log and re.search(r"1 x \d+ tokens, asked for at most 8", log)
    hub.ledger.check()


def test_a_vllm_that_hangs_dies_or_stalls_in_an_update_is_started_again(
    hub, tmp_path, fake_vllm_command, capfd
):
    """Each within a minute, on the newest weights, without a prompt lost."""

    async def scenario(node):
        await groups(hub, 2)
        for published, kind in [
            (0, "hang"),
            (0, "crash"),
            (1, "crash_update"),
            (2, "stall_update"),
        ]:
            with contextlib.suppress(aiohttp.ClientError):  # a crash does not answer
                await node.vllm.post("/fault", {"kind": kind})
            await asyncio.to_thread(publish, hub, published)
            await until(
                lambda published=published: node.version == published and node.ready.is_set()
            )
            await groups(hub, 40)  # more than the answers that were on their way
        return [max(g.versions.tolist()) for g in hub.ledger.buffer]

    versions = run_node(hub, tmp_path, fake_vllm_command, scenario)
    assert versions == sorted(versions) and versions[-1] == 2
    log = capfd.readouterr().out
    assert (
        log.count("vLLM is up") == 5
        and "wait 'vllm progress': rollout node waits for a token from vLLM since" in log
    )
    assert "vLLM ended with status 1" in log and log.count("failed, vLLM is started again") == 2
    assert sorted(g.ordinal for g in hub.ledger.buffer) == list(range(len(hub.ledger.buffer)))
    hub.ledger.check()
    assert not [
        p for p in psutil.Process().children(recursive=True) if "fake_vllm" in " ".join(p.cmdline())
    ]


def test_a_prompt_that_fails_everywhere_is_set_aside_and_named(
    tmp_path, tiny_checkpoint, fake_vllm_command, monkeypatch
):
    prompts = [
        {"prompt": "xyzab>" if i == 2 else "abcde>", "answer": "edcba"} for i in range(100_000)
    ]
    (poison,) = Codec(tiny_checkpoint).encode({"prompt": "x"})
    monkeypatch.setenv("FAKE_VLLM_FAULT", json.dumps({"kind": "poison", "token": poison}))
    hub = make_hub(tmp_path, tiny_checkpoint, prompts=prompts, max_failures=2)
    try:
        run_node(hub, tmp_path, fake_vllm_command, lambda node: groups(hub, 8), max_tries=2)
        assert list(hub.ledger.set_aside) == [2] and hub.status()["set_aside"] == 1
        (news,) = [line for line in hub.take_news() if "set aside" in line]
        assert re.match(
            r"prompt 2 failed 2 times and is set aside: 2 tries, the last: generation failed: .*out of memory",
            news,
        )
        assert {g.ordinal for g in hub.ledger.buffer}.isdisjoint({2}) and len(
            hub.ledger.buffer
        ) >= 8
        hub.ledger.check()
    finally:
        hub.close(patience_s=0.0)


def test_a_node_killed_between_pause_and_resume_leaves_no_process_and_loses_no_prompt(
    hub, tmp_path, fake_vllm_command
):
    command = [
        sys.executable,
        str(REPO / "rollout.py"),
        hub.url,
        "--dir",
        str(tmp_path / "node"),
        "--beat-s",
        "0.2",
        "--vllm-command",
        fake_vllm_command,
    ]
    hub.node_timeout_s = 2.0
    env = {**os.environ, "CISPO_TOKEN": "t"}

    def wait(condition):
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, (tmp_path / "out").read_text()[-2000:]
            time.sleep(0.05)  # polling other processes

    with open(tmp_path / "out", "w") as out:
        node = subprocess.Popen(command, env=env, stdout=out, stderr=out)
        try:
            wait(lambda: len(hub.ledger.buffer) > 2)
            children = psutil.Process(node.pid).children(recursive=True)
            assert any("fake_vllm" in " ".join(p.cmdline()) for p in children)
            (port,) = re.findall(r"port (\d+)", (tmp_path / "out").read_text())

            async def stall():
                async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
                    await session.post("/fault", json={"kind": "stall_update"})

            asyncio.run(stall())
            publish(hub, 1)
            wait(lambda: "stalled in mid-update" in (tmp_path / "node/vllm.log").read_text())
            node.send_signal(signal.SIGKILL)
            node.wait()
            _, alive = psutil.wait_procs(children, timeout=20)
            assert not alive, [p.cmdline() for p in alive]
            wait(lambda: not hub.ledger.leases)  # contact is lost: handed out again
            node = subprocess.Popen(command, env=env, stdout=out, stderr=out)
            before = len(hub.ledger.buffer)
            wait(lambda: len(hub.ledger.buffer) > before + 2)
            assert hub.ledger.buffer[-1].oldest_version == 1
            # what the first one left is gone
            assert [p.name for p in (tmp_path / "node").glob("v*/")] == ["v1"]
        finally:
            node.send_signal(signal.SIGTERM)
            node.wait(30)
    hub.ledger.check()


DEAF = """
import runpy, signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_vllm_deaf_to_sigterm_ends_with_a_node_that_was_killed(tmp_path):
    """So do its children, one of which a signal to it would never have reached."""
    (tmp_path / "deaf.py").write_text(DEAF)
    (tmp_path / "vllm.py").write_text("import time; print('up', flush=True); time.sleep(600)")
    node = f"""
import subprocess, sys, time
sys.path.insert(0, {str(REPO)!r})
from bridge.processes import guarded
command = guarded([sys.executable, {str(tmp_path / "deaf.py")!r}, {str(tmp_path / "vllm.py")!r}], 1.0)
subprocess.Popen(command, start_new_session=True)
time.sleep(600)
"""
    node = subprocess.Popen([sys.executable, "-c", node], stdout=subprocess.PIPE, text=True)
    assert node.stdout.readline() == "up\n"
    children = psutil.Process(node.pid).children(recursive=True)
    assert len(children) == 3  # the guard, vLLM and what that started
    node.kill()
    node.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive, [p.cmdline() for p in alive]


def test_a_second_signal_does_not_break_off_the_ending_of_a_node(hub, tmp_path, fake_vllm_command):
    """A launcher signals the whole group, and then the trainer its node once more."""
    (tmp_path / "deaf.py").write_text(DEAF)
    python, fake = fake_vllm_command.split()
    command = [
        sys.executable,
        str(REPO / "rollout.py"),
        hub.url,
        "--dir",
        str(tmp_path / "node"),
        "--vllm-command",
        f"{python} {tmp_path / 'deaf.py'} {fake}",
    ]
    node = subprocess.Popen(
        command, env={**os.environ, "CISPO_TOKEN": "t"}, stdout=subprocess.PIPE, text=True
    )
    while "onto itself" not in (line := node.stdout.readline()):
        assert line, "the node has ended"
    children = psutil.Process(node.pid).children(recursive=True)
    node.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        node.wait(1.0)  # it is ending, and waits for vLLM
    node.send_signal(signal.SIGTERM)
    assert node.wait(30) == 0
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive, [p.cmdline() for p in alive]


def test_the_limit_of_prompts_in_flight_follows_vllm():
    calm, full, queued = ({"kv": kv, "waiting": w} for kv, w in ((0.3, 0), (0.95, 0), (0.3, 9)))
    assert next_limit(32, 64, 32, calm, False) == 40  # all used and room left: up
    assert next_limit(60, 64, 60, calm, False) == 64 and next_limit(64, 64, 64, calm, False) == 64
    assert next_limit(32, 64, 10, calm, False) == 32  # not what holds it back
    assert next_limit(32, 64, 32, queued, False) == 32  # more would only stand in the queue
    assert next_limit(32, 64, 32, full, False) == 24 and next_limit(32, 64, 32, calm, True) == 24
    assert next_limit(24, 64, 32, full, False) == 24  # what is in flight has yet to come down
    assert next_limit(1, 64, 1, full, True) == 1  # one prompt is always tried


def test_a_weight_update_is_not_taken_for_a_full_cache(hub, tmp_path, fake_vllm_command):
    """vLLM counts what a pause stops among its preemptions, each with its next token, which may
    come seconds after the update; a real one between two updates still lowers the limit."""

    async def scenario(node):
        await node.ready.wait()
        told, tokens = (
            lambda name=name: node.vitals.get(name, 0) for name in ("preemptions", "tokens")
        )
        await until(lambda: node.in_vllm >= 4)  # something to preempt
        limit = node.limit
        await node.vllm.post("/fault", {"kind": "slow", "s": 3.0})
        seen = tokens()
        await until(lambda: tokens() > seen)
        publish(hub, 1)  # the next token comes in 2 s, and the node looks each second
        await until(lambda: node.version == 1)
        assert told() == 0
        await until(lambda: told() > 0)
        assert node.limit >= limit
        await node.vllm.post("/fault", {"kind": "slow", "s": 0.2})
        while node.limit >= limit:  # not an update: nobody loads anything
            for route in ("/pause", "/resume"):
                await node.vllm.post(route)
            await asyncio.sleep(0.5)

    run_node(hub, tmp_path, fake_vllm_command, scenario, max_groups=32, stall_timeout_s=60.0)


def test_a_lease_whose_answer_was_lost_and_one_that_is_void_are_settled_by_the_next_beat(hub):
    async def scenario():
        async with aiohttp.ClientSession(hub.url, headers={"Authorization": "Bearer t"}) as session:

            async def post(route, **body):
                async with session.post(route, json={"node": "n", **body}) as response:
                    return await response.json()

            await post("/receipts", version=0, digest=weights.digest(hub.manifest), timing={})
            first, second = [x["lease"] for x in (await post("/lease", max=2))["leases"]]
            assert (await post("/beat", leases=[first], vllm={})) == {"drop": []} and len(
                hub.ledger.leases
            ) == 2
            hub.ledger.leases[second].granted -= 11  # by now it would have arrived
            assert (await post("/beat", leases=[first, "9-9"], vllm={"running": 3})) == {
                "drop": ["9-9"]
            }
            assert hub.ledger.returned == [1] and hub.status()["in_flight"] == 3
            assert (await post("/return", lease=first, why="cannot")) == {"returned": first}
            assert hub.ledger.returned == [0, 1] and hub.ledger.failures[0] == ["cannot (n)"]
            assert "error" in await post("/return", lease=first, why="again")

    asyncio.run(scenario())
    hub.ledger.check()


# ---- GPUs ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("visible", "cuda", "why"),
    [
        ("", "13.0", "CUDA_VISIBLE_DEVICES='' hides them"),
        (None, None, "is a build for CPUs"),
        (None, "13.0", "the driver 570.1 may be too old for CUDA 13.0"),
    ],
)
def test_gpus_that_torch_does_not_see_are_one_line_with_the_cause(
    tmp_path, monkeypatch, visible, cuda, why
):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 570.1\necho 570.1\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        ValueError, match="nvidia-smi lists 2 GPUs, and torch sees none: "
    ) as refused:
        prepare.use_cpu(parse_config(["--preset", "qwen3-0.6b"]), 1, True)
    assert why in str(refused.value) and "\n" not in str(refused.value)


def test_ranks_of_a_node_share_its_cores_to_compile(monkeypatch):
    monkeypatch.setattr(prepare, "cores", lambda: 24)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cfg = Config()
    with inductor.patch(compile_threads=7):  # monkeypatch would take the option away at the end
        monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "7")
        prepare.use_machine(cfg, 8, True)
        assert inductor.compile_threads == 7  # the user's
        monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS")
        for ranks, threads in ((8, 3), (48, 1)):
            prepare.use_machine(cfg, ranks, True)
            assert inductor.compile_threads == threads


@pytest.mark.parametrize(
    ("args", "shared", "width", "added", "used"),
    [
        ("", False, 768, "--data-parallel-size 8", 8),
        ("", False, 750, "--data-parallel-size 6", 6),  # experts are cut over all GPUs
        ("--enable-expert-parallel", False, 750, "--data-parallel-size 8", 8),
        ("--tensor-parallel-size 4", False, 768, "--data-parallel-size 2", 8),
        ("-tp 8", False, 768, "", 8),
        ("-tp 2 -dp 2", False, 768, "", 4),
        ("", True, 768, "", 1),
    ],
)
def test_vllm_alone_on_a_node_uses_all_of_its_gpus(
    tmp_path, monkeypatch, args, shared, width, added, used
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    if shared:
        monkeypatch.setenv("CISPO_GPUS_SHARED", "1")
    (tmp_path / "config.json").write_text(json.dumps({"moe_intermediate_size": width}))
    run = {"dtype": "bfloat16", "max_model_len": 8, "seed": 0}
    server = VLLM(RolloutConfig(hub="", vllm_args=args), run, tmp_path / "log")
    command = " ".join(server._command(tmp_path, 1)[0])
    assert command.endswith(f"{args} {added}".strip() or "--disable-uvicorn-access-log")
    assert server.gpus == used
    # checksums of vLLMs of other sizes are not compared
    assert (f"on {used} x " in server.engine()) == (used > 1)


def test_more_gpus_than_there_are_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    run = {"dtype": "bfloat16", "max_model_len": 8, "seed": 0}
    server = VLLM(RolloutConfig(hub="", vllm_args="-tp 8"), run, tmp_path / "log")
    with pytest.raises(VLLMUnfit, match=r"'-tp 8' asks for 8 GPUs .* and 4 are visible here"):
        server._command(tmp_path, 1)


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ("--quantization fp8_per_block", "quantizes the router"),
        ("-q fp8_per_tensor", "quantizes the router"),
        ("""-q fp8_per_block --quantization-config '{"ignore": ["*.mlp.gate"]}'""", ""),
        ("--enable-expert-parallel", ""),
        ("--enable-expert-parallel --enable-eplb", "could not be proven"),
        ("""--speculative-config '{"rejection_sample_method": "synthetic"}'""", "did not draw"),
        ("""--speculative-config '{"method": "ngram", "num_speculative_tokens": 4}'""", ""),
        ("--spec-method ngram", "on a CPU: wrong log-probs"),
        ("""--hf-overrides '{"rope_theta": 1e6}'""", 'put "head_dtype": "float32" in it'),
        ("""--hf-overrides '{"rope_theta": 1e6, "head_dtype": "float32"}'""", ""),
    ],
)
def test_a_vllm_whose_samples_cannot_be_trained_on_is_refused(tmp_path, args, why, monkeypatch):
    if not why.startswith("on a CPU"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    why = why.removeprefix("on a CPU: ")
    (tmp_path / "config.json").write_text(json.dumps({"num_experts": 8}))
    run = {"dtype": "bfloat16", "max_model_len": 8, "seed": 0}
    server = VLLM(RolloutConfig(hub="", vllm_args=args), run, tmp_path / "log")
    with pytest.raises(VLLMUnfit, match=why) if why else contextlib.nullcontext():
        server._command(tmp_path, 1)


def test_a_router_that_is_quantized_all_the_same_is_seen_in_vllm_itself(tmp_path, monkeypatch):
    server = VLLM(RolloutConfig(hub=""), {}, tmp_path / "log")
    names = ["dp0:pp0:pcp0:tp0:model.layers.0.mlp.experts.w13_weight_scale"]

    async def answer(route, body):
        return {"checksums": dict.fromkeys(names, "x")}

    monkeypatch.setattr(server, "post", answer)
    assert list(asyncio.run(server.checksums())) == names
    names.append("dp0:pp0:pcp0:tp0:model.layers.0.mlp.gate.weight_scale_inv")
    with pytest.raises(VLLMUnfit, match=r"quantized 1 routers, such as dp0.*mlp\.gate"):
        asyncio.run(server.checksums())
