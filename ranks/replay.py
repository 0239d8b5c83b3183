"""Router replay with the sampler's experts (R3, arXiv:2510.11370): what vLLM chose, on the rank
that needs it.

They are hundreds of bytes a token, so they are not part of the batch that every rank gets: each
rank is sent those of its own micro-batches, and of its own slice of their tokens.
"""

import torch
import torch.distributed as dist

from bridge.groups import Group
from ranks.batch import Batch, MicroBatch, padded_length, rows_by_rank
from ranks.parallel import Mesh


def of_row(group: Group, sample: int) -> torch.Tensor:
    """The experts of all tokens of a sample, its prompt first. The last token predicts nothing, and
    no other attends to it: it gets those of the one before. Shape: (P + n, L, K)."""
    end = int(group.lengths[: sample + 1].sum())
    experts = group.experts[end - int(group.lengths[sample]) : end]
    return torch.cat((group.prompt_experts, experts, experts[-1:]))


def give_experts(
    groups: list[Group] | None, batch: Batch, updates: list[list[MicroBatch]], cfg, mesh: Mesh, m
) -> None:
    """With --router-replay sampler, fill in `expert_ids` of this rank's micro-batches, from the
    groups that rank 0 has. m: the ModelConfig; layers without experts are left out."""
    if cfg.router_replay != "sampler":
        return
    places = batch.rows_PS.nonzero().tolist()
    for micro_batches, (mine, by_rank) in zip(updates, rows_by_rank(batch, cfg, mesh.dp)):
        for i, mb in enumerate(micro_batches):
            if mesh.rank:
                shape = (len(m.moe_layers), len(mb.tokens_T) // mesh.tp, m.num_experts_per_tok)
                mb.expert_ids = torch.empty(shape, dtype=m.expert_dtype, device=mesh.device)
                dist.recv(mb.expert_ids.view(torch.uint8), 0)
                continue
            for dp_rank in range(mesh.dp):
                rows = mine[by_rank[dp_rank][i][0]].tolist()
                tokens_T = torch.cat([of_row(groups[p], s) for p, s in (places[r] for r in rows)])
                padded = padded_length(len(tokens_T), mesh.tp)
                padding = tokens_T[-1:].expand(padded - len(tokens_T), -1, -1)
                tokens_T = torch.cat((tokens_T, padding))[:, m.moe_layers]
                for tp_rank, slice_t in enumerate(tokens_T.tensor_split(mesh.tp)):
                    slice_LtK = slice_t.transpose(0, 1).contiguous().to(mesh.device)
                    rank = dp_rank * mesh.tp + tp_rank
                    if rank:
                        dist.send(slice_LtK.view(torch.uint8), rank)
                    else:
                        mb.expert_ids = slice_LtK
