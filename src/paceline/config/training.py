"""`[training]`, `[evaluation]`, `[tracking]`, `[export]`."""

from typing import Literal

from pydantic import Field, model_validator

from paceline.config.base import Config


class ProfileConfig(Config):
    """A window of steps under the torch profiler."""

    start: int = Field(ge=0)
    """First profiled step."""
    steps: int = Field(4, ge=1)
    """How many."""


class TrainingConfig(Config):
    """The loop."""

    num_epochs: int = Field(1, ge=1)
    """Passes over the rows."""
    max_steps: int | None = Field(None, ge=0)
    """Optimizer steps at most; None is all epochs."""
    rows_per_step: int = Field(1, ge=1)
    """G: rows in an optimizer step, over all ranks and micro-steps."""
    sharding: Literal["none", "full"] = "none"
    """With several trainer ranks: "none" keeps all weights and optimizer state on each, "full" divides them (FSDP2)."""
    sequence_parallel: int = Field(1, ge=1, le=64)
    """Ranks that train each row together, each with a part of its tokens; divides the number of trainer ranks. For rows
    too long for one GPU."""
    sequence_exchange: Literal["keys", "heads"] = "keys"
    """What ranks that train a row together exchange for attention: "keys" gives each the keys and values of the whole
    row, once; "heads" moves queries at every attention, needs less memory, and `sequence_parallel` must then divide the
    drafts' heads and key/value heads."""
    dist_timeout_s: float = Field(1800.0, gt=0)
    """Trainer ranks that wait for each other longer than this end the run. Data is prepared, compiled and saved in
    such waits."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute dtype of the drafts; master weights, gradients and optimizer state are fp32."""
    device: str = "auto"
    """"cpu", "cuda", "cuda:1"; "auto" is cuda where there is one."""
    compile: bool = False
    """Compile the drafts' layers and losses with torch.compile."""
    activation_checkpointing: bool = False
    """Recompute draft layers in the backward pass: less memory, about a third more time."""
    head_chunk_tokens: int = Field(4096, ge=1)
    """Slots whose logits over the vocabulary exist at one time."""
    deterministic: bool = False
    """Bit-equal losses from run to run on a GPU, at some cost in speed (a CPU always is)."""
    num_threads: int | None = Field(None, ge=1)
    """CPU threads of torch; None leaves its default. Another number changes the last bits."""
    log_every: int = Field(10, ge=1)
    """Steps between console lines and metrics read back from the device."""
    eval_every: int = Field(500, ge=0)
    """Steps between evaluations on held-out rows; 0 only at the end."""
    max_eval_rows: int | None = Field(64, ge=1)
    """Held-out rows in an evaluation; None is all."""
    checkpoint_every: int = Field(500, ge=0)
    """Steps between checkpoints; 0 only at the end."""
    keep_checkpoints: int = Field(3, ge=1)
    """Newest checkpoints kept; each draft's best is kept besides."""
    async_checkpoints: bool = True
    """Write checkpoints in the background, one at a time."""
    shutdown_grace_s: float = Field(8.0, gt=0)
    """After SIGINT or SIGTERM: seconds to end in order before the process is ended."""
    profile: ProfileConfig | None = None
    """Profile a window of steps into `profile/` in the run directory."""


class EvaluationConfig(Config):
    """`paceline evaluate`: real speculative decoding of held-out prompts."""

    prompts: str | None = None
    """Conversations whose last assistant turn is decoded anew; None is the held-out data."""
    num_prompts: int = Field(32, ge=1)
    """Prompts decoded, the first ones."""
    max_new_tokens: int = Field(256, ge=2)
    """Tokens decoded a prompt at most."""
    temperature: float = Field(0.0, ge=0.0)
    """0 is greedy; above, tokens are drawn (from `seed`), and output is held against the target's distribution."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of target and draft while decoding; "auto" is the target's. In fp32 output must equal exactly."""


class TrackingConfig(Config):
    """Views of metrics.jsonl elsewhere."""

    tensorboard: bool = False
    """Also write TensorBoard events (extra `tensorboard`)."""
    wandb: bool = False
    """Also send to Weights & Biases (extra `wandb`)."""
    wandb_project: str = "paceline"
    """Project of the run."""
    wandb_mode: Literal["online", "offline"] = "online"
    """"offline" writes to the run directory only."""
    trackers: tuple[str, ...] = ()
    """Further views, of other packages (entry points `paceline.trackers`)."""


class ExportConfig(Config):
    """`paceline export`: published layouts."""

    include_embedding: bool = False
    """Write the target's embedding into EAGLE-3 exports (engines take the target's own)."""
    output: str | None = None
    """Directory to write; None is `export/` in the run directory."""

    @model_validator(mode="after")
    def _output_is_not_empty(self) -> "ExportConfig":
        if self.output is not None and not self.output.strip():
            raise ValueError("is empty: name a directory or leave it out")
        return self
