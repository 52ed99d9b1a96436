"""Features: what is asked of a target (FeatureSpec) and what it answers (Features)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from paceline.errors import ConfigError
from paceline.schema.parts import WHOLE, Part, part_range
from paceline.schema.rows import Row

if TYPE_CHECKING:
    import torch

FinalHidden = Literal["none", "supervised", "all"]
_FINAL_HIDDEN_ORDER: tuple[FinalHidden, ...] = ("none", "supervised", "all")


@dataclass(frozen=True, slots=True)
class FeatureSpec:
    """What a session wants computed for each row."""

    layers: tuple[int, ...]
    """Capture layers, strictly ascending; layer i is the output of the 0-based decoder layer i."""
    final_hidden: FinalHidden = "none"
    """For which tokens the final hidden state (after the target's last norm) is returned."""
    greedy: bool = False
    """Whether the target's argmax token after each token is returned."""
    logsumexp: bool = False
    """Whether the logsumexp over all V logits after each token is returned (fp32)."""
    halo: int = 0
    """How many tokens to the right of its own range a part of a row also has `greedy`, `final_hidden` and `logsumexp`
    of; `hidden` has none. Means nothing for a whole row."""

    def __post_init__(self) -> None:
        if list(self.layers) != sorted(set(self.layers)):
            raise ConfigError(
                f"capture layers {list(self.layers)} are not strictly ascending: sort them and drop repeats"
            )


def merge_specs(specs: Iterable[FeatureSpec]) -> FeatureSpec:
    """The smallest spec that serves all `specs`: several drafts share one capture."""
    specs = list(specs)
    return FeatureSpec(
        layers=tuple(sorted({layer for spec in specs for layer in spec.layers})),
        final_hidden=max((s.final_hidden for s in specs), key=_FINAL_HIDDEN_ORDER.index, default="none"),
        greedy=any(s.greedy for s in specs),
        logsumexp=any(s.logsumexp for s in specs),
        halo=max((s.halo for s in specs), default=0),
    )


@dataclass(slots=True, eq=False)
class Features:
    """What the target computed for one row; tensors in the target's dtype unless said otherwise.

    A part of a row has `hidden` of its own range of tokens alone; `greedy`, `logsumexp` and `final_hidden` reach
    `FeatureSpec.halo` tokens further. T is then the length of the range, or of the range with its halo.
    """

    layers: tuple[int, ...]
    """Which decoder layers `hidden` holds, ascending."""
    hidden: torch.Tensor
    """[T, L, H]: outputs of the captured decoder layers."""
    greedy: torch.Tensor | None
    """int32[T]: the target's argmax token after each token."""
    final_hidden: torch.Tensor | None
    """[F, H]: final hidden states, after the target's last norm."""
    final_index: torch.Tensor | None
    """int32[F]: the row index of each of `final_hidden`, ascending; of the whole row's, also for a part."""
    logsumexp: torch.Tensor | None
    """float32[T]."""
    row_hash: str
    """Of the request these features answer, which is for the whole row."""
    finite: bool
    """Whether every returned number is finite, judged where it was computed."""
    queued_s: float = 0.0
    """From its request until the engine worked on it."""
    computed_s: float = 0.0
    """The engine's time for it alone: of rows in flight together no second counts twice, so that sums tell how busy
    an engine is."""
    transfer_s: float = 0.0
    """From the head of the reply to its delivery; 0 in one process."""
    part: Part = WHOLE

    @property
    def num_tokens(self) -> int:
        """Of the part, without its halo."""
        return int(self.hidden.shape[0])

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that travel, by name."""
        named = {
            "hidden": self.hidden,
            "greedy": self.greedy,
            "final_hidden": self.final_hidden,
            "final_index": self.final_index,
            "logsumexp": self.logsumexp,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def select_hidden(self, layers: tuple[int, ...]) -> torch.Tensor:
        """[T, L * H]: the states of `layers`, concatenated in ascending layer order.

        A view when all captured layers are asked for, a copy otherwise.
        """
        hidden = self.hidden
        if layers != self.layers:
            hidden = hidden[:, [self.layers.index(layer) for layer in layers]]
        return hidden.flatten(1)


@dataclass(slots=True, eq=False)
class FeatureRow:
    """A row with its features: what a stream hands to the trainer. The row is whole, the features may be a part's."""

    row: Row
    features: Features

    @property
    def token_range(self) -> tuple[int, int]:
        """[start, end), row coordinates: the tokens whose captured states are here."""
        return part_range(self.row.num_tokens, self.features.part)
