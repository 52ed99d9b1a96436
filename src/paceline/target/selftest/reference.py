"""What transformers computes for the known texts: plain library code that shares nothing with any engine."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from paceline.errors import TargetError
from paceline.target.selftest.texts import KnownTexts, build_texts

_FORMAT = "2"
"""Of files that are kept; another one is computed anew."""
_NUM_TOP = 16
_ATTENTION = "eager"
"""It does all that a model asks for: sdpa of transformers 5.17 leaves out the soft cap of Gemma 2's scores."""
_OBSERVED = ("layers", "final_hidden", "before_norm", "top_ids", "top_logits", "logit_spread")
_TENSORS = (*_OBSERVED, "rounding")
_FACTS = ("model", "fingerprint", "text_hash", "dtype", "rounded_dtype")
_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f")
"""Names of a decoder's last norm."""


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """States of T tokens, those compared of the known texts end to end, each text computed alone."""

    layers: Tensor
    """[T, N - 1, H]: outputs of decoder layers 0..N-2."""
    final_hidden: Tensor
    """[T, H]: after the final norm."""
    before_norm: Tensor | None
    """[T, H]: output of layer N - 1; None where the final norm was not found."""
    top_ids: Tensor
    """int64[T, 16] (fewer of a tiny vocabulary): the likeliest tokens, the first first."""
    top_logits: Tensor
    """fp32[T, 16]: their logits."""
    logit_spread: Tensor
    """fp32[T]: standard deviation of all logits."""
    rounding: Tensor | None
    """fp32[T, N + 1]: how far transformers itself is from this, relatively, when it computes in `rounded_dtype`: layers
    0..N-1, final hidden. NaN where the output of layer N-1 is not known."""
    model: str
    """Name of the target."""
    fingerprint: str
    """Of its weights, as in TargetInfo."""
    text_hash: str
    dtype: str
    """That it was computed in."""
    rounded_dtype: str = ""
    """Of `rounding`; "" without it."""

    def for_engine(self, dtype: str) -> Reference:
        """This, without a rounding that is of another data type than the engine's."""
        return self if dtype == self.rounded_dtype else replace(self, rounding=None, rounded_dtype="")

    def save(self, path: Path) -> None:
        """Write one safetensors file, whole or not at all."""
        tensors = {name: getattr(self, name) for name in _TENSORS if getattr(self, name) is not None}
        facts = {name: getattr(self, name) for name in _FACTS}
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished, metadata=facts)
        unfinished.replace(path)


def load_reference(path: Path, fingerprint: str | None, texts: KnownTexts) -> Reference:
    """A reference from a file.

    Args:
        fingerprint: of the weights it must be of; None takes any, as a quantised target has those of its original.

    Raises:
        TargetError: it cannot be read, or is of other weights or texts; both values are named.
    """
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
        absent = {name: tensors.pop(name, None) for name in ("before_norm", "rounding")}
        reference = Reference(**absent, **tensors, **facts)
    except (OSError, SafetensorError, TypeError) as error:
        raise TargetError(f"the self-test's reference {path} cannot be read: {error}") from error
    for what, theirs, ours in (
        ("weights", reference.fingerprint, fingerprint),
        ("texts", reference.text_hash, texts.text_hash()),
    ):
        if ours is not None and theirs != ours:
            raise TargetError(
                f"the self-test's reference {path} is of {what} {theirs}, this target's are {ours}: make it anew with "
                "`paceline doctor MODEL --save-reference`"
            )
    return reference


@torch.no_grad()
def observe(model: PreTrainedModel, texts: KnownTexts, fingerprint: str) -> Reference:
    """What a loaded model computes, a text at a time.

    transformers' `hidden_states[i + 1]` is the output of layer i, but for the last, which is after the final norm (in
    a few classes before it: what the norm itself says counts, where it is found).
    """
    device = next(model.parameters()).device
    seen: dict[str, list[Tensor]] = {name: [] for name in _OBSERVED}
    with _final_norm(model) as norm:
        for text in texts.documents:
            tokens = torch.from_numpy(text.tokens).long()[None].to(device)
            out = model(input_ids=tokens, output_hidden_states=True, use_cache=False)
            places = torch.from_numpy(text.places).to(device)
            logits = out.logits[0, places.to(out.logits.device)].float()
            top = logits.topk(min(_NUM_TOP, logits.shape[-1]))
            final = _rows(out.hidden_states[-1], places)
            inner = [_rows(state, places) for state in out.hidden_states[1:-1]]
            seen["layers"].append(torch.stack(inner, 1) if inner else final.new_empty(len(final), 0, final.shape[-1]))
            seen["final_hidden"].append(_rows(norm.pop("after"), places) if norm else final)
            seen["before_norm"] += [_rows(norm.pop("before"), places)] if norm else []
            seen["top_ids"].append(top.indices.cpu())
            seen["top_logits"].append(top.values.cpu())
            seen["logit_spread"].append(logits.std(-1).cpu())
    tensors = {name: torch.cat(parts) if parts else None for name, parts in seen.items()}
    return Reference(
        **tensors,  # type: ignore[arg-type]  # before_norm alone may be None
        rounding=None,
        model=str(model.config._name_or_path),  # noqa: SLF001  # transformers has no other name for it
        fingerprint=fingerprint,
        text_hash=texts.text_hash(),
        dtype=str(seen["final_hidden"][0].dtype).removeprefix("torch."),
    )


