"""`[target]`: the frozen model and how it is run."""

import re
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from paceline.config.base import Config

_SERVER_URL = re.compile(r"https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}/?")

_OF_ENGINES = (
    *("capture_layers", "engine_args", "engine_directory", "engine_documents", "engine_python", "engine_tokens"),
    "engine_url",
)
"""Settings that mean nothing to "hf"."""


class TargetConfig(Config):
    """The frozen target model."""

    model: str = Field(min_length=1)
    """Path or hub id of a transformers causal language model."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    engine: Literal["hf", "vllm", "sglang"] = "hf"
    """Who runs it: "hf" is transformers; "vllm" and "sglang" are servers of these, which `paceline serve` starts."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """"auto" is the checkpoint's own."""
    device: str = "auto"
    """"cpu", "cuda", "cuda:1"; "auto" is cuda where there is one."""
    device_map: Literal["auto", "balanced", "sequential"] | None = None
    """Spreads one model over several devices (extra `accelerate`); None puts it on `device`."""
    tensor_parallel: int = Field(1, ge=1)
    """Processes that compute each row together, by transformers' tensor-parallel plan (extra `accelerate`): one GPU
    each, from `device` on. A failed row ends all of them."""
    num_threads: int | None = Field(None, ge=1)
    """CPU threads of torch in each process of a target server, in those of an engine that it starts, too; None leaves
    torch's default. Another number changes the last bits of features."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = "auto"
    """transformers' attention implementation."""
    documents: Literal["auto", "packed", "padded"] = "auto"
    """How a row's documents share a forward: variable-length attention, or a right-padded batch."""
    compile: bool = False
    """Compile the decoder layers with torch.compile."""
    vocab_chunk_tokens: int = Field(1024, ge=1)
    """Tokens whose logits exist at one time while greedy tokens are computed."""
    trust_remote_code: bool = False
    """Run model code that comes with the checkpoint."""
    embedding_key: str | None = None
    """Name of the embedding in the checkpoint, if it is not found by itself."""
    lm_head_key: str | None = None
    """Name of the lm_head in the checkpoint, if it is not found by itself."""

    engine_args: dict[str, Any] = Field(default_factory=dict)
    """The engine's own options, as it names them: {"max-model-len": 32768, "enforce-eager": true}. In a run that has
    begun all may change but those that change what is computed (numbers, formats, parts of the model, files)."""
    engine_python: str | None = None
    """Python of the environment that has the engine; None is paceline's own."""
    engine_url: str | None = None
    """A server of the engine that runs on this host already, started as `paceline doctor --show-command` says; None
    starts one. Its key, if it asks for one, is in PACELINE_ENGINE_KEY."""
    engine_directory: str | None = None
    """Where the server of `engine_url` writes hidden states."""
    engine_documents: int = Field(256, ge=1)
    """Documents at an engine's server at one time: as many short ones as make up `engine_tokens`."""
    engine_tokens: int = Field(32_768, ge=1)
    """Tokens of rows at an engine's server, up to which it gets more rows: it computes documents as they come."""
    engine_start_timeout_s: float = Field(1800, gt=0)
    """The longest an engine may take to load and compile, and transformers to compute the self-test's reference."""
    capture_layers: tuple[int, ...] | None = None
    """Layers that an engine other than "hf" is started for, 0-based; None: those of the run's drafts, for a server
    without a run those that all algorithms read by default."""
    selftest: bool = True
    """Compare what the engine computes with transformers before the first session."""
    selftest_reference: str | None = None
    """What transformers says to the self-test, written by `paceline doctor` elsewhere, for a target that it cannot load
    here."""

    @model_validator(mode="after")
    def _engine_settings(self) -> Self:
        defaults = type(self).model_fields
        given = [name for name in _OF_ENGINES if (value := getattr(self, name)) and value != defaults[name].default]
        if self.engine == "hf" and given:
            raise ValueError(f'{", ".join(given)} set for engine = "hf": choose another engine or leave them out')
        if self.engine_url is not None and not _SERVER_URL.fullmatch(self.engine_url):
            raise ValueError(
                "engine_url must be http(s)://HOST:PORT and nothing else: a key goes into PACELINE_ENGINE_KEY"
            )
        if (self.engine_url is None) != (self.engine_directory is None):
            raise ValueError(
                f"engine_url = {self.engine_url!r} and engine_directory = {self.engine_directory!r}: a server that "
                "runs already needs both, where it answers and where it writes"
            )
        return self

    @model_validator(mode="after")
    def _one_way_of_spreading(self) -> Self:
        if self.tensor_parallel > 1 and self.device_map is not None:
            raise ValueError(
                f'tensor_parallel = {self.tensor_parallel} and device_map = "{self.device_map}" both spread the model: '
                "keep one"
            )
        return self
