"""What is proved of a model once, when it is loaded: logits can be rebuilt, documents do not see each other."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from paceline.config.target import TargetConfig
from paceline.errors import TargetError
from paceline.schema.features import FeatureSpec
from paceline.schema.rows import RowRequest
from paceline.schema.target_info import LogitTransform
from paceline.target.hf.attention import DOCUMENT_ATTENTION, register_document_attention
from paceline.target.hf.capture import Layout, RowCapture, apply_logit_transform
from paceline.target.hf.loading import EXPERT_COUNTS, ModelParts

logger = logging.getLogger(__name__)

_NUM_PROBE_TOKENS = 8
_LARGE_LOGIT = 100.0
"""Logits are also compared at this size, where a soft cap cannot hide."""
_LOGIT_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""Of the largest logit; the model applies its transform in its own dtype, we in fp32."""
_STATE_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""Relative, document packed against document alone; bf16 kernels differ by 1-2e-2 after 36 layers."""
_ATTENTION_LAYERS = {"full_attention", "sliding_attention"}


@torch.no_grad()
def check_logits(parts: ModelParts, transform: LogitTransform) -> None:
    """Raise unless the model's logits are `transform` of its lm_head of its final hidden states.

    Raises:
        TargetError: they are not: names both values. An unknown transform is refused, never guessed.
    """
    prepared: list[Tensor] = []

    def replace(module: Any, arguments: Any, output: Any) -> Any:
        """Hand the lm_head the final hidden states twice, once as they are and once with large logits."""
        final = output.last_hidden_state
        largest = apply_logit_transform(parts.lm_head(final), LogitTransform()).abs().max().clamp(min=1e-6)
        prepared.append(torch.cat([final, final * (_LARGE_LOGIT / largest).to(final.dtype)], dim=1))
        output.last_hidden_state = prepared[0]
        return output

    handle = parts.body.register_forward_hook(replace)
    try:
        own = parts.model(input_ids=_probe_tokens(parts)[None], use_cache=False).logits.float()
    finally:
        handle.remove()
    rebuilt = apply_logit_transform(parts.lm_head(prepared[0]), transform).to(own.device)
    difference = (own - rebuilt).abs()
    worst = int(difference.argmax())
    limit = _LOGIT_TOLERANCE[parts.state_dtype] * max(1.0, float(own.abs().max()))
    if not float(difference.max()) <= limit:
        raise TargetError(
            f"{type(parts.model).__name__} computes logits in a way paceline does not know: its own logit "
            f"{float(own.flatten()[worst]):.6g} is {float(rebuilt.flatten()[worst]):.6g} when rebuilt from the final "
            f"hidden state with {transform}"
        )


@torch.no_grad()
def measure_embedding_scale(parts: ModelParts) -> float:
    """What the model multiplies embedding rows by before its first layer (Gemma, Granite); 1.0 for most.

    1.0 as well where something else is added (learned positions): then there is no such factor.
    """
    seen: list[Tensor] = []

    def keep(module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        seen.append(arguments[0] if arguments else keywords["hidden_states"])

    tokens = _probe_tokens(parts)
    handle = parts.layers[0].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        parts.body(input_ids=tokens[None], use_cache=False)
    finally:
        handle.remove()
    table = parts.embedding.weight
    if not isinstance(table, Tensor) or table.dim() != 2 or table.shape[1] != seen[0].shape[-1]:
        return 1.0
    rows, states = _look_up(table, tokens).float(), seen[0][0].float().to(table.device)
    factor = float((rows * states).sum() / rows.square().sum().clamp(min=1e-12))
    if not float((states - factor * rows).norm()) <= 2e-2 * float(states.norm()):
        return 1.0
    hidden_size = parts.config.hidden_size
    known = (1.0, math.sqrt(hidden_size), getattr(parts.config, "embedding_multiplier", None) or 1.0)
    # bf16 models round the factor (Gemma's 55.43 to 55.5): the exact one is meant
    return next((value for value in known if abs(factor - value) <= 1e-2 * abs(value)), factor)


def _look_up(table: Tensor, tokens: Tensor) -> Tensor:
    """[n, H]: rows of the embedding's table; with tensor parallelism the ranks hold parts of it."""
    if not isinstance(table, DTensor):
        return table[tokens]
    whole = DTensor.from_local(tokens, table.device_mesh, [Replicate()], run_check=False)
    found = torch.nn.functional.embedding(whole, table)
    assert isinstance(found, DTensor)
    return found.full_tensor()


