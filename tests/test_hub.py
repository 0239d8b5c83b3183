"""hub.py: what is refused and why, and that prompts are neither lost, nor used twice, nor trained
too late."""

import asyncio
import heapq
import json
import random
import struct
import threading
import time

import aiohttp
import pytest
import torch
from published import publish, write_version
from safetensors.torch import save

from bridge.groups import Group, Refused, parse_group, views
from bridge.hub import Hub
from bridge.ledger import Ledger
from bridge.waits import WaitOver
from bridge.weights import digest
from task import Prompts

TOKEN, VOCAB, G, NEW = "secret", 32, 4, 8


def group_tensors(**change):
    """A group of two samples, with one tensor changed."""
    tensors = {
        "lengths": torch.tensor([2, 3], dtype=torch.int32),
        "token_ids": torch.tensor([3, 1, 4, 5, 1], dtype=torch.int32),
        "logprobs": torch.tensor([-0.1, -0.2, -0.3, -0.4, -0.5]),
        "versions": torch.zeros(5, dtype=torch.int32),
        "rewards": torch.tensor([0.0, 1.0]),
        "truncated": torch.tensor([0, 0], dtype=torch.uint8),
    }
    tensors.update(change)
    return {name: t for name, t in tensors.items() if t is not None}


@pytest.fixture
def hub(tmp_path):
    """A hub with version 0 published and two prompts to a step; its node "n" has sent a receipt."""
    (tmp_path / "config.json").write_text("{}")
    weights_dir = tmp_path / "weights"
    write_version(weights_dir, 0, [("w", torch.arange(4.0))], static=tmp_path)
    prompts = [{"prompt": "ab>", "answer": "ba"}] * 100
    run = {"num_generations": G, "max_new_tokens": NEW}
    hub = Hub(Ledger(2, 1, 10, 600.0), prompts, lambda e: [2, 3, 4], weights_dir, VOCAB, TOKEN, run)
    hub.start("127.0.0.1", 0)
    publish(hub, 0)
    receipt = {"node": "n", "version": 0, "digest": digest(hub.manifest), "timing": {}}
    assert call(hub, "POST", "/receipts", json=receipt)[0] == 200
    yield hub
    hub.close(patience_s=0.0)


def call(hub, method, route, token=TOKEN, **kwargs):
    """(status, body) of one request."""

    async def request():
        headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
        async with aiohttp.ClientSession(hub.url, headers=headers) as session:
            async with session.request(method, route, **kwargs) as response:
                return response.status, (await response.read()).decode(errors="replace")

    return asyncio.run(request())


def lease(hub, count=1):
    status, body = call(hub, "POST", "/lease", json={"node": "n", "max": count})
    assert status == 200, body
    return [granted["lease"] for granted in json.loads(body)["leases"]]


def push(hub, lease_id, **change):
    return call(
        hub, "POST", "/groups", data=save(group_tensors(**change), metadata={"lease": lease_id})
    )


# ---- refusals ------------------------------------------------------------------------------------
@pytest.mark.parametrize("token", [None, "wrong", ""])
@pytest.mark.parametrize(
    ("method", "route"),
    [
        ("GET", "/status"),
        ("GET", "/run"),
        ("POST", "/lease"),
        ("POST", "/groups"),
        ("POST", "/receipts"),
        ("GET", "/weights/latest"),
        ("GET", "/weights/0/config.json"),
    ],
)
def test_every_route_refuses_a_missing_or_wrong_token(hub, token, method, route):
    status, body = call(hub, method, route, token=token)
    assert status == 401 and "token" in body


