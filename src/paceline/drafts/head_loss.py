"""Losses over a vocabulary, computed in chunks with the gradient formed in the forward pass.

A head's logits are the largest tensors of draft training: 8,192 slots x 7 depths x 32,000 fp32 would be 7.3 GB.
Here at most `chunk` rows of them exist at a time, and the gradient with respect to hidden states and weights is
made while they do; the backward pass only scales it. Where no gradient can be asked for, none is made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paceline.drafts.compiling import compile_rows
from paceline.schema.target_info import LogitTransform

_IDENTITY = LogitTransform()


@dataclass(frozen=True, slots=True)
class Head:
    """Hidden states -> logits: transform(W h + bias)."""

    weight: Tensor
    """[D, H]."""
    bias: Tensor | None = None
    """[D]."""
    transform: LogitTransform = _IDENTITY

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 [n, D] of [n, H]."""
        return transform_logits(hidden @ self.weight.T, self.bias, *self.constants)

    @property
    def constants(self) -> tuple[float, float | None]:
        """(scale, soft cap), plain numbers that torch.compile can specialise on."""
        return self.transform.scale, self.transform.soft_cap


@dataclass(frozen=True, slots=True)
class HeadLoss:
    """Sums over rows of a head loss, and per-row figures without a graph."""

    total: Tensor
    """fp32 scalar: sum of row_weight * cross-entropy."""
    cross_entropy: Tensor
    """fp32[N], detached."""
    predicted: Tensor
    """int64[N]: argmax of the student's logits."""


def transform_logits(raw: Tensor, bias: Tensor | None, scale: float, soft_cap: float | None) -> Tensor:
    """fp32 soft_cap * tanh(scale * (raw + bias) / soft_cap)."""
    logits = raw.float()
    if bias is not None:
        logits = logits + bias.float()
    if scale != 1.0:
        logits = logits * scale
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    return logits


def soft_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    teacher_hidden: Tensor,
    teacher: Head,
    pairs: TeacherPairs,
    row_weight: Tensor,
    compile_chunks: bool = False,
) -> HeadLoss:
    """Sum of w_n * -sum_v p log q: q from student rows, p from the target's own distribution.

    A teacher row's distribution is made once and shared by all student rows that it teaches.

    Args:
        hidden: [R, H] student states (with graph). head: [D, H] the student's head (with graph).
        teacher_hidden: [M, H] final hidden states of the target.
        pairs: which student row is taught by which teacher row.
        row_weight: fp32[N], one a pair; 0 leaves a pair out.
    """
    hidden, head = _as_asked(hidden), _as_asked(head)
    total, cross_entropy, predicted = _SoftCrossEntropy.apply(
        hidden, head, teacher_hidden, teacher, pairs, row_weight, compile_chunks
    )
    return HeadLoss(total, cross_entropy, predicted)


def hard_cross_entropy(
    hidden: Tensor, head: Head, labels: Tensor, row_weight: Tensor, chunk: int, compile_chunks: bool = False
) -> HeadLoss:
    """Sum of w_n * -log q[label_n] through a frozen head.

    Args:
        hidden: [N, H] with graph. labels: int64[N]. row_weight: fp32[N] without a graph. chunk: rows at a time.
    """
    hidden = _as_asked(hidden)
    total, cross_entropy, predicted = _HardCrossEntropy.apply(hidden, head, labels, row_weight, chunk, compile_chunks)
    return HeadLoss(total, cross_entropy, predicted)


@dataclass(frozen=True, slots=True)
class TeacherPairs:
    """Student rows grouped by the teacher row they learn from, cut into chunks.

    Chunk c covers teacher rows teacher_bounds[c]:teacher_bounds[c+1] and pairs pair_bounds[c]:pair_bounds[c+1].
    """

    student: Tensor
    """int64[N]: student row of each pair; no row twice."""
    teacher: Tensor
    """int64[N]: teacher row of each pair, ascending by chunk."""
    teacher_bounds: tuple[int, ...]
    pair_bounds: tuple[int, ...]

    @property
    def chunks(self) -> list[tuple[int, int, int, int]]:
        """(teacher start, teacher end, pair start, pair end) of each chunk."""
        t, p = self.teacher_bounds, self.pair_bounds
        return [(t[c], t[c + 1], p[c], p[c + 1]) for c in range(len(t) - 1)]


def _as_asked(tensor: Tensor) -> Tensor:
    """The tensor as autograd will treat it: a function's `needs_input_grad` knows nothing of `torch.no_grad`."""
    return tensor if torch.is_grad_enabled() else tensor.detach()


