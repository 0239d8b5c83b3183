"""A group: all samples of one prompt, and how it travels from a rollout node to the trainer."""

import itertools
import json
import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save

from bridge.reward_process import MOST_PARTS, PART_NAME

# ---- a group -------------------------------------------------------------------------------------
# in place of a policy version: a token that was put there, by --interrupt-text or by the sample's
# environment; no loss row
NOT_SAMPLED = -1


@dataclass
class Group:
    """All samples of one prompt. Flat tensors over the samples' response tokens, R of them in
    all."""

    ordinal: int
    prompt_ids: list[int]
    lengths: torch.Tensor  # (S,) int32: response tokens of each sample
    token_ids: torch.Tensor  # (R,) int32
    logprobs: torch.Tensor  # (R,) float32: the sampler's, in nats
    versions: torch.Tensor  # (R,) int32: the policy version that sampled each token, or NOT_SAMPLED
    rewards: torch.Tensor  # (S,) float32
    truncated: torch.Tensor  # (S,) uint8: 1 where max_new_tokens cut the sample off
    # for router replay, of all layers: vLLM's experts of the prompt's tokens but the last,
    prompt_experts: torch.Tensor | None = None  # (P - 1, L, K)
    # and of the token before each response token, which is the pass that predicts it
    experts: torch.Tensor | None = None  # (R, L, K)
    # of a reward that is a dict: its parts by name, (S,) float32, NaN where a sample has not this
    parts: dict[str, torch.Tensor] = field(default_factory=dict)

    @cached_property
    def oldest_version(self) -> int:
        return int(self.sampled_versions.min())

    @property
    def sampled_versions(self) -> torch.Tensor:
        return self.versions[self.versions != NOT_SAMPLED]


# ---- from vLLM's answer to bytes, on the node ----------------------------------------------------
def damage(choice: dict, max_new_tokens: int | None = None) -> str:
    """Why a sample cannot be trained on, or "": it needs a finite log-prob and a version for each
    of its tokens. vLLM may send NaN, which JSON may make null."""
    try:
        tokens, entries = (
            choice.get("token_ids") or [],
            (choice.get("logprobs") or {}).get("content") or [],
        )
        spans = [
            (int(span["version"]), span["end"] - span["start"])
            for span in choice.get("weight_versions") or []
        ]
        covered = sum(length for _, length in spans)
        choice["finish_reason"], [x["logprob"] for x in entries]
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        return f"it has not the form of a sample: {e!r}"
    if not tokens:
        return "no tokens"
    if max_new_tokens and len(tokens) > max_new_tokens:
        return f"{len(tokens)} tokens, asked for at most {max_new_tokens}"
    if not all(
        isinstance(x["logprob"], float | int) and math.isfinite(x["logprob"]) for x in entries
    ):
        return "a log-prob that is not finite"
    if not len(entries) == len(tokens) == covered:
        return f"{len(tokens)} tokens, {len(entries)} log-probs, versions of {covered}"
    return ""


def pack_group(samples: list, rewards: list[float], lease: str, prompt_experts=None) -> bytes:
    """The safetensors body of POST /groups, of `sample.Sample`s; Group says what each tensor is."""
    S = len(samples)
    tensors = {
        "lengths": torch.tensor([len(s.token_ids) for s in samples], dtype=torch.int32),
        "token_ids": torch.tensor([t for s in samples for t in s.token_ids], dtype=torch.int32),
        "logprobs": torch.tensor([x for s in samples for x in s.logprobs], dtype=torch.float32),
        "versions": torch.tensor([v for s in samples for v in s.versions], dtype=torch.int32),
        "rewards": torch.tensor(rewards, dtype=torch.float32),
        "truncated": torch.tensor([s.truncated for s in samples], dtype=torch.uint8),
    }
    if prompt_experts is not None:
        experts = np.concatenate([x for s in samples for x in s.experts])
        tensors["prompt_experts"] = torch.from_numpy(prompt_experts)
        tensors["experts"] = torch.from_numpy(experts)
    parts = [getattr(reward, "parts", {}) for reward in rewards]
    # samples may differ in theirs: as many as one function may have, so the group is not refused
    for name in list(dict.fromkeys(name for x in parts for name in x))[:MOST_PARTS]:
        values = [x.get(name, math.nan) for x in parts]
        tensors[f"{PART}{name}"] = torch.tensor(values, dtype=torch.float32)
    numbers = {
        "generate_group_s": max(s.generate_s for s in samples),
        "turns_per_sample": sum(s.turns for s in samples) / S,
        "environment_s": sum(s.environment_s for s in samples) / S,
    }
    return save(tensors, metadata={"lease": lease, **{n: f"{x:.6f}" for n, x in numbers.items()}})


