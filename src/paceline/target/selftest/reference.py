"""What transformers computes for the known texts: plain library code that shares nothing with any engine."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from paceline.errors import TargetError
from paceline.target.selftest.texts import KnownTexts, build_texts

_NUM_TOP = 2
_TENSORS = ("layers", "final_hidden", "before_norm", "top_ids", "top_logits")


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """States of T tokens, the known texts end to end, each text computed alone."""

    layers: Tensor
    """[T, N - 1, H]: outputs of decoder layers 0..N-2."""
    final_hidden: Tensor
    """[T, H]: after the final norm."""
    before_norm: Tensor | None
    """[T, H]: output of layer N - 1; None where the final norm was not found."""
    top_ids: Tensor
    """int64[T, 2]: the likeliest tokens."""
    top_logits: Tensor
    """fp32[T, 2]: their logits."""
    model: str
    """Name of the target."""
    fingerprint: str
    """Of its weights, as in TargetInfo."""
    text_hash: str
    dtype: str
    """That it was computed in."""

    def save(self, path: Path) -> None:
        """Write one safetensors file, whole or not at all."""
        tensors = {name: getattr(self, name) for name in _TENSORS if getattr(self, name) is not None}
        facts = {name: getattr(self, name) for name in ("model", "fingerprint", "text_hash", "dtype")}
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished, metadata=facts)
        unfinished.replace(path)


def load_reference(path: Path, fingerprint: str, texts: KnownTexts) -> Reference:
    """A reference from a file.

    Raises:
        TargetError: it cannot be read, or is of other weights or texts; both values are named.
    """
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
        reference = Reference(before_norm=tensors.pop("before_norm", None), **tensors, **facts)
    except (OSError, SafetensorError, TypeError) as error:
        raise TargetError(f"the self-test's reference {path} cannot be read: {error}") from error
    for what, theirs, ours in (
        ("weights", reference.fingerprint, fingerprint),
        ("texts", reference.text_hash, texts.text_hash()),
    ):
        if theirs != ours:
            raise TargetError(
                f"the self-test's reference {path} is of {what} {theirs}, this target's are {ours}: make it anew with "
                "`paceline doctor MODEL --save-reference`"
            )
    return reference


@torch.no_grad()
def observe(model: PreTrainedModel, texts: KnownTexts, fingerprint: str) -> Reference:
    """What a loaded model computes, a text at a time.

    transformers' `hidden_states[i + 1]` is the output of layer i, but for the last, which is after the final norm.
    """
    device = next(model.parameters()).device
    layers, finals, before, ids, logits = [], [], [], [], []
    with _last_outputs(model) as last:
        for text in texts.documents:
            tokens = torch.from_numpy(text.tokens).long()[None].to(device)
            out = model(input_ids=tokens, output_hidden_states=True, use_cache=False)
            layers.append(torch.stack([state[0].cpu() for state in out.hidden_states[1:-1]], 1))
            finals.append(out.hidden_states[-1][0].cpu())
            before += [last[-1][0].cpu()] if last else []
            top = out.logits[0].float().topk(_NUM_TOP)
            ids.append(top.indices.cpu())
            logits.append(top.values.cpu())
    return Reference(
        layers=torch.cat(layers),
        final_hidden=torch.cat(finals),
        before_norm=torch.cat(before) if before else None,
        top_ids=torch.cat(ids),
        top_logits=torch.cat(logits),
        model=str(model.config._name_or_path),  # noqa: SLF001  # transformers has no other name for it
        fingerprint=fingerprint,
        text_hash=texts.text_hash(),
        dtype=str(finals[0].dtype).removeprefix("torch."),
    )


def cache_path(fingerprint: str, dtype: str, texts: KnownTexts) -> Path:
    """Where a reference is kept: one for each of weights, dtype, texts and version of transformers."""
    key = "-".join((fingerprint, dtype, texts.text_hash(), transformers.__version__))
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "paceline" / "selftest" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"


@contextmanager
def _last_outputs(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """What goes into the final norm, for a diagnosis; nothing where there is no norm of a usual name."""
    body: Any = model.get_decoder() or model
    norm = next((getattr(body, name) for name in ("norm", "final_layernorm", "ln_f") if hasattr(body, name)), None)
    seen: list[Tensor] = []
    if not isinstance(norm, nn.Module):
        yield seen
        return
    handle = norm.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    try:
        yield seen
    finally:
        handle.remove()


def main() -> None:
    """A process of its own, since a GPU may not hold two models: settings as JSON in, a file out."""
    settings = json.loads(sys.argv[1])
    model = AutoModelForCausalLM.from_pretrained(
        settings["model"],
        dtype=settings["dtype"],
        trust_remote_code=settings["trust_remote_code"],
        device_map={"": settings["device"]} if settings["quantised"] else None,
    )
    if not settings["quantised"]:
        model.to(settings["device"])
    texts = build_texts(settings["num_tokenizer_tokens"])
    observe(model.eval(), texts, settings["fingerprint"]).save(Path(settings["output"]))


if __name__ == "__main__":
    main()