def test_a_bad_group_is_refused_with_the_reason_and_the_run_goes_on(hub):
    (lease_id,) = lease(hub)
    t = group_tensors()
    for change, status, reason in [
        ({"lengths": t["lengths"].long()}, 400, "lengths is torch.int64"),
        ({"logprobs": t["logprobs"].double()}, 400, "logprobs is torch.float64"),
        ({"rewards": t["rewards"][None]}, 400, "rewards is torch.float32 [1, 2]"),
        ({"versions": None}, 400, "tensor versions is missing"),
        ({"extra": t["rewards"]}, 400, "unexpected tensor extra"),
        ({"lengths": torch.tensor([2, 2], dtype=torch.int32)}, 422, "lengths add up to 4, not 5"),
        ({"lengths": torch.tensor([-4, 9], dtype=torch.int32)}, 422, "no tokens"),
        ({"lengths": torch.tensor([0, 5], dtype=torch.int32)}, 422, "no tokens"),
        ({"logprobs": t["logprobs"][:4]}, 422, "not one for each token"),
        ({"rewards": torch.zeros(3)}, 422, "not one for each sample"),
        ({"token_ids": t["token_ids"] + VOCAB - 4}, 422, f"outside the vocabulary of {VOCAB}"),
        ({"token_ids": -t["token_ids"]}, 422, "outside the vocabulary"),
        ({"logprobs": t["logprobs"] * torch.nan}, 422, "log-prob is not finite"),
        ({"logprobs": -t["logprobs"]}, 422, "above 0"),
        ({"rewards": torch.tensor([0.0, torch.inf])}, 422, "reward is not finite"),
        ({"versions": t["versions"] + 1}, 422, "policy versions 1..1 outside 0..0"),
        (
            {
                "lengths": torch.tensor([5], dtype=torch.int32),
                "rewards": torch.zeros(1),
                "truncated": torch.zeros(1, dtype=torch.uint8),
            },
            422,
            "1 samples, expected 2 to 4",
        ),
    ]:
        found, body = push(hub, lease_id, **change)
        assert (found, reason in body) == (status, True), (change.keys(), found, body)
    long = torch.ones(2 * NEW + 1)
    found, body = push(
        hub,
        lease_id,
        lengths=torch.tensor([NEW + 1, NEW], dtype=torch.int32),
        token_ids=long.int(),
        logprobs=-long,
        versions=0 * long.int(),
    )
    assert found == 422 and f"more than {NEW} tokens" in body
    assert push(hub, lease_id)[0] == 200  # the same lease is still good


def test_a_body_is_read_as_the_library_reads_it_without_a_copy():
    tensors = group_tensors(
        extra=torch.arange(6, dtype=torch.int16).view(1, 3, 2), none=torch.zeros(0, 2)
    )
    body = bytearray(save(tensors, metadata={"lease": "l"}))
    metadata, found = views(body)
    assert metadata == {"lease": "l"} and found.keys() == tensors.keys()
    for name, t in tensors.items():
        assert found[name].dtype == t.dtype and torch.equal(found[name], t), name
    body[-1] ^= 1  # of a one-byte tensor, which the library puts last
    assert found["truncated"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"shape": [3]}, "not where the tensor before it ends"),
        ({"shape": [-2]}, "shape"),
        ({"shape": [True, 2]}, "shape"),
        ({"shape": [2**40, 2**40]}, "shape"),
        ({"shape": "2"}, "shape"),
        ({"shape": [16], "data_offsets": [0, 64]}, "not where"),  # past the end
        ({"data_offsets": [4, 12]}, "not where"),
        ({"data_offsets": [0, 8, 8]}, "not where"),
        ({"data_offsets": None}, ""),
        ({"dtype": "F8"}, "F8"),
        ({"dtype": ["F32"]}, ""),
        (None, "bytes in a body of"),  # no tensor is there for its bytes
        (7, ""),
    ],
)
def test_a_header_that_says_something_else_than_its_body_holds_is_refused(change, why):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    entry = {**entry, **change} if isinstance(change, dict) else change
    text = json.dumps({"x": entry} if entry else {}).encode()
    text += b" " * (-len(text) % 8)
    with pytest.raises(Refused, match=f"body is not safetensors: .*{why}"):
        parse_group(bytearray(struct.pack("<Q", len(text)) + text + bytes(8)))


