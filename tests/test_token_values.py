"""What `--log-tokens` writes of each token, and how watch.py colours it."""

import dataclasses

import pytest
import torch
from test_train import SMALL, random_groups

import loss
import report
import train_cispo
import watch
from bridge.groups import NOT_SAMPLED, Group
from bridge.show_samples import BLUE, OFF, SHADES, shade, shaded, show_samples
from bridge.token_values import TokenValues
from ranks.batch import Batch, micro_batches_of, pack_batch
from ranks.parallel import Mesh
from train_cispo import token_values


def with_insertion():
    """Groups of a step; in the first sample two tokens were put in."""
    groups = random_groups(dropped=(1,))
    groups[0].versions[:2] = NOT_SAMPLED
    groups[0].logprobs[:2] = 0.0
    return groups


def values_of(cfg, dp: int, monkeypatch) -> tuple[Batch, TokenValues]:
    """As dp ranks find them, the sums over whom are taken here."""
    batch, shares = Batch.unpack(pack_batch(with_insertion(), cfg)), []
    advantages_PS = loss.group_advantages(
        batch.rewards_PS, batch.valid_PS, cfg.use_leave_one_out_baseline, cfg.advantage_scale
    )
    monkeypatch.setattr(train_cispo, "all_reduce", lambda x, group: shares.append(x.clone()))
    for rank in range(dp):
        updates, _ = micro_batches_of(batch, advantages_PS, cfg, rank, dp, "cpu")
        for mb in (mb for micro_batches in updates for mb in micro_batches):
            mb.prev_logprobs = mb.gen_logprobs + 0.1 * torch.sin(mb.gen_logprobs)
            mb.logprobs = mb.prev_logprobs + 2 * torch.cos(mb.gen_logprobs)
        token_values(updates, batch, cfg, Mesh())
    monkeypatch.setattr(train_cispo, "all_reduce", lambda x, group: x.copy_(sum(shares)))
    return batch, advantages_PS, token_values(updates, batch, cfg, Mesh())


@pytest.mark.parametrize("dp", [1, 3])
def test_cispo_s_weight_is_the_clipped_ratio_times_the_correction(dp, monkeypatch):
    cfg = dataclasses.replace(SMALL, ratio_clip_min=0.5, ratio_clip_max=1.0)
    batch, advantages_PS, values = values_of(cfg, dp, monkeypatch)
    gen, log_ratio = batch.gen_logprobs, 2 * torch.cos(batch.gen_logprobs)
    mismatch = 0.1 * torch.sin(gen)
    put_in = batch.versions == NOT_SAMPLED
    assert put_in.sum() == 2 and torch.equal(values.log_ratios_F.isnan(), put_in)
    assert values.weights_F[put_in].isnan().all()
    close = dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        values.log_ratios_F[~put_in], (log_ratio + mismatch)[~put_in], **close
    )
    judged = (advantages_PS[batch.rows_PS] != 0).repeat_interleave(batch.lengths) & ~put_in
    weight = log_ratio.exp().clamp(0.5, 2.0) * mismatch.exp()
    torch.testing.assert_close(values.weights_F[judged], weight[judged], **close)
    assert not values.weights_F[~judged & ~put_in].isfinite().any()


def test_a_token_that_ppo_drops_has_weight_0_and_no_penalty_counts(monkeypatch):
    bounds = {"ratio_clip_min": 0.2, "ratio_clip_max": 0.2}
    ppo = {"use_cispo": False, "use_importance_sampling_correction": False}
    cfg = dataclasses.replace(SMALL, **bounds, **ppo, reference_policy_kl_penalty=0.3)
    batch, advantages_PS, values = values_of(cfg, 1, monkeypatch)
    ratio = (2 * torch.cos(batch.gen_logprobs)).exp()
    advantage = advantages_PS[batch.rows_PS].repeat_interleave(batch.lengths)
    high, low = 1.2, 0.8
    dropped = torch.where(advantage > 0, ratio > high, ratio < low)
    judged = (advantage != 0) & (batch.versions != NOT_SAMPLED)
    assert (dropped & judged).any() and (~dropped & judged).any()
    wanted = torch.where(dropped, 0.0, ratio)
    torch.testing.assert_close(values.weights_F[judged], wanted[judged], rtol=1e-5, atol=1e-5)


