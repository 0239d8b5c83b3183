"""weights.py: what is published is complete, atomic and readable by others; what is damaged is never loaded."""

import asyncio
import json
import threading

import aiohttp
import pytest
import torch
from safetensors.torch import load_file

import weights
from hub import Hub
from ledger import Ledger
from model import ModelConfig, Qwen3MoE
from weights import MANIFEST, Publisher, WeightsError, fetch, gather_hf, load_hf, verify, write_version


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    model = Qwen3MoE(ModelConfig.from_dir(tiny_checkpoint))
    load_hf(model, tiny_checkpoint)
    return model


def manifest_of(path):
    return json.loads((path / MANIFEST).read_text())


# ---- files ---------------------------------------------------------------------------------------------------
def test_the_safetensors_library_reads_what_write_safetensors_wrote(tmp_path):
    special = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-45])
    tensors = [("a", torch.randn(3, 5)), ("b", torch.arange(7)), ("scalar", torch.tensor(2.5)),
               ("empty", torch.zeros(0, 4)), ("bf16", torch.randn(9).bfloat16()), ("special", special),
               ("strided", torch.randn(4, 6).t())]  # fmt: skip
    weights.write_safetensors(tmp_path / "x.safetensors", tensors)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == dict(tensors).keys()
    for name, tensor in tensors:
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        # compared as bytes: -0.0 and NaN payloads count
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.contiguous().reshape(-1).view(torch.uint8))


def test_a_published_version_opens_in_transformers_as_it_is(tmp_path, model, tiny_checkpoint):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = write_version(tmp_path, 5, list(model.hf_tensors()), tiny_checkpoint)
    hf = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokens = tokenizer("abcde>", return_tensors="pt").input_ids
    hidden, _ = model(tokens[0], torch.tensor([0, tokens.shape[1]], dtype=torch.int32), tokens.shape[1])
    with torch.no_grad():
        difference = hf(tokens).logits[0] - hidden @ model.head_weight.t()
    assert hf.dtype == torch.float32 and difference.abs().max() < 1e-4  # fp32 rounding on logits of about 10
    assert tokenizer.decode(tokens[0]) == "abcde>" and tokenizer.eos_token == "<eos>"


def test_a_checkpoint_that_does_not_fit_is_refused_by_name(tmp_path, model, tiny_checkpoint):
    target = Qwen3MoE(model.cfg)
    tensors = dict(model.hf_tensors())
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    for change, reason in [
        ({name: None}, f"{name} among them"),
        ({name: torch.zeros(2, 2)}, rf"{name} is \(2, 2\), expected \(64, 128\)"),
        ({"extra.weight": torch.zeros(1)}, "extra.weight has no place"),
    ]:
        changed = [(n, t) for n, t in {**tensors, **change}.items() if t is not None]
        weights.write_safetensors(tmp_path / "model.safetensors", changed)
        with pytest.raises(WeightsError, match=reason):
            load_hf(target, tmp_path)


# ---- publish -------------------------------------------------------------------------------------------------
def test_what_is_published_is_the_moment_of_the_call_not_of_the_write(tmp_path, tiny_checkpoint, monkeypatch):
    """The next step changes the weights while the writer still works on the last ones."""
    model = Qwen3MoE(ModelConfig.from_dir(tiny_checkpoint))
    load_hf(model, tiny_checkpoint)
    may_write, real_write = threading.Event(), weights.write_version
    monkeypatch.setattr(weights, "write_version", lambda *a: (may_write.wait(30), real_write(*a))[1])
    published = []
    publisher = Publisher(tmp_path / "w", tiny_checkpoint, keep=2, on_published=published.append)
    publisher.publish(1, gather_hf(model, torch.float32))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    may_write.set()
    publisher.close()
    assert published == [1]
    found, before = load_file(tmp_path / "w/v1/model.safetensors"), load_file(tiny_checkpoint / "model.safetensors")
    assert all(torch.equal(found[name], before[name]) for name in before)


def test_a_writer_that_failed_is_an_error_of_the_next_publish_not_a_hang(tmp_path, tiny_checkpoint, model):
    blocked = tmp_path / "w"
    blocked.write_text("a file where the directory should be")
    publisher = Publisher(blocked, tiny_checkpoint, keep=2, on_published=lambda version: None)
    with pytest.raises(WeightsError, match="publishing to"):
        for version in range(10):
            publisher.publish(version, list(model.hf_tensors()))
    with pytest.raises(WeightsError, match="publishing to"):
        publisher.close()


