"""The optimizer of one draft: fp32 master weights and gradients, one division, clipping, AdamW. No host waits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from paceline.config.drafts import DraftConfig
from paceline.errors import DraftError
from paceline.training.schedule import learning_rate


class _ScaledAdamW(torch.optim.AdamW):
    """Fused AdamW that divides gradients by `grad_scale` and does nothing where `found_inf` is 1.

    torch reads the two attributes in `step` (torch.amp.GradScaler sets them): the decision stays on the device.
    """

    grad_scale: Tensor
    found_inf: Tensor


class MasterOptimizer:
    """Trains a module in its compute dtype through fp32 master weights.

    A parameter that is fp32 already is its own master, and autograd adds up its gradient: no copies then. `accumulate`
    follows each row's backward, `step` ends the optimizer step. Gradients are sums until `step` divides once (N11).
    """

    def __init__(self, module: nn.Module, config: DraftConfig, num_steps: int) -> None:
        """`num_steps` is how many optimizer steps the schedule spans.

        Raises:
            DraftError: the module has nothing to train.
        """
        named = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        if not named:
            raise DraftError(f"{type(module).__name__} has no parameter that is trained")
        self._config = config
        self._num_steps = num_steps
        self._masters = self._take_masters(named)
        self._adamw = self._build_adamw()

    def _take_masters(self, named: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        """fp32 weights by name, each with its gradient sum."""
        masters = {
            name: parameter.detach() if parameter.dtype == torch.float32 else parameter.detach().float()
            for name, parameter in named.items()
        }
        lowered = [name for name, parameter in named.items() if parameter.dtype != torch.float32]
        self._lowered_parameters: list[Tensor] = [named[name] for name in lowered]
        self._lowered_masters = [masters[name] for name in lowered]
        for name, master in masters.items():
            master.grad = torch.zeros_like(master)
            if name not in lowered:
                named[name].grad = master.grad
        self._grads: list[Tensor] = [master.grad for master in masters.values() if master.grad is not None]
        self._lowered_grads = [master.grad for master in self._lowered_masters if master.grad is not None]
        return masters

    def _total_norm(self) -> Tensor:
        """fp32 scalar: norm of all gradient sums."""
        return torch.nn.utils.get_total_norm(self._grads)

    def _build_adamw(self) -> _ScaledAdamW:
        """AdamW whose whole state exists before the first step, so that a checkpoint loads into it."""
        config, masters = self._config, list(self._masters.values())
        adamw = _ScaledAdamW(
            [
                {"params": [p for p in masters if p.dim() >= 2], "weight_decay": config.weight_decay},
                {"params": [p for p in masters if p.dim() < 2], "weight_decay": 0.0},
            ],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )
        self._num_updates = torch.zeros(len(masters), device=masters[0].device)
        for index, master in enumerate(masters):
            adamw.state[master] = {
                "step": self._num_updates[index],
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }
        return adamw

    @torch.no_grad()
    def accumulate(self) -> None:
        """Move the gradients a backward left on the module into the fp32 sums."""
        arrived = [
            (total, parameter.grad)
            for total, parameter in zip(self._lowered_grads, self._lowered_parameters, strict=True)
            if parameter.grad is not None
        ]
        if arrived:
            totals, gradients = zip(*arrived, strict=True)
            torch._foreach_add_(totals, gradients)
        for parameter in self._lowered_parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self, weight: Tensor, step: int) -> Tensor:
        """Update the weights with (sum of gradients) / weight, clipped; returns the gradient norm before clipping.

        A total weight of 0 changes nothing: neither weights nor moments, and nothing decays. Neither does a norm that
        is not finite; the caller reads the norm when it logs, and fails then.

        Args:
            weight: fp32 scalar on the module's device, what all losses since the last step are divided by.
            step: index of this optimizer step, from 0, for the schedule.

        Returns:
            fp32 scalar on the device; 0 if the weight is 0.
        """
        divisor = torch.where(weight == 0, 1.0, weight)
        norm = self._total_norm() / divisor
        clip = (self._config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        self._adamw.grad_scale = divisor / clip
        self._adamw.found_inf = ((weight == 0) | ~torch.isfinite(norm)).float()
        for group in self._adamw.param_groups:
            group["lr"] = self.learning_rate(step)
        self._adamw.step()
        self.discard()
        self.publish_masters()
        return torch.where(weight == 0, 0.0, norm)

    def discard(self) -> None:
        """Forget the gradients gathered since the last step."""
        self._adamw.zero_grad(set_to_none=False)
        for parameter in self._lowered_parameters:
            parameter.grad = None

    def learning_rate(self, step: int) -> float:
        """Of optimizer step `step`, from 0."""
        return learning_rate(self._config, step, self._num_steps)

    def tensors(self) -> dict[str, Tensor]:
        """The live fp32 state: "master/NAME", "exp_avg/NAME", "exp_avg_sq/NAME" and "num_updates"."""
        state = self._adamw.state
        return {"num_updates": self._num_updates} | {
            f"{kind}/{name}": tensor
            for name, master in self._masters.items()
            for kind, tensor in (
                ("master", master),
                ("exp_avg", state[master]["exp_avg"]),
                ("exp_avg_sq", state[master]["exp_avg_sq"]),
            )
        }

    @torch.no_grad()
    def publish_masters(self) -> None:
        """Copy the masters to the module, after `tensors()` were written from outside."""
        if self._lowered_parameters:
            torch._foreach_copy_(self._lowered_parameters, self._lowered_masters)
