"""A layer of experts: a router sends each token to some of many SwiGLUs, which ranks may share.

Shazeer et al. 2017; the losses that balance it: Fedus et al. 2022, section 2.2, and Zoph et al. 2022, section 3.1.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import all_to_all
from megatron.core.transformer.transformer_config import TransformerConfig

from armillary.kernels.swiglu import swiglu
from armillary.model.config import ModelConfig
from armillary.model.context import own_positions


class Experts(torch.nn.Module):
    """In the place of a layer's SwiGLU: [positions, 1, hidden] -> the same.

    Each rank of the expert-parallel group holds num_experts / ranks whole experts; tokens go to them and come back by
    all-to-all. `aux_scale` weighs the router's own losses; the step sets it before each forward pass.
    """

    def __init__(self, config: TransformerConfig, model: ModelConfig):
        super().__init__()
        self.model, self.aux_scale = model, 0.0
        self.ranks = parallel_state.get_expert_model_parallel_world_size()
        local, hidden, ffn = model.num_experts // self.ranks, model.hidden_size, model.ffn_hidden_size
        dtype = config.params_dtype
        self.router = torch.nn.Parameter(torch.empty(model.num_experts, hidden, dtype=dtype))
        self.linear_fc1 = torch.nn.Parameter(torch.empty(local, 2 * ffn, hidden, dtype=dtype))
        self.linear_fc2 = torch.nn.Parameter(torch.empty(local, hidden, ffn, dtype=dtype))
        for weight in self.parameters():  # each tensor-parallel rank's positions are others under sequence parallelism
            weight.sequence_parallel = config.sequence_parallel
        for weight in (self.linear_fc1, self.linear_fc2):
            weight.of_experts = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens_TH = x.flatten(0, 1)
        logits_TE = F.linear(tokens_TH.float(), self.router.float())
        probabilities_TE = logits_TE.softmax(-1)
        weights_TK, experts_TK = probabilities_TE.topk(self.model.experts_per_token)
        if self.model.experts_per_token > 1:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        if self.model.capacity_factor and self.training:  # else answers would depend on what stands beside them
            weights_TK = weights_TK * within_shared_capacity(experts_TK, weights_TK, self.model)
        if self.training:
            loss = router_losses(logits_TE, probabilities_TE, experts_TK, self.model)
            weights_TK = _WithLoss.apply(weights_TK, loss, self.aux_scale)
        kept = weights_TK.flatten() > 0
        source = torch.arange(len(tokens_TH), device=x.device).repeat_interleave(self.model.experts_per_token)[kept]
        order = experts_TK.flatten()[kept].argsort(stable=True)
        source = source[order]
        counts_E = torch.bincount(experts_TK.flatten()[kept], minlength=self.model.num_experts)
        results = self._exchanged(tokens_TH[source], counts_E) * weights_TK.flatten()[kept][order, None].to(x.dtype)
        return torch.zeros_like(tokens_TH).index_add(0, source, results).view_as(x)

    def _exchanged(self, tokens: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
        """What the experts make of tokens [n, hidden], sorted by expert, counts_E of each; other ranks' experts too."""
        if self.ranks == 1:
            return self._computed(tokens, counts_E)
        group = parallel_state.get_expert_model_parallel_group()
        arriving_RE = torch.empty_like(counts_E)
        dist.all_to_all_single(arriving_RE, counts_E, group=group)
        arriving_RE = arriving_RE.view(self.ranks, -1)
        sent, received = counts_E.view(self.ranks, -1).sum(1).tolist(), arriving_RE.sum(1).tolist()
        arrived = all_to_all(group, tokens, received, sent)
        # They come by rank and then by expert: stable sorting puts each expert's together.
        expert = torch.arange(arriving_RE.shape[1], device=tokens.device).repeat(self.ranks)
        order = expert.repeat_interleave(arriving_RE.flatten()).argsort(stable=True)
        results = self._computed(arrived[order], arriving_RE.sum(0))
        return all_to_all(group, torch.empty_like(results).index_copy(0, order, results), sent, received)

    def _computed(self, tokens: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """This rank's experts on tokens sorted by expert."""
        ends = counts.cumsum(0).int()
        gate_up = F.grouped_mm(tokens, self.linear_fc1.transpose(1, 2), offs=ends)
        return F.grouped_mm(swiglu(gate_up), self.linear_fc2.transpose(1, 2), offs=ends)


def within_shared_capacity(experts_TK: torch.Tensor, weights_TK: torch.Tensor, model: ModelConfig) -> torch.Tensor:
    """`within_capacity` of a micro-batch whose positions tensor- and context-parallel ranks share: of this rank's."""
    group = parallel_state.get_tensor_and_context_parallel_group()
    ranks, context = dist.get_world_size(group), parallel_state.get_context_parallel_world_size()
    if ranks == 1:
        return within_capacity(experts_TK, weights_TK, model)
    own = torch.stack([weights_TK.detach(), experts_TK.to(weights_TK.dtype)], 1)  # floats have room for the numbers
    gathered = own.new_empty(ranks * len(own), *own.shape[1:])
    dist.all_gather_into_tensor(gathered, own, group=group)
    # Of equal weights the first position's is kept, wherever it is.
    positions = torch.arange(len(gathered), device=own.device)
    positions = torch.cat([own_positions(positions, context, rank) for rank in range(context)])
    weights, experts = torch.empty_like(gathered).index_copy(0, positions, gathered).unbind(1)
    kept = within_capacity(experts.long(), weights.contiguous(), model)
    return kept[positions].chunk(ranks)[dist.get_rank(group)]


def within_capacity(experts_TK: torch.Tensor, weights_TK: torch.Tensor, model: ModelConfig) -> torch.Tensor:
    """1 for each choice that an expert has room for, else 0; the largest weights come first. Float [T, K]."""
    flat, experts = weights_TK.detach().flatten(), experts_TK.flatten()
    room = math.ceil(model.capacity_factor * len(flat) / model.num_experts)
    by_weight = flat.argsort(descending=True, stable=True)
    order = by_weight[experts[by_weight].argsort(stable=True)]  # by expert, and then by weight
    counts = torch.bincount(experts, minlength=model.num_experts)
    place = torch.arange(len(flat), device=flat.device) - (counts.cumsum(0) - counts)[experts[order]]
    return torch.zeros_like(flat).index_put((order,), (place < room).to(flat.dtype)).view_as(weights_TK)


def router_losses(
    logits_TE: torch.Tensor, probabilities_TE: torch.Tensor, experts_TK: torch.Tensor, model: ModelConfig
) -> torch.Tensor:
    """This rank's part of the micro-batch's balance loss and z-loss, which add up over the ranks that share it:
    E sum_e f_e P_e with f_e the share of choices that are expert e and P_e its mean probability, and the mean of
    logsumexp(logits)^2, each with its weight."""
    group = parallel_state.get_tensor_and_context_parallel_group()
    counts_E = torch.bincount(experts_TK.flatten(), minlength=model.num_experts).float()
    if dist.get_world_size(group) > 1:
        dist.all_reduce(counts_E, group=group)
    choices = counts_E.sum()
    tokens = choices / model.experts_per_token
    balance = model.num_experts * (counts_E / choices * probabilities_TE.sum(0) / tokens).sum()
    z = logits_TE.logsumexp(-1).square().sum() / tokens
    return model.balance_loss * balance + model.router_z_loss * z


class _WithLoss(torch.autograd.Function):
    """x as it is; in the backward pass the loss's gradient comes in, `scale` times."""

    @staticmethod
    def forward(ctx, x, loss, scale):
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        return dx, dx.new_tensor(ctx.scale, dtype=torch.float32), None
