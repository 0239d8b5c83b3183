"""What a GPU would run, without one: on meta tensors that say they are CUDA's, so each branch for a
GPU is taken, with torch's own checks of shapes, strides, alignment, dtypes and argument names. No
value is computed: tests/test_gpu.py compares values, tests/test_fake_gpu.py counts launches."""

import dataclasses
import importlib
from collections import Counter
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.library import CustomOpDef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import KNOWN_MODELS, Qwen3MoE
from ranks import ops
from ranks.parallel import Mesh, ShardedAdamW
from report import Clock

META = torch.device("meta")
MOE, DENSE = KNOWN_MODELS["Qwen/Qwen3-30B-A3B"], KNOWN_MODELS["Qwen/Qwen3-0.6B"]
LAYERS, TOKENS = 2, 512


BODY_OF = {op._opoverload: op._init_fn for op in vars(ops).values() if type(op) is CustomOpDef}


class CudaBodies(TorchDispatchMode):
    """Of each custom op that is called, on meta tensors its fake alone, runs the body too, which
    must return what the fake promises."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        promised = function(*args, **(kwargs or {}))
        if function in BODY_OF:
            real = BODY_OF[function](*args, **(kwargs or {}))
            assert layout(real) == layout(promised), f"{function} and its fake differ"
        return promised


def layout(result) -> list[tuple]:
    """Of each tensor in what an operation returns."""
    return [(x.shape, x.stride(), x.dtype) for x in tree_leaves(result)]


@pytest.fixture
def calls():
    """Meta tensors are CUDA's; the calls of the kernels that exist on a GPU alone, counted."""
    counted = Counter()

    def spy(owner, name):
        kernel = getattr(owner, name)

        def call(*args, **kwargs):
            counted[name] += 1
            return kernel(*args, **kwargs)

        return mock.patch.object(owner, name, call)

    is_cuda = mock.patch.object(torch.Tensor, "is_cuda", property(lambda x: True))
    flash = spy(torch.ops.aten, "_flash_attention_forward")
    flash_backward = spy(torch.ops.aten, "_flash_attention_backward")
    with is_cuda, flash, flash_backward, spy(F, "grouped_mm"), CudaBodies():
        yield counted


def a_model(cfg, recompute=False, fp32_head=False) -> Qwen3MoE:
    cfg = dataclasses.replace(cfg, num_hidden_layers=LAYERS)
    with META:
        model = Qwen3MoE(cfg, Mesh(device=META), recompute).to(torch.bfloat16)
    if fp32_head:
        head = model.model["embed_tokens"] if cfg.tie_word_embeddings else model.lm_head
        head.to(torch.float32)
    return model


def forward(model):
    tokens_T = torch.zeros(TOKENS, dtype=torch.int64, device=META)
    return model(tokens_T, torch.zeros(5, dtype=torch.int32, device=META), 128)


def head_pass(dtype=torch.bfloat16, one_pass=True, weight_grad=True):
    """Loss and log-probs of 300 tokens, in chunks of 256, and the gradients."""
    vocab, width = MOE.vocab_size, MOE.hidden_size
    hidden = torch.empty(300, width, device=META, dtype=dtype, requires_grad=True)
    weight = torch.empty(vocab, width, device=META, dtype=dtype, requires_grad=True)
    targets = torch.zeros(300, dtype=torch.int64, device=META)
    head = (hidden, weight, targets)
    main_grad = torch.empty(vocab, width, device=META) if weight_grad else None
    if one_pass:
        aux = (torch.empty(300, device=META),)
        loss, logprobs, entropy = ops.fused_head_loss(
            *head, torch.mul, aux, 1.0, 256, False, None, main_grad
        )
    else:
        logprobs, entropy = ops.token_logprobs(*head, 1.0, 256, False)
        loss = logprobs.sum()
    loss.backward()
    return hidden, weight, logprobs, entropy