def run_with(tmp_path, values):
    """A run with one logged step, of one prompt with two answers."""
    group = Group(
        3,
        [1],
        torch.tensor([4, 2]),
        torch.tensor([5, 6, 7, 8, 5, 9]),
        torch.zeros(6),
        torch.zeros(6, dtype=torch.int32),
        torch.tensor([1.0, 0.0]),
        torch.zeros(2, dtype=torch.uint8),
    )
    texts = {
        (5,): "a\n",
        (6,): "\ufffd",
        (7,): "\ufffd",
        (6, 7): "é",
        (8,): "b",
        (9,): "c",
        (1,): "?",
    }
    decode = lambda ids: texts.get(tuple(ids)) or "".join(texts[(i,)] for i in ids)
    report.log_samples([group], 0, {3: {}}, decode, tmp_path, 4, values)
    return tmp_path


def test_tokens_are_coloured_by_what_became_of_them(tmp_path):
    nan = torch.nan
    values = TokenValues(
        torch.tensor([[True, True]]),
        torch.tensor([4, 2]),
        torch.tensor([0.0, -0.5, -0.5, 2.0, 0.1, nan]),
        torch.tensor([1.0, 3.0, 1.0, 0.0, nan, nan]),
    )
    run = run_with(tmp_path, values)
    best, worst = watch.read_jsonl(run / "samples.jsonl")
    assert best["values"] == [["a\n", 0.0, 1.0], ["é", -1.0, 2.0], ["b", 2.0, 0.0]]
    assert worst["values"] == [["a\n", 0.1, None], ["c", None, None]]
    text = show_samples(run, None, "log-ratio")
    assert f"{SHADES[0]}é{OFF}{SHADES[6]}b{OFF}" in text and f"{SHADES[4]}a↵{OFF}" in text
    assert "< -0.70" in text.splitlines()[0]
    text = show_samples(run, 0, "weight")
    assert f"{shade(2.0, 'weight')}é{OFF}" in text and f"\x1b[9;2mb{OFF}" in text
    assert f"a\n    {BLUE}c{OFF}" in text and "put in, not sampled" in text.splitlines()[0]
    assert shade(1.0, "weight") == shade(None, "weight") == shade(-1.0, "weight") == ""


def test_a_coloured_token_shows_each_line_that_it_ends_once():
    tokens = ["user", "\n", "<tool>", "\n\n", "a\nb", ""]
    text = shaded([[token, None, None] for token in tokens], "weight")
    lines = text.replace(BLUE, "").replace(OFF, "").split("\n    ")
    assert lines == ["    user↵", "<tool>↵", "↵", "a↵", "b"]
    assert shaded([["a\n", 0.0, 1.0]], "weight") == "    a\n    "  # the middle has no colour


def test_a_sample_that_is_not_trained_on_has_no_values(tmp_path):
    values = TokenValues(
        torch.tensor([[False, True]]), torch.tensor([2]), torch.ones(2), torch.ones(2)
    )
    best, worst = watch.read_jsonl(run_with(tmp_path, values) / "samples.jsonl")
    assert best["values"] == [] and worst["values"] == [["a\n", 1.0, 1.0], ["c", 1.0, 1.0]]
    assert "b" in show_samples(tmp_path, None, "weight")


def test_colours_that_a_run_did_not_log_are_refused(tmp_path):
    run_with(tmp_path, None)
    with pytest.raises(
        ValueError, match=r"--colour weight: .* did not log its tokens; --log-tokens"
    ):
        show_samples(tmp_path, None, "weight")