def token_errors(received: Tensor, expected: Tensor) -> Tensor:
    """fp32[m] of [m, H]: relative, of each token, since the first one's states may be a thousand times as large."""
    mine, theirs = received.float(), expected.float()
    errors: Tensor = (mine - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp(min=1e-12)
    return errors


def add_rounding(exact: Reference, rounded: Reference) -> Reference:
    """`exact` with how far `rounded` is from it, which is the same model in another data type."""
    columns = [token_errors(rounded.layers[:, i], exact.layers[:, i]) for i in range(exact.layers.shape[1])]
    if exact.before_norm is None or rounded.before_norm is None:
        columns.append(torch.full((len(exact.final_hidden),), torch.nan))
    else:
        columns.append(token_errors(rounded.before_norm, exact.before_norm))
    columns.append(token_errors(rounded.final_hidden, exact.final_hidden))
    return replace(exact, rounding=torch.stack(columns, 1), rounded_dtype=rounded.dtype)


def _rows(states: Tensor, places: Tensor) -> Tensor:
    """[m, H] on the CPU, of the only document."""
    return states[0, places.to(states.device)].cpu()


def cache_path(fingerprint: str, dtype: str, rounded_dtype: str | None, texts: KnownTexts) -> Path:
    """Where a reference is kept: one for each of weights, data types, texts and version of transformers."""
    key = "-".join(
        (_FORMAT, fingerprint, dtype, str(rounded_dtype), texts.text_hash(), transformers.__version__, _ATTENTION)
    )
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "paceline" / "selftest" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"


@contextmanager
def _final_norm(model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """What went into the final norm and came out of it in the last forward; nothing where none has a usual name."""
    body: Any = model.get_decoder() or model
    norm = next((getattr(body, name) for name in _NORMS if hasattr(body, name)), None)
    seen: dict[str, Tensor] = {}
    if not isinstance(norm, nn.Module):
        yield seen
        return
    handle = norm.register_forward_hook(
        lambda module, arguments, output: seen.update(before=arguments[0], after=output)
    )
    try:
        yield seen
    finally:
        handle.remove()


def _loader(model: str, trust_remote_code: bool) -> type:
    """Some models that see pictures (Mistral Small 3) are known as such only."""
    kind = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code).model_type
    if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def main() -> None:
    """A process of its own, since a GPU may not hold two models: settings as JSON in, a file out."""
    settings = json.loads(sys.argv[1])
    texts = build_texts(settings["num_tokenizer_tokens"], settings["num_positions"])
    reference = observe(_load(settings, settings["dtype"]), texts, settings["fingerprint"])
    if settings["rounded_dtype"] is not None:
        gc.collect()  # the first model is gone before the second is there
        rounded = observe(_load(settings, settings["rounded_dtype"]), texts, settings["fingerprint"])
        reference = add_rounding(reference, rounded)
    reference.save(Path(settings["output"]))


def _load(settings: Mapping[str, Any], dtype: str) -> PreTrainedModel:
    # transformers' types leave out what output_loading_info returns
    loader: Any = _loader(settings["model"], settings["trust_remote_code"])
    options: dict[str, Any] = {}
    if settings["spread"]:
        # One GPU is filled after the other: "auto" gives uneven ones even shares, and puts what is left on the disk.
        options["device_map"] = "sequential"
        options["max_memory"] = {int(gpu): num_bytes for gpu, num_bytes in settings["spread"].items()}
    elif settings["quantised"]:
        options["device_map"] = {"": settings["device"]}
    if settings["unpacked"]:  # what the weights mean: on a GPU transformers would round activations, too
        config = AutoConfig.from_pretrained(settings["model"], trust_remote_code=settings["trust_remote_code"])
        config.quantization_config = {**config.quantization_config, "dequantize": True}
        options["config"] = config
    model, report = loader.from_pretrained(
        settings["model"],
        output_loading_info=True,
        dtype=dtype,
        attn_implementation=_ATTENTION,
        trust_remote_code=settings["trust_remote_code"],
        **options,
    )
    if report["missing_keys"]:  # transformers would go on with random numbers
        sys.exit(f"{settings['model']} lacks {sorted(report['missing_keys'])[:3]}")
    places = set(getattr(model, "hf_device_map", {}).values())
    if places & {"cpu", "disk"}:
        sys.exit(f"{settings['model']} does not fit on GPUs with room for {settings['spread']} bytes")
    if "device_map" not in options:
        model.to(settings["device"])
    if settings["unpacked"]:  # what was not packed is in the data type that it is stored in; buffers stay as they are
        for parameter in model.parameters():
            parameter.data = parameter.data.to(getattr(torch, dtype))
    loaded: PreTrainedModel = model.eval()
    return loaded


if __name__ == "__main__":
    main()
