"""Loading a target: any transformers causal language model, from a directory or the hub."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.distributed import DistributedConfig  # type: ignore[attr-defined]  # loaded lazily
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from paceline.config.target import TargetConfig
from paceline.errors import OutOfMemoryError, TargetError
from paceline.target.hf.stored_tensors import read_tensor_table

logger = logging.getLogger(__name__)

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""transformers' names of how many experts a layer has."""
_WEIGHTS = "*.safetensors"
_HUB_PATTERNS = ["*.json", _WEIGHTS, "*.model", "*.txt", "*.jinja", "*.tiktoken"]
_HUB_IGNORED = ["original/*", "consolidated*"]
"""Second copies of the same weights in other layouts."""
_FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""safetensors' names."""
_LAYER_KEY = re.compile(r"\blayers\.\d+\.")
_TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")
_LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError, SafetensorError)
"""What transformers raises for a checkpoint it cannot load."""


@dataclass(frozen=True, slots=True)
class ModelParts:
    """The parts of a loaded causal language model that capture needs."""

    model: PreTrainedModel
    body: nn.Module
    """Everything from token ids to the final hidden state, without the lm_head."""
    layers: nn.ModuleList
    """The decoder layers, N of them."""
    embedding: nn.Module
    lm_head: nn.Module
    config: PretrainedConfig
    """The text model's own configuration."""

    state_dtype: torch.dtype
    """Dtype of hidden states."""
    vocab_size: int
    """V: rows of the embedding."""

    @property
    def device(self) -> torch.device:
        """Where tokens go in."""
        device: torch.device = next(self.embedding.parameters()).device
        return device


def resolve_device(name: str, setting: str = "target.device") -> torch.device:
    """The device that `name` means here.

    Args:
        setting: where it comes from, for messages.

    Raises:
        TargetError: a CUDA device that this machine does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise TargetError(f"{setting} = {name!r} is not a device: use cpu, cuda or cuda:N") from error
    if device.type == "cuda":
        count = torch.cuda.device_count()
        index = device.index or 0
        if index >= count:
            raise TargetError(f"{setting} = {name!r}, but this machine has {count} CUDA devices: use cpu or another")
        return torch.device("cuda", index)
    return device


def resolve_checkpoint(
    model: str, revision: str | None = None, trust_remote_code: bool = False, weights: bool = True
) -> Path:
    """The directory of a checkpoint: `model` itself, or a download of that hub id, without `weights` of the rest.

    Raises:
        TargetError: no such directory, or a hub id that cannot be fetched.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise TargetError(f"target.model = {model!r} is a file: name the checkpoint's directory")
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise TargetError(f"target.model = {model!r}: no such directory")
    patterns = [*_HUB_PATTERNS, "*.py"] if trust_remote_code else _HUB_PATTERNS
    if not weights:
        patterns = [pattern for pattern in patterns if pattern != _WEIGHTS]
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns, ignore_patterns=_HUB_IGNORED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise TargetError(
            f"target.model = {model!r} is neither a directory here nor a hub model that can be fetched ({reason})"
        ) from error