def test_tensors_out_of_line_and_metadata_that_is_no_text_are_refused():
    def blob(text: bytes, data: bytes) -> bytearray:
        return bytearray(struct.pack("<Q", len(text)) + text + data)

    with pytest.raises(Refused, match="not aligned"):
        entry = b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}} '
        parse_group(blob(entry + b" " * (-len(entry) % 8 + 1), bytes(4)))
    with pytest.raises(Refused, match="no text"):
        parse_group(blob(b'{"__metadata__": {"turns_per_sample": 1}}', b""))
    with pytest.raises(Refused, match="a header of 65537 bytes"):
        parse_group(blob(b" " * 65_537, b""))


def test_a_body_without_a_length_is_read_too_and_as_bounded(hub):
    async def pieces(body):
        for at in range(0, len(body), 1 << 16):
            yield body[at : at + (1 << 16)]

    body = save(group_tensors(), metadata={"lease": lease(hub)[0]})
    assert call(hub, "POST", "/groups", data=pieces(bytes(2 << 20)))[0] == 413
    assert call(hub, "POST", "/groups", data=pieces(body))[0] == 200


def test_garbage_oversize_and_unknown_leases_are_refused_and_the_run_goes_on(hub):
    for body in (b"", b"garbage", b"\xff" * 4096, (1 << 60).to_bytes(8, "little") + b"{}"):
        status, reason = call(hub, "POST", "/groups", data=body)
        assert status == 400 and "not safetensors" in reason
    status, reason = call(hub, "POST", "/groups", data=b"\0" * (2 << 20))
    assert status == 413 and "larger than any group" in reason
    for lease_id in ("7-1", "", "0-1"):
        status, reason = push(hub, lease_id)
        assert status == 409 and "unknown lease" in reason
    for body in (
        b"{",
        b"[]",
        b'{"node": "n"}',
        b'{"node": 1, "max": 2}',
        b'{"node": "n", "max": 0}',
    ):
        assert call(hub, "POST", "/lease", data=body)[0] in (400, 422)
    # without a receipt
    assert call(hub, "POST", "/lease", json={"node": "stranger", "max": 1})[0] == 422
    assert call(hub, "GET", "/weights/latest?after=x")[0] == 400
    for route in (
        "/weights/1/config.json",
        "/weights/0/manifest.json",
        "/weights/0/..%2Fconfig.json",
    ):
        assert call(hub, "GET", route)[0] == 404
    bad_digest = {"node": "n", "version": 0, "digest": "0", "timing": {}}
    assert call(hub, "POST", "/receipts", json=bad_digest)[0] == 409
    assert call(hub, "POST", "/receipts", json={**bad_digest, "version": 5})[0] == 422
    (lease_id,) = lease(hub)
    assert push(hub, lease_id)[0] == 200


def test_a_group_counts_once_whatever_is_retried(hub):
    (lease_id,) = lease(hub)
    assert push(hub, lease_id)[0] == 200
    assert push(hub, lease_id)[0] == 409
    assert hub.status()["buffered"] == 1


def test_a_batch_is_handed_over_once_it_is_whole(hub):
    for lease_id in lease(hub, 2):
        assert hub.next_batch(0, timeout_s=0.05) is None
        assert push(hub, lease_id)[0] == 200
    batch = hub.next_batch(0, timeout_s=10)
    assert [g.ordinal for g in batch] == [0, 1] and batch[0].prompt_ids == [2, 3, 4]
    assert hub.status()["taken"] == 2 and hub.status()["counts"]["samples_dropped"] == 2 * (G - 2)


