"""`[drafts.NAME]`: one table a draft; `algorithm` says which kind."""

from typing import Annotated, Literal

from pydantic import Field

from paceline.config.base import Config
from paceline.config.data import FEWEST_SUPERVISED_TOKENS


class DraftConfig(Config):
    """What every draft has: its optimizer, its starting weights, the target layers it reads."""

    lr: float = Field(1e-4, gt=0)
    """Peak learning rate of AdamW."""
    min_lr_ratio: float = Field(0.0, ge=0.0, le=1.0)
    """Share of `lr` that the cosine schedule ends at."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After warm-up; counted in optimizer steps."""
    warmup_ratio: float = Field(0.015, ge=0.0, le=1.0)
    """Share of all optimizer steps spent rising linearly to `lr`."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's, on matrices; norms are never decayed."""
    max_grad_norm: float = Field(0.5, gt=0)
    """Gradients are clipped to this norm."""
    init_from: str | None = None
    """Directory of an exported draft to start from; None starts from nothing."""
    target_layers: tuple[int, ...] | None = None
    """Capture layers, 0-based, strictly ascending; None takes the algorithm's default."""
    num_heads: int | None = Field(None, ge=1)
    """Attention heads; None is the target's."""
    num_kv_heads: int | None = Field(None, ge=1)
    """Key/value heads; None is the target's."""
    head_dim: int | None = Field(None, ge=2)
    """Size of a head; None is the target's."""
    intermediate_size: int | None = Field(None, ge=1)
    """Width of the MLP; None is the target's, or 3 H for a target without a dense MLP."""

    @property
    def fewest_supervised_tokens(self) -> int:
        """Supervised tokens that this draft wants of every sample."""
        return FEWEST_SUPERVISED_TOKENS

    def reserved_token(self, target_mask_token_id: int | None) -> int | None:
        """The id that means something of its own to this draft, and so may not occur in data; None without one."""
        return None


class Eagle3Config(DraftConfig):
    """EAGLE-3 (arXiv 2503.01840): one layer, unrolled over its own states."""

    algorithm: Literal["eagle3"] = "eagle3"
    """Which kind of draft this is."""
    num_depths: int = Field(7, ge=1)
    """K: tokens drafted by unrolling, in training and in evaluation."""
    depth_decay: float = Field(0.8, gt=0, le=1)
    """Weight of depth k in the loss is this to the power k."""
    vocab_size: int = Field(32000, ge=0)
    """D: the draft's vocabulary, the most frequent supervised tokens; 0 means the target's whole one."""


class DFlashConfig(DraftConfig):
    """DFlash (arXiv 2602.06036): a whole block of tokens predicted at once from mask tokens."""

    algorithm: Literal["dflash"] = "dflash"
    """Which kind of draft this is."""
    lr: float = Field(6e-4, gt=0)
    """Peak learning rate of AdamW."""
    warmup_ratio: float = Field(0.04, ge=0.0, le=1.0)
    """Share of all optimizer steps spent rising linearly to `lr`."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this norm."""
    num_layers: int = Field(5, ge=1)
    """Decoder layers of the draft; the default number of capture layers, too."""
    block_size: int = Field(16, ge=2)
    """B: slots in a block; B - 1 tokens are drafted."""
    anchor_every: int = Field(6, ge=1)
    """A document of n tokens draws at most n // anchor_every anchors an epoch."""
    loss_gamma: float | None = Field(None, gt=0)
    """Slot k weighs exp(-(k - 1) / gamma); None is 7, 5, 4 for blocks of 16, 10, 8, else 7 B / 16."""
    mask_token_id: int | None = Field(None, ge=0)
    """Embedding row that stands for "unknown"; None is the target's mask token or first unused row."""
    sliding_window: int | None = Field(None, ge=1)
    """Window of layers that `layer_types` calls sliding_attention."""
    layer_types: tuple[Literal["full_attention", "sliding_attention"], ...] | None = None
    """One entry a draft layer; None is full attention everywhere."""

    @property
    def fewest_supervised_tokens(self) -> int:
        return 2 * self.block_size

    def reserved_token(self, target_mask_token_id: int | None) -> int | None:
        return target_mask_token_id if self.mask_token_id is None else self.mask_token_id


AnyDraftConfig = Annotated[Eagle3Config | DFlashConfig, Field(discriminator="algorithm")]
