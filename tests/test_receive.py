"""receive.py: what is damaged on the way is never loaded, and a node always gets there."""

import asyncio
import contextlib
import errno
import json
import os
import shutil
import socket
import threading
import time
from types import SimpleNamespace

import aiohttp
import pytest
import torch
from aiohttp import web
from published import SHARD, manifest_of, publish, write_version
from test_weights import loaded, mounted, nudge, publisher, same
from test_weights import model as model  # the fixture

import bridge.publish
from bridge import delta, receive, waits
from bridge.hub import Hub
from bridge.ledger import Ledger
from bridge.receive import NoRoom, fetch, path_to
from bridge.weights import MANIFEST, WeightsError
from config import RolloutConfig
from rollout import Node

FULL, DELTA = f"{SHARD}.safetensors", f"{SHARD}.delta"


def steps(model, count, seed=0):
    """Tensors of versions 0, 1, ...: each differs from the one before in a few elements, as at a
    low learning rate."""
    rng, versions = (
        torch.Generator().manual_seed(seed),
        [{n: t.clone() for n, t in model.hf_tensors()}],
    )
    for _ in range(count - 1):
        new = {name: t.clone() for name, t in versions[-1].items()}
        for tensor in new.values():
            where = torch.randint(tensor.numel(), (1 + tensor.numel() // 50,), generator=rng)
            tensor.view(-1)[where] *= 1.0001
        versions.append(new)
    return versions


# ---- receive -------------------------------------------------------------------------------------
@pytest.fixture
def hub(tmp_path, tiny_checkpoint, model):
    """A hub with versions 0 to 3, the first whole; 0 is published."""
    ledger = Ledger(1, 1, 1, 60.0)
    hub = Hub(
        ledger, [], None, tmp_path / "hub", 32, "t", {"num_generations": 2, "max_new_tokens": 8}
    )
    hub.versions = steps(model, 4)
    for version, tensors in enumerate(hub.versions):
        before = hub.versions[version - 1] if version else None
        write_version(
            hub.weights_dir,
            version,
            tensors,
            tiny_checkpoint,
            hub.run["id"],
            before,
            full=version == 0,
        )
    hub.start("127.0.0.1", 0)
    publish(hub, 0)
    yield hub
    hub.close(patience_s=0.0)


def fetch_from(hub, version, root, have=None, url=None, change=()):
    publish(hub, version)
    manifest = {**json.loads(hub.manifest), **dict(change)}
    headers = {"Authorization": "Bearer t", "X-Run": hub.run["id"]}
    return asyncio.run(fetch(manifest, root, have, url or hub.url, headers))


def test_a_node_follows_by_deltas_and_a_late_joiner_takes_the_anchor_and_the_chain(hub, tmp_path):
    first, _ = fetch_from(hub, 0, tmp_path / "node")
    assert same(first, hub.versions[0])
    second, timing = fetch_from(hub, 1, tmp_path / "node", have=first)
    assert same(second, hub.versions[1]) and same(first, hub.versions[0])
    assert timing["fetch_bytes"] == (hub.weights_dir / "v1" / DELTA).stat().st_size
    assert (second / "tokenizer.json").samefile(first / "tokenizer.json")
    fourth, timing = fetch_from(hub, 3, tmp_path / "node", have=second)  # one was missed
    assert same(fourth, hub.versions[3])
    assert timing["fetch_bytes"] == sum(
        (hub.weights_dir / v / DELTA).stat().st_size for v in ("v2", "v3")
    )
    late, timing = fetch_from(hub, 3, tmp_path / "late")
    assert (
        same(late, hub.versions[3])
        and timing["fetch_bytes"] > (hub.weights_dir / "v0" / FULL).stat().st_size
    )
    for name in ("config.json", "tokenizer.json"):
        assert (late / name).read_bytes() == (hub.weights_dir / "v0" / name).read_bytes()
    assert not list(tmp_path.glob("*/v*.tmp"))


def test_the_cheapest_way_by_bytes_is_taken():
    whole = [{"version": v, "kind": "full", "bytes": 100} for v in (0, 4)]
    deltas = [{"version": v, "kind": "delta", "bytes": 20} for v in (1, 2, 3, 4, 5)]
    shard = {"name": "s", "files": [*whole, *deltas]}

    def way(held):
        return [(f["version"], f["kind"]) for f in path_to(shard, 5, held)]

    assert way(4) == [(5, "delta")] and way(3) == [(4, "delta"), (5, "delta")]
    assert way(0) == [(v, "delta") for v in (1, 2, 3, 4, 5)]  # 100 bytes, against 120
    assert way(None) == [(4, "full"), (5, "delta")] and way(-7) == way(None)
    with pytest.raises(WeightsError, match="no way to v6 of s from v5"):
        path_to(shard, 6, 5)


def flip(data, at=-1000):
    return (
        data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        if at != -1
        else data[:-1] + bytes([data[-1] ^ 1])
    )


DAMAGE = [
    ("v0", FULL, flip, "tensor .* differs from the manifest"),
    ("v0", FULL, lambda data: flip(data, 12), "header differs from the manifest"),
    ("v0", FULL, lambda data: data[:-4], "status 416|fetch"),
    ("v0", FULL, None, "status 404"),
    ("v0", "config.json", lambda data: data.replace(b"128", b"129"), "config.json: digest differs"),
    ("v1", DELTA, flip, "v1/.*delta: digest differs"),
    ("v1", DELTA, lambda data: flip(data, 12), "v1/.*delta: digest differs"),
    ("v1", DELTA, None, "status 404"),
]


@pytest.mark.parametrize(("version", "name", "damage", "reason"), DAMAGE)
def test_damage_on_the_way_is_found_and_nothing_is_kept(
    hub, tmp_path, monkeypatch, version, name, damage, reason
):
    """One flipped bit in a tensor, a header or a delta; a file that is cut, missing or another:
    each is refused by name, and once it is mended the node takes it."""
    monkeypatch.setattr(receive, "PATIENCE_S", 0.3)
    have = fetch_from(hub, 0, tmp_path / "node")[0] if version == "v1" else None
    source = hub.weights_dir / version / name
    whole = source.read_bytes()
    source.write_bytes(damage(whole)) if damage else source.unlink()
    with pytest.raises((WeightsError, waits.WaitOver), match=reason):
        fetch_from(hub, 1, tmp_path / "node", have)
    assert [p.name for p in (tmp_path / "node").iterdir()] == (["v0"] if have else [])
    assert have is None or same(have, hub.versions[0])
    # a full copy from elsewhere would still do; here there is none
    if damage is not None and version == "v1":
        source.write_bytes(whole)
        assert same(fetch_from(hub, 1, tmp_path / "node", have)[0], hub.versions[1])


def test_a_delta_on_another_base_or_of_another_run_is_refused(hub, tmp_path, tiny_checkpoint):
    first, _ = fetch_from(hub, 0, tmp_path / "node")
    for run, base, reason in [
        (hub.run["id"], "7", "'base': '7'"),
        ("other", "0", "'run': 'other'"),
    ]:
        directory = hub.weights_dir / "v1"
        old, new = hub.versions[:2]
        codes = {n: delta.encode(old[n], new[n]) for n in new}
        file = bridge.publish.write_share(
            directory, SHARD, new, codes, {"run": run, "version": "1", "base": base}
        )
        manifest = manifest_of(directory)
        manifest["shards"][0]["files"][-1] = {**file, "url": ""}
        (directory / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(WeightsError, match=f"v1/.* is of .*{reason}"):
            fetch_from(hub, 1, tmp_path / "node", first)
    assert same(first, hub.versions[0])


def test_memory_of_the_node_that_has_changed_shows_and_a_full_copy_mends_it(hub, tmp_path):
    first, _ = fetch_from(hub, 0, tmp_path / "node")
    held = first / FULL
    held.write_bytes(flip(held.read_bytes()))
    with pytest.raises(WeightsError, match=r"tensor .* differs from the manifest"):
        fetch_from(hub, 1, tmp_path / "node", first)
    assert same(fetch_from(hub, 1, tmp_path / "node", None)[0], hub.versions[1])


def test_replayed_and_foreign_manifests_are_refused(hub, tmp_path):
    manifest = json.loads(hub.manifest)
    check = receive.check_manifest
    check(manifest, hub.run["id"], -1)
    for change, after, reason in [
        ({}, 0, "manifest of v0, which is not newer than v0"),
        ({}, 5, "manifest of v0, which is not newer than v5"),
        ({"run": "other"}, -1, "manifest of run other"),
        ({"shards": [{**manifest["shards"][0], "name": "../x"}]}, -1, "not a plain file name"),
        ({"static": {"version": 0, "files": {"../x": {}}}}, -1, "which no checkpoint needs"),
    ]:
        with pytest.raises(WeightsError, match=reason):
            check({**manifest, **change}, hub.run["id"], after)


def test_a_refused_version_is_written_again_whole_and_taken(tmp_path, tiny_checkpoint, model):
    """A delta that is damaged on the trainer's disk would keep every node from it until the next
    whole version."""
    model = loaded(tiny_checkpoint)
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
    headers = {"Authorization": "Bearer t", "X-Run": hub.run["id"]}
    p = publisher(model, hub.weights_dir, tiny_checkpoint, hub, full_every=100)

    def newest(have=None):
        return asyncio.run(
            fetch(json.loads(hub.manifest), tmp_path / "node", have, hub.url, headers)
        )[0]

    def until(condition):
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline and p.error is None
            time.sleep(0.01)  # polling a thread

    try:
        p.publish(0)
        until(lambda: hub.published == 0)
        first = newest()
        nudge(model, 1)
        p.publish(1)
        until(lambda: hub.published == 1)
        damaged, before = hub.weights_dir / "v1" / DELTA, hub.manifest
        damaged.write_bytes(flip(damaged.read_bytes()))
        for have in (first, None):  # neither from what is here nor from the anchor
            with pytest.raises(WeightsError, match=r"v1/.*digest differs"):
                newest(have)
        word = {
            "node": "n",
            "version": 0,
            "digest": "",
            "timing": {},
            "refused": "v1 refused: damaged",
        }
        assert asyncio.run(call(hub, "POST", "/receipts", json=word))[0] == 200
        until(lambda: hub.manifest != before)
        # the model card, as of any whole version
        assert "step 1\n" in (hub.weights_dir / "v1/README.md").read_text()
        assert (
            "n stays on v0: v1 refused: damaged" in hub.take_news()
            and hub.status()["counts"]["updates_refused"] == 1
        )
        assert same(newest(), dict(model.hf_tensors())) and same(
            hub.weights_dir / "v1", dict(model.hf_tensors())
        )
        nudge(model, 2)
        p.publish(2)  # and on it goes, from what was written again
        until(lambda: hub.published == 2)
        assert same(newest(tmp_path / "node/v1"), dict(model.hf_tensors()))
    finally:
        p.close()
        hub.close(patience_s=0.0)


async def call(hub, method, route, **kwargs):
    async with aiohttp.ClientSession(hub.url, headers={"Authorization": "Bearer t"}) as session:
        async with session.request(method, route, **kwargs) as response:
            return response.status, await response.read(), response.headers


async def between(hub, answers, old):
    """A server that passes requests on to the hub, but for manifests: what `answers` says, in turn,
    is done to them; `old` is the answer that is replayed. Returns it and its address."""

    async def forward(request):
        kept = ("Authorization", "X-Run", "Range")
        given = {k: v for k, v in request.headers.items() if k in kept}
        data = await request.read()
        async with aiohttp.ClientSession(hub.url) as session:
            ask = session.request(request.method, request.path_qs, headers=given, data=data)
            async with ask as response:
                body, digest = await response.read(), response.headers.get("X-Blake3", "")
        what = answers.pop(0) if "latest" in request.path and answers else ""
        if what == "flip":
            body = flip(body, len(body) // 2)
        elif what == "replay":
            body, digest = old[1], old[2]["X-Blake3"]
        headers = {"X-Blake3": digest} if digest else {}
        return web.Response(body=body, status=response.status, headers=headers)

    app = web.Application(client_max_size=1 << 24)
    app.router.add_route("*", "/{path:.*}", forward)
    # a long poll whose node has gone is not waited for
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return runner, f"http://127.0.0.1:{runner.addresses[0][1]}"


def test_a_manifest_with_one_bit_flipped_or_replayed_is_not_taken(hub, tmp_path, tiny_checkpoint):
    """Between hub and node: a damaged manifest is asked for again; an old one is refused and
    reported."""
    publish(hub, 0)
    old = asyncio.run(call(hub, "GET", "/weights/latest"))
    publish(hub, 1)
    answers = []

    async def run():
        runner, url = await between(hub, answers, old)
        headers = {"Authorization": "Bearer t", "X-Run": hub.run["id"]}
        async with aiohttp.ClientSession(url, headers=headers) as session:
            node = Node(RolloutConfig(url, dir=str(tmp_path / "node")), session)
            node.run, loads = hub.run, []

            async def update(manifest, digest, checkpoint, timing, start):
                version = manifest["version"]
                loads.append((version, same(checkpoint, hub.versions[version])))
                node.version, node.checkpoint = version, checkpoint

            node.update, node.cfg.hub = update, url
            task = asyncio.create_task(node.follow_weights())
            for version, faults in (
                (1, ["flip", "flip"]),
                (2, ["replay", "flip"]),
                (3, ["replay"]),
            ):
                answers.extend(faults)
                await asyncio.to_thread(publish, hub, version)
                async with asyncio.timeout(40):
                    while node.version < version:
                        assert not task.done(), task.exception()
                        await asyncio.sleep(0.02)  # a short poll of the node's own state
            task.cancel()
        await runner.cleanup()
        return loads

    publish(hub, 1)
    loads = asyncio.run(run())
    assert loads == [(1, True), (2, True), (3, True)] and not answers
    assert hub.status()["counts"]["updates_refused"] >= 1
    assert any("manifest of v0, which is not newer than v" in line for line in hub.take_news())


def test_a_directory_that_is_too_small_is_said_before_a_byte_is_fetched_or_when_it_fills(
    hub, tmp_path, monkeypatch
):
    # the weights take 2: one copy fits, and the next beside it not
    with mounted(tmp_path / "small", "3m") as small:
        with pytest.raises(
            NoRoom,
            match=r"has 0.00 GiB free, and two versions.*choose another directory with --dir",
        ):
            fetch_from(hub, 0, small)
        # what is free may go to others meanwhile
        monkeypatch.setattr(receive, "check_room", lambda *a: None)
        first, _ = fetch_from(hub, 0, small)
        with pytest.raises(
            WeightsError, match=f"cannot write weights to .*{os.strerror(errno.ENOSPC)}"
        ):
            fetch_from(hub, 1, small, None)
        assert same(first, hub.versions[0]) and [p.name for p in small.iterdir()] == ["v0"]
        assert shutil.disk_usage(small).free > 0


class Link:
    """A TCP proxy to the hub that can be cut: bytes stop, and no connection ends."""

    def __init__(self, target, cut_after):
        self.target, self.cut_after, self.passed = target, cut_after, 0
        self.cut, self.open = threading.Event(), threading.Event()
        self.open.set()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                there = socket.create_connection(self.target)
                for a, b in ((client, there), (there, client)):
                    threading.Thread(target=self._pump, args=(a, b), daemon=True).start()

    def _pump(self, a, b):
        with contextlib.suppress(OSError):
            while data := a.recv(1 << 15):
                self.passed += len(data)
                if self.passed > self.cut_after and not self.cut.is_set():
                    self.cut.set()
                    self.open.clear()
                self.open.wait()
                b.sendall(data)
            b.shutdown(socket.SHUT_WR)

    def mend_after(self, seconds):
        self.cut.wait(60)
        timer = threading.Timer(seconds, self.open.set)
        timer.start()


def test_a_link_that_is_cut_in_mid_fetch_costs_the_seconds_of_the_cut(hub, tmp_path, monkeypatch):
    """Four times as long as one connection waits."""
    monkeypatch.setattr(receive, "SILENCE_S", 0.5)
    host, port = hub.url.removeprefix("http://").split(":")
    link = Link((host, int(port)), cut_after=1_000_000)
    threading.Thread(target=link.mend_after, args=(2.0,), daemon=True).start()
    start = time.monotonic()
    directory, _ = fetch_from(hub, 0, tmp_path / "node", url=link.url)
    seconds = time.monotonic() - start
    link.listener.close()
    assert same(directory, hub.versions[0]) and link.cut.is_set() and 2 < seconds < 17
    # resumed where it was: what came before the cut did not come again, but for what was in flight
    assert link.passed < 1.7 * (hub.weights_dir / "v0" / FULL).stat().st_size


def test_a_link_that_stays_cut_refuses_the_update(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(receive, "PATIENCE_S", 1.0)
    monkeypatch.setattr(receive, "SILENCE_S", 0.5)
    host, port = hub.url.removeprefix("http://").split(":")
    link = Link((host, int(port)), cut_after=1_000_000)
    with pytest.raises(
        waits.WaitOver, match=r"wait 'weights fetch': rollout node waits for v0/.* since"
    ):
        fetch_from(hub, 0, tmp_path / "node", url=link.url)
    assert not list((tmp_path / "node").iterdir())
    link.listener.close()


def test_a_fetch_that_is_cancelled_ends_and_leaves_nothing(hub, tmp_path):
    host, port = hub.url.removeprefix("http://").split(":")
    link = Link((host, int(port)), cut_after=1_000_000)  # never mended

    async def cancelled():
        headers = {"Authorization": "Bearer t"}
        task = asyncio.create_task(
            fetch(json.loads(hub.manifest), tmp_path / "node", None, link.url, headers)
        )
        await asyncio.to_thread(link.cut.wait, 30)
        task.cancel()
        async with asyncio.timeout(20):
            await asyncio.wait([task])
        return task.cancelled()

    assert asyncio.run(cancelled()) and not list((tmp_path / "node").iterdir())
    link.listener.close()


def test_a_tensor_missing_from_the_files_is_found_by_name(hub, tmp_path):
    path, _ = fetch_from(hub, 0, tmp_path / "node")
    manifest = manifest_of(path)
    manifest["shards"][0]["tensors"]["model.ghost.weight"] = {
        "dtype": "F32",
        "shape": [1],
        "blake3": "0",
    }
    workers = SimpleNamespace(map=map)
    with pytest.raises(WeightsError, match=r"model\.ghost\.weight among them"):
        receive.prove(path, manifest, workers, threading.Event())
