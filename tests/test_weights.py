"""weights.py and publish.py: what is published is complete, atomic and readable by others."""

import asyncio
import contextlib
import errno
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from on_ranks import on_ranks
from published import write_version
from safetensors.torch import load_file

import bridge.publish
from bridge import files, weights
from bridge.publish import Publisher
from bridge.receive import fetch
from bridge.versions import write_index
from bridge.weights import MANIFEST, WeightsError, load_hf, read_tensors
from model import ModelConfig, Qwen3MoE
from prepare import resolve_dtype
from presets import parse_config
from ranks import parallel


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    model = Qwen3MoE(ModelConfig.from_dir(tiny_checkpoint))
    load_hf(model, tiny_checkpoint)
    return model


def same(directory, tensors):
    found = dict(read_tensors(directory))
    assert found.keys() == tensors.keys()
    return all(
        torch.equal(found[n].view(torch.uint8), t.contiguous().view(torch.uint8))
        for n, t in tensors.items()
    )


# ---- files ---------------------------------------------------------------------------------------
def test_the_safetensors_library_reads_what_write_safetensors_wrote(tmp_path):
    special = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-45])
    tensors = [
        ("a", torch.randn(3, 5)),
        ("b", torch.arange(7)),
        ("scalar", torch.tensor(2.5)),
        ("empty", torch.zeros(0, 4)),
        ("bf16", torch.randn(9).bfloat16()),
        ("special", special),
        ("strided", torch.randn(4, 6).t()),
    ]
    weights.write_safetensors(tmp_path / "x.safetensors", tensors)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == dict(tensors).keys()
    for name, tensor in tensors:
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        # compared as bytes: -0.0 and NaN payloads count
        assert torch.equal(
            found[name].reshape(-1).view(torch.uint8),
            tensor.contiguous().reshape(-1).view(torch.uint8),
        )


def test_a_whole_version_opens_in_transformers_as_it_is(tmp_path, model, tiny_checkpoint):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = write_version(tmp_path, 5, model.hf_tensors(), tiny_checkpoint)
    hf = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokens = tokenizer("abcde>", return_tensors="pt").input_ids
    hidden, _ = model(
        tokens[0], torch.tensor([0, tokens.shape[1]], dtype=torch.int32), tokens.shape[1]
    )
    with torch.no_grad():
        difference = hf(tokens).logits[0] - hidden @ model.head_weight.t()
    # fp32 rounding on logits of about 10
    assert hf.dtype == torch.float32 and difference.abs().max() < 1e-4
    assert tokenizer.decode(tokens[0]) == "abcde>" and tokenizer.eos_token == "<eos>"


def test_a_checkpoint_that_does_not_fit_is_refused_by_name(tmp_path, model, tiny_checkpoint):
    target = Qwen3MoE(model.cfg)
    tensors = dict(model.hf_tensors())
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    for change, reason in [
        ({name: None}, f"{name} among them"),
        ({name: torch.zeros(2, 2)}, rf"{name} is \(2, 2\), config.json makes it \(64, 128\)"),
        ({"extra.weight": torch.zeros(1)}, "extra.weight has no place"),
    ]:
        changed = [(n, t) for n, t in {**tensors, **change}.items() if t is not None]
        weights.write_safetensors(tmp_path / "model.safetensors", changed)
        with pytest.raises(WeightsError, match=reason):
            load_hf(target, tmp_path)


def test_tensors_come_layer_by_layer_whatever_files_they_are_in(tmp_path, model, tiny_checkpoint):
    """vLLM converts a layer once all of it has come, and buffers what is ahead of it."""
    tensors = list(model.hf_tensors())
    shards = [
        {"name": f"model-0000{i + 1}-of-00003", "tensors": dict(tensors[i::3])} for i in range(3)
    ]
    for shard in shards:
        weights.write_safetensors(
            tmp_path / f"{shard['name']}.safetensors", list(shard["tensors"].items())
        )
    write_index(tmp_path, shards)
    names = [name for name, _ in read_tensors(tmp_path)]
    assert sorted(names) == sorted(name for name, _ in tensors)
    layers = [name.split(".")[2] if ".layers." in name else name for name in names]
    blocks = [layer for i, layer in enumerate(layers) if i == 0 or layers[i - 1] != layer]
    assert blocks == ["model.embed_tokens.weight", "0", "1", "lm_head.weight", "model.norm.weight"]