def test_old_versions_are_pruned_and_the_published_dtype_is_in_the_config(tmp_path, tiny_checkpoint, model):
    publisher = Publisher(tmp_path, tiny_checkpoint, keep=2, on_published=lambda version: None)
    for version in range(5):
        publisher.publish(version, gather_hf(model, torch.bfloat16))
    publisher.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["v3", "v4"]
    assert json.loads((tmp_path / "v4/config.json").read_text())["dtype"] == "bfloat16"
    assert load_file(tmp_path / "v4/model.safetensors")["model.norm.weight"].dtype == torch.bfloat16


def test_half_written_weights_are_never_a_version(tmp_path, tiny_checkpoint, model, monkeypatch):
    """The writer dies after each of its steps in turn: no v1 may exist, and v0 stays whole."""
    write_version(tmp_path, 0, list(model.hf_tensors()), tiny_checkpoint)
    tensors = list(model.hf_tensors())
    for step in ("write_safetensors", "describe", "fsync"):
        with monkeypatch.context() as m:
            m.setattr(weights, step, lambda *a: (_ for _ in ()).throw(OSError("disk full")))
            with pytest.raises(OSError, match="disk full"):
                write_version(tmp_path, 1, tensors, tiny_checkpoint)
        assert not (tmp_path / "v1").exists()
    verify(tmp_path / "v0", manifest_of(tmp_path / "v0"))
    assert write_version(tmp_path, 1, tensors, tiny_checkpoint).name == "v1"  # the leftovers are no obstacle


# ---- receive -------------------------------------------------------------------------------------------------
@pytest.fixture
def hub(tmp_path, tiny_checkpoint, model):
    write_version(tmp_path / "hub", 0, list(model.hf_tensors()), tiny_checkpoint)
    ledger = Ledger(1, 1, 1, 60.0)
    hub = Hub(ledger, [], None, tmp_path / "hub", 32, "t", {"num_generations": 2, "max_new_tokens": 8})
    hub.start("127.0.0.1", 0)
    hub.set_published(0)
    yield hub
    hub.close(patience_s=0.0)


def fetch_from(hub, manifest, root, have=None):
    async def run():
        async with aiohttp.ClientSession(hub.url, headers={"Authorization": "Bearer t"}) as session:
            return await fetch(session, manifest, root, have)

    return asyncio.run(run())


def test_a_fetched_version_is_the_published_one_and_unchanged_files_are_linked(hub, tmp_path, model, tiny_checkpoint):
    first = fetch_from(hub, manifest_of(tmp_path / "hub/v0"), tmp_path / "node")
    changed = [(name, t + 1) for name, t in model.hf_tensors()]
    write_version(tmp_path / "hub", 1, changed, tiny_checkpoint)
    second = fetch_from(hub, manifest_of(tmp_path / "hub/v1"), tmp_path / "node", have=first)
    for file in (tmp_path / "hub/v1").iterdir():
        assert (second / file.name).read_bytes() == file.read_bytes() or file.name == MANIFEST
    assert (second / "tokenizer.json").samefile(first / "tokenizer.json")
    assert not (second / "model.safetensors").samefile(first / "model.safetensors")


def test_damage_on_the_way_is_found_and_nothing_is_kept(hub, tmp_path):
    """One flipped bit in a tensor, a cut file, a changed config: each refused, each named."""
    source, good = tmp_path / "hub/v0", manifest_of(tmp_path / "hub/v0")

    def flip(data):
        return data[:-1000] + bytes([data[-1000] ^ 1]) + data[-999:]

    for name, damage, reason in [
        ("model.safetensors", flip, "tensor .* differs from the manifest"),
        ("model.safetensors", lambda data: data[:-4], "bytes, not"),
        ("config.json", lambda data: data.replace(b"128", b"129"), "config.json: digest differs"),
    ]:
        whole = (source / name).read_bytes()
        (source / name).write_bytes(damage(whole))
        with pytest.raises(WeightsError, match=reason):
            fetch_from(hub, good, tmp_path / "node")
        (source / name).write_bytes(whole)
        assert not (tmp_path / "node/v0").exists()
    with pytest.raises(WeightsError, match="not a plain file name"):
        fetch_from(hub, {**good, "files": {"../x": {}, **good["files"]}}, tmp_path / "node")
    fetch_from(hub, good, tmp_path / "node")


def test_a_tensor_missing_from_the_file_is_found_by_name(tmp_path, model, tiny_checkpoint):
    path = write_version(tmp_path, 0, list(model.hf_tensors()), tiny_checkpoint)
    manifest = manifest_of(path)
    manifest["tensors"]["model.ghost.weight"] = {"dtype": "F32", "shape": [1], "blake3": "0"}
    with pytest.raises(WeightsError, match=r"model\.ghost\.weight among them"):
        verify(path, manifest)
