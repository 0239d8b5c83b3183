"""Rollout nodes: beside one that refuses, with a vLLM that dies at the worst moment or never
starts, far from a hub."""

import asyncio
import contextlib
import itertools
import json
import re
import runpy
import shlex
import signal
import socket
import sys
import time
import types
from pathlib import Path

import aiohttp
import pytest
import torch
from aiohttp import web
from programs import run_program
from test_failures import REPO, groups, make_hub, run_node, until

import bridge.publish
from bridge import files, weights
from bridge.hub import Hub
from bridge.ledger import Ledger
from bridge.processes import LocalRollout
from bridge.vllm import VLLM, VLLMUnfit
from config import RolloutConfig
from model import ModelConfig, Qwen3MoE
from rollout import Node
from task import Codec


@pytest.fixture
def hub(tmp_path, tiny_checkpoint):
    hub = make_hub(tmp_path, tiny_checkpoint)
    yield hub
    hub.close(patience_s=0.0)


def test_a_node_that_loads_while_another_refuses_the_same_version_stays(
    tmp_path, tiny_checkpoint, fake_vllm_command
):
    """Two whole nodes and a real publisher: one has fetched v1 and loads it when a bit of the file
    flips. The other refuses it, v1 is published again, and the receipt of the first names the
    manifest that it was given."""
    hub = make_hub(tmp_path, tiny_checkpoint)
    model = Qwen3MoE(ModelConfig.from_dir(tiny_checkpoint))
    weights.load_hf(model, tiny_checkpoint)
    publisher = bridge.publish.Publisher(
        model,
        torch.float32,
        hub.weights_dir,
        tiny_checkpoint,
        full_every=1,
        keep=4,
        store=torch.distributed.HashStore(),
        deadline_s=60.0,
        hub=hub,
    )

    async def run():
        async with asyncio.timeout(200), contextlib.AsyncExitStack() as stack:
            nodes, tasks, loading, go_on = {}, [], asyncio.Event(), asyncio.Event()
            for name in ("first", "second"):
                session = aiohttp.ClientSession(hub.url, headers={"Authorization": "Bearer t"})
                cfg = RolloutConfig(
                    hub.url, dir=str(tmp_path / name), vllm_command=fake_vllm_command
                )
                node = nodes[name] = Node(cfg, await stack.enter_async_context(session))
                node.name = name
                await node.join()
                stack.push_async_callback(node.close)
            load = nodes["first"].vllm.load

            async def held_up(checkpoint, version):
                if version == 1:
                    loading.set()
                    await go_on.wait()
                return await load(checkpoint, version)

            nodes["first"].vllm.load = held_up
            # The publisher has cleared and written version 0 by now; the nodes start on it one
            # after the other.
            publisher.publish(0)
            tasks = [asyncio.create_task(nodes["first"].follow_weights())]
            fine = lambda: not any(task.done() and task.exception() for task in tasks)
            await until(lambda: "first" in hub.nodes)
            publisher.publish(1)
            await loading.wait()
            given = hub.manifest
            file = next((hub.weights_dir / "v1").glob("model-*.safetensors"))
            whole = bytearray(file.read_bytes())
            whole[-5] ^= 1
            file.write_bytes(whole)
            tasks.append(asyncio.create_task(nodes["second"].follow_weights()))
            await until(lambda: "second" in hub.nodes and hub.nodes["second"].version == 1)
            # the second may have met the mended file a moment earlier
            await until(lambda: hub.manifest != given)
            go_on.set()
            await until(lambda: hub.nodes["first"].version == 1 or not fine())
            found = [task.exception() for task in tasks if task.done()]
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            return found

    try:
        assert asyncio.run(run()) == []
        # it may ask again before the version is mended
        assert hub.ledger.counts["updates_refused"] >= 1
        assert hub.nodes["first"].digest != weights.digest(hub.manifest)
    finally:
        publisher.close()
        hub.close(patience_s=0.0)


def test_a_vllm_that_dies_between_load_and_checksum_is_started_again(
    hub, tmp_path, fake_vllm_command, capfd
):
    async def scenario(node):
        await groups(hub, 2)
        await node.vllm.post("/fault", {"kind": "crash_checksum"})
        from published import publish

        await asyncio.to_thread(publish, hub, 1)
        await until(lambda: hub.nodes[node.name].version == 1 and node.ready.is_set())
        await groups(hub, 3)

    run_node(hub, tmp_path, fake_vllm_command, scenario)
    log = capfd.readouterr().out
    assert log.count("vLLM is up") == 2 and "loading v1 failed, vLLM is started again" in log
    hub.ledger.check()


