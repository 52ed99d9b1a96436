"""One draft on several ranks, by FSDP2: weights kept whole or in shards, gradients added up over ranks once a step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from paceline.config.drafts import DraftConfig
from paceline.drafts.interface import DraftAlgorithm, LossTerms
from paceline.schema.features import FeatureRow
from paceline.training.optimizer import MasterOptimizer
from paceline.training.ranks import Ranks


class SharedDraft:
    """A draft whose weights FSDP2 manages: fp32 masters on each rank, its compute dtype while a loss runs.

    Every rank calls `loss` and runs backward equally often: with `last` the gradients of all rows since the step
    before are added up, in fp32, over rows and ranks. Outside of `loss` weights are there only inside `gathered`.
    """

    def __init__(self, algorithm: DraftAlgorithm, mesh: DeviceMesh) -> None:
        """Hand the weights of `algorithm`, equal on all ranks, to FSDP2."""
        self.algorithm = algorithm
        for parameter in algorithm.draft.parameters():
            parameter.data = parameter.data.float()
        self._module = _LossOfRow(algorithm)
        compute = algorithm.context.dtype
        policy = MixedPrecisionPolicy(
            param_dtype=None if compute == torch.float32 else compute,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
        # One group of weights: a draft is small beside its activations, and its parts are not called as modules.
        fully_shard(self._module, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        self._fsdp = cast(FSDPModule, self._module)
        # Sums, not means: whoever adds up divides once, by the weight of all rows (N11).
        self._fsdp.set_gradient_divide_factor(1.0)
        self._fsdp.set_force_sum_reduction_for_comms(enable=True)

    def loss(self, row: FeatureRow | None, last: bool) -> LossTerms:
        """Loss of a row, or of none for a rank that has no row left; `last` of the step: gradients are reduced."""
        self._fsdp.set_requires_gradient_sync(last)
        self._fsdp.set_reshard_after_backward(last)
        total, weight, metrics = self._module(row)
        return LossTerms(total, weight, metrics)

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """The whole weights, in the compute dtype, while the block runs; every rank enters it."""
        self._fsdp.unshard()
        try:
            yield
        finally:
            self._fsdp.reshard()


class _LossOfRow(nn.Module):
    """The module whose forward FSDP2 hooks into."""

    def __init__(self, algorithm: DraftAlgorithm) -> None:
        super().__init__()
        self.draft = algorithm.draft
        self._algorithm = algorithm

    def forward(self, row: FeatureRow | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        terms = self._algorithm.nothing() if row is None else self._algorithm.loss(row)
        total = _TouchWeights.apply(terms.total, *self.draft.parameters())
        return total, terms.weight, terms.metrics


class _TouchWeights(torch.autograd.Function):
    """`total`, with a gradient (of zeros at least) for every weight.

    FSDP2 reduces the weights that have one: a rank whose row left one out would reduce less than the others, who wait.
    """

    @staticmethod
    def forward(ctx: Any, total: Tensor, *weights: Tensor) -> Tensor:
        ctx.likes = [(weight.shape, weight.dtype, weight.device) for weight in weights]
        return total.clone()

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> Any:
        zeros = (torch.zeros((), dtype=dtype, device=device).expand(shape) for shape, dtype, device in ctx.likes)
        return grad_total, *zeros


class ShardOptimizer(MasterOptimizer):
    """The optimizer of a `SharedDraft`: each rank updates its shard, which is everything where weights are whole.

    A step does not depend on how weights are divided, but for the order in which the norm is added up.
    """

    def __init__(self, shared: SharedDraft, config: DraftConfig, num_steps: int, mesh: DeviceMesh) -> None:
        self._shards = mesh["shards"]
        self._as_shards = self._shards.size() > 1
        super().__init__(shared.algorithm.draft, config, num_steps)

    def _take_masters(self, named: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        self._parameters = {name: cast(DTensor, parameter) for name, parameter in named.items()}
        self._lowered_parameters = []
        return {name: cast(DTensor, parameter.detach()).to_local() for name, parameter in self._parameters.items()}

    def accumulate(self) -> None:
        """FSDP2 has added up what the backward left."""

    def step(self, weight: Tensor, step: int) -> Tensor:
        """As `MasterOptimizer.step`; every rank calls it with the same weight."""
        for name, master in self._masters.items():
            gradient = self._parameters[name].grad
            assert gradient is not None, f"no backward has reduced the gradient of {name}"
            master.grad = cast(DTensor, gradient).to_local()
        self._grads = [master.grad for master in self._masters.values() if master.grad is not None]
        return super().step(weight, step)

    def _total_norm(self) -> Tensor:
        squares = super()._total_norm().square()
        if self._as_shards:
            dist.all_reduce(squares, group=self._shards.get_group())
        return squares.sqrt()

    def discard(self) -> None:
        self._grads = []
        for name, parameter in self._parameters.items():
            parameter.grad = self._masters[name].grad = None

    def tensors(self) -> dict[str, Tensor]:
        """As `MasterOptimizer.tensors`; DTensors where weights are divided."""
        local = super().tensors()
        if not self._as_shards:
            return local
        return {name: self._whole(name, tensor) for name, tensor in local.items()}

    def _whole(self, name: str, local: Tensor) -> Tensor:
        """The tensor that `local` is this rank's shard of."""
        if name == "num_updates":
            return local
        like = self._parameters[name.partition("/")[2]]
        return DTensor.from_local(
            local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )


def share_drafts(
    drafts: Mapping[str, DraftAlgorithm], ranks: Ranks, sharding: Literal["none", "full"], num_steps: int
) -> tuple[dict[str, SharedDraft], dict[str, MasterOptimizer]]:
    """What trains each draft, by name: with one rank its optimizer alone, with several FSDP2 as well.

    Args:
        num_steps: that the learning rates' schedules span.
    """
    if ranks.num_ranks == 1:
        return {}, {name: MasterOptimizer(draft.draft, draft.config, num_steps) for name, draft in drafts.items()}
    shared: dict[str, SharedDraft] = {}
    optimizers: dict[str, MasterOptimizer] = {}
    mesh = ranks.mesh(next(iter(drafts.values())).context.device.type, sharding)
    for name, draft in drafts.items():
        shared[name] = SharedDraft(draft, mesh)
        optimizers[name] = ShardOptimizer(shared[name], draft.config, num_steps, mesh)
    return shared, optimizers
