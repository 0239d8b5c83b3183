"""Samples whose thinking is ended for them: what was put into them is context, and trained on by
nothing."""

import dataclasses

import pytest
import torch
from batches import unpack_batch
from test_batch import CFG
from test_failures import SAMPLES, groups, make_hub, run_node

from bridge import sample, weights
from bridge.groups import NOT_SAMPLED, Group, Refused, check_group
from config import Config
from model import ModelConfig, Qwen3MoE
from prepare import interruption
from ranks import batch
from task import Codec
from train_cispo import micro_batch_logprobs

AT, PUT = 3, [9, 1, 9]  # an end token among them: it ends nothing, since nobody sampled it


def run_interrupted(
    tmp_path, tiny_checkpoint, command, prompts, monkeypatch, think_end, max_model_len=64
):
    hub = make_hub(
        tmp_path, tiny_checkpoint, prompts=[{"prompt": p, "answer": "x"} for p in prompts] * 100
    )
    hub.run |= {"interrupt_at": AT, "interrupt_ids": PUT, "max_model_len": max_model_len}
    monkeypatch.setattr(sample, "THINK_END", think_end)
    try:
        run_node(hub, tmp_path, command, lambda node: groups(hub, 12))
        return hub.ledger.buffer
    finally:
        hub.close(patience_s=0.0)


def test_an_interrupted_sample_has_the_model_s_own_logprobs_around_what_was_put_in(
    tmp_path, tiny_checkpoint, fake_vllm_command, monkeypatch
):
    """Against the trainer's forward of the whole sequence, in the trainer's own packing; a sample
    that has ended its thinking ("c" stands for that) or itself is left alone."""
    found = run_interrupted(
        tmp_path, tiny_checkpoint, fake_vllm_command, ["abcde>", "vwxyz>"], monkeypatch, "c"
    )
    codec, kinds = Codec(tiny_checkpoint), set()
    for group in found:
        for ids, versions in zip(
            group.token_ids.split(group.lengths.tolist()),
            group.versions.split(group.lengths.tolist()),
        ):
            ids, put = ids.tolist(), (versions == NOT_SAMPLED).nonzero().flatten().tolist()
            thinks = "c" not in codec.decode(ids[:AT]) and 1 not in ids[:AT]
            assert put == (list(range(AT, AT + len(PUT))) if thinks else [])
            assert len(ids) <= 8 and (not thinks or ids[AT : AT + len(PUT)] == PUT)
            kinds.add(thinks)
    assert kinds == {True, False}
    cfg = dataclasses.replace(
        Config(),
        num_prompts_per_step=len(found),
        num_generations_per_prompt=SAMPLES,
        train_global_batch_size=len(found) * SAMPLES,
        logprob_chunk_size=16,
    )
    model = Qwen3MoE(ModelConfig.from_dir(tiny_checkpoint))
    weights.load_hf(model, tiny_checkpoint)
    ((mb,),), ((num_tokens, _),) = unpack_batch(
        batch.pack_batch(found, cfg), cfg, 0, 1, torch.device("cpu")
    )
    assert (
        num_tokens
        == sum(int((g.versions != NOT_SAMPLED).sum()) for g in found)
        == int(mb.mask.sum())
    )
    logprobs = micro_batch_logprobs(model, mb, dataclasses.replace(cfg, compile=False))[0]
    assert (logprobs - mb.gen_logprobs)[mb.mask].abs().max() < 1e-4
    assert (mb.versions[mb.mask] == 0).all() and mb.weights[mb.mask].sum() == pytest.approx(1.0)