def test_a_waiting_lease_is_granted_when_a_receipt_admits_it(hub):
    assert len(lease(hub, 9)) == 4  # (version 0 + age 1 + 1) * 2 prompts
    hub.next_batch(1, timeout_s=0.01)  # the trainer is at version 1, and publishes it

    async def scenario():
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with aiohttp.ClientSession(hub.url, headers=headers) as session:
            waiting = asyncio.create_task(session.post("/lease", json={"node": "n", "max": 9}))
            done, _ = await asyncio.wait([waiting], timeout=0.3)
            assert not done
            write_version(hub.weights_dir, 1, [("w", torch.ones(4))], static=hub.weights_dir / "v0")
            await asyncio.to_thread(publish, hub, 1)
            receipt = {"node": "n", "version": 1, "digest": digest(hub.manifest), "timing": {}}
            assert (await session.post("/receipts", json=receipt)).status == 200
            return await (await asyncio.wait_for(waiting, 10)).json()

    assert len(asyncio.run(scenario())["leases"]) == 2


def test_a_batch_that_the_trainer_no_longer_waits_for_is_not_taken(hub):
    """The hub's thread stands still for longer than the trainer waits: the prompts are trained
    later, not lost."""
    for lease_id in lease(hub, 2):
        assert push(hub, lease_id)[0] == 200
    go_on, hub.call_timeout_s = threading.Event(), 0.2
    hub._loop.call_soon_threadsafe(go_on.wait, 60)
    with pytest.raises(WaitOver, match="wait 'hub thread'"):
        hub.next_batch(0, timeout_s=0.1)
    go_on.set()
    hub.call_timeout_s = 30.0
    assert hub.status()["taken"] == 0
    assert [g.ordinal for g in hub.next_batch(0, timeout_s=10)] == [0, 1]


def test_a_node_that_dies_while_it_waits_for_prompts_gets_none(hub):
    receipt(hub, "dead")
    lease(hub, 4)  # all that there is

    async def scenario():
        headers, before = {"Authorization": f"Bearer {TOKEN}"}, hub.nodes["dead"].last_seen_s
        async with asyncio.timeout(30), aiohttp.ClientSession(hub.url, headers=headers) as session:
            waiting = asyncio.create_task(session.post("/lease", json={"node": "dead", "max": 9}))
            while hub.nodes["dead"].last_seen_s == before:
                await asyncio.sleep(0.01)  # a short poll of another thread's state
            await asyncio.to_thread(hub.release, "dead")
            hub.ledger.max_age = 5  # now there is more, and a receipt wakes those who wait
            await asyncio.to_thread(receipt, hub, "n")
            waiting.cancel()

    asyncio.run(scenario())
    assert {held.node for held in hub.ledger.leases.values()} == {"n"}
    assert len(lease(hub, 9)) == 8


# ---- weights -------------------------------------------------------------------------------------
def receipt(hub, node, version=0, **more):
    body = {"node": node, "version": version, "digest": digest(hub.manifest), "timing": {}, **more}
    assert call(hub, "POST", "/receipts", json=body)[0] == 200


def test_the_log_says_when_a_version_has_landed_everywhere_and_status_who_lags(hub):
    receipt(hub, "m")
    hub.take_news()
    write_version(hub.weights_dir, 1, [("w", torch.ones(4))], static=hub.weights_dir / "v0")
    publish(hub, 1)
    receipt(hub, "n", 1)
    assert hub.take_news() == [] and {n: s["behind"] for n, s in hub.status()["nodes"].items()} == {
        "n": 0,
        "m": 1,
    }
    receipt(hub, "m", 1)
    assert hub.take_news() == ["v1 landed on 2/2 engines, digest ok"]


def test_nodes_whose_vllm_made_different_things_of_one_version_are_named(hub):
    receipt(hub, "n", checksum="a" * 64)
    receipt(hub, "m", checksum="a" * 64)
    # others may differ from it
    receipt(hub, "split", checksum="c" * 64, engine="--tensor-parallel-size 2")
    assert not hub.status()["counts"].get("checksums_differ")
    receipt(hub, "x", checksum="b" * 64)
    (news,) = [line for line in hub.take_news() if "not the same" in line]
    assert news == f"v0 is not the same in vLLM on x as on n: checksums {'b' * 16} and {'a' * 16}"
    assert hub.status()["counts"]["checksums_differ"] == 1


