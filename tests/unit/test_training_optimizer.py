"""The optimizer of a draft: masters, one division, clipping, schedule."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from paceline.config.drafts import DraftConfig
from paceline.errors import DraftError
from paceline.training.optimizer import MasterOptimizer
from paceline.training.schedule import learning_rate, num_planned_steps

ONE = torch.ones(())


def small_module(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.RMSNorm(3)).to(dtype)


def put_gradients(module: nn.Module, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        gradient = (torch.randn(parameter.shape, generator=generator) * scale).to(parameter.dtype)
        if parameter.grad is None:
            parameter.grad = gradient
        else:
            parameter.grad += gradient


def config(**changes: float) -> DraftConfig:
    return DraftConfig(**({"lr": 0.1, "schedule": "constant", "warmup_ratio": 0.0} | changes))


def test_ten_steps_equal_torch_adamw_with_clip_grad_norm() -> None:
    ours, theirs = small_module(), small_module()
    optimizer = MasterOptimizer(ours, config(weight_decay=0.2, max_grad_norm=1.5), num_steps=10)
    matrices = [p for p in theirs.parameters() if p.dim() >= 2]
    vectors = [p for p in theirs.parameters() if p.dim() < 2]
    reference = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.2}, {"params": vectors, "weight_decay": 0.0}], lr=0.1, betas=(0.9, 0.95)
    )
    weight = 8.0
    clipped = 0
    for step in range(10):
        put_gradients(ours, seed=step, scale=3.0 + step)
        optimizer.accumulate()
        norm = optimizer.step(torch.tensor(weight), step)
        reference.zero_grad()
        put_gradients(theirs, seed=step, scale=3.0 + step)
        for parameter in theirs.parameters():
            assert parameter.grad is not None
            parameter.grad /= weight
        expected_norm = nn.utils.clip_grad_norm_(theirs.parameters(), 1.5)
        reference.step()
        clipped += bool(expected_norm > 1.5)
        torch.testing.assert_close(norm, expected_norm)
    assert 0 < clipped < 10
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-5)


def test_only_matrices_decay() -> None:
    module = small_module()
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    MasterOptimizer(module, config(weight_decay=0.5), num_steps=1).step(ONE, 0)
    for name, parameter in module.named_parameters():
        expected = before[name] * (1 - 0.1 * 0.5) if parameter.dim() >= 2 else before[name]
        torch.testing.assert_close(parameter.detach(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_weight_zero_changes_neither_weights_nor_moments(dtype: torch.dtype) -> None:
    module = small_module(dtype)
    optimizer = MasterOptimizer(module, config(weight_decay=0.5), num_steps=3)
    put_gradients(module, seed=1)
    optimizer.accumulate()
    optimizer.step(ONE, 0)
    before = {name: tensor.clone() for name, tensor in optimizer.tensors().items()}
    weights = [parameter.detach().clone() for parameter in module.parameters()]
    assert all(tensor.abs().sum() > 0 for tensor in before.values())
    put_gradients(module, seed=2)
    optimizer.accumulate()
    norm = optimizer.step(torch.zeros(()), 1)
    assert norm.item() == 0
    for name, tensor in optimizer.tensors().items():
        assert torch.equal(tensor, before[name]), name
    for parameter, weight in zip(module.parameters(), weights, strict=True):
        assert torch.equal(parameter, weight)
    optimizer.step(ONE, 2)
    assert optimizer.tensors()["num_updates"].tolist() == [2.0] * 3, "the gradients of the empty step came back"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_reported_and_not_applied(bad: float) -> None:
    module = small_module()
    optimizer = MasterOptimizer(module, config(), num_steps=2)
    before = {name: tensor.clone() for name, tensor in optimizer.tensors().items()}
    put_gradients(module, seed=1)
    next(module.parameters()).grad[0, 0] = bad  # type: ignore[index]
    optimizer.accumulate()
    assert not torch.isfinite(optimizer.step(ONE, 0))
    for name, tensor in optimizer.tensors().items():
        assert torch.equal(tensor, before[name]), name
    put_gradients(module, seed=1)
    optimizer.accumulate()
    assert torch.isfinite(optimizer.step(ONE, 1)), "the bad gradient stayed in the sums"


def test_fp32_parameters_are_their_own_masters() -> None:
    module = small_module()
    tensors = MasterOptimizer(module, config(), num_steps=1).tensors()
    for name, parameter in module.named_parameters():
        assert tensors[f"master/{name}"].data_ptr() == parameter.data_ptr()


def test_many_small_bf16_gradients_add_up_in_fp32() -> None:
    """1,000 gradients of 2**-8: a bf16 sum sticks at 1, where the next one is below half a unit in the last place."""
    module = nn.Linear(2, 2, bias=False).to(torch.bfloat16)
    naive = torch.zeros((), dtype=torch.bfloat16)
    optimizer = MasterOptimizer(module, config(max_grad_norm=1e9), num_steps=1)
    for _ in range(1000):
        module.weight.grad = torch.full((2, 2), 2.0**-8, dtype=torch.bfloat16)
        naive += 2.0**-8
        optimizer.accumulate()
    assert naive.item() == 1.0
    norm = optimizer.step(ONE, 0)
    assert norm.item() == pytest.approx(1000 * 2.0**-8 * 2, rel=1e-6)


def test_updates_smaller_than_bf16_can_show_move_the_master() -> None:
    module = nn.Linear(2, 2, bias=False).to(torch.bfloat16)
    nn.init.ones_(module.weight)
    optimizer = MasterOptimizer(module, config(lr=1e-3), num_steps=10)
    for step in range(10):
        module.weight.grad = torch.ones(2, 2, dtype=torch.bfloat16)
        optimizer.accumulate()
        optimizer.step(ONE, step)
    master = optimizer.tensors()["master/weight"]
    assert (torch.ones(2, 2, dtype=torch.bfloat16) - 1e-3 == 1).all(), "one step is invisible in bf16"
    torch.testing.assert_close(master, torch.full((2, 2), 0.99), atol=1e-5, rtol=0)
    assert torch.equal(module.weight, master.bfloat16())


def test_a_module_without_trained_parameters_is_refused() -> None:
    with pytest.raises(DraftError, match="Identity has no parameter"):
        MasterOptimizer(nn.Identity(), config(), num_steps=1)


def test_warm_up_then_cosine_by_hand() -> None:
    settings = DraftConfig(lr=8.0, warmup_ratio=0.2, min_lr_ratio=0.5)
    rates = [learning_rate(settings, step, 10) for step in range(10)]
    assert rates[:3] == [4.0, 8.0, 8.0]
    assert rates[6] == pytest.approx(8.0 * 0.75), "half-way between lr and lr / 2"
    assert rates[9] == pytest.approx(8.0 * (0.5 + 0.5 * 0.5 * (1 + math.cos(math.pi * 7 / 8))))
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_warm_up_then_constant_by_hand() -> None:
    settings = DraftConfig(lr=8.0, warmup_ratio=0.25, schedule="constant")
    assert [learning_rate(settings, step, 8) for step in range(8)] == [4.0] + [8.0] * 7


def test_no_schedule_wastes_a_step_on_a_rate_of_zero() -> None:
    for num_steps in (1, 2, 7):
        for warmup_ratio in (0.0, 0.07, 1.0):
            settings = DraftConfig(lr=1.0, warmup_ratio=warmup_ratio)
            assert all(learning_rate(settings, step, num_steps) > 0 for step in range(num_steps))


def test_warm_up_of_seven_percent_of_a_hundred_steps_takes_seven() -> None:
    settings = DraftConfig(lr=7.0, warmup_ratio=0.07)
    assert [learning_rate(settings, step, 100) for step in range(7)] == pytest.approx([1, 2, 3, 4, 5, 6, 7])


@pytest.mark.parametrize(
    ("num_rows", "max_steps", "expected"), [(8, None, 2), (9, None, 3), (9, 2, 2), (0, None, 0), (9, 0, 0)]
)
def test_planned_steps_cover_every_row(num_rows: int, max_steps: int | None, expected: int) -> None:
    assert num_planned_steps(num_rows, 4, max_steps) == expected
