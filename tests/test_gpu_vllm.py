"""A real vLLM on a GPU: that weights arrive in it under CUDA graphs, all of them and unchanged, that
its log-probs are the trainer's, and runs of the trainer beside it on one GPU.

    CISPO_TEST_GPU=1 python -m pytest tests/test_gpu_vllm.py

tests/test_vllm.py says the same of a CPU, in fp32. Here it is bf16, so policies are compared by the
KL between them. Four minutes on one GPU of 16 GB; vLLM takes a minute of them to start.
"""

import asyncio
import dataclasses
import json

import pytest
import torch
from published import two_checkpoints
from test_gpu import MOE, show, train
from test_vllm import reference, running_requests

from bridge.vllm import VLLM
from config import RolloutConfig
from loss import mismatch

pytestmark = pytest.mark.gpu

RUN = {"dtype": "bfloat16", "max_model_len": 1024, "seed": 0, "experts": True}
VLLM_ARGS = "--gpu-memory-utilization 0.4 --max-num-seqs 64"  # few graphs: a quick start
SAMPLING = {
    "n": 16,
    "temperature": 1.0,
    "max_tokens": 64,
    "logprobs": 0,
    "ignore_eos": True,
    "detokenize": False,
}
PROMPT = [5, 9, 2, 7, 3, 28]
# of policies that differ by bf16's rounding, and of two that have nothing in common
SAME, OTHER = 5e-3, 0.5


@pytest.fixture(scope="module")
def loop():
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    cfg = dataclasses.replace(MOE, max_position_embeddings=1024)
    return two_checkpoints(tmp_path_factory.mktemp("checkpoints"), cfg)


@pytest.fixture(scope="module")
def server(loop, checkpoints, tmp_path_factory):
    log = tmp_path_factory.mktemp("vllm") / "vllm.log"
    vllm = VLLM(RolloutConfig(hub="", vllm_args=VLLM_ARGS), RUN, log)
    loop.run_until_complete(vllm.start(checkpoints[0]))
    loop.run_until_complete(vllm.load(checkpoints[0], 0))
    yield vllm
    loop.run_until_complete(vllm.stop())


def kl(checkpoint, choice, begin=0, end=None) -> float:
    """Of transformers' policy in fp32 from vLLM's, in nats a token, over these tokens."""
    logprobs, _ = reference(checkpoint, PROMPT + choice["token_ids"], len(PROMPT))
    found = torch.tensor([x["logprob"] for x in choice["logprobs"]["content"]])
    return mismatch(logprobs[begin:end], found[begin:end])["gen_kl_error"].mean().item()


def test_reloading_the_same_weights_changes_no_checksum(loop, server, checkpoints):
    before = loop.run_until_complete(server.checksums())
    for _ in range(2):
        show("seconds of a reload", str(loop.run_until_complete(server.load(checkpoints[0], 0))))
    assert len(before) > 10 and loop.run_until_complete(server.checksums()) == before


def test_after_loading_other_weights_the_policy_is_theirs(loop, server, checkpoints):
    sums = {0: loop.run_until_complete(server.checksums())}
    for version in (1, 0):
        loop.run_until_complete(server.load(checkpoints[version], version))
        choices = loop.run_until_complete(server.generate(PROMPT, SAMPLING, version))
        same = max(kl(checkpoints[version], choice) for choice in choices[:4])
        other = min(kl(checkpoints[1 - version], choice) for choice in choices[:4])
        show(f"version {version}: KL from its own policy", same)
        show(f"version {version}: KL from the other one", other)
        assert same < SAME < OTHER < other
        found = loop.run_until_complete(server.checksums())
        assert (found == sums[0]) == (version == 0)


def test_requests_in_flight_at_an_update_carry_both_versions(loop, server, checkpoints):
    """And each token's log-prob is the one of the weights that its version names."""
    sampling = {**SAMPLING, "n": 32, "max_tokens": 900}

    async def scenario():
        await server.load(checkpoints[0], 3)
        request = asyncio.create_task(server.generate(PROMPT, sampling, 3))
        while not await running_requests(server):
            pass  # each turn is a request to the server's metrics
        await server.load(checkpoints[1], 4)
        assert not request.done()
        return await request

    choices = loop.run_until_complete(asyncio.wait_for(scenario(), 120))
    mixed = [c for c in choices if [s["version"] for s in c["weight_versions"]] == ["3", "4"]]
    assert mixed, [c["weight_versions"] for c in choices]
    boundary = mixed[0]["weight_versions"][1]["start"]
    own = [kl(checkpoints[0], mixed[0], 0, boundary), kl(checkpoints[1], mixed[0], boundary)]
    other = [kl(checkpoints[1], mixed[0], 0, boundary), kl(checkpoints[0], mixed[0], boundary)]
    show("tokens before the update", str(boundary))
    show("KL from each token's own policy, from the other one", str([*own, *other]))
    assert max(own) < SAME < OTHER < min(other)


@pytest.mark.parametrize(
    "flags", [("--compile",), ("--no-compile", "--router-replay", "sampler")], ids=["plain", "r3"]
)
def test_a_run_beside_a_real_vllm(tmp_path, tiny_checkpoint, flags):
    """The trainer in bf16 and vLLM in bf16 share the GPU; every version is proven by its sums."""
    vllm = "--vllm-args '--gpu-memory-utilization 0.3 --max-num-seqs 64'"
    done = train(tmp_path, tiny_checkpoint, vllm, *flags, "--max-num-steps", "8")
    (log,) = (tmp_path / "runs" / "tiny").glob("**/vllm*.log")
    print(done.stdout[-3500:], log.read_text()[-3000:])
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()
    steps = [line for line in map(json.loads, lines) if "step" in line]
    found = [line["train/gen_kl_error_same_version"] for line in steps]
    show("gen_kl_error, same version", str(found))
    assert len(steps) == 8 and all(k is None or k < SAME for k in found)