def test_a_receipt_for_any_manifest_of_a_version_is_honest(hub):
    """After a node's refusal the version is published again, with more files, while another loads
    it as it was."""
    write_version(hub.weights_dir, 1, [("w", torch.ones(4))], static=hub.weights_dir / "v0")
    publish(hub, 1)
    first = digest(hub.manifest)
    hub.set_published(hub.manifest + b" ")
    assert digest(hub.manifest) != first
    for node, known in (("n", first), ("m", digest(hub.manifest))):
        receipt(hub, node, 1, digest=known)
    body = {"node": "x", "version": 1, "digest": digest(b"another"), "timing": {}}
    assert call(hub, "POST", "/receipts", json=body)[0] == 409


def test_what_a_node_fetches_is_known_from_its_question_to_its_receipt_or_its_end(hub):
    assert hub.oldest_in_use() == float("inf")
    assert call(hub, "GET", "/weights/latest?after=-1&node=n")[0] == 200
    assert hub.oldest_in_use() == 0
    receipt(hub, "n")
    assert hub.oldest_in_use() == float("inf")
    for version in (1, 2):
        write_version(
            hub.weights_dir, version, [("w", torch.ones(4))], static=hub.weights_dir / "v0"
        )
    publish(hub, 2)
    assert call(hub, "GET", "/weights/latest?after=0&node=n")[0] == 200
    assert hub.oldest_in_use() == 1  # the deltas after what it has; or the newest whole one, 2
    hub.node_timeout_s = 0.0
    assert hub.oldest_in_use() == float("inf")  # it is gone


# ---- ledger --------------------------------------------------------------------------------------
def made_group(ordinal, version, rewards=(1.0, 0.0)):
    t = group_tensors(
        versions=torch.full((5,), version, dtype=torch.int32), rewards=torch.tensor(rewards)
    )
    return Group(ordinal, [2], **t)


def test_expired_leases_are_handed_out_again_and_their_late_groups_refused():
    ledger = Ledger(prompts_per_step=2, max_age=0, num_steps=5, lease_timeout_s=10)
    first = ledger.grant("n", 0, now=0.0)
    ledger.expire(now=11.0)
    again = ledger.grant("n", 0, now=11.0)
    assert (again.ordinal, again.id) == (first.ordinal, "0-2") and first.id not in ledger.leases
    assert ledger.counts["leases_expired"] == 1
    ledger.check()


def test_a_group_that_would_be_too_old_is_waited_for_and_one_that_is_gets_a_new_lease():
    ledger = Ledger(prompts_per_step=1, max_age=1, num_steps=5, lease_timeout_s=10)
    slow, quick = ledger.grant("n", 0, 0.0), ledger.grant("n", 0, 0.0)
    ledger.accept(quick.id, made_group(quick.ordinal, 0))
    assert [g.ordinal for g in ledger.take(0)] == [quick.ordinal]
    newer = ledger.grant("n", 1, 0.0)
    ledger.accept(newer.id, made_group(newer.ordinal, 1))
    assert ledger.take(1) is None  # a batch is there, but `slow` could not be trained after it
    ledger.expire(now=11.0)
    assert [g.ordinal for g in ledger.take(1)] == [newer.ordinal]
    again = ledger.grant("n", 1, 11.0)
    assert again.ordinal == slow.ordinal
    ledger.accept(again.id, made_group(again.ordinal, 1))
    # two steps later: dropped, and returned
    assert ledger.take(3) is None and ledger.counts["groups_too_old"] == 1
    assert ledger.grant("n", 3, 11.0).ordinal == slow.ordinal
    ledger.check()