def test_a_sample_of_another_form_is_dropped_and_named(hub, tmp_path, fake_vllm_command, capfd):
    async def scenario(node):
        await groups(hub, 1)
        await node.vllm.post("/fault", {"kind": "odd"})
        await groups(hub, 3)

    run_node(hub, tmp_path, fake_vllm_command, scenario)
    assert "it has not the form of a sample: KeyError('finish_reason')" in capfd.readouterr().out
    assert hub.ledger.counts["samples_dropped"] == 1


def test_a_generation_may_take_as_long_as_its_lease_and_no_longer(
    tmp_path, tiny_checkpoint, fake_vllm_command, capfd
):
    """There is one deadline: the hub's, which comes with the lease."""
    hub = make_hub(tmp_path, tiny_checkpoint, lease_timeout_s=1.5)

    async def scenario(node):
        await groups(hub, 1)
        await node.vllm.post("/fault", {"kind": "hang"})
        await until(lambda: hub.ledger.counts["leases_expired"])
        await until(
            lambda: (
                "wait 'generation': rollout node waits for vLLM's answer to lease"
                in capfd.readouterr().out
            )
        )

    try:
        run_node(hub, tmp_path, fake_vllm_command, scenario, stall_timeout_s=100.0, beat_s=100.0)
    finally:
        hub.close(patience_s=0.0)
    assert not hasattr(RolloutConfig("http://h:1"), "request_timeout_s")


def test_nodes_of_one_host_name_and_process_id_have_names_of_their_own(tmp_path):
    names = {
        Node(RolloutConfig("http://h:1", dir=str(tmp_path / str(i))), None).name for i in range(3)
    }
    assert len(names) == 3 and all(name.startswith(f"{socket.gethostname()}:") for name in names)


def test_what_a_killed_local_node_held_goes_back_at_once(hub, tmp_path, fake_vllm_command):
    args = f"--vllm-command {shlex.quote(fake_vllm_command)} --max-groups 2 --beat-s 0.2"
    local = LocalRollout(hub, tmp_path / "rollout", args, tmp_path / "rollout.log")
    try:
        deadline = time.monotonic() + 120
        while not hub.nodes or not hub.ledger.leases:
            assert local.process.poll() is None and time.monotonic() < deadline, (
                tmp_path / "rollout.log"
            ).read_text()
            time.sleep(0.02)  # polling another process
        (name,) = hub.nodes
        local.process.send_signal(signal.SIGKILL)
        local.process.wait(30)
        local.keep(len(hub.ledger.buffer), lambda line: None)
        assert name not in hub.status()["nodes"] and not hub.ledger.held_by(name)
        assert hub.ledger.counts["leases_of_lost_nodes"]
    finally:
        local.stop()


# ---- what never starts ---------------------------------------------------------------------------
PYDANTIC = """
(APIServer pid=77) INFO 11-26 07:00:00 [api_server.py:1] vLLM API server version 0.33.0
(APIServer pid=77) Traceback (most recent call last):
(APIServer pid=77)   File "<frozen runpy>", line 198, in _run_module_as_main
(APIServer pid=77) pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
(APIServer pid=77)   Value error, User-specified max_model_len (1024) is greater than 512. [type=value_error]
(APIServer pid=77)     For further information visit https://errors.pydantic.dev/2.14/v/value_error
"""
ENGINE = """
(EngineCore pid=78) ERROR 11-26 07:00:00 [core.py:866] EngineCore failed to start.
(EngineCore pid=78) ValueError: {}
(APIServer pid=77) Traceback (most recent call last):
(APIServer pid=77) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {{}}
"""


def first_starts(tmp_path, output, count):
    """What each of the first starts of a vLLM that says this and ends is answered by."""
    (tmp_path / "output").write_text(output)
    command = (
        f"{sys.executable} -c 'import sys; sys.exit(open(sys.argv[1]).read())' "
        f"{tmp_path / 'output'}"
    )
    run = {"dtype": "float32", "max_model_len": 64, "seed": 0}
    server, found = VLLM(RolloutConfig("", vllm_command=command), run, tmp_path / "vllm.log"), []
    for _ in range(count):
        with pytest.raises((RuntimeError, VLLMUnfit)) as e:
            asyncio.run(server.start(tmp_path))
        found.append((e.type, str(e.value)))
    return found


def test_what_vllm_refuses_is_tried_once_and_its_own_reason_is_said(tmp_path):
    (kind, said), *_ = first_starts(tmp_path, PYDANTIC, 1)
    assert (
        kind is VLLMUnfit
        and ": Value error, User-specified max_model_len (1024) is greater than 512.; see" in said
        and "\n" not in said
    )
    (kind, said), *_ = first_starts(
        tmp_path, "usage: api_server.py\napi_server.py: error: argument --seed: invalid int", 1
    )
    assert kind is VLLMUnfit and "argument --seed: invalid int" in said


