"""`paceline prepare`: conversations -> tokenized samples, loss masks, counts for the draft vocabulary."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from paceline.config.run import RunConfig
from paceline.config.run_dir import RunDir
from paceline.data.prepared import PreparedData, prepare
from paceline.data.samples import read_chat_template
from paceline.launch.recorded import recorded_data
from paceline.launch.target_facts import TargetFacts
from paceline.target.hf.loading import load_tokenizer


def prepare_data(config: RunConfig, run: RunDir, facts: TargetFacts) -> PreparedData:
    """The run's prepared data, made now, taken from the cache, or those of a recording; loads no weights.

    Raises:
        DataError: data that cannot be used; names the file.
        ConfigError: a recording has other rows than the configuration asks for.
    """
    reserved = reserved_tokens(config, facts)
    if config.placement.target == "recorded":
        return recorded_data(config, reserved)
    cache = Path(config.data.cache_dir) if config.data.cache_dir else run.prepared
    return prepare(
        config.data.model_copy(update={"min_supervised_tokens": config.min_supervised_tokens}),
        load_run_tokenizer(config, facts),
        target_vocab_size=facts.vocab_size,
        cache_root=cache,
        seed=config.seed,
        reserved_tokens=reserved,
    )


def load_run_tokenizer(config: RunConfig, facts: TargetFacts) -> PreTrainedTokenizerBase:
    """The tokenizer of `data.tokenizer`, else the target's own; with `data.chat_template` if that is set."""
    tokenizer = facts.tokenizer
    if config.data.tokenizer not in (None, "server"):
        tokenizer = load_tokenizer(config.data.tokenizer, None, config.target.trust_remote_code)
    template = read_chat_template(config.data.chat_template)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def reserved_tokens(config: RunConfig, facts: TargetFacts) -> frozenset[int]:
    """Ids that stand for something else than text in a draft of the run: DFlash's mask token."""
    tokens = (draft.reserved_token(facts.mask_token_id) for draft in config.drafts.values())
    return frozenset(token for token in tokens if token is not None)
