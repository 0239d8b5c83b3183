"""Against a real vLLM server: that weights arrive, all of them and unchanged, and what a token's
version means.

One server for the file; it takes about half a minute to start.
"""

import asyncio
import dataclasses
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from published import write_version

from bridge import publish, receive, weights
from bridge.groups import damage, pack_group
from bridge.hub import Hub
from bridge.ledger import Ledger
from bridge.sample import Sample
from bridge.vllm import VLLM
from bridge.weights import read_tensors
from config import RolloutConfig
from loss import mismatch
from model import ModelConfig, Qwen3MoE

RUN = {"dtype": "float32", "max_model_len": 512, "seed": 0}
GREEDY = {
    "n": 1,
    "temperature": 0.0,
    "max_tokens": 24,
    "logprobs": 0,
    "ignore_eos": True,
    "detokenize": False,
}
PROMPTS = [[5, 9, 2, 7, 3, 28], [11, 4, 4, 6, 20, 28], [2, 2, 2, 2, 2, 28]]


@pytest.fixture(scope="module")
def loop():
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture(scope="module")
def server(loop, tiny_checkpoint, tmp_path_factory):
    """A vLLM on the tiny checkpoint, loaded as version 0."""
    log = tmp_path_factory.mktemp("vllm") / "vllm.log"
    vllm = VLLM(RolloutConfig(hub=""), RUN, log)
    loop.run_until_complete(vllm.start(tiny_checkpoint))
    loop.run_until_complete(vllm.load(tiny_checkpoint, 0))
    yield vllm
    loop.run_until_complete(vllm.stop())


@pytest.fixture(scope="module")
def other_checkpoint(tiny_checkpoint, tmp_path_factory):
    """The same architecture with other weights: fresh ones, large enough that every layer
    matters."""
    cfg = dataclasses.replace(ModelConfig.from_dir(tiny_checkpoint), initializer_range=0.15)
    model = Qwen3MoE(cfg)
    model.init_weights(torch.Generator().manual_seed(7))
    return write_version(
        tmp_path_factory.mktemp("other"), 1, list(model.hf_tensors()), tiny_checkpoint
    )


def reference(checkpoint, tokens, num_prompt):
    """transformers' log-probs of tokens[num_prompt:], and its greedy choice at each of them."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        logprobs = model(torch.tensor([tokens])).logits[0].log_softmax(-1)[num_prompt - 1 : -1]
    sampled = torch.tensor(tokens[num_prompt:])
    return logprobs.gather(-1, sampled[:, None]).squeeze(-1), logprobs.argmax(-1).tolist()


def test_reloading_the_same_weights_changes_no_checksum(loop, server, tiny_checkpoint):
    before = loop.run_until_complete(server.checksums())
    for version in (0, 0):
        loop.run_until_complete(server.load(tiny_checkpoint, version))
    assert len(before) > 10 and loop.run_until_complete(server.checksums()) == before


def test_after_loading_other_weights_greedy_tokens_and_logprobs_match_transformers(
    loop, server, tiny_checkpoint, other_checkpoint
):
    first = loop.run_until_complete(server.checksums())
    for version, checkpoint in ((1, other_checkpoint), (2, tiny_checkpoint)):
        loop.run_until_complete(server.load(checkpoint, version))
        for prompt in PROMPTS:
            (choice,) = loop.run_until_complete(server.generate(prompt, GREEDY, version))
            tokens = choice["token_ids"]
            logprobs, greedy = reference(checkpoint, prompt + tokens, len(prompt))
            assert tokens == greedy
            found = torch.tensor([x["logprob"] for x in choice["logprobs"]["content"]])
            # two fp32 implementations of the same sums: the difference is rounding, as in
            # tests/test_model.py
            assert (found - logprobs).abs().max() < 1e-4
            error = mismatch(logprobs, found)
            assert (
                error["gen_kl_error"].mean() < 1e-9
                and error["token_mult_prob_error"].mean() < 1.0001
            )
            assert choice["weight_versions"] == [
                {"version": str(version), "start": 0, "end": len(tokens)}
            ]
        if version == 1:
            # the checksums can tell weights apart
            assert loop.run_until_complete(server.checksums()) != first
    assert loop.run_until_complete(server.checksums()) == first


def test_requests_in_flight_at_an_update_carry_both_versions(
    loop, server, tiny_checkpoint, other_checkpoint
):
    """And each token's log-prob is the one of the weights that its version names."""
    # some seconds, even of a busy machine
    sampling = {**GREEDY, "n": 32, "temperature": 1.0, "max_tokens": 500}
    prompt = PROMPTS[0]

    async def scenario():
        await server.load(tiny_checkpoint, 3)
        request = asyncio.create_task(server.generate(prompt, sampling, 3))
        while not await running_requests(server):
            pass  # each turn is a request to the server's metrics
        await server.load(other_checkpoint, 4)
        assert not request.done()
        return await request

    choices = loop.run_until_complete(asyncio.wait_for(scenario(), 120))
    mixed = [c for c in choices if [s["version"] for s in c["weight_versions"]] == ["3", "4"]]
    assert mixed, [c["weight_versions"] for c in choices]
    samples = [Sample(prompt, sampling, 500, None) for _ in choices]
    for sample, choice in zip(samples, choices):
        sample.add([], choice)
    blob = pack_group(samples, [0.0] * len(samples), lease="1-1")
    _, tensors = weights_of_blob(blob)
    assert (
        sorted(set(tensors["versions"].tolist())) == [3, 4] and len(tensors["versions"]) == 32 * 500
    )
    choice = mixed[0]
    boundary = choice["weight_versions"][1]["start"]
    assert boundary == choice["weight_versions"][0]["end"]
    found = torch.tensor([x["logprob"] for x in choice["logprobs"]["content"]])
    old, _ = reference(tiny_checkpoint, prompt + choice["token_ids"], len(prompt))
    new, _ = reference(other_checkpoint, prompt + choice["token_ids"], len(prompt))
    # Before the boundary exactly the old policy, after it exactly the new one: this vLLM computes
    # the KV cache of what it resumes anew. Either policy is far off on the other side.
    assert (
        (found[:boundary] - old[:boundary]).abs().max()
        < 1e-4
        < (found[:boundary] - new[:boundary]).abs().mean()
    )
    assert (
        (found[boundary:] - new[boundary:]).abs().max()
        < 1e-4
        < (found[boundary:] - old[boundary:]).abs().mean()
    )