def choose_layout(parts: ModelParts, config: TargetConfig) -> Layout:
    """How this model can take several documents in one forward without them seeing each other.

    "auto" packs where that costs nothing extra and is proved for this model here and now; otherwise it pads.

    Raises:
        TargetError: `target.documents = "packed"`, but packed documents differ from documents alone.
    """
    if config.documents == "padded":
        return "padded"
    candidate = _packed_layout(parts)
    if candidate == "positions" and config.documents == "auto" and "flash" not in _attention_of(parts):
        logger.info("documents are padded: %s attention would mask the square of the row", _attention_of(parts))
        return "padded"
    reason = _why_not_packed(parts, candidate)
    if reason is None:
        return candidate
    if config.documents == "packed":
        raise TargetError(f'target.documents = "packed" does not work for this model ({reason}): use "padded"')
    logger.info("documents are padded: %s", reason)
    return "padded"


def _packed_layout(parts: ModelParts) -> Layout:
    if _attention_of(parts) != "sdpa":
        return "positions"
    register_document_attention()
    parts.model.set_attn_implementation(DOCUMENT_ATTENTION)
    return "documents" if _attention_of(parts) == DOCUMENT_ATTENTION else "positions"


def _attention_of(parts: ModelParts) -> str:
    return str(parts.config._attn_implementation)  # noqa: SLF001  # transformers has no public getter


def _why_not_packed(parts: ModelParts, layout: Layout) -> str | None:
    """What speaks against packing; None once it is proved."""
    if getattr(parts.config, "attention_chunk_size", None):
        return "attention in chunks counts from the start of the row"
    others = set(getattr(parts.config, "layer_types", None) or ()) - _ATTENTION_LAYERS
    if others:
        return f"{sorted(others)[0]} layers carry state from one document to the next"
    try:
        leak, error = _compare_layouts(parts, layout)
    except TargetError as failure:
        return str(failure)
    # Rows of one shape run the same kernels, so that a dense model's other documents keep every bit. Experts get
    # other numbers of tokens, which may change the last bits.
    dense = not any(getattr(parts.config, name, None) for name in EXPERT_COUNTS)
    if leak > (0.0 if dense else 4 * torch.finfo(parts.state_dtype).eps):
        return f"changing one document changed another by {leak:.1e}"
    if error > _STATE_TOLERANCE[parts.state_dtype]:
        return f"a packed document differs from the same alone by {error:.1e}"
    return None


def _compare_layouts(parts: ModelParts, layout: Layout) -> tuple[float, float]:
    """Relative change of documents when another one changes, and of packed documents against each alone."""
    packed = RowCapture(parts, LogitTransform(), layout, _NUM_PROBE_TOKENS)
    alone = RowCapture(parts, LogitTransform(), "padded", _NUM_PROBE_TOKENS)
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, parts.vocab_size, n, dtype=np.int32) for n in (7, 1, 11)]
    other = [(documents[0] + 1) % parts.vocab_size, *documents[1:]]
    first = _final_hidden(packed, documents)
    second = _final_hidden(packed, other)
    apart = torch.cat([_final_hidden(alone, [document]) for document in documents])
    size = len(documents[0])
    return _relative(second[size:], first[size:]), _relative(first, apart)


def _final_hidden(capture: RowCapture, documents: list[np.ndarray]) -> Tensor:
    bounds = np.cumsum([0, *map(len, documents)]).astype(np.int32)
    positions = np.concatenate([np.arange(len(d), dtype=np.int32) for d in documents])[None]
    request = RowRequest(
        0, "selftest", np.concatenate(documents), bounds, spans=np.zeros((0, 2), np.int32), positions=positions
    )
    return capture(request, FeatureSpec(layers=(), final_hidden="all"))["final_hidden"].float()


def _relative(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm().clamp(min=1e-12))


def _probe_tokens(parts: ModelParts) -> Tensor:
    """int64[8] spread over the vocabulary."""
    return torch.linspace(0, parts.vocab_size - 1, _NUM_PROBE_TOKENS, device=parts.device).long()
