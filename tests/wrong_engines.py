"""Engines that are wrong on purpose: a real engine behind somebody who changes what is asked or answered."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import torch

from paceline.schema.features import Features, FeatureSpec
from paceline.schema.limits import Limits
from paceline.schema.rows import RowRequest
from paceline.schema.target_info import TargetInfo
from paceline.target.hf.engine import HFEngine

Change = Callable[["WrongEngine", RowRequest, FeatureSpec], Features]


class WrongEngine:
    """A real engine behind somebody who changes what is asked or answered."""

    def __init__(self, engine: HFEngine, change: Change) -> None:
        self.engine, self.change = engine, change
        self.seen: list[bytes] = []
        """Documents that were asked for before."""

    def info(self) -> TargetInfo:
        return self.engine.info()

    def ask(self, request: RowRequest, spec: FeatureSpec) -> Features:
        return self.engine.capture(request, spec).result(60)

    def capture(self, request: RowRequest, spec: FeatureSpec) -> Future[Features]:
        future: Future[Features] = Future()
        future.set_result(self.change(self, request, spec))
        starts = zip(request.documents, request.documents[1:], strict=False)
        self.seen += [request.tokens[start:end].tobytes() for start, end in starts]
        return future

    def limits(self) -> Limits:
        return self.engine.limits()

    def room(self) -> int:
        return 1

    def close(self) -> None:
        return


def one_document(request: RowRequest) -> RowRequest:
    num = len(request.tokens)
    return replace(request, documents=np.array([0, num], np.int32), positions=np.arange(num, dtype=np.int32)[None])


def next_layer(wrong: WrongEngine, request: RowRequest, spec: FeatureSpec) -> Features:
    """transformers' numbering taken for ours."""
    features = wrong.ask(request, replace(spec, layers=tuple(layer + 1 for layer in spec.layers)))
    return replace(features, layers=spec.layers)


def layer_before(wrong: WrongEngine, request: RowRequest, spec: FeatureSpec) -> Features:
    features = wrong.ask(request, replace(spec, layers=tuple(max(0, layer - 1) for layer in spec.layers[1:])))
    return replace(features, layers=spec.layers, hidden=torch.cat([features.hidden[:, :1], features.hidden], 1))


def shifted_by_one(wrong: WrongEngine, request: RowRequest, spec: FeatureSpec) -> Features:
    """A state too early, as where an engine answers for the token that comes next."""
    features = wrong.ask(request, spec)
    moved = {name: torch.roll(getattr(features, name), -1, 0) for name in ("hidden", "final_hidden", "greedy")}
    return replace(features, **moved)


def before_the_norm(wrong: WrongEngine, request: RowRequest, spec: FeatureSpec) -> Features:
    last = wrong.ask(request, FeatureSpec((wrong.info().num_layers - 1,)))
    return replace(wrong.ask(request, spec), final_hidden=last.hidden[:, 0])


def documents_see_each_other(wrong: WrongEngine, request: RowRequest, spec: FeatureSpec) -> Features:
    return wrong.ask(one_document(request), spec)


def stale_prefix_cache(wrong: WrongEngine, request: RowRequest, spec: FeatureSpec) -> Features:
    """A repeated document has the states of its last token everywhere but there."""
    features = wrong.ask(request, spec)
    return forget(features, request, lambda tokens: tokens.tobytes() in wrong.seen)


def shared_prefix_cache(wrong: WrongEngine, request: RowRequest, spec: FeatureSpec) -> Features:
    """The same for one that begins like another that came before; the same whole is computed again."""
    features = wrong.ask(request, spec)

    def begins_like_another(tokens: np.ndarray) -> bool:
        head = tokens[:64].tobytes()
        return len(tokens) > 64 and any(other.startswith(head) and other != tokens.tobytes() for other in wrong.seen)

    return forget(features, request, begins_like_another)


def forget(features: Features, request: RowRequest, cached: Callable[[np.ndarray], bool]) -> Features:
    hidden = features.hidden.clone()
    for start, end in zip(request.documents, request.documents[1:], strict=False):
        if end - start > 1 and cached(request.tokens[start:end]):
            hidden[start : end - 1] = hidden[end - 1]
    return replace(features, hidden=hidden)


def other_greedy(wrong: WrongEngine, request: RowRequest, spec: FeatureSpec) -> Features:
    features = wrong.ask(request, spec)
    assert features.greedy is not None
    return replace(features, greedy=(features.greedy + 1) % 300)


def not_finite(wrong: WrongEngine, request: RowRequest, spec: FeatureSpec) -> Features:
    features = wrong.ask(request, spec)
    hidden = features.hidden.clone()
    hidden[-1, 0, 0] = torch.nan
    return replace(features, hidden=hidden)


def rows_missing(wrong: WrongEngine, request: RowRequest, spec: FeatureSpec) -> Features:
    """A prefix that was in a cache is left out."""
    features = wrong.ask(request, spec)
    return features if len(request.tokens) < 100 else replace(features, hidden=features.hidden[64:])


def chunk_without_its_past(first: int) -> Change:
    """Tokens of a document from `first` on do not see those before."""

    def change(wrong: WrongEngine, request: RowRequest, spec: FeatureSpec) -> Features:
        if len(request.documents) != 2 or len(request.tokens) <= first:
            return wrong.ask(request, spec)
        num = len(request.tokens)
        positions = np.concatenate([np.arange(first), np.arange(num - first)]).astype(np.int32)[None]
        return wrong.ask(replace(request, documents=np.array([0, first, num], np.int32), positions=positions), spec)

    return change


def rerouted(wrong: WrongEngine, request: RowRequest, spec: FeatureSpec) -> Features:
    """The first token of every fourth short document and of each long one goes to other experts, in any row."""
    features = wrong.ask(request, spec)
    return spoil(features, request, lambda tokens: len(tokens) >= 32 or int(tokens[0]) % 4 == 0, 1)


def one_token_documents_spoilt(wrong: WrongEngine, request: RowRequest, spec: FeatureSpec) -> Features:
    features = wrong.ask(request, spec)
    return spoil(features, request, lambda tokens: len(tokens) == 1, 1)


def spoil(features: Features, request: RowRequest, which: Callable[[np.ndarray], bool], num_tokens: int) -> Features:
    """The first tokens of some documents with another sign in half of their numbers."""
    assert features.final_hidden is not None
    hidden, final = features.hidden.clone(), features.final_hidden.clone()
    for start, end in zip(request.documents, request.documents[1:], strict=False):
        if which(request.tokens[start:end]):
            hidden[start : start + num_tokens, :, ::2] *= -1
            final[start : start + num_tokens, ::2] *= -1
    return replace(features, hidden=hidden, final_hidden=final)
