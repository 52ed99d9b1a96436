"""What is known of a target before any weight is loaded: enough to prepare data and to plan a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from paceline.client.recording import Recording
from paceline.config.drafts import DFlashConfig, Eagle3Config
from paceline.config.run import RunConfig
from paceline.config.run_dir import RunDir
from paceline.config.target import TargetConfig
from paceline.drafts.registry import load_algorithm
from paceline.errors import DataError
from paceline.launch.trained import recall_target
from paceline.schema.features import FeatureSpec, merge_specs
from paceline.schema.layout import ELEMENT_BYTES
from paceline.schema.target_info import RopeInfo, TargetInfo
from paceline.target.hf.info import choose_mask_token, dense_mlp_width, read_heads
from paceline.target.hf.loading import load_config, load_tokenizer, resolve_checkpoint


@dataclass(frozen=True, slots=True)
class TargetFacts:
    """What preparing data needs."""

    vocab_size: int
    """V: rows of the embedding."""
    mask_token_id: int | None
    """As TargetInfo has it."""
    tokenizer: PreTrainedTokenizerBase
    """The target's own."""


def read_checkpoint_facts(config: RunConfig) -> TargetFacts:
    """From the target's configuration and tokenizer files."""
    target = config.target
    text = text_config(target)
    tokenizer = load_tokenizer(target.model, target.revision, target.trust_remote_code)
    return TargetFacts(int(text.vocab_size), choose_mask_token(tokenizer, int(text.vocab_size)), tokenizer)


def open_recording(config: RunConfig) -> Recording:
    """The recording that placement "recorded" trains from.

    Raises:
        DataError: there is none, it is not finished, or files of it are missing or too short.
    """
    assert config.data.recorded is not None, "the configuration was checked"
    recording = Recording(config.data.recorded)
    manifest = recording.manifest
    if not manifest.complete:
        raise DataError(
            f"{recording.name} is not finished: {manifest.num_recorded_rows} of {manifest.num_rows} rows are there; "
            "run `paceline record` again, it goes on"
        )
    if problems := recording.forget_missing():
        raise DataError(
            f"{recording.name} is damaged: " + "; ".join(problems) + "; copy the files anew, or run `paceline record` "
            "again"
        )
    return recording


def recorded_facts(config: RunConfig) -> TargetFacts:
    """From a recording, all of whose files but the shards are compared with what was written.

    Raises:
        DataError: as `open_recording`, or a file that is damaged.
    """
    recording = open_recording(config)
    recording.check_files()
    info = recording.info
    return TargetFacts(info.vocab_size, info.mask_token_id, load_tokenizer(str(recording.paths.tokenizer)))


def known_facts(config: RunConfig) -> TargetFacts:
    """What a recording or a run directory says of a target that was elsewhere, else what the checkpoint's files say."""
    if config.placement.target == "recorded":
        return recorded_facts(config)
    run = RunDir(Path(config.run_dir))
    if run.tokenizer.is_dir() and run.target_info.exists():
        info = recall_target(run)
        return TargetFacts(info.vocab_size, info.mask_token_id, load_tokenizer(str(run.tokenizer)))
    return read_checkpoint_facts(config)


def feature_bytes_per_token(config: RunConfig) -> tuple[int, tuple[int, ...]]:
    """(bytes a token of a fully supervised row takes, the capture layers of all drafts)."""
    info = outline_target(config)
    spec = training_spec(config, info)
    return round(bytes_per_token(spec, info, 1.0)), spec.layers


def training_spec(config: RunConfig, info: TargetInfo) -> FeatureSpec:
    """The features that all drafts of a run are trained on."""
    drafts = [(load_algorithm(draft.algorithm), draft) for draft in config.drafts.values()]
    return merge_specs(algorithm.feature_spec(draft, info) for algorithm, draft in drafts)


def bytes_per_token(spec: FeatureSpec, info: TargetInfo, supervised: float) -> float:
    """Bytes of features a token of a row takes, `supervised` of whose tokens are."""
    state = info.hidden_size * ELEMENT_BYTES[info.dtype]
    share = {"none": 0.0, "supervised": supervised, "all": 1.0}[spec.final_hidden]
    return len(spec.layers) * state + 4 * (spec.greedy + spec.logsumexp) + share * (state + 4)


def outline_target(config: RunConfig) -> TargetInfo:
    """What a recording or the run directory says of the target, else its sizes as the checkpoint's files have them."""
    if config.placement.target == "recorded":
        return open_recording(config).info
    run = RunDir(Path(config.run_dir))
    return recall_target(run) if run.target_info.exists() else _outline(config.target)


def default_layers(target: TargetConfig) -> tuple[int, ...]:
    """Those that any algorithm reads of this target unless its draft says otherwise."""
    info = _outline(target)
    drafts = (Eagle3Config(), DFlashConfig())
    return merge_specs(load_algorithm(draft.algorithm).feature_spec(draft, info) for draft in drafts).layers


def text_config(target: TargetConfig) -> PretrainedConfig:
    """The configuration of the target's text model."""
    checkpoint = resolve_checkpoint(target.model, target.revision, target.trust_remote_code, weights=False)
    text: PretrainedConfig = load_config(checkpoint, target.trust_remote_code).get_text_config(decoder=True)
    return text


def _outline(target: TargetConfig) -> TargetInfo:
    """The sizes of a target that nobody has loaded yet; what only loading can tell is left empty."""
    text = text_config(target)
    dtype = target.dtype if target.dtype != "auto" else str(text.dtype or "float32")
    num_heads, num_kv_heads, head_dim = read_heads(text)
    return TargetInfo(
        name=target.model,
        model_type=text.model_type,
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        intermediate_size=dense_mlp_width(text),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=text.vocab_size,
        num_tokenizer_tokens=0,  # no id is known to be text: a draft's mask token may be any
        norm_eps=1e-6,
        rope=RopeInfo(),
        max_position_embeddings=text.max_position_embeddings,
        dtype=dtype.removeprefix("torch."),
        tied_embeddings=False,
        weight_fingerprint="",
        tokenizer_fingerprint="",
        deterministic=False,
        mask_token_id=0,
    )