def test_requests_in_flight_can_keep_the_cache_that_older_weights_computed(
    loop, server, tiny_checkpoint, other_checkpoint, monkeypatch
):
    """Then nothing is computed again, and what comes after the update is neither policy's own."""
    prompt = PROMPTS[1]

    async def update(recompute):
        monkeypatch.setitem(server.run, "recompute_kv_cache", recompute)
        await server.load(tiny_checkpoint, 5)
        sampling = {**GREEDY, "n": 8, "temperature": 1.0, "max_tokens": 500}
        request = asyncio.create_task(server.generate(prompt, sampling, 5))
        while not await running_requests(server):
            pass  # each turn is a request to the server's metrics
        before = (await server.vitals())["preemptions"]
        await server.load(other_checkpoint, 6)
        assert not request.done()
        choices = await request
        return (await server.vitals())["preemptions"] - before, choices[0]

    for recompute in (True, False):
        preempted, choice = loop.run_until_complete(asyncio.wait_for(update(recompute), 120))
        assert (preempted > 0) == recompute
        _, after = choice["weight_versions"]
        found = torch.tensor([x["logprob"] for x in choice["logprobs"]["content"]])[
            after["start"] :
        ]
        new, _ = reference(other_checkpoint, prompt + choice["token_ids"], len(prompt))
        assert ((found - new[after["start"] :]).abs().max() < 1e-4) == recompute


async def running_requests(server) -> bool:
    async with server.session.get("/metrics") as response:
        lines = (await response.text()).splitlines()
    return any(
        line.startswith("vllm:generation_tokens_total") and not line.endswith(" 0.0")
        for line in lines
    ) and any(
        line.startswith("vllm:num_requests_running") and not line.endswith(" 0.0") for line in lines
    )


def weights_of_blob(blob):
    from bridge.groups import parse_group

    return parse_group(bytearray(blob))


def test_samples_without_finite_logprobs_are_not_whole(loop, server):
    (choice,) = loop.run_until_complete(server.generate(PROMPTS[0], GREEDY, 4))
    assert not damage(choice)
    for bad in (None, math.nan, -math.inf):
        damaged = json.loads(json.dumps(choice))
        damaged["logprobs"]["content"][3]["logprob"] = bad
        assert "not finite" in damage(damaged)
    for missing in ("logprobs", "token_ids", "weight_versions"):
        assert damage({**choice, missing: None})