# ---- from bytes to tensors, at the hub -----------------------------------------------------------
class Refused(Exception):
    """A request that cannot be honoured: HTTP status and one line that says why."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status, self.reason = status, reason


GROUP_NUMBERS = ("generate_group_s", "turns_per_sample", "environment_s")  # for the metrics
GROUP_TENSORS = {
    "lengths": torch.int32,
    "token_ids": torch.int32,
    "logprobs": torch.float32,
    "versions": torch.int32,
    "rewards": torch.float32,
    "truncated": torch.uint8,
}

PART = "part/"  # what the tensors of a reward's parts are called, before their name

EXPERT_TENSORS = ("prompt_experts", "experts")  # of a run with router replay, see Group


class Experts(NamedTuple):
    """What a run with router replay expects of vLLM's experts."""

    layers: int  # of the model, with those that have no experts
    per_token: int
    count: int  # that a layer has

    @property
    def dtype(self) -> torch.dtype:
        return torch.uint8 if self.count <= 256 else torch.int16

    @property
    def bytes_per_token(self) -> int:
        return self.layers * self.per_token * self.dtype.itemsize


MAX_HEADER_BYTES = 1 << 16
DTYPES = {"F32": torch.float32, "F64": torch.float64, "U8": torch.uint8}
DTYPES |= {"I16": torch.int16, "I32": torch.int32, "I64": torch.int64}


def views(body: bytearray) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Metadata and tensors of a safetensors blob. The tensors lie in `body`: the library would copy
    them while no other request is answered, 50 MB with router replay. Raises: ValueError,
    TypeError, KeyError, AttributeError or struct.error unless they fill it end to end."""
    (size,) = struct.unpack_from("<Q", body)
    if size > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {size} bytes, {MAX_HEADER_BYTES} is the most")
    header, tensors, start = json.loads(body[8 : 8 + size]), {}, 8 + size
    metadata, end = header.pop("__metadata__", None) or {}, start
    if not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("metadata that is no text")
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, at = DTYPES[entry["dtype"]], entry["shape"], end
        if not all(type(n) is int and 0 <= n <= len(body) for n in shape):
            raise ValueError(f"{name:.60} has the shape {shape!s:.60}")
        count = math.prod(shape)
        end += count * dtype.itemsize
        if entry["data_offsets"] != [at - start, end - start] or end > len(body):
            raise ValueError(f"{name:.60} is not where the tensor before it ends")
        if at % dtype.itemsize:
            raise ValueError(f"{name:.60} is not aligned")
        # frombuffer takes no count of 0
        flat = torch.frombuffer(body, dtype=dtype, count=count, offset=at) if count else []
        tensors[name] = torch.as_tensor(flat, dtype=dtype).view(shape)
    if end != len(body):
        raise ValueError(f"tensors of {end} bytes in a body of {len(body)}")
    return metadata, tensors


def parse_group(body: bytearray) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Metadata and tensors of a /groups body; they keep its memory. Raises: Refused (400) unless it
    is exactly the format above."""
    try:
        metadata, tensors = views(body)
        for name in GROUP_NUMBERS:
            given = metadata.get(name, "nan")
            metadata[name] = float(given) if len(given) < 32 else math.nan
    except (ValueError, TypeError, KeyError, AttributeError, struct.error, RecursionError) as e:
        raise Refused(400, f"body is not safetensors: {str(e)[:200]}") from None
    for name, dtype in GROUP_TENSORS.items():
        if name not in tensors:
            raise Refused(400, f"tensor {name} is missing")
        if tensors[name].dtype != dtype or tensors[name].dim() != 1:
            raise Refused(
                400,
                f"{name} is {tensors[name].dtype} {list(tensors[name].shape)}, expected 1-D "
                f"{dtype}",
            )
    parts = {name: tensors.pop(name) for name in [*tensors] if name.startswith(PART)}
    if extra := tensors.keys() - GROUP_TENSORS.keys() - set(EXPERT_TENSORS):
        raise Refused(400, f"unexpected tensor {sorted(extra)[0]}")
    check_parts(parts, len(tensors["rewards"]))
    if parts:
        tensors["parts"] = {name.removeprefix(PART): x for name, x in parts.items()}
    return metadata, tensors