def load_config(checkpoint: Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """The checkpoint's whole configuration (text models nest theirs: `get_text_config()`).

    Raises:
        TargetError: missing, damaged, or an architecture this transformers does not know.
    """
    if not (checkpoint / "config.json").is_file():
        raise TargetError(f"{checkpoint} has no config.json: is this a transformers checkpoint?")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
    except _LOAD_ERRORS as error:
        raise TargetError(f"{checkpoint / 'config.json'} cannot be used: {_short(error)}") from error
    return config


def resolve_dtype(config: TargetConfig, checkpoint: Path) -> str:
    """Data type of the target's states, e.g. "bfloat16": what "auto" is to transformers.

    Raises:
        TargetError: the checkpoint cannot be read.
    """
    if config.dtype != "auto":
        return config.dtype
    whole = load_config(checkpoint, config.trust_remote_code)
    stated = whole.get_text_config(decoder=True).dtype or whole.dtype
    if stated is not None:
        return str(stated).removeprefix("torch.")
    stored = (tensor.dtype for tensor in read_tensor_table(checkpoint).values())
    return next((_FLOATS[name] for name in stored if name in _FLOATS), "float32")


def load_tokenizer(path: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory or hub id.

    Raises:
        TargetError: there is none, or it cannot be read.
    """
    directory = resolve_checkpoint(path, revision, trust_remote_code, weights=False)
    # Without files transformers makes up an empty tokenizer of the model's class.
    if not trust_remote_code and not any(any(directory.glob(pattern)) for pattern in _TOKENIZER_FILES):
        raise TargetError(f"{directory} has no tokenizer files: save the model's own tokenizer there")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, trust_remote_code=trust_remote_code
        )
    except _LOAD_ERRORS as error:
        raise TargetError(f"no usable tokenizer in {directory}: {_short(error)}") from error
    return tokenizer


def read_quantization(checkpoint: Path) -> Mapping[str, Any] | None:
    """The `quantization_config` of a checkpoint, or of its text model; None of plain weights."""
    whole = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    found: Mapping[str, Any] | None = whole.get("quantization_config")
    return found or whole.get("text_config", {}).get("quantization_config")


def load_model(
    config: TargetConfig, checkpoint: Path, device: torch.device, num_layers: int | None = None
) -> PreTrainedModel:
    """The frozen model in eval mode, on `device` or spread by `target.device_map`.

    With `num_layers` only the first so many decoder layers, beside all that is no layer. These are to be thrown away:
    of a quantised checkpoint they are not what they should be, so that nothing that unpacks weights is needed.

    Raises:
        TargetError: missing or damaged files, an unknown architecture, tensors the model needs and the files lack.
        OutOfMemoryError: it does not fit.
    """
    whole = load_config(checkpoint, config.trust_remote_code)
    read_tensor_table(checkpoint)  # a missing or cut file is named here, not by a loader's stack of errors
    options: dict[str, Any] = {"dtype": config.dtype, "trust_remote_code": config.trust_remote_code}
    if num_layers is not None:
        options["config"] = _cut_layers(copy.deepcopy(whole), num_layers)
    if (attention := _attention(config, whole)) is not None:
        options["attn_implementation"] = attention
    if config.tensor_parallel > 1:
        options["distributed_config"] = DistributedConfig(tp_size=config.tensor_parallel)
    elif config.device_map is not None:
        options["device_map"] = config.device_map
    elif num_layers is None and getattr(whole, "quantization_config", None) is not None:
        options["device_map"] = {"": device}  # quantised weights are placed while they are read
    loader: Any = _loader(whole)  # transformers' types leave out what output_loading_info returns
    model: PreTrainedModel
    try:
        with _without_report() if num_layers is not None else contextlib.nullcontext():
            model, report = loader.from_pretrained(
                checkpoint, use_safetensors=True, output_loading_info=True, **options
            )
        if not options.keys() & {"device_map", "distributed_config"}:
            nn.Module.to(model, device)
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f'{config.model} does not fit on {device}: use target.dtype = "bfloat16", or target.device_map'
        ) from error
    except _LOAD_ERRORS as error:
        raise TargetError(f"target.model = {config.model!r} cannot be loaded: {_short(error)}") from error
    missing = sorted(key for key in report["missing_keys"] if num_layers is None or not _LAYER_KEY.search(key))
    if missing:
        raise TargetError(
            f"{checkpoint} lacks {len(missing)} of the model's tensors, first {missing[0]}: "
            f"is config.json ({whole.model_type}) that of these weights?"
        )
    if report["unexpected_keys"]:
        unexpected = sorted(report["unexpected_keys"])
        logger.info("%d tensors of %s are not used, first %s", len(unexpected), checkpoint, unexpected[0])
    model.eval()
    model.requires_grad_(False)
    return model


@contextlib.contextmanager
def _without_report() -> Iterator[None]:
    """transformers warns of each tensor that a cut model does not take: that is what was wanted."""
    transformers_log = logging.getLogger("transformers")
    level = transformers_log.level
    transformers_log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        transformers_log.setLevel(level)


def _attention(config: TargetConfig, whole: PretrainedConfig) -> str | None:
    """transformers' implementation; None leaves it to transformers.

    Raises:
        TargetError: sdpa for scores with a soft cap, which transformers 5.17 leaves out without a word.
    """
    cap = getattr(whole.get_text_config(decoder=True), "attn_logit_softcapping", None)
    if cap is None:
        return None if config.attention == "auto" else config.attention
    if config.attention == "sdpa":
        raise TargetError(
            f'target.attention = "sdpa" leaves out the soft cap of {cap} on attention scores of {config.model} '
            f'({whole.model_type}): use "eager", or "flex_attention" on a GPU'
        )
    return "eager" if config.attention == "auto" else config.attention


def _loader(whole: PretrainedConfig) -> type:
    """Who loads it: some models that see pictures (Mistral Small 3) are known as such only."""
    kind = whole.model_type
    if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def _cut_layers(whole: PretrainedConfig, num_layers: int) -> PretrainedConfig:
    if getattr(whole, "quantization_config", None) is not None:
        del whole.quantization_config
    text = whole.get_text_config(decoder=True)
    text.num_hidden_layers = num_layers
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = text.layer_types[:num_layers]
    return whole


def find_parts(model: PreTrainedModel) -> ModelParts:
    """Body, decoder layers, embedding and lm_head of a causal language model.

    Raises:
        TargetError: an architecture laid out in another way.
    """
    config = model.config.get_text_config(decoder=True)
    body: Any = _find_body(model)  # transformers has no type for what all bodies can
    num_layers = config.num_hidden_layers
    lists = [child for child in body.children() if isinstance(child, nn.ModuleList) and len(child) == num_layers]
    if len(lists) != 1:
        raise TargetError(
            f"{type(model).__name__}: {len(lists)} lists of {num_layers} modules in {type(body).__name__}, "
            "expected exactly one (the decoder layers): this architecture cannot be captured"
        )
    lm_head = model.get_output_embeddings()
    if lm_head is None:
        raise TargetError(f"{type(model).__name__} has no lm_head: is this a causal language model?")
    embedding = body.get_input_embeddings()
    state_dtype, vocab_size = _probe_states(body, embedding)
    return ModelParts(model, body, lists[0], embedding, lm_head, config, state_dtype, vocab_size)


def _find_body(model: PreTrainedModel) -> nn.Module:
    body: nn.Module = model.get_decoder()
    if body is not model:
        return body
    # Llama 4 gives itself: its body is not where transformers looks for it.
    inside = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    if len(inside) != 1:
        raise TargetError(
            f"{type(model).__name__} has {len(inside)} models inside, expected exactly one (all but the lm_head): this "
            "architecture cannot be captured"
        )
    return inside[0]


@torch.no_grad()
def _probe_states(body: nn.Module, embedding: nn.Module) -> tuple[torch.dtype, int]:
    """Dtype of the model's states (not that of its weights where these are quantised), and its embedding rows."""
    table = embedding.weight
    assert isinstance(table, torch.Tensor)
    final = body(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=table.device), use_cache=False)[0]
    return final.dtype, table.shape[0]


def _short(error: BaseException) -> str:
    """The first lines of transformers' message; its errors run to pages."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}"
