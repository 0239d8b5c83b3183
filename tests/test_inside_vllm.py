"""What vLLM's worker reads of a version, and the sums by which its weights are told apart."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from bridge.inside_vllm.vllm_tensors import WORDS, Directory, tensor_sum
from bridge.versions import write_index
from bridge.weights import describe, write_safetensors

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture
def tensors():
    g = torch.Generator().manual_seed(0)
    shapes = {"a.0": (3, 4), "a.1": (3, 4), "b": (5,), "a.2": (3, 4), "a.10": (3, 4)}
    return {name: torch.randn(shape, generator=g).bfloat16() for name, shape in shapes.items()}


def test_tensors_are_those_of_the_safetensors_library(tmp_path, tensors):
    tensors |= {"f": torch.randn(7), "h": torch.randn(2, 2).half()}
    save_file(tensors, tmp_path / "model.safetensors")
    directory = Directory(tmp_path)
    assert directory.places.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert directory[name].dtype == tensor.dtype and torch.equal(directory[name], tensor)


def test_neighbours_in_a_file_are_one_piece_and_others_are_not(tmp_path, tensors):
    """In the order asked for, over files, around what lies between them, and backwards."""
    names = list(tensors)
    files = {"one": names[:3], "two": names[3:]}
    for file, held in files.items():
        write_safetensors(tmp_path / f"{file}.safetensors", [(n, tensors[n]) for n in held])
    shards = [
        {"name": f, "tensors": {n: describe(tensors[n]) for n in h}} for f, h in files.items()
    ]
    write_index(tmp_path, shards)
    directory = Directory(tmp_path)
    for asked, firsts in (
        (["a.0", "a.1", "a.2", "a.10"], [0, 2]),
        (["a.1", "a.0"], [0, 1]),
        (["a.0", "a.1", "a.10", "a.2"], [0, 2, 3]),
        (["a.2"], [0]),
    ):
        runs = directory.runs(asked)
        assert [run.first for run in runs] == firsts
        whole = torch.cat([run.tensors for run in runs])
        assert torch.equal(whole, torch.stack([tensors[name] for name in asked]))


def test_headers_are_read_again_only_where_they_are_others(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors")
    first = Directory(tmp_path)
    save_file({name: -t for name, t in tensors.items()}, tmp_path / "model.safetensors")
    second = Directory(tmp_path, first.layout)
    assert second.layout is first.layout and torch.equal(second["b"], -tensors["b"])
    save_file({name: t.float() for name, t in tensors.items()}, tmp_path / "model.safetensors")
    third = Directory(tmp_path, first.layout)
    assert third.layout is not first.layout and torch.equal(third["b"], tensors["b"].float())


# ---- copies --------------------------------------------------------------------------------------
def reloaded(model, directory, process):
    """As vLLM does it: a layer at a time, into memory of its own, and from there into the model."""
    qkv, b = torch.empty(9, 4, dtype=torch.bfloat16), torch.empty(5)
    for i, name in enumerate(["a.0", "a.2", "a.10"]):
        qkv.narrow(0, 3 * i, 3).copy_(directory[name])
    if hasattr(model, "buffer"):
        model.buffer.copy_(directory["a.1"])
    b.copy_(directory["b"])  # to fp32, as a head in it
    with torch.no_grad():
        for p, loaded in zip(model.parameters(), process(qkv, b)):
            loaded.copy_(loaded)  # onto itself, as for experts
            p.data[: len(loaded)].copy_(loaded)


BESIDE = lambda qkv, b: (qkv, b)


@pytest.mark.parametrize(
    ("process", "rows", "is_copied"),
    [
        (lambda qkv, b: (qkv, b), 9, True),
        (lambda qkv, b: (qkv.clone(), b), 9, False),  # no longer known where from
        (lambda qkv, b: (qkv.mul_(2), b), 9, False),
        (lambda qkv, b: (qkv.view(4, 9).t(), b), 9, False),
        (lambda qkv, b: (qkv, b), 12, False),  # padded
        (lambda qkv, b: (qkv,), 9, False),  # one tensor comes from elsewhere
        (BESIDE, 9, False),  # a buffer is loaded too
    ],
    ids=["as it is", "by way of a copy", "scaled", "transposed", "padded", "left out", "buffer"],
)
def test_what_is_copied_is_found_and_anything_else_is_left_to_vllm(
    tmp_path, monkeypatch, tensors, process, rows, is_copied
):
    monkeypatch.syspath_prepend(REPO / "bridge/inside_vllm")
    import vllm_copies

    model = torch.nn.ParameterList([torch.zeros(rows, 4).bfloat16(), torch.zeros(5)])
    if process is BESIDE:
        model.register_buffer("buffer", torch.zeros(3, 4))
    write_safetensors(tmp_path / "model.safetensors", list(tensors.items()))
    directory = Directory(tmp_path)
    with vllm_copies.Watch(directory) as watch:
        reloaded(model, directory, process)
    copies = watch.proven(model)
    assert (copies is not None) == is_copied
    if is_copied:
        later = {name: -t for name, t in tensors.items()}
        write_safetensors(tmp_path / "later.safetensors", list(later.items()))
        (tmp_path / "later.safetensors").rename(tmp_path / "model.safetensors")
        vllm_copies.copy_version(copies, Directory(tmp_path, directory.layout))
        assert torch.equal(model[0], torch.cat([later[n] for n in ("a.0", "a.2", "a.10")]))
        assert torch.equal(model[1], later["b"].float())


# ---- sums ----------------------------------------------------------------------------------------
def by_hand(data: bytes) -> str:
    total, mask = 0, (1 << 64) - 1
    data += bytes(-len(data) % 8)
    for i in range(len(data) // 8):
        x = int.from_bytes(data[8 * i : 8 * i + 8], "little")
        x ^= (i + 1) * 0x9E3779B97F4A7C15 & mask
        signed = x - (1 << 64) if x >> 63 else x  # torch shifts signed integers
        x = ((signed ^ (signed >> 30)) * 0xBF58476D1CE4E5B9) & mask
        signed = x - (1 << 64) if x >> 63 else x
        x = ((signed ^ (signed >> 27)) * 0x94D049BB133111EB) & mask
        signed = x - (1 << 64) if x >> 63 else x
        total += (signed ^ (signed >> 31)) & mask
    return f"{total & mask:016x}"


@pytest.mark.parametrize("numel", [0, 1, 3, 4, 257])
def test_a_sum_is_that_of_a_loop_over_words(numel):
    tensor = torch.randn(numel, generator=torch.Generator().manual_seed(numel)).bfloat16()
    assert tensor_sum(tensor) == f"{numel}:{by_hand(tensor.view(torch.uint8).numpy().tobytes())}"


def test_a_sum_over_many_parts_is_that_over_one(monkeypatch):
    tensor = torch.randn(1000)
    whole = tensor_sum(tensor)
    monkeypatch.setattr("bridge.inside_vllm.vllm_tensors.WORDS", 7)
    assert tensor_sum(tensor) == whole and WORDS > 1000


def test_every_bit_and_every_place_counts():
    """Also those that a plain sum would lose: two signs, or two values changed for each other."""
    tensor = torch.randn(24, generator=torch.Generator().manual_seed(0)).bfloat16()
    data, seen = tensor.view(torch.uint8), {tensor_sum(tensor)}
    for bit in range(8 * len(data)):
        other = data.clone()
        other[bit // 8] ^= 1 << bit % 8
        seen.add(tensor_sum(other.view(torch.bfloat16)))
    pairs = [(i, j) for i in range(24) for j in range(i)]
    for i, j in pairs:
        other = tensor.clone()
        other[[i, j]] = -tensor[[i, j]]
        seen.add(tensor_sum(other))
        other[[i, j]] = tensor[[j, i]]
        seen.add(tensor_sum(other))
    assert len(seen) == 1 + 8 * len(data) + 2 * len(pairs)


def test_a_view_is_summed_as_its_values_lie():
    tensor = torch.randn(6, 5)
    assert tensor_sum(tensor.t()) == tensor_sum(tensor.t().contiguous())
    assert tensor_sum(tensor.view(-1)[1:]) == tensor_sum(tensor.view(-1)[1:].clone())


# ---- inside vLLM ---------------------------------------------------------------------------------
E, D, F = 6, 8, 12  # experts, hidden size, their width
PREFIX = "model.layers.0.mlp.experts"


def layer_of_experts(expert_ids: list[int], f_rank: int, f_parts: int, padding: int = 0):
    """As a worker of vLLM has it that holds these experts, and a share of their width."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    f = F // f_parts + padding
    layer = RoutedExperts.__new__(RoutedExperts)
    torch.nn.Module.__init__(layer)
    for name, shape in {"w13_weight": (2 * f, D), "w2_weight": (D, f)}.items():
        param = torch.nn.Parameter(torch.zeros(len(expert_ids), *shape), requires_grad=False)
        param.weight_loader = layer.weight_loader  # vLLM's own, tensor by tensor
        setattr(layer, name, param)
    parallel = SimpleNamespace(tp_rank=f_rank, tp_size=f_parts)
    layer.moe_config = SimpleNamespace(moe_parallel_config=parallel)
    layer.global_num_experts = E
    local = {expert: i for i, expert in enumerate(expert_ids)}
    layer.expert_map_manager = SimpleNamespace(map_global_to_local=lambda e: local.get(e, -1))
    return layer