def test_no_sample_is_longer_than_the_context_allows(
    tmp_path, tiny_checkpoint, fake_vllm_command, monkeypatch
):
    """A prompt of 6 leaves 7 tokens of 13, and one of 9 only 4, where an interruption would leave
    no answer."""
    prompts = ["vwxyz>", "vwxyzvwx>"]
    found = run_interrupted(
        tmp_path, tiny_checkpoint, fake_vllm_command, prompts, monkeypatch, "</think>", 13
    )
    for group in found:
        room = 13 - len(group.prompt_ids)
        assert room in (4, 7) and int(group.lengths.max()) <= room
        assert (room == 7) == bool((group.versions == NOT_SAMPLED).any())
        assert ((group.lengths == room) | (group.truncated == 0)).all()


def test_context_that_was_put_in_is_no_row_of_the_loss():
    """By hand: prompt 5 6, sampled 7 8, put 9 9, sampled 3; a second sample of one token."""
    ints = lambda *x: torch.tensor(x, dtype=torch.int32)
    group = Group(
        0,
        [5, 6],
        ints(5, 1),
        ints(7, 8, 9, 9, 3, 4),
        torch.tensor([-1.0, -2, 0, 0, -3, -4]),
        ints(1, 1, -1, -1, 2, 2),
        torch.tensor([1.0, 0.0]),
        torch.zeros(2).byte(),
    )
    assert group.oldest_version == 1
    cfg = dataclasses.replace(
        CFG, num_prompts_per_step=1, num_generations_per_prompt=2, train_global_batch_size=2
    )
    ((mb,),), counts = unpack_batch(batch.pack_batch([group], cfg), cfg, 0, 1, torch.device("cpu"))
    assert counts == [(4, 2)] and mb.num_tokens == 10
    order = [0, 1] if mb.tokens_T[2] == 7 else [1, 0]
    tokens, targets = [[5, 6, 7, 8, 9, 9, 3], [5, 6, 4]], [[7, 8, 3], [4]]
    assert mb.tokens_T.tolist() == [x for i in order for x in tokens[i]]
    assert mb.targets_N.tolist() == [x for i in order for x in targets[i]]
    # the 9 predicts the 3
    assert mb.tokens_T[mb.rows_N].tolist() == [x for i in order for x in [[6, 7, 9], [6]][i]]
    assert mb.gen_logprobs[mb.mask].tolist() == [
        x for i in order for x in [[-1.0, -2.0, -3.0], [-4.0]][i]
    ]
    assert mb.weights[mb.mask].tolist() == [0.25] * 4


@pytest.mark.parametrize(
    ("versions", "may_have", "refused"),
    [
        ([0, -1, 0, 0], 1, ""),
        ([0, -1, 0, 0], 0, "1 of a sample's 2 tokens were not sampled, expected 0"),
        ([-1, -1, 0, 0], 2, "2 of a sample's 2 tokens"),
        ([0, -2, 0, 0], 1, "policy versions -2..0 outside 0..0"),
    ],
)
def test_the_hub_takes_no_more_than_the_run_puts_in(versions, may_have, refused):
    ints = lambda *x: torch.tensor(x, dtype=torch.int32)
    group = {
        "lengths": ints(2, 2),
        "token_ids": ints(1, 2, 3, 4),
        "logprobs": torch.zeros(4),
        "versions": ints(*versions),
        "rewards": torch.zeros(2),
        "truncated": torch.zeros(2).byte(),
    }
    if not refused:
        check_group(group, (2, 2), 8, 32, (0, 0), may_have)
        return
    with pytest.raises(Refused, match=refused):
        check_group(group, (2, 2), 8, 32, (0, 0), may_have)


def test_an_interruption_that_leaves_no_room_to_answer_is_refused(tiny_checkpoint):
    codec = Codec(tiny_checkpoint)
    assert interruption(Config(), codec) == {}
    found = interruption(Config(interrupt_at_tokens=4, interrupt_text="abc"), codec)
    assert found == {"interrupt_at": 4, "interrupt_ids": codec.encode({"prompt": "abc"})}
    with pytest.raises(
        ValueError,
        match="--interrupt-at-tokens 5 and the 3 tokens of --interrupt-text leave nothing",
    ):
        interruption(Config(interrupt_at_tokens=5, interrupt_text="abc"), codec)
