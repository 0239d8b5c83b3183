"""What the step does with a batch, in one call."""

import loss
from loss import group_advantages
from ranks.batch import Batch, micro_batches_of


def advantages_of(batch, cfg):
    leave_one_out, scale = cfg.use_leave_one_out_baseline, cfg.advantage_scale
    return group_advantages(batch.rewards_PS, batch.valid_PS, leave_one_out, scale)


def unpack_batch(blob, cfg, dp_rank, dp, device, pad_to=1):
    """A rank's micro-batches of each update, with their advantages, and the updates' counts."""
    batch = Batch.unpack(blob)
    advantages_PS = advantages_of(batch, cfg)
    return micro_batches_of(batch, advantages_PS, cfg, dp_rank, dp, device, pad_to)


def rows_of(blob, cfg) -> dict:
    """The tensors of a batch by name, and each row's advantage."""
    batch = Batch.unpack(blob)
    return {**vars(batch), "advantages": advantages_of(batch, cfg)[batch.rows_PS]}


# ---- the loss with its tensors one by one, as formulas have them -----------------------------------
def policy_loss(
    logprobs, prev, gen, advantages, mask, weights, num_tokens, alg, ref_logprobs=None, nll_weights=None,
    sequence=None, num_seqs=1, age=None, max_age=0,
):  # fmt: skip
    tokens = loss.Tokens(prev, gen, advantages, mask, weights, ref_logprobs, nll_weights)
    return loss.policy_loss(logprobs, tokens, alg, num_tokens, num_seqs, sequence, age, max_age)


def token_loss(
    logprobs, prev, gen, advantages, mask, weights, alg, ref=None, nll_weights=None, sequence=None
):
    tokens = loss.Tokens(prev, gen, advantages, mask, weights, ref, nll_weights)
    return loss.token_loss(logprobs, tokens, alg, sequence)
