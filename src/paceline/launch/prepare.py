"""`paceline prepare`: conversations -> tokenized samples, loss masks, counts for the draft vocabulary."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from paceline.config.run import RunConfig
from paceline.config.run_dir import RunDir
from paceline.data.prepared import PreparedData, prepare
from paceline.data.samples import read_chat_template
from paceline.target.hf.info import choose_mask_token
from paceline.target.hf.loading import load_config, load_tokenizer, resolve_checkpoint


def prepare_data(config: RunConfig, run: RunDir) -> PreparedData:
    """The run's prepared data, made now or taken from the cache; loads no weights.

    Raises:
        DataError: data that cannot be used; names the file.
    """
    cache = Path(config.data.cache_dir) if config.data.cache_dir else run.prepared
    tokenizer, num_rows = load_run_tokenizer(config), target_vocab_size(config)
    return prepare(
        config.data.model_copy(update={"min_supervised_tokens": config.min_supervised_tokens}),
        tokenizer,
        target_vocab_size=num_rows,
        cache_root=cache,
        seed=config.seed,
        reserved_tokens=_reserved_tokens(config, tokenizer, num_rows),
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


def _reserved_tokens(config: RunConfig, tokenizer: PreTrainedTokenizerBase, num_rows: int) -> frozenset[int]:
    """Ids that stand for something else than text in a draft of the run: DFlash's mask token."""
    target = config.target
    if config.data.tokenizer:  # drafts are built from the target's facts, whatever tokenizes the data
        tokenizer = load_tokenizer(target.model, target.revision, target.trust_remote_code)
    mask_token = choose_mask_token(tokenizer, num_rows)
    reserved = (draft.reserved_token(mask_token) for draft in config.drafts.values())
    return frozenset(token for token in reserved if token is not None)


def target_vocab_size(config: RunConfig) -> int:
    """V of the target, from its configuration file."""
    target = config.target
    checkpoint = resolve_checkpoint(target.model, target.revision, target.trust_remote_code)
    text = load_config(checkpoint, target.trust_remote_code).get_text_config(decoder=True)
    return int(text.vocab_size)
