"""EAGLE-3: what is asked of the target, the loss, proposals. Source: arXiv 2503.01840 and ALGORITHMS in docs."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from paceline.config.drafts import DraftConfig, Eagle3Config
from paceline.drafts.attention import Visibility, build_visibility
from paceline.drafts.eagle3 import layout
from paceline.drafts.eagle3.decoding import Eagle3Decoder
from paceline.drafts.eagle3.model import Context, Eagle3Draft, Eagle3Shape
from paceline.drafts.eagle3.slots import SlotPlan, plan_slots
from paceline.drafts.head_loss import Head, HeadLoss, soft_cross_entropy
from paceline.drafts.interface import DraftAlgorithm, DraftContext, LossTerms
from paceline.drafts.layers import Rotary, init_weights
from paceline.drafts.layers_spec import choose_layers
from paceline.drafts.published import read_published
from paceline.drafts.sequence import gather_tokens, open_exchange, sequence_of
from paceline.drafts.upload import upload
from paceline.drafts.vocabulary import DraftVocabulary
from paceline.errors import ConfigError
from paceline.schema.features import FeatureRow, FeatureSpec
from paceline.schema.target_info import TargetInfo


class Eagle3(DraftAlgorithm):
    """One decoder layer that drafts K tokens by reading its own states."""

    name: ClassVar[str] = "eagle3"
    config_class: ClassVar[type[DraftConfig]] = Eagle3Config
    first_start = 1
    shares_rows = True
    config: Eagle3Config
    draft: Eagle3Draft

    @classmethod
    def feature_spec(cls, config: DraftConfig, info: TargetInfo, evaluation: bool = False) -> FeatureSpec:
        """Captured layers and greedy tokens; for training also the final hidden state of supervised tokens.

        Slot t is taught by the states of tokens up to t + K, and its proposals are held against greedy tokens as far:
        a part's last slots need what lies behind their part.
        """
        layers = choose_layers(config.target_layers, layout.default_layers(info.num_layers), info, at_least=2)
        halo = _own(config).num_depths + 1
        if evaluation:
            return FeatureSpec(layers=layers, greedy=True, halo=halo)
        return FeatureSpec(layers=layers, final_hidden="supervised", greedy=True, halo=halo)

    def __init__(self, config: DraftConfig, context: DraftContext) -> None:
        self.config, self.context = _own(config), context
        self.num_drafted = self.config.num_depths
        info, device, dtype = context.info, context.device, context.dtype
        self.layers = self.feature_spec(self.config, info).layers
        self.shape = eagle3_shape(self.config, info, len(self.layers), context.vocabulary)
        if context.sequence is not None:
            context.sequence.check_heads(self.shape.num_heads, self.shape.num_kv_heads)
        rotary = Rotary(info.rope, self.shape.head_dim, info.max_position_embeddings, device)
        self.draft = Eagle3Draft(self.shape, rotary, context.compile)
        init_weights(self.draft, context.seed)
        self.draft.to(device=device, dtype=dtype)
        rows = None if context.vocabulary.is_full else upload(context.vocabulary.ids, device)
        self.teacher = Head(
            context.weights.lm_head(rows).to(dtype), context.weights.lm_head_bias(rows), info.logit_transform
        )
        with torch.no_grad():
            self.draft.lm_head.weight.copy_(self.teacher.weight)
        self.embedding = context.weights.embedding().to(dtype)
        self._target_ids = upload(context.vocabulary.ids, device)
        self._draft_index = context.vocabulary.draft_index().to(device)
        if self.config.init_from is not None:
            self.load_published(*read_published(self.config.init_from))
        self._decay = self.config.depth_decay ** torch.arange(self.num_drafted, device=device, dtype=torch.float32)

    def loss(self, row: FeatureRow) -> LossTerms:
        """Sum over depths of decay^k times cross-entropy to the target's distribution, over counted slots."""
        final = row.features.final_hidden
        greedy = row.features.greedy
        assert final is not None, "the feature spec asks for it"
        assert greedy is not None, "the feature spec asks for it"
        plan = plan_slots(row, self.config.num_depths, self.context.head_chunk_tokens, self.context.device)
        # A greedy token outside the draft vocabulary leaves its slots out of the loss, and is a miss in accuracy.
        taught = self._draft_index[greedy.long()[plan.teacher_tokens]]
        said = taught[plan.pairs.teacher]
        weight = self._decay[plan.depth] * (said >= 0)
        # A part without slots goes on: the others' slots read its keys, and its exchanges are theirs, too.
        if not any(plan.counts):
            return self.nothing()
        head = soft_cross_entropy(
            self._unroll_taught(row, plan),
            self.draft.lm_head.weight,
            final.to(self.context.dtype)[plan.teacher_rows],
            self.teacher,
            plan.pairs,
            weight,
            self.context.compile,
        )
        return LossTerms(
            head.total, (taught[: plan.num_slots] >= 0).sum().float(), self._depth_metrics(head, plan, said)
        )

    def nothing(self) -> LossTerms:
        total = self.draft.fc.weight.sum() * 0.0
        empty = torch.zeros(2, self.config.num_depths, device=self.context.device)
        metrics = {"accuracy": empty, "loss": empty.clone()}
        return LossTerms(total.float(), torch.zeros((), device=self.context.device), metrics)

    def propose(self, row: FeatureRow, starts: Tensor) -> Tensor:
        """Chains of argmax tokens, each slot reading its own proposals."""
        slots = starts - 1
        context, tokens, positions = self._read_row(row)
        sequence = sequence_of(row, self.context.sequence)
        context = context.share(lambda own: gather_tokens(own, len(tokens), sequence))
        document_start = upload(row.row.documents, slots.device)
        document = torch.searchsorted(document_start, slots, right=True) - 1
        visible = build_visibility(document_start[document], slots + 1, len(tokens))
        slots = slots - row.token_range[0]
        states = self.draft.first_depth(context, slots, positions, visible)
        return self.draft_chain(states, positions[slots], context, visible)

    def draft_chain(self, states: Tensor, positions: Tensor, context: Context, visible: Visibility) -> Tensor:
        """int64[S, K] target ids, from g_1 [S, H] of slots at `positions` (index in their document)."""
        own = None
        proposed: list[Tensor] = []
        for depth in range(self.config.num_depths):
            if depth:
                states, own = self.draft.next_depth(
                    states, self.embedding[proposed[-1]], positions + depth, context, visible, own
                )
            logits = self.draft.lm_head(self.draft.norm(states))
            proposed.append(self._target_ids[logits.argmax(-1)])
        return torch.stack(proposed, 1)

    def decoder(self) -> Eagle3Decoder:
        return Eagle3Decoder(self.draft, self.embedding, self.draft_chain, self.num_drafted)

    def published_config(self) -> dict[str, Any]:
        return layout.published_config(self.config, self.context, self.shape, self.layers)

    def published_tensors(self) -> dict[str, Tensor]:
        return layout.published_tensors(self.draft, self.context)

    def load_published(self, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        layout.load_published(self.draft, config, tensors, expected=self.published_config(), context=self.context)

    def _read_row(self, row: FeatureRow) -> tuple[Context, Tensor, Tensor]:
        """Depth 0 of the row's part; tokens int64[T] of the whole row; positions int64 of the part's."""
        own = slice(*row.token_range)
        tokens = upload(row.row.tokens, self.context.device)
        positions = upload(row.row.document_positions()[own], self.context.device)
        hidden = row.features.select_hidden(self.layers).to(self.context.dtype)
        # The last token's successor is unknown here and seen by no counted slot.
        embeddings = self.embedding[pad(tokens[1:], (0, 1))[own]]
        return self.draft.read_context(hidden, embeddings, positions), tokens, positions

    def _unroll_taught(self, row: FeatureRow, plan: SlotPlan) -> Tensor:
        """[K * S, H]: normed states of every depth, each slot reading the text's own tokens."""
        context, tokens, positions = self._read_row(row)
        exchange = open_exchange(row, self.context.sequence, plan.counts)
        context = context.share(exchange.share_keys)
        visible = build_visibility(plan.document_start, plan.seen_end, len(tokens), exchange)
        slots = plan.slots - row.token_range[0]
        states = self._run(self.draft.first_depth, context, slots, positions, visible)
        own, every = None, [self.draft.norm(states)]
        for depth in range(1, self.config.num_depths):
            # Past the end of the row only slots that do not count are read: any token will do.
            read = (plan.slots + 1 + depth).clamp(max=len(tokens) - 1)
            states, own = self._run(
                self.draft.next_depth,
                states,
                self.embedding[tokens[read]],
                positions[slots] + depth,
                context,
                visible,
                own,
            )
            every.append(self.draft.norm(states))
        return torch.cat(every)

    def _run(self, step: Any, *arguments: Any) -> Any:
        if self.context.activation_checkpointing:
            return checkpoint(step, *arguments, use_reentrant=False)
        return step(*arguments)

    def _depth_metrics(self, head: HeadLoss, plan: SlotPlan, said: Tensor) -> dict[str, Tensor]:
        def by_depth(values: Tensor) -> Tensor:
            return torch.zeros_like(self._decay).index_add_(0, plan.depth, values.float())

        counted = said >= 0
        right = by_depth((head.predicted == said) & counted)
        return {
            "accuracy": torch.stack([right, by_depth(torch.ones_like(said))]),
            "loss": torch.stack([by_depth(head.cross_entropy * counted), by_depth(counted)]),
        }


def _own(config: DraftConfig) -> Eagle3Config:
    if not isinstance(config, Eagle3Config):
        raise ConfigError(f"an eagle3 draft was given the configuration of {type(config).__name__}")
    return config


def eagle3_shape(config: Eagle3Config, info: TargetInfo, num_states: int, vocabulary: DraftVocabulary) -> Eagle3Shape:
    """Sizes from the target, where the configuration does not set them."""
    num_heads = config.num_heads or info.num_heads
    num_kv_heads = config.num_kv_heads or min(info.num_kv_heads, num_heads)
    if num_heads % num_kv_heads:
        raise ConfigError(f"num_heads = {num_heads} is not a multiple of num_kv_heads = {num_kv_heads}")
    return Eagle3Shape(
        hidden_size=info.hidden_size,
        num_states=num_states,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=config.head_dim or info.head_dim,
        intermediate_size=config.intermediate_size or info.intermediate_size or 3 * info.hidden_size,
        vocab_size=vocabulary.size,
        norm_eps=info.norm_eps,
    )
