"""The losses over a vocabulary: gradients are those of autograd, and where none can be asked for none is made"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from paceline.drafts.head_loss import Head, HeadLoss, TeacherPairs, hard_cross_entropy, soft_cross_entropy
from paceline.schema.target_info import LogitTransform

ROWS, SIZE, VOCABULARY, CHUNK = 10, 6, 40, 4
NUM_CHUNKS = 3
TRANSFORM = LogitTransform(scale=0.5, soft_cap=3.0, has_bias=True)
PAIRS = TeacherPairs(torch.arange(ROWS), torch.arange(ROWS), (0, 4, 8, 10), (0, 4, 8, 10))


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "matmul", "bmm")
        return func(*args, **(kwargs or {}))


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weights() -> Tensor:
    return torch.linspace(0, 2, ROWS)


def teacher() -> Head:
    return Head(draw(VOCABULARY, SIZE, seed=1), draw(VOCABULARY, seed=2), TRANSFORM)


def soft(hidden: Tensor, head: Tensor) -> HeadLoss:
    return soft_cross_entropy(hidden, head, draw(ROWS, SIZE, seed=3), teacher(), PAIRS, weights())


def hard(hidden: Tensor, head: Tensor) -> HeadLoss:
    del head  # it learns through the frozen one
    return hard_cross_entropy(hidden, teacher(), torch.arange(ROWS), weights(), CHUNK)


def naive_soft(hidden: Tensor, head: Tensor) -> Tensor:
    p = teacher().logits(draw(ROWS, SIZE, seed=3)).softmax(-1)
    return -(weights() * (p * (hidden @ head.T).log_softmax(-1)).sum(-1)).sum()


def naive_hard(hidden: Tensor, head: Tensor) -> Tensor:
    return (weights() * cross_entropy(teacher().logits(hidden), torch.arange(ROWS), reduction="none")).sum()


CASES = {"soft": (soft, naive_soft, 4, 2), "hard": (hard, naive_hard, 2, 1)}
"""The loss, a naive version, and its products a chunk: with gradients and without."""


def leaves() -> tuple[Tensor, Tensor]:
    return draw(ROWS, SIZE, seed=4).requires_grad_(), draw(VOCABULARY, SIZE, seed=5).requires_grad_()


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_autograd(case: str) -> None:
    loss, naive, _, _ = CASES[case]
    ours, expected = leaves(), leaves()
    total = loss(*ours).total
    torch.testing.assert_close(total, naive(*expected))
    total.backward()
    naive(*expected).backward()
    for one, other in zip(ours, expected, strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None and other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_an_evaluation_pays_for_no_gradient_and_says_the_same(case: str) -> None:
    loss, _, with_gradients, without = CASES[case]

    def products(call: Callable[[], HeadLoss]) -> tuple[int, HeadLoss]:
        with Products() as counted:
            result = call()
        return counted.count, result

    trained, result = products(lambda: loss(*leaves()))
    with torch.no_grad():
        evaluated, quiet = products(lambda: loss(*leaves()))
    frozen, _ = products(lambda: loss(*(leaf.detach() for leaf in leaves())))
    assert trained == with_gradients * NUM_CHUNKS, "the premise: gradients are made with the loss"
    assert evaluated == frozen == without * NUM_CHUNKS
    assert torch.equal(quiet.total, result.total.detach())
    assert torch.equal(quiet.cross_entropy, result.cross_entropy)
    assert torch.equal(quiet.predicted, result.predicted)
    assert not quiet.total.requires_grad