@pytest.mark.slow  # 10 s, to import vLLM
@pytest.mark.parametrize(
    ("expert_ids", "f_rank", "f_parts"),
    [([0, 1, 2, 3, 4, 5], 0, 1), ([0, 1, 2, 3, 4, 5], 1, 3), ([4, 5], 0, 1), ([5, 0, 3], 1, 2)],
)
def test_a_worker_s_share_of_the_experts_is_loaded_at_once(
    tmp_path, monkeypatch, expert_ids, f_rank, f_parts
):
    """Whichever experts it has, and whichever part of them, from two files as two ranks of the
    trainer write them; by the reload of vLLM, which leaves its tensors where they were."""
    monkeypatch.syspath_prepend(REPO / "bridge/inside_vllm")
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
        record_metadata_for_reloading,
    )
    from vllm_engine import Stack

    gate, up, down = torch.randn(E, F, D), torch.randn(E, F, D), torch.randn(E, D, F)
    shards = []
    for file, held in (("one", range(0, 4)), ("two", range(4, E))):
        both = [(e, k, t[e]) for e in held for k, t in (("gate", gate), ("up", up))]
        named = both + [(e, "down", down[e]) for e in held]
        tensors = {f"{PREFIX}.{e}.{kind}_proj.weight": t for e, kind, t in named}
        write_safetensors(tmp_path / f"{file}.safetensors", list(tensors.items()))
        shards.append({"name": file, "tensors": {n: describe(t) for n, t in tensors.items()}})
    write_index(tmp_path, shards)
    layer = layer_of_experts(expert_ids, f_rank, f_parts)
    model = torch.nn.ModuleDict({"experts": layer})
    record_metadata_for_reloading(model)
    memory = [p.data_ptr() for p in layer.parameters()]
    loaders = {name: p.weight_loader for name, p in layer.named_parameters()}
    stack = Stack(layer, PREFIX)
    for sign in (1, -1):  # twice: the second finds what the first has left
        for t in (gate, up, down):
            t.mul_(sign)
        for shard in shards:  # the files are mapped anew each time
            names = shard["tensors"]
            by_kind = {"gate": gate, "up": up, "down": down}
            values = [(n, by_kind[n.split(".")[-2][:-5]][int(n.split(".")[-3])]) for n in names]
            write_safetensors(tmp_path / f"{shard['name']}.safetensors", values)
        initialize_layerwise_reload(model)
        parts = stack.parts(Directory(tmp_path))
        assert parts is not None
        stack.load(parts)
        finalize_layerwise_reload(model, None)
        mine = slice(f_rank * F // f_parts, (f_rank + 1) * F // f_parts)
        w13 = torch.cat([gate[expert_ids][:, mine], up[expert_ids][:, mine]], dim=1)
        assert torch.equal(layer.w13_weight, w13)
        assert torch.equal(layer.w2_weight, down[expert_ids][:, :, mine])
        assert [p.data_ptr() for p in layer.parameters()] == memory
        assert {name: p.weight_loader for name, p in layer.named_parameters()} == loaders

    padded = layer_of_experts(expert_ids, f_rank, f_parts, padding=4)
    assert Stack(padded, PREFIX).parts(Directory(tmp_path)) is None  # vLLM's loaders know how