def _soft_chunk(
    raw: Tensor,
    teacher_raw: Tensor,
    bias: Tensor | None,
    constants: tuple[float, float | None],
    index: Tensor,
    weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cross-entropy [n], argmax [n] and, with a weight, gradient of the weighted sum by raw logits [n, D]."""
    p = torch.softmax(transform_logits(teacher_raw, bias, *constants), -1)[index]
    logits = raw.float()
    lse = torch.logsumexp(logits, -1)
    cross_entropy = lse - (p * logits).sum(-1)
    if weight is None:
        return cross_entropy, logits.argmax(-1), None
    gradient = (torch.softmax(logits, -1) - p) * weight[:, None]
    return cross_entropy, logits.argmax(-1), gradient.to(raw.dtype)


def _hard_chunk(
    raw: Tensor, bias: Tensor | None, constants: tuple[float, float | None], labels: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    scale, soft_cap = constants
    logits = transform_logits(raw, bias, scale, soft_cap)
    lse = torch.logsumexp(logits, -1)
    cross_entropy = lse - logits.gather(-1, labels[:, None])[:, 0]
    if weight is None:
        return cross_entropy, logits.argmax(-1), None
    is_label = torch.arange(raw.shape[-1], device=raw.device) == labels[:, None]
    gradient = (torch.softmax(logits, -1) - is_label.float()) * weight[:, None]
    if soft_cap is not None:
        gradient = gradient * (1 - (logits / soft_cap) ** 2)
    return cross_entropy, logits.argmax(-1), (gradient * scale).to(raw.dtype)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return compile_rows(function, dynamic=True)


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        teacher_hidden: Tensor,
        teacher: Head,
        pairs: TeacherPairs,
        row_weight: Tensor,
        compile_chunks: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        chunk_loss = _compiled(_soft_chunk) if compile_chunks else _soft_chunk
        num_pairs = len(pairs.student)
        cross_entropy = torch.empty(num_pairs, device=hidden.device)
        predicted = torch.empty(num_pairs, dtype=torch.int64, device=hidden.device)
        with_gradient = any(ctx.needs_input_grad[:2])
        grad_hidden = torch.zeros_like(hidden if with_gradient else hidden[:0])
        # fp32: a bf16 sum over many chunks would lose the small contributions of each.
        grad_head = torch.zeros_like(head if with_gradient else head[:0], dtype=torch.float32)
        for teacher_start, teacher_end, start, end in pairs.chunks:
            students = pairs.student[start:end]
            states = hidden[students]
            cross_entropy[start:end], predicted[start:end], gradient = chunk_loss(
                states @ head.T,
                teacher_hidden[teacher_start:teacher_end] @ teacher.weight.T,
                teacher.bias,
                teacher.constants,
                pairs.teacher[start:end] - teacher_start,
                row_weight[start:end] if with_gradient else None,
            )
            if gradient is not None:
                grad_hidden[students] = gradient @ head
                _add_product(grad_head, gradient.T, states)
        ctx.save_for_backward(grad_hidden, grad_head.to(head.dtype))
        ctx.mark_non_differentiable(cross_entropy, predicted)
        return (cross_entropy * row_weight).sum(), cross_entropy, predicted

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *unused: Any) -> Any:
        grad_hidden, grad_head = ctx.saved_tensors
        scale = grad_total.to(grad_hidden.dtype)
        return grad_hidden * scale, grad_head * scale, None, None, None, None, None


class _HardCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Head, labels: Tensor, row_weight: Tensor, chunk: int, compile_chunks: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        chunk_loss = _compiled(_hard_chunk) if compile_chunks else _hard_chunk
        cross_entropy = torch.empty(len(hidden), device=hidden.device)
        predicted = torch.empty(len(hidden), dtype=torch.int64, device=hidden.device)
        with_gradient = ctx.needs_input_grad[0]
        grad_hidden = torch.empty_like(hidden if with_gradient else hidden[:0])
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            cross_entropy[part], predicted[part], gradient = chunk_loss(
                hidden[part] @ head.weight.T,
                head.bias,
                head.constants,
                labels[part],
                row_weight[part] if with_gradient else None,
            )
            if gradient is not None:
                grad_hidden[part] = gradient @ head.weight
        ctx.save_for_backward(grad_hidden)
        ctx.mark_non_differentiable(cross_entropy, predicted)
        return (cross_entropy * row_weight).sum(), cross_entropy, predicted

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *unused: Any) -> Any:
        (grad_hidden,) = ctx.saved_tensors
        return grad_hidden * grad_total.to(grad_hidden.dtype), None, None, None, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right with fp32 accumulation of low-precision products."""
    if left.dtype == torch.float32:
        total.addmm_(left, right)
    elif left.is_cuda:
        total.add_(torch.mm(left, right, out_dtype=torch.float32))
    else:
        total.add_(left.float() @ right.float())
