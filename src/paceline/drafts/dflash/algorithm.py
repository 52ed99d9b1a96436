"""DFlash: blocks of mask tokens behind anchors, learned from the data's own tokens."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from paceline.config.drafts import DFlashConfig, DraftConfig
from paceline.drafts.dflash.anchors import BlockPlan, draw_anchors, share_blocks
from paceline.drafts.dflash.decoding import BlockProposer, DFlashDecoder
from paceline.drafts.dflash.layout import check_published, published_config
from paceline.drafts.dflash.model import DFlashDraft
from paceline.drafts.dflash.settings import derive_settings
from paceline.drafts.head_loss import Head, hard_cross_entropy
from paceline.drafts.interface import DraftAlgorithm, DraftContext, DraftDecoder, LossTerms
from paceline.drafts.layers import Rotary, init_weights
from paceline.drafts.published import check_names, read_published
from paceline.drafts.sequence import gather_tokens, open_exchange, sequence_of
from paceline.drafts.upload import upload
from paceline.errors import ConfigError
from paceline.schema.features import FeatureRow, FeatureSpec
from paceline.schema.target_info import TargetInfo


class DFlash(DraftAlgorithm):
    """DFlash (arXiv 2602.06036) with the target's frozen embedding and head."""

    name: ClassVar[str] = "dflash"
    config_class: ClassVar[type[DraftConfig]] = DFlashConfig
    draft: DFlashDraft
    config: DFlashConfig
    first_start = 0
    shares_rows = True

    @classmethod
    def feature_spec(cls, config: DraftConfig, info: TargetInfo, evaluation: bool = False) -> FeatureSpec:
        # The last of a part's B - 1 proposals are held against greedy tokens behind the part.
        halo = _own(config).block_size if evaluation else 0
        return FeatureSpec(derive_settings(_own(config), info).layers, "none", greedy=evaluation, halo=halo)

    def __init__(self, config: DraftConfig, context: DraftContext) -> None:
        self.config, self.context = _own(config), context
        info, weights = context.info, context.weights
        self.settings = derive_settings(self.config, info)
        self.num_drafted = self.config.block_size - 1
        sizes = self.settings.sizes
        if context.sequence is not None:
            context.sequence.check_heads(sizes.num_heads, sizes.num_kv_heads)
        rotary = Rotary(info.rope, sizes.head_dim, info.max_position_embeddings, context.device)
        with torch.device("meta"):  # every weight is drawn below: torch's own initialisation would be in vain
            draft = DFlashDraft(sizes, rotary, context.compile)
        self.draft = draft.to(context.dtype).to_empty(device=context.device)
        init_weights(self.draft, context.seed)
        head = Head(weights.lm_head(), weights.lm_head_bias(), info.logit_transform)
        self._blocks = BlockProposer(
            self.draft, weights.embedding(), head, self.settings.mask_token_id, context.head_chunk_tokens
        )
        self._slot_weights = torch.from_numpy(self.settings.slot_weights).to(context.device)
        if self.config.init_from is not None:
            self.load_published(*read_published(self.config.init_from))

    def loss(self, row: FeatureRow) -> LossTerms:
        anchors = draw_anchors(row.row, self.config.anchor_every, self.context.seed)
        part = row.features.part
        plans = share_blocks(row.row, anchors, self.config.block_size, part.count)
        # A part without blocks goes on: the others' blocks read its keys, and its exchanges are theirs, too.
        if not any(len(share.counted) for share in plans):
            return self.nothing()
        plan, device = plans[part.index], self.context.device
        labels, counted = upload(plan.labels, device), upload(plan.counted, device)
        weights = self._slot_weights[counted % self.config.block_size]
        head = hard_cross_entropy(
            self._run_blocks(row, plans, counted),
            self._blocks.head,
            labels,
            weights,
            self.context.head_chunk_tokens,
            self.context.compile,
        )
        metrics = {
            "accuracy": self._per_position((head.predicted == labels).float(), plan, counted),
            "loss": self._per_position(head.cross_entropy, plan, counted),
        }
        return LossTerms(head.total, weights.sum(), metrics)

    def nothing(self) -> LossTerms:
        device = self.context.device
        parts = [parameter.flatten()[:0].float().sum() for parameter in self.draft.parameters()]
        empty = torch.zeros(2, self.num_drafted, device=device)
        return LossTerms(
            torch.stack(parts).sum(), torch.zeros((), device=device), {"accuracy": empty, "loss": empty.clone()}
        )

    @torch.no_grad()
    def propose(self, row: FeatureRow, starts: Tensor) -> Tensor:
        documents = upload(row.row.documents, starts.device)
        first = documents[torch.searchsorted(documents, starts, right=True) - 1]
        tokens = upload(row.row.tokens, starts.device)[starts]
        sequence, num_tokens = sequence_of(row, self.context.sequence), row.row.num_tokens
        context = [
            (gather_tokens(k, num_tokens, sequence), gather_tokens(v, num_tokens, sequence))
            for k, v in self._read_context(row)
        ]
        return self._blocks.propose(tokens, first, starts, context)

    def decoder(self) -> DraftDecoder:
        return DFlashDecoder(self._blocks)

    def published_config(self) -> dict[str, Any]:
        return published_config(self.settings, self.context.info)

    def published_tensors(self) -> dict[str, Tensor]:
        dtype = getattr(torch, self.context.info.dtype)
        return {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in self.draft.state_dict().items()}

    def load_published(self, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        check_published(config, self.published_config())
        check_names(self.draft.state_dict(), tensors)
        self.draft.load_state_dict(tensors)

    def _read_context(self, row: FeatureRow) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each layer: of the row's part with all heads."""
        captured = row.features.select_hidden(self.settings.layers).to(self.context.dtype)
        positions = row.row.document_positions()[slice(*row.token_range)]
        return self.draft.read_context(captured, upload(positions, self.context.device))

    def _run_blocks(self, row: FeatureRow, plans: list[BlockPlan], counted: Tensor) -> Tensor:
        """[N, H]: final states of the slots that count; of the others no logits ever exist.

        Args:
            plans: the blocks of each part of the row.
        """
        device, num_tokens = self.context.device, row.row.num_tokens
        num_slots = [len(plan) * self.config.block_size for plan in plans]
        exchange = open_exchange(row, self.context.sequence, num_slots)
        context = [(exchange.share_keys(k), exchange.share_keys(v)) for k, v in self._read_context(row)]
        inputs = self._blocks.block_inputs(upload(row.row.tokens[plans[row.features.part.index].anchors], device))
        geometry = self.draft.place_blocks(
            upload(np.concatenate([plan.first for plan in plans]), device),
            upload(np.concatenate([plan.anchors for plan in plans]), device),
            num_tokens,
            self.context.dtype,
            exchange,
        )
        states: Tensor = self.draft(inputs, context, geometry, counted, self.context.activation_checkpointing)
        return states

    def _per_position(self, values: Tensor, plan: BlockPlan, counted: Tensor) -> Tensor:
        """fp32[2, K]: sums of counted slots' values by position k = 1..B-1, and how many they are."""
        size = self.config.block_size
        table = torch.zeros(len(plan) * size, device=values.device)
        # Each slot once, then a plain sum: index_add_ would add in another order every time on a GPU.
        table[counted] = values
        counts = upload(np.bincount(plan.counted % size, minlength=size), values.device)
        return torch.stack([table.view(-1, size).sum(0), counts.float()])[:, 1:]


def _own(config: DraftConfig) -> DFlashConfig:
    if not isinstance(config, DFlashConfig):
        raise ConfigError(f"algorithm = dflash was given the configuration of {type(config).__name__}")
    return config