def test_a_bad_directory_is_an_error_and_not_a_hang(loop, server, tiny_checkpoint, tmp_path):
    with pytest.raises(RuntimeError, match="update_weights"):
        loop.run_until_complete(server.load(tmp_path, 9))
    # rollout.Node starts a fresh server then (tests/test_run.py); here only: the error came, and in
    # time


def test_this_vllm_has_every_route_that_is_asked_of_it(loop, server):
    assert loop.run_until_complete(server.probe()).startswith("0.3")


NODE = """
import asyncio, json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from config import RolloutConfig
from bridge.vllm import VLLM

async def main():
    vllm = VLLM(RolloutConfig(hub=""), json.loads(sys.argv[2]), Path(sys.argv[3]))
    await vllm.start(Path(sys.argv[4]))
    sums = await vllm.checksums()
    await vllm.post("/pause?mode=keep")
    await vllm.post("/start_weight_update")
    print("SUMS", json.dumps(sums), flush=True)
    await asyncio.Event().wait()  # killed here, between pause and resume

asyncio.run(main())
"""


@pytest.mark.slow
def test_60_updates_end_bit_for_bit_where_a_fresh_server_starts_which_dies_with_its_node(
    loop, server, tiny_checkpoint, tmp_path
):
    """After each update the rollout host's files equal the trainer's tensors, digest by digest; at
    the end all runtime tensors of vLLM equal those of a server that is started on that directory.
    That one is paused for an update when its node is killed by -9, and may not stay behind."""
    hub = Hub(
        Ledger(1, 1, 1, 60.0),
        [],
        None,
        tmp_path / "hub",
        32,
        "t",
        {"num_generations": 2, "max_new_tokens": 8},
    )
    hub.start("127.0.0.1", 0)
    model = Qwen3MoE(ModelConfig.from_dir(tiny_checkpoint))
    weights.load_hf(model, tiny_checkpoint)
    rng, directory, timings = torch.Generator().manual_seed(0), None, []
    publisher = publish.Publisher(
        model,
        torch.float32,
        hub.weights_dir,
        tiny_checkpoint,
        full_every=16,
        keep=2,
        store=torch.distributed.HashStore(),
        deadline_s=60.0,
        hub=hub,
    )
    headers = {"Authorization": "Bearer t", "X-Run": hub.run["id"]}
    for version in range(61):
        publisher.publish(version)
        trained = {name: weights.describe(t) for name, t in model.hf_tensors()}
        with torch.no_grad():
            for p in model.parameters():  # three per cent of the elements move
                p.view(-1)[torch.randint(p.numel(), (1 + p.numel() // 33,), generator=rng)] *= 1.003
        while hub.published < version:
            assert publisher.error is None, publisher.error
            time.sleep(0.01)  # polling a thread
        have, manifest = directory, json.loads(hub.manifest)
        work = receive.fetch(manifest, tmp_path / "node", have, hub.url, headers)
        directory, timing = loop.run_until_complete(work)
        assert {name: weights.describe(t) for name, t in read_tensors(directory)} == trained
        timings.append(timing | loop.run_until_complete(server.load(directory, version)))
        if have is not None:
            shutil.rmtree(have)
    publisher.close()
    hub.close(patience_s=0.0)
    middle = {name: sorted(t[name] for t in timings)[30] for name in timings[0]}
    print("medians of 61 updates:", {name: round(value, 4) for name, value in middle.items()})
    # of 2 MB: deltas, but for the first
    assert sum(t["fetch_bytes"] < 300_000 for t in timings) == 60
    assert middle["stopped_s"] <= 0.3
    sums = loop.run_until_complete(server.checksums())

    repo = str(Path(weights.__file__).parent)
    command = [
        sys.executable,
        "-c",
        NODE,
        repo,
        json.dumps(RUN),
        str(tmp_path / "fresh.log"),
        str(directory),
    ]
    node = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = next(line for line in node.stdout if line.startswith("SUMS"))
        assert json.loads(line.removeprefix("SUMS")) == sums
        started = psutil.Process(node.pid).children(recursive=True)
        assert any("api_server" in " ".join(p.cmdline()) for p in started)
    finally:
        node.kill()
        node.wait()
    _, alive = psutil.wait_procs(started, timeout=30)
    assert not alive, [p.cmdline() for p in alive]