@pytest.mark.parametrize("max_age", [0, 1, 3])
def test_under_random_delays_losses_and_retries_every_prompt_is_trained_once_and_in_time(max_age):
    """A simulated run: leases are answered in any order, some never; nodes lag behind with their
    weights."""
    rng = random.Random(max_age)
    P, steps = 4, 50
    # every second lease is lost
    ledger = Ledger(P, max_age, steps, lease_timeout_s=30, max_failures=1000)
    trained, now, version, node_version, held = [], 0.0, 0, 0, []
    while version < steps:
        now += 1.0
        ledger.expire(now)
        if rng.random() < 0.5:
            node_version = rng.randint(node_version, version)
        while lease := ledger.grant("n", node_version, now):
            if rng.random() < 0.9:  # else the node is lost with it
                held.append((lease, node_version))
        rng.shuffle(held)
        for lease, sampled in held[: rng.randint(0, 4)]:
            if lease.id in ledger.leases:
                ledger.accept(lease.id, made_group(lease.ordinal, rng.randint(sampled, version)))
        held = held[4:]
        batch = ledger.take(version)
        ledger.check()
        if batch:
            assert len(batch) == P
            assert all(version - g.oldest_version <= max_age for g in batch)
            trained += [g.ordinal for g in batch]
            version += 1
        assert now < 20_000, "the simulated run got stuck"
    assert len(trained) == len(set(trained)) == P * steps
    assert set(trained) == set(range(P * steps))  # no hole: what was lost or too old came back


@pytest.mark.parametrize("sigma", [0.5, 1.0])
def test_long_answers_are_trained_as_surely_as_short_ones(sigma):
    """A simulated run of the preset scalerl's shape: 48 prompts a step, age 8, log-normal answer
    times. Without an expired lease nothing is dropped for age, so each answer is trained, however
    long it took."""
    rng, P, steps, now, version = random.Random(0), 48, 40, 0.0, 0
    ledger, trainer_free, in_flight, took, trained, again = (
        Ledger(P, 8, steps, 1e9),
        0.0,
        [],
        {},
        [],
        [],
    )
    while version < steps:
        while len(in_flight) < 400 and (lease := ledger.grant("n", version, now)):
            again += [took[lease.ordinal]] if lease.ordinal in took else []
            took[lease.ordinal] = rng.lognormvariate(4.5, sigma)
            heapq.heappush(in_flight, (now + took[lease.ordinal], lease.ordinal, lease))
        if now >= trainer_free and (batch := ledger.take(version)):
            trained += [g.ordinal for g in batch]
            version, trainer_free = version + 1, now + 5.0
            continue
        now = min(t for t in (trainer_free, *(answer[0] for answer in in_flight[:1])) if t > now)
        while in_flight and in_flight[0][0] <= now:
            lease = heapq.heappop(in_flight)[2]
            ledger.accept(lease.id, made_group(lease.ordinal, lease.version))
    assert (ledger.counts["groups_too_old"], again) == (0, [])
    assert sorted(trained) == list(range(P * steps))


def test_admission_never_hands_out_more_than_the_run_needs():
    ledger = Ledger(prompts_per_step=2, max_age=5, num_steps=3, lease_timeout_s=1)
    granted = [ledger.grant("n", 0, time.monotonic()) for _ in range(20)]
    assert sum(lease is not None for lease in granted) == 6