def test_an_engine_that_fails_twice_alike_is_given_up_but_memory_may_come_free(tmp_path):
    (first, _), (second, said) = first_starts(
        tmp_path, ENGINE.format("head size 7 is not supported"), 2
    )
    assert (first, second) == (
        RuntimeError,
        VLLMUnfit,
    ) and "ValueError: head size 7 is not supported" in said
    found = first_starts(
        tmp_path, ENGINE.format("Free memory on device (1 GiB) is less than desired"), 3
    )
    assert [kind for kind, _ in found] == [RuntimeError] * 3 and "Free memory on device" in found[
        -1
    ][1]


# ---- addresses -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("h0:8790", "expected http://HOST:PORT"),
        ("http://::1:8790", "expected http://HOST:PORT"),
        ("http://h0", "expected http://HOST:PORT"),
        ("http://h0:port", "expected http://HOST:PORT"),
    ],
)
def test_what_is_no_address_of_a_hub_is_one_line(address, why, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rollout.py", address])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(REPO / "rollout.py"), run_name="__main__")
    (line,) = capsys.readouterr().out.splitlines()
    assert end.value.code == 2 and why in line and repr(address) in line


@pytest.mark.parametrize(
    "flags", ["--hub-host no-such-host.invalid", "--hub-host 127.0.0.1 --hub-port {taken}"]
)
def test_a_hub_that_cannot_listen_is_one_line_before_anything_is_made(tmp_path, flags):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        flags = flags.format(taken=taken.getsockname()[1])
        found = run_program(REPO / "train_cispo.py", *flags.split(), cwd=tmp_path, timeout_s=200)
    assert found.returncode == 2 and "Traceback" not in found.stderr, found.stderr
    (line,) = found.stderr.strip().splitlines()
    assert line.startswith("train_cispo.py: error: --hub-host") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_a_hub_on_ipv6_is_reached_by_the_address_it_says(tmp_path, tiny_checkpoint, host):
    run = {"num_generations": 2, "max_new_tokens": 8}
    hub = Hub(Ledger(1, 1, 1, 60.0), [], Codec(tiny_checkpoint).encode, tmp_path, 32, "t", run)
    hub.start(host, 0)
    try:
        assert re.fullmatch(r"http://\[::1\]:\d+", hub.url)

        async def get():
            async with aiohttp.ClientSession(
                hub.url, headers={"Authorization": "Bearer t"}
            ) as session:
                async with session.get("/run") as response:
                    return await response.json()

        assert asyncio.run(get()) == json.loads(json.dumps(hub.run))
    finally:
        hub.close(patience_s=0.0)
    server = files.FileServer(Path(tmp_path), "t", "::1", 0)
    assert re.fullmatch(r"http://\[::1\]:\d+", server.url)


def test_of_several_engines_the_fullest_cache_counts_and_requests_add_up(tmp_path):
    """Two engines that are half full are not one that is full."""
    text = "".join(
        f'vllm:{name}{{engine="{i}"}} {value}\n'
        for name, value in (("kv_cache_usage_perc", 0.45), ("num_requests_running", 3.0))
        for i in range(2)
    )

    async def run():
        app = web.Application()
        app.router.add_get("/health", lambda request: asyncio.sleep(0, web.Response()))
        app.router.add_get("/metrics", lambda request: asyncio.sleep(0, web.Response(text=text)))
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        vllm = VLLM(RolloutConfig("http://h:1"), {}, tmp_path / "log")
        vllm.process = types.SimpleNamespace(returncode=None)
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        async with aiohttp.ClientSession(url) as vllm.session:
            found = await vllm.vitals()
        await runner.cleanup()
        return found

    found = asyncio.run(run())
    assert found["kv"] == 0.45 and found["running"] == 6.0


@pytest.mark.parametrize(
    ("cuda", "asked", "fp32"),
    [(True, False, True), (True, True, True), (False, True, True), (False, False, False)],
)
def test_on_a_gpu_vllm_s_logits_are_fp32_as_the_trainer_s_always_are(
    cuda, asked, fp32, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    run = {"dtype": "bfloat16", "max_model_len": 64, "seed": 0, "fp32_lm_head": asked}
    flags = types.SimpleNamespace(vllm_command="", vllm_args="", vllm_threads=0)
    command, _ = VLLM(flags, run, tmp_path / "log")._command(tmp_path, 1)
    given = dict(itertools.pairwise(command)).get("--hf-overrides")
    assert (given is not None and json.loads(given) == {"head_dtype": "float32"}) == fp32
