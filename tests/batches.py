"""What the step does with a batch, in one call."""

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