def test_prompts_too_long_or_solved_are_passed_over_and_every_ordinal_keeps_its_prompt():
    """Ten rows of which two are too long; a group with mean reward 0.75 or more ends its row's
    turn. All is counted, a checkpoint in between changes nothing, and when no row is left the
    ledger says so."""
    examples = [{"prompt": str(i), "answer": ""} for i in range(10)]
    prompts = Prompts(examples, seed=1, skip={3, 7})
    solved_by = {2: 0, 5: 1}  # row: the epoch in which it is solved

    def make():
        return Ledger(2, 0, 10**6, 60.0, prompts=prompts, pass_rate=0.75)

    ledger, seen = make(), []
    for step in range(30):
        leases = [ledger.grant("n", step, 0.0) for _ in range(2)]
        for lease in leases:
            row, epoch = prompts.row(lease.ordinal), lease.ordinal // 10
            seen.append((epoch, row))
            reward = [1.0, 0.5] if solved_by.get(row, 99) <= epoch else [1.0, 0.0]
            ledger.accept(lease.id, made_group(lease.ordinal, step, reward))
        assert len(ledger.take(step)) == 2
        ledger.check()
        if step % 7 == 3:
            state, ledger = json.loads(json.dumps(ledger.state())), make()
            ledger.restore(state)
            ledger.check()
            assert ledger.state() == state
    whole = {epoch: sorted(row for e, row in seen if e == epoch) for epoch in range(4)}
    assert whole[0] == [0, 1, 2, 4, 5, 6, 8, 9] and whole[1] == [0, 1, 4, 5, 6, 8, 9]
    assert whole[2] == whole[3] == [0, 1, 4, 6, 8, 9]
    assert (
        ledger.solved == {2, 5}
        and ledger.next_ordinal == 60 + ledger.num_skipped == ledger.frontier
    )
    assert not ledger.none_left
    ledger.solved |= {0, 1, 4, 6, 8, 3}  # 3 is too long as well: after a resume with another limit
    assert not ledger.none_left
    ledger.solved |= {9}
    assert ledger.none_left and ledger.grant("n", 30, 0.0) is None


def test_a_node_that_has_died_loses_its_prompts_long_before_one_that_is_silent(hub):
    """The kernel closes the connections of a process that is killed; a node that is only slow keeps
    them."""
    hub.hung_up_timeout_s = 0.5
    receipt = {"node": "dead", "version": 0, "digest": digest(hub.manifest), "timing": {}}
    assert call(hub, "POST", "/receipts", json=receipt)[0] == 200

    async def scenario():
        headers, held = {"Authorization": f"Bearer {TOKEN}"}, {}
        sessions = {node: aiohttp.ClientSession(hub.url, headers=headers) for node in ("n", "dead")}
        for node, session in sessions.items():
            async with session.post("/lease", json={"node": node, "max": 1}) as response:
                (held[node],) = [granted["lease"] for granted in (await response.json())["leases"]]
            async with session.post(
                "/beat", json={"node": node, "leases": [held[node]], "vllm": {}}
            ) as response:
                assert (await response.json())["drop"] == []
        await sessions["dead"].close()
        deadline = time.monotonic() + 10
        while held["dead"] in hub.ledger.leases and time.monotonic() < deadline:
            await asyncio.sleep(0.05)  # a short poll of another thread's state
        found = set(hub.ledger.leases)
        await sessions["n"].close()
        return found == {held["n"]}

    assert asyncio.run(scenario())
    assert any("hub waits for dead" in line for line in hub.take_news())


def test_the_speed_of_the_rollouts_gpus_is_over_all_nodes_and_null_without_gpus(hub):
    beats = {"a": (3.0, 24.0, 7200), "b": (3.0, 12.0, 3600)}  # seconds, GPU seconds, tokens
    for node, (over_s, gpu_s, made) in beats.items():
        receipt = {"node": node, "version": 0, "digest": digest(hub.manifest), "timing": {}}
        assert call(hub, "POST", "/receipts", json=receipt)[0] == 200
        load = {"over_s": over_s, "gpu_s": gpu_s, "made": made}
        call(hub, "POST", "/beat", json={"node": node, "leases": [], "vllm": load})
    found = hub.take_timing()
    assert found["rollout/tokens_per_s_per_gpu"] == 10800 / 36 and found["rollout/node_s"] == 6
    call(hub, "POST", "/beat", json={"node": "a", "leases": [], "vllm": {"over_s": 3, "made": 9}})
    assert hub.take_timing()["rollout/tokens_per_s_per_gpu"] is None