@pytest.mark.parametrize("cfg", [MOE, DENSE], ids=["moe", "dense"])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_model_calls_the_gpus_kernels_forward_and_backward(calls, cfg, recompute):
    model = a_model(cfg, recompute)
    hidden_TD, ids_LtK = forward(model)
    assert hidden_TD.dtype == torch.bfloat16 and hidden_TD.shape == (TOKENS, cfg.hidden_size)
    assert cfg is DENSE or ids_LtK.shape == (LAYERS, TOKENS, cfg.num_experts_per_tok)
    first = Counter(calls)
    hidden_TD.sum().backward()
    for name, p in model.named_parameters():
        if name != "lm_head.weight":
            assert (p.grad.shape, p.grad.dtype) == (p.shape, p.dtype), name
    # what a recompute does not do again
    assert first["_flash_attention_forward"] == calls["_flash_attention_forward"] == LAYERS
    assert calls["_flash_attention_backward"] == LAYERS
    # gate, up and down, in one call or in several; backward the inputs' and the weights' gradients;
    # a recompute leaves down out
    per_layer, later = first["grouped_mm"] // LAYERS, calls["grouped_mm"] - first["grouped_mm"]
    assert (per_layer > 0) == (cfg is MOE)
    assert later == LAYERS * (2 * per_layer + (recompute and per_layer and per_layer - 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(
    "way",
    [{}, {"weight_grad": False}, {"one_pass": False}],
    ids=["added", "autograd", "two passes"],
)
def test_the_heads_logits_are_fp32_and_its_gradients_are_the_weights(calls, dtype, way):
    hidden, weight, logprobs, entropy = head_pass(dtype, **way)
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert (hidden.grad.dtype, hidden.grad.shape) == (dtype, hidden.shape)
    assert (weight.grad is None) == (way == {})
    assert weight.grad is None or weight.grad.dtype == dtype


@pytest.mark.parametrize("cfg", [MOE, DENSE], ids=["moe", "dense"])
@pytest.mark.parametrize("fp32_head", [False, True])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_an_update_of_the_optimizer(calls, monkeypatch, cfg, fp32_head, grad_dtype):
    # torch knows of no fused AdamW for meta tensors
    optim = importlib.import_module("torch.optim.optimizer")
    monkeypatch.setattr(optim, "_get_fused_kernels_supported_devices", lambda: ["meta"])
    model = a_model(cfg, fp32_head=fp32_head)
    optimizer = ShardedAdamW(model, 1.0, grad_dtype, lr=1e-6)
    optimizer.zero_grad()
    forward(model)[0].float().sum().backward()
    assert all(p.grad is None and p.main_grad.dtype == grad_dtype for p in model.parameters())
    norm = optimizer.step()
    assert norm.shape == () and norm.dtype == torch.float64
    dtypes = {bucket.values.dtype for bucket in optimizer.buckets}
    assert dtypes == {torch.bfloat16, *([torch.float32] if fp32_head else [])}
    assert all(bucket.master.dtype == torch.float32 for bucket in optimizer.buckets)


# ---- faults that must be found -------------------------------------------------------------------
def int64_offsets(grouped_mm):
    return lambda *args, offs: grouped_mm(*args, offs=offs.long())


def other_strides(grouped_mm):
    return lambda *args, offs: grouped_mm(*args, offs=offs).mT.contiguous().mT


def an_argument_less(flash):
    return lambda *args: flash(*args[:-1])


def not_transposed(grouped_outer):
    return lambda *args: grouped_outer(*args).transpose(1, 2)


def without_out_dtype(mm):
    return lambda *args, out_dtype=None, **rest: mm(*args, **rest)


@pytest.mark.parametrize(
    ("owner", "name", "fault", "said"),
    [
        (F, "grouped_mm", int64_offsets, "Offsets tensor must be integer"),
        (F, "grouped_mm", other_strides, "its fake differ"),
        (torch.ops.aten, "_flash_attention_forward", an_argument_less, "return_debug_mask"),
        (ops, "grouped_outer", not_transposed, "invalid gradient"),
        (torch, "mm", without_out_dtype, "dtype"),
    ],
)
def test_a_planted_fault_is_found(calls, monkeypatch, owner, name, fault, said):
    def run():
        forward(a_model(MOE))[0].sum().backward()
        head_pass()

    run()
    monkeypatch.setattr(owner, name, fault(getattr(owner, name)))
    with pytest.raises((RuntimeError, TypeError, AssertionError), match=said):
        run()


# ---- another flash kernel ------------------------------------------------------------------------
def test_a_flash_attention_whose_package_is_missing_is_refused_and_torchs_own_asks_for_nothing():
    ops.use_flash_attention("2")
    for version, package in ops.FLASH_PACKAGES.items():
        with pytest.raises(ValueError, match=f"--flash-attention {version}: .*{package}"):
            ops.use_flash_attention(version)


def test_another_flash_attention_is_torchs_switch(monkeypatch):
    chosen = []
    monkeypatch.setattr(ops, "activate_flash_attention_impl", chosen.append)
    for version in ("2", "3", "4"):
        ops.use_flash_attention(version)
    assert chosen == ["FA3", "FA4"]


def test_a_part_of_a_step_ends_with_what_it_gave_to_the_gpu(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(clock.doing))
    clock = Clock()
    clock.begin("policy_training")
    clock.begin("publish_copy")
    assert waits == ["start", "policy_training"]
