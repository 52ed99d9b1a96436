"""The draft algorithm interface: everything the trainer, the evaluators and the exporter know of a draft."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from paceline.config.drafts import DraftConfig
from paceline.drafts.sequence import SequenceGroup
from paceline.drafts.vocabulary import DraftVocabulary
from paceline.schema.features import FeatureRow, FeatureSpec
from paceline.schema.target_info import TargetInfo


class TargetWeights(Protocol):
    """The target's frozen weights a draft needs, wherever they come from; on the draft's device and dtype.

    Repeated calls return the same storage, so that several drafts share one copy.
    """

    def embedding(self) -> Tensor:
        """[V, H]: the raw table, without any embedding multiplier."""

    def lm_head(self, rows: Tensor | None = None) -> Tensor:
        """[V, H], or [len(rows), H] for int64 `rows`."""

    def lm_head_bias(self, rows: Tensor | None = None) -> Tensor | None:
        """[V] or [len(rows)], or None when the target has none."""


@dataclass(frozen=True, slots=True)
class DraftContext:
    """What a draft is built from."""

    info: TargetInfo
    weights: TargetWeights
    vocabulary: DraftVocabulary
    device: torch.device
    dtype: torch.dtype
    """Compute dtype of the draft's module; master weights live in the optimizer."""
    seed: int
    head_chunk_tokens: int = 4096
    compile: bool = False
    activation_checkpointing: bool = False
    sequence: SequenceGroup | None = None
    """The ranks that train each row together with this one, where rows come in parts."""


@dataclass(slots=True)
class LossTerms:
    """A row's loss as a sum and its weight: whoever adds rows divides once (rule N11)."""

    total: Tensor
    """fp32 scalar with a graph: the weighted sum of the loss over counted slots."""
    weight: Tensor
    """fp32 scalar without a graph: what `total` is divided by; 0 for a row that teaches nothing."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Detached fp32 vectors [2, n] of (sums, counts) per position; the ratio is the metric. Names and n are those of
    the draft, whatever the row.
    "accuracy": teacher-forced, prediction k equals the target's greedy token (or the data's, where labels
    are the data's); a token outside the draft vocabulary is a miss. "loss": unweighted cross-entropy."""


class DraftDecoder(ABC):
    """A draft proposing tokens for one sequence during real decoding, with its own key/value cache."""

    num_drafted: int
    """K: tokens proposed at a time."""

    @abstractmethod
    def extend(self, hidden: Tensor, next_tokens: Tensor) -> None:
        """Take in the target's states of the newest verified tokens.

        Args:
            hidden: [n, L * H] captured states (this draft's layers, ascending) of n further tokens.
            next_tokens: int64[n], the token that follows each; the last is the newest token of the text.
        """

    @abstractmethod
    def propose(self) -> Tensor:
        """int64[K]: drafted tokens (target ids) after the newest token. Does not change the state."""


class DraftAlgorithm(ABC):
    """A draft model with its loss. Built once per draft of a run; complete when constructed.

    `draft` holds exactly the weights that are trained; frozen tensors stay outside of it.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[DraftConfig]]
    """Its settings; `algorithm: Literal[name] = name` is one of them."""
    config: DraftConfig
    context: DraftContext
    draft: nn.Module
    num_drafted: int
    """K: tokens drafted in one step: the unroll depth (EAGLE-3), B - 1 (DFlash)."""
    first_start: int
    """Least index in its document at which a step may start: 1 for EAGLE-3, 0 for DFlash."""
    shares_rows: ClassVar[bool] = False
    """Whether `loss` and `propose` take parts of rows, and exchange what they lack with `context.sequence`."""

    @classmethod
    @abstractmethod
    def feature_spec(cls, config: DraftConfig, info: TargetInfo, evaluation: bool = False) -> FeatureSpec:
        """What this draft asks of the target for training, or for evaluation by the serving walk.

        Raises:
            ConfigError: layers out of range or out of order, sizes that cannot fit.
        """

    @abstractmethod
    def __init__(self, config: DraftConfig, context: DraftContext) -> None:
        """Build and initialise the draft (from `context.seed`, or from `config.init_from`)."""

    @abstractmethod
    def loss(self, row: FeatureRow) -> LossTerms:
        """Loss of one row; feature tensors are on the draft's device.

        Of a part of a row (`context.sequence`) it is this rank's share: totals, weights, metrics and gradients of the
        group's ranks add up to those of the row. All of them call this, and go backward, at the same time.
        """

    @abstractmethod
    def nothing(self) -> LossTerms:
        """Total, weight and metrics of zeros: the loss of a row that teaches nothing, and of a rank without a row."""

    @abstractmethod
    def propose(self, row: FeatureRow, starts: Tensor) -> Tensor:
        """What the draft would propose, on its own tokens, at many places of a row at once.

        Of a part of a row all ranks of its group call this at the same time, each with `starts` of its own: p -
        `first_start` is one of the part's tokens. There may be none.

        Args:
            starts: int64[S] row indices p (on the draft's device): the newest known token is x_p and the
                target has read the document up to x_{p-1}.

        Returns:
            int64[S, K]: proposals (target ids) for x_{p+1} .. x_{p+K}.
        """

    @abstractmethod
    def decoder(self) -> DraftDecoder:
        """A fresh decoder for one sequence; call under `torch.no_grad()`."""

    @abstractmethod
    def published_config(self) -> dict[str, Any]:
        """config.json of the published layout (ALGORITHMS: SGLang/EAGLE, z-lab)."""

    @abstractmethod
    def published_tensors(self) -> dict[str, Tensor]:
        """Tensors of the published layout by published name, contiguous, in the target's dtype, on the CPU."""

    @abstractmethod
    def load_published(self, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Take weights from a published layout.

        Raises:
            DraftError: a name, shape or convention that does not fit, naming both sides.
        """
