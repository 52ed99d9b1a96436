"""`[target]`: the frozen model and how it is run."""

from typing import Literal, Self

from pydantic import Field, model_validator

from paceline.config.base import Config


class TargetConfig(Config):
    """The frozen target model."""

    model: str = Field(min_length=1)
    """Path or hub id of a transformers causal language model."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    engine: Literal["hf"] = "hf"
    """Who runs it: "hf" is transformers."""
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
    """CPU threads of torch in each process of a target server; None leaves torch's default. Another number changes
    the last bits of features."""
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

    @model_validator(mode="after")
    def _one_way_of_spreading(self) -> Self:
        if self.tensor_parallel > 1 and self.device_map is not None:
            raise ValueError(
                f'tensor_parallel = {self.tensor_parallel} and device_map = "{self.device_map}" both spread the model: '
                "keep one"
            )
        return self
