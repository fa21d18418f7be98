"""The connectionist temporal classification loss as sums over alignments, one time step after the other.

ATen's kernels read the lengths, so that no trace passes them, and ONNX has none. The recursion is that of the paper
(Graves et al., Connectionist Temporal Classification, 2006, section 4.1), in logarithms, and autograd goes through it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .computed_losses import reduced

_NEVER = -1e30  # the logarithm of no probability: an infinite one would make derivatives not-a-number
_Lengths = Tensor | Sequence[int]


def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: _Lengths,
    target_lengths: _Lengths,
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    """As ATen's, of as many time steps as the example has; samples and targets of any number.

    Its gradient takes the probabilities of a time step to sum to one, as ATen's does, which is not the derivative.
    """
    batched = log_probs.dim() == 3
    if not batched:
        log_probs = log_probs.unsqueeze(1)
    steps = int(log_probs.shape[0])
    lengths = _as_tensor(target_lengths, log_probs)
    labels = _labels(targets, lengths, target_lengths, batched, blank)
    states = _between_blanks(labels, blank)
    scores = log_probs.gather(2, states.expand([steps, *states.shape])).clamp(min=_NEVER)
    inputs = _as_tensor(input_lengths, log_probs)
    inside = torch.arange(steps, device=log_probs.device).unsqueeze(1) < inputs  # time steps, samples
    alpha = _last_alpha(scores, _skips(states, blank), inside.unsqueeze(2))
    # An alignment ends with the last label or the blank behind it.
    ends = torch.stack([2 * lengths, (2 * lengths - 1).clamp(min=0)], 1)
    last = alpha.gather(1, ends)
    is_there = torch.stack([torch.ones_like(lengths), lengths], 1) > 0
    loss = -torch.logsumexp(torch.where(is_there, last, _NEVER), 1)
    loss = torch.where(inputs > 0, loss, torch.where(lengths > 0, -_NEVER, 0.0).to(loss.dtype))
    total = torch.where(inside.unsqueeze(2), log_probs.exp(), 0.0).sum((0, 2))
    loss = loss + (total - total.detach())
    impossible = loss > -_NEVER / 2
    if zero_infinity:
        loss = torch.where(impossible, 0.0, loss)
    else:
        loss = loss * torch.where(impossible, torch.inf, 1.0).to(loss.dtype)
    if reduction == "mean":
        loss = loss / lengths.clamp(min=1).to(loss.dtype)
    return reduced(loss if batched else loss.squeeze(0), None, None, reduction)


def _as_tensor(lengths: _Lengths, like: Tensor) -> Tensor:
    if isinstance(lengths, Tensor):
        return lengths.reshape(-1).to(torch.int64)
    return torch.tensor(list(lengths), dtype=torch.int64, device=like.device)


def _labels(targets: Tensor, lengths: Tensor, given: _Lengths, batched: bool, blank: int) -> Tensor:
    """A row for each sample: its labels, and blanks behind them."""
    targets = targets.to(torch.int64)
    if not batched:
        targets = targets.reshape(1, -1)
    if targets.dim() == 1:  # one sample's behind the other's
        longest = targets.shape[0] if isinstance(given, Tensor) else max(given, default=0)
        starts = (lengths.cumsum(0) - lengths).unsqueeze(1)
        places = starts + torch.arange(longest, device=targets.device)
        padded = torch.cat([targets, targets.new_full([1], blank)])  # also where there is none
        targets = padded[places.clamp(max=targets.shape[0])]
    return torch.where(torch.arange(targets.shape[1], device=targets.device) < lengths.unsqueeze(1), targets, blank)


def _between_blanks(labels: Tensor, blank: int) -> Tensor:
    """A blank before each label, and one at the end."""
    first = labels.new_full([labels.shape[0], 1], blank)
    return torch.cat([torch.stack([torch.full_like(labels, blank), labels], 2).flatten(1), first], 1)


def _skips(states: Tensor, blank: int) -> Tensor:
    """0 where an alignment may come from two states before, leaving out the blank between two different labels."""
    count = states.shape[1]
    before = torch.cat([states.new_full([states.shape[0], 2], blank), states], 1)[:, :count]
    return torch.where(states != before, 0.0, _NEVER)


def _last_alpha(scores: Tensor, skips: Tensor, inside: Tensor) -> Tensor:
    """The logarithm of the probability of all alignments that are in a state at each sample's last time step.

    Args:
        scores: of the states, (time steps, samples, states). skips: (samples, states).
        inside: whether a sample still has this time step, (time steps, samples, 1).
    """
    first, *others = scores.unbind()
    count = first.shape[1]
    skips = skips.to(first.dtype)
    nothing = first.new_full([first.shape[0], 2], _NEVER)
    alpha = torch.where(torch.arange(count, device=first.device) < 2, first, _NEVER)
    for step, score in enumerate(others, 1):
        before = torch.cat([nothing, alpha], 1)
        sources = torch.stack([alpha, before[:, 1 : count + 1], before[:, :count] + skips])
        alpha = torch.where(inside[step], score + torch.logsumexp(sources, 0), alpha)
    return alpha
