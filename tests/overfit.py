"""A target's own greedy answers with their features, and how much of them a draft predicts; for tests of learning."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from paceline.drafts.interface import DraftAlgorithm
from paceline.schema.features import FeatureRow, Features
from rows import make_row


class ModelWeights:
    """A transformers model's own embedding and head."""

    def __init__(self, model):
        self.model = model

    def embedding(self) -> Tensor:
        return self.model.get_input_embeddings().weight.detach()

    def lm_head(self, rows: Tensor | None = None) -> Tensor:
        assert rows is None
        return self.model.get_output_embeddings().weight.detach()

    def lm_head_bias(self, rows: Tensor | None = None) -> None:
        return None


def greedy_rows(model, layers, count: int, prompt: int, length: int) -> list[FeatureRow]:
    """The model's own greedy answers to random prompts, one a row, with its states."""
    found = []
    for index in range(count):
        plain = make_row([length], [[(prompt, length)]], vocab=256, sample_ids=[index])
        tokens = torch.from_numpy(plain.tokens).long()
        with torch.no_grad():
            for end in range(prompt, length):
                tokens[end] = model(tokens[None, :end]).logits[0, -1].argmax()
            plain.tokens[:] = tokens.int().numpy()
            out = model(tokens[None], output_hidden_states=True)
        hidden = torch.stack([out.hidden_states[layer + 1][0] for layer in layers], 1)
        greedy = out.logits[0].argmax(-1).int()
        supervised = torch.from_numpy(plain.supervised_index())
        final = out.hidden_states[-1][0][supervised.long()]
        found.append(FeatureRow(plain, Features(layers, hidden, greedy, final, supervised, None, "", True)))
    return found


def acceptance_length(algorithm: DraftAlgorithm, rows: list[FeatureRow]) -> float:
    """1 + mean accepted tokens, by the serving walk, over steps not cut by the end of the answer."""
    accepted, steps = 0, 0
    for row in rows:
        tokens, greedy = row.row.tokens, row.features.greedy
        start, last = row.row.spans[0, 0], row.row.spans[0, 1] - 1
        while start < last:
            proposal = algorithm.propose(row, torch.tensor([start]))[0]
            right = 0
            while right < min(algorithm.num_drafted, last - start):
                at = start + right + 1
                if not proposal[right] == greedy[at - 1] == tokens[at]:
                    break
                right += 1
            if last - start >= algorithm.num_drafted:
                accepted, steps = accepted + right, steps + 1
            start += right + 1
    return 1 + accepted / steps


def pack(rows: list[FeatureRow]) -> FeatureRow:
    """All rows, of one document each, in one: the same loss (packing changes nothing), computed at once."""
    lengths = [one.row.num_tokens for one in rows]
    spans = [[tuple(span) for span in one.row.spans.tolist()] for one in rows]
    packed = make_row(lengths, spans, sample_ids=[int(one.row.sample_ids[0]) for one in rows])
    packed.tokens[:] = np.concatenate([one.row.tokens for one in rows])
    parts = [one.features for one in rows]
    index = torch.from_numpy(packed.supervised_index())

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    features = Features(
        parts[0].layers, joined("hidden"), joined("greedy"), joined("final_hidden"), index, None, "", True
    )
    return FeatureRow(packed, features)
