"""`paceline prepare`: conversations -> tokenized samples, loss masks, counts for the draft vocabulary."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from paceline.config.run import RunConfig
from paceline.config.run_dir import RunDir
from paceline.data.prepared import PreparedData, prepare
from paceline.data.samples import read_chat_template
from paceline.target.hf.loading import load_config, load_tokenizer, resolve_checkpoint


def prepare_data(config: RunConfig, run: RunDir) -> PreparedData:
    """The run's prepared data, made now or taken from the cache; loads no weights.

    Raises:
        DataError: data that cannot be used; names the file.
    """
    cache = Path(config.data.cache_dir) if config.data.cache_dir else run.prepared
    return prepare(
        config.data,
        load_run_tokenizer(config),
        target_vocab_size=target_vocab_size(config),
        cache_root=cache,
        seed=config.seed,
    )


def load_run_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of `data.tokenizer`, else the target's own; with `data.chat_template` if that is set."""
    target = config.target
    if config.data.tokenizer:
        tokenizer = load_tokenizer(config.data.tokenizer, None, target.trust_remote_code)
    else:
        tokenizer = load_tokenizer(target.model, target.revision, target.trust_remote_code)
    template = read_chat_template(config.data.chat_template)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def target_vocab_size(config: RunConfig) -> int:
    """V of the target, from its configuration file."""
    target = config.target
    checkpoint = resolve_checkpoint(target.model, target.revision, target.trust_remote_code)
    text = load_config(checkpoint, target.trust_remote_code).get_text_config(decoder=True)
    return int(text.vocab_size)