def check_parts(parts: dict[str, torch.Tensor], samples: int) -> None:
    """Raises: Refused (400)."""
    if len(parts) > MOST_PARTS:
        raise Refused(400, f"{len(parts)} parts of rewards, {MOST_PARTS} is the most")
    for name, x in parts.items():
        if not re.fullmatch(PART + PART_NAME, name) or x.dtype != torch.float32:
            raise Refused(400, f"{name:.60}: expected float32 and a name like {PART_NAME}")
        if list(x.shape) != [samples] or x.isinf().any():
            raise Refused(400, f"{name}: expected a finite number or NaN for each sample")


def check_group(
    t: dict[str, torch.Tensor],
    num_samples,
    max_new_tokens: int,
    vocab_size: int,
    versions,
    max_inserted: int = 0,
    prompt_tokens: int = 0,
    experts: Experts | None = None,
):
    """Raises: Refused (422) unless the tensors are what was asked for. `num_samples`: (fewest,
    most) of the prompt; `versions`: (oldest, newest) that are possible; max_inserted: tokens of a
    sample that may be NOT_SAMPLED; experts: for router replay."""
    faults = itertools.chain(  # one after the other: values make sense where shapes are right
        _shape_faults(t, *num_samples, max_new_tokens),
        _inserted_faults(t, max_inserted),
        _value_faults(t, vocab_size, *versions),
        _expert_faults(t, prompt_tokens, experts),
    )
    for fault in faults:
        raise Refused(422, fault)


def _shape_faults(t, fewest: int, most: int, max_new_tokens: int) -> Iterator[str]:
    samples, tokens, total = len(t["lengths"]), len(t["token_ids"]), int(t["lengths"].sum())
    if not fewest <= samples <= most:
        yield f"{samples} samples, expected {fewest} to {most}"
    if not all(len(t[name]) == samples for name in ("rewards", "truncated")):
        yield "rewards or truncated: not one for each sample"
    if not all(len(t[name]) == tokens for name in ("logprobs", "versions")):
        yield "logprobs or versions: not one for each token"
    if not samples or int(t["lengths"].min()) < 1:
        yield "a sample has no tokens"
    if int(t["lengths"].max()) > max_new_tokens:
        yield f"a sample has more than {max_new_tokens} tokens"
    if total != tokens:
        yield f"lengths add up to {total}, not {tokens} tokens"


def _inserted_faults(t, max_inserted: int) -> Iterator[str]:
    sampled = t["versions"] != NOT_SAMPLED
    for sample in sampled.split(t["lengths"].tolist()) if not sampled.all() else ():
        inserted, tokens = int((~sample).sum()), len(sample)
        if inserted > max_inserted or inserted == tokens:
            expected = f"expected {max_inserted}"
            yield f"{inserted} of a sample's {tokens} tokens were not sampled, {expected}"


def _value_faults(t, vocab_size: int, oldest: int, newest: int) -> Iterator[str]:
    versions = t["versions"][t["versions"] != NOT_SAMPLED]
    low, high = int(versions.min()), int(versions.max())
    if int(t["token_ids"].min()) < 0 or int(t["token_ids"].max()) >= vocab_size:
        yield f"a token id is outside the vocabulary of {vocab_size}"
    if not (t["logprobs"].isfinite().all() and t["logprobs"].max() <= 1e-3):
        yield "a log-prob is not finite or above 0"
    if not t["rewards"].isfinite().all():
        yield "a reward is not finite"
    if not oldest <= low <= high <= newest:
        yield f"policy versions {low}..{high} outside {oldest}..{newest}"


def _expert_faults(t, prompt_tokens: int, experts: Experts | None) -> Iterator[str]:
    rows = {"prompt_experts": prompt_tokens - 1, "experts": len(t["token_ids"])}
    for name in EXPERT_TENSORS:
        if (name in t) != (experts is not None):
            yield f"{name}: {'missing' if experts else 'the run has no use for it'}"
        if experts is None:
            continue
        shape, found = [rows[name], experts.layers, experts.per_token], t[name]
        if list(found.shape) != shape or found.dtype != experts.dtype:
            yield f"{name} is {found.dtype} {list(found.shape)}, expected {experts.dtype} {shape}"
        if found.numel() and not 0 <= int(found.min()) <= int(found.max()) < experts.count:
            yield f"{name} names an expert outside 0..{experts.count - 1}"


def means_of_parts(groups: list[Group], prefix: str) -> dict[str, float]:
    """Of each part of the rewards: its mean over the samples that have it."""
    names = sorted({name for g in groups for name in g.parts})
    found = {n: torch.cat([g.parts[n] for g in groups if n in g.parts]).double() for n in names}
    return {f"{prefix}{n}": x.nanmean().item() for n, x in found.items() if not x.isnan().all()}