# ---- publish -------------------------------------------------------------------------------------
class Listener:
    """What a publisher needs of a hub."""

    def __init__(self):
        self.run, self.token, self.refused, self.used = {"id": "run"}, "t", -1, float("inf")
        self.published, self.failed, self.failure = [], "", threading.Event()

    def set_published(self, manifest):
        self.published.append(json.loads(manifest))

    def oldest_in_use(self):
        return self.used

    def fail(self, why):
        self.failed = why
        self.failure.set()


def publisher(model, root, static, listener=None, **flags):
    flags = {"full_every": 4, "keep": 2, "deadline_s": 20.0, "dtype": torch.float32, **flags}
    return Publisher(
        model,
        root=root,
        static=static,
        store=torch.distributed.HashStore(),
        hub=listener or Listener(),
        **flags,
    )


def loaded(tiny_checkpoint):
    model = Qwen3MoE(ModelConfig.from_dir(tiny_checkpoint))
    load_hf(model, tiny_checkpoint)
    return model


def nudge(model, seed):
    """Change a few elements of each parameter, as an update does."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.view(-1)[torch.randint(p.numel(), (1 + p.numel() // 50,), generator=rng)] *= 1.001


def test_what_is_published_is_the_moment_of_the_call_not_of_the_write(
    tmp_path, tiny_checkpoint, monkeypatch
):
    """The next step changes the weights while the writer still works on the last ones."""
    model, listener = loaded(tiny_checkpoint), Listener()
    may_write, real = threading.Event(), bridge.publish.write_share
    monkeypatch.setattr(bridge.publish, "write_share", lambda *a: (may_write.wait(30), real(*a))[1])
    p = publisher(model, tmp_path / "w", tiny_checkpoint, listener)
    p.publish(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    may_write.set()
    p.close()
    assert [m["version"] for m in listener.published] == [1]
    assert same(tmp_path / "w/v1", load_file(tiny_checkpoint / "model.safetensors"))


def test_versions_are_deltas_between_whole_ones_and_every_digest_is_of_the_full_tensor(
    tmp_path, tiny_checkpoint
):
    model, listener = loaded(tiny_checkpoint), Listener()
    p = publisher(model, tmp_path, tiny_checkpoint, listener)
    wanted = []
    for version in range(7):
        p.publish(version, last=version == 6)
        wanted.append({name: weights.describe(t) for name, t in model.hf_tensors()})
        nudge(model, version)
    p.close()
    kinds = [
        [f["kind"] for f in m["shards"][0]["files"] if f["version"] == m["version"]]
        for m in listener.published
    ]
    assert kinds == [["full"], *[["delta"]] * 3, ["delta", "full"], ["delta"], ["delta", "full"]]
    assert [m["shards"][0]["tensors"] for m in listener.published] == wanted
    assert [m["version"] for m in listener.published if m["compare"]] == [0, 4, 6]
    assert (
        0.01 < p.stats["weights/changed"] < 0.03
        and p.stats["weights/delta_bytes"] * 5 < p.stats["weights/full_bytes"]
    )
    assert p.stats["weights/full_bytes"] == sum(t.nbytes for _, t in model.hf_tensors())
    # two, and the whole one before v5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v4", "v5", "v6"]
    assert json.loads((tmp_path / "v6/config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_a_version_whose_delta_would_be_larger_is_written_whole(tmp_path, tiny_checkpoint, name):
    dtype = resolve_dtype(
        parse_config(["--publish-dtype", name]).publish_dtype, torch.device("cpu")
    )
    model, listener = loaded(tiny_checkpoint), Listener()
    p = publisher(model, tmp_path, tiny_checkpoint, listener, dtype=dtype)
    p.publish(1)
    with torch.no_grad():
        # any bit pattern: nothing of it can be said in fewer bits
        for parameter in model.parameters():
            parameter.copy_(
                torch.randint(-(2**15), 2**15, parameter.shape).to(torch.int16).view(dtype)
            )
    p.publish(2)
    p.close()
    assert [f["kind"] for f in listener.published[1]["shards"][0]["files"]] == ["full", "full"]
    assert (
        listener.published[1]["static"]["version"] == 2 and (tmp_path / "v2/config.json").exists()
    )
    assert json.loads((tmp_path / "v2/config.json").read_text())["dtype"] == name
    assert dict(read_tensors(tmp_path / "v2"))["model.norm.weight"].dtype == dtype


@pytest.mark.parametrize(("moved", "kind"), [(1e-2, "full"), (1e-6, "delta")])
def test_a_delta_of_more_than_half_is_not_sent(tmp_path, tiny_checkpoint, moved, kind):
    """As float32 gives it at a high learning rate: all weights move, by a part of themselves."""
    model, listener = loaded(tiny_checkpoint), Listener()
    p = publisher(model, tmp_path, tiny_checkpoint, listener)
    p.publish(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + moved * torch.randn(parameter.shape))
    p.publish(2)
    p.close()
    share = p.stats["weights/delta_bytes"] / p.stats["weights/full_bytes"]
    assert (0.5 < share < 0.9) == (kind == "full") and p.stats["weights/changed"] > 0.9
    assert [f["kind"] for f in listener.published[1]["shards"][0]["files"]][-1] == kind


def test_what_a_node_still_fetches_is_kept_and_no_more_than_four_copies_of_it(
    tmp_path, tiny_checkpoint
):
    model, listener = loaded(tiny_checkpoint), Listener()
    p = publisher(model, tmp_path, tiny_checkpoint, listener, full_every=1, keep=1)
    listener.used = 1
    for version in range(8):
        p.publish(version)
        nudge(model, version)
        while len(listener.published) <= version:
            assert not listener.failed
            time.sleep(0.01)  # polling a thread
        if version == 2:
            assert sorted(path.name for path in tmp_path.iterdir()) == ["v1", "v2"]
    p.close()
    # v1 was in use all the time, but a node that is so slow may not fill the disk
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v5", "v6", "v7"]


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = sys.argv[3:5]
import torch._dynamo  # the model wants it: here once, not in each child
import bridge.publish
from test_weights import loaded, nudge, publisher, weights
root, checkpoint = Path(sys.argv[1]), Path(sys.argv[2])
for whole_files in map(int, sys.argv[5:]):
    if not (child := os.fork()):
        left, real = [whole_files], weights.put_in_place
        def put(tmp):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            real(tmp)
        weights.put_in_place = bridge.publish.put_in_place = put
        p = publisher(loaded(checkpoint), root / str(whole_files), checkpoint)
        p.publish(0)
        nudge(p.model, 0)
        p.publish(1, last=True)
        p.close()
        os._exit(1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_half_written_weights_are_never_a_version_and_the_next_start_removes_them(
    tmp_path, tiny_checkpoint, model
):
    """kill -9 of the trainer between write and rename, of some of the files that two versions
    consist of."""
    # v0: share, three configs, tokenizer, model card, index, manifest; v1: a delta, then the same
    files = 8
    kills, here = (0, 3, files - 1, files, files + 1, files + 4, 2 * files), Path(__file__).parent
    command = [
        sys.executable,
        "-c",
        KILLED,
        str(tmp_path),
        str(tiny_checkpoint),
        str(here.parent),
        str(here),
    ]
    done = subprocess.run(
        [*command, *map(str, kills)], capture_output=True, text=True, check=False, timeout=100
    )
    assert done.stdout.split() == ["-9"] * len(kills), (done.stdout, done.stderr[-2000:])
    for kill in kills:
        root = tmp_path / str(kill)
        assert (root / "v0" / MANIFEST).exists() == (kill >= files) and not (
            root / "v1" / MANIFEST
        ).exists()
        assert len(list(root.glob("v*/*.tmp"))) == 1
        publisher(model, root, tiny_checkpoint).close()  # the next start
        assert [path.name for path in root.iterdir()] == (["v0"] if kill >= files else [])
        if kill >= files:
            assert len(list((root / "v0").iterdir())) == files
            assert same(root / "v0", dict(model.hf_tensors()))


def test_a_writer_that_failed_is_an_error_with_a_name_that_reaches_the_loop(
    tmp_path, tiny_checkpoint
):
    """The disk is full (a file system of 1 MiB): publish never blocks, and the run is asked to
    stop."""
    listener, small = Listener(), tmp_path / "small"
    with mounted(small, "1m"):
        model = loaded(tiny_checkpoint)
        p = publisher(model, small / "w", tiny_checkpoint, listener)
        for version in range(4):
            p.publish(version)
        assert listener.failure.wait(20)
        assert (
            "publishing v0 to" in listener.failed and os.strerror(errno.ENOSPC) in listener.failed
        )
        p.close()
        assert str(p.error) == listener.failed and not listener.published


@contextlib.contextmanager
def mounted(path, size):
    """A file system in RAM of this size."""
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_disk_that_stands_still_is_a_wait_with_a_name(tmp_path, tiny_checkpoint, monkeypatch):
    """publish() for the third version needs the buffers of the first, which the thread still
    uses."""
    model, listener, go = loaded(tiny_checkpoint), Listener(), threading.Event()
    monkeypatch.setattr(bridge.publish, "write_share", lambda *a: go.wait(60))
    p = publisher(model, tmp_path, tiny_checkpoint, listener, deadline_s=0.3)
    for version in range(4):
        p.publish(version)
    assert (
        "wait 'publish': trainer rank 0 waits for its publisher to be done with a version since"
        in listener.failed
    )
    p.close()
    go.set()


def test_a_rank_that_says_nothing_is_a_wait_with_a_name(tmp_path, tiny_checkpoint):
    listener = Listener()
    p = publisher(loaded(tiny_checkpoint), tmp_path, tiny_checkpoint, listener, deadline_s=0.3)
    p.world_size = 2
    p.publish(0)
    assert listener.failure.wait(20)
    assert (
        "wait 'version': trainer rank 0's publisher waits for every rank's share since"
        in listener.failed
    )
    assert "missing: 0/1" in listener.failed and not listener.published
    p.close()


def of_rank(root, checkpoint, fail):
    """On each of four ranks, as two nodes of two: publish three versions; the files of the node,
    and rank 0's manifests. fail: rank 3's disk is full at version 1."""
    parallel.join_ranks(60)
    rank = torch.distributed.get_rank()
    os.environ |= {"GROUP_RANK": str(rank // 2), "LOCAL_RANK": str(rank % 2)}
    model_cfg = ModelConfig.from_dir(checkpoint)
    mesh = parallel.make_mesh(2, 2, model_cfg.num_key_value_heads)
    model, listener = Qwen3MoE(model_cfg, mesh), Listener()
    load_hf(model, checkpoint)
    real = bridge.publish.write_share

    def full_disk(directory, *rest):
        if fail and rank == 3 and directory.name == "v1":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(directory, *rest)

    bridge.publish.write_share = full_disk
    store = torch.distributed.distributed_c10d._get_default_store()
    p = Publisher(
        model,
        torch.float32,
        root / f"node{rank // 2}",
        checkpoint,
        2,
        9,
        store,
        20.0,
        listener if rank == 0 else None,
    )
    p.store.wait(["url/0", "url/1"])
    for version in range(3):
        p.publish(version)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.001)
    if fail:
        assert rank != 0 or listener.failure.wait(30)
    p.close()
    torch.distributed.barrier()
    if rank == 0 and not fail:
        write = fetch_all(listener.published[-1], p, root)
        torch.distributed.barrier()
        return listener.published, write, ""
    torch.distributed.barrier()
    return [], [], listener.failed


def fetch_all(manifest, p, root):
    """A rollout node's fetch while both trainer nodes serve. In a run the hub serves rank 0's
    files; here a file server does."""
    headers = {"Authorization": "Bearer t"}
    with files.FileServer(p.root, "t", "127.0.0.1", 0) as server:
        directory, timing = asyncio.run(
            fetch(manifest, root / "rollout", None, server.url, headers)
        )
    return [sorted(path.name for path in directory.iterdir()), timing["fetch_bytes"]]


def test_every_tensor_has_one_owner_and_all_nodes_write_and_serve(tmp_path, tiny_checkpoint, model):
    """tp 2, ep 2 on four ranks, two nodes with a disk each: the rollout node has all, from both."""
    published, (names, _), _ = on_ranks(4, of_rank, tmp_path, tiny_checkpoint, False)[0]
    shards = published[-1]["shards"]
    owned = [name for shard in shards for name in shard["tensors"]]
    assert sorted(owned) == sorted(name for name, _ in model.hf_tensors()) and len(shards) == 4
    urls = {shard["name"]: {file["url"] for file in shard["files"]} for shard in shards}
    assert [len(u) for u in urls.values()] == [1] * 4 and len(set().union(*urls.values())) == 2
    for node in (0, 1):
        files = sorted(path.name for path in (tmp_path / f"node{node}/v2").glob("*.safetensors"))
        assert files == [f"model-0000{2 * node + i}-of-00004.safetensors" for i in (1, 2)]
    sizes = [
        sum(torch.Size(t["shape"]).numel() for t in shard["tensors"].values()) for shard in shards
    ]
    assert max(sizes) < 0.5 * sum(sizes), sizes
    # 1.001 three times over, rounded as the ranks round it
    wanted = {name: t * 1.001 * 1.001 for name, t in model.hf_tensors()}
    assert same(tmp_path / "rollout/v2", wanted) and "model.safetensors.index.json" in names


def test_a_full_disk_at_one_rank_stops_the_run_by_rank_0_s_word(tmp_path, tiny_checkpoint):
    results = on_ranks(4, of_rank, tmp_path, tiny_checkpoint, True)
    failed = results[0][2]
    assert "rank 3: publishing v1 to" in failed and os.strerror(errno.ENOSPC) in failed
