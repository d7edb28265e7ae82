"""Cross entropy whose vocabulary is split over ranks, beside the same in one process."""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from armillary.kernels.cross_entropy import IGNORED, linear_cross_entropy
from armillary.training.layout import Layout
from armillary.training.process_group import join
from tests.conftest import free_port
from tests.groups import in_group

TOKENS, HIDDEN, ENTRIES, RANKS = 37, 12, 10, 2


def drawn():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, HIDDEN, generator=generator, dtype=torch.float64) for n in (TOKENS, ENTRIES))
    labels = torch.randint(0, ENTRIES, (TOKENS,), generator=generator)
    labels[::5] = IGNORED
    return hidden, weight, labels, torch.rand(TOKENS, generator=generator, dtype=torch.float64)


def on_a_rank(rank, out):
    join(rank, Layout(tensor=RANKS))
    hidden, weight, labels, weights = drawn()
    mine = weight.chunk(RANKS)[rank.rank].clone().requires_grad_()
    hidden.requires_grad_()
    total, losses = linear_cross_entropy(hidden, mine, labels, weights, 1e-2, 0.1, dist.group.WORLD)
    (3 * total).backward()
    dist.all_reduce(hidden.grad)
    torch.save([total.detach(), losses, hidden.grad, mine.grad], out / f"{rank.rank}.pt")


def test_each_rank_has_the_loss_of_the_whole_vocabulary(tmp_path):
    in_group(RANKS, free_port(), on_a_rank, tmp_path)
    hidden, weight, labels, weights = (x.requires_grad_() if x.dim() == 2 else x for x in drawn())
    logits = hidden @ weight.T
    losses = F.cross_entropy(logits, labels, ignore_index=IGNORED, label_smoothing=0.1, reduction="none")
    losses = losses + 1e-2 * logits.logsumexp(-1).square() * (labels != IGNORED)
    total = (losses * weights).sum()
    (3 * total).backward()
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]
    for got, part in zip(found, weight.grad.chunk(RANKS), strict=True):
        torch.testing.assert_close(got, [total.detach(), losses.detach(), hidden.grad, part])
