"""What the training made of each token, for the samples' log (`--log-tokens`). show_samples.py
shows it, and must not import torch, which takes longer than all that it does."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from bridge.groups import Group


class TokenValues(NamedTuple):
    """Of the tokens of a step. Shapes: over prompts and samples (P, S); over the R samples that are
    trained on; over their F tokens, NaN where a value is not known."""

    rows_PS: torch.Tensor  # which samples are trained on
    lengths_R: torch.Tensor
    log_ratios_F: torch.Tensor  # log pi, at the token's update, less the sampler's; nats
    weights_F: torch.Tensor  # what its gradient was multiplied by, besides the advantage

    def pieces(self, group: Group, p: int, i: int, decode: Callable[[list[int]], str]) -> list:
        """Sample i of the step's prompt p: [text, log-ratio, weight] of each token; of several
        that make one character, their sum and mean. [] where it is not trained on."""
        if not self.rows_PS[p, i]:
            return []
        row = int(self.rows_PS.flatten()[: p * self.rows_PS.shape[1] + i].sum())
        begin = int(self.lengths_R[:row].sum())
        ids = group.token_ids.split(group.lengths.tolist())[i].tolist()
        found, waiting = [], []
        for at, token in enumerate(ids, start=begin):
            waiting.append((token, self.log_ratios_F[at].item(), self.weights_F[at].item()))
            tokens, log_ratios, weights = zip(*waiting)
            text = decode(list(tokens))
            if not text.endswith("\ufffd") or len(waiting) == 4 or at == begin + len(ids) - 1:
                found.append([text, known(sum(log_ratios)), known(sum(weights) / len(weights))])
                waiting = []
        return found


def known(value: float) -> float | None:
    """For JSON, which has no NaN."""
    return round(value, 4) if math.isfinite(value) else None
