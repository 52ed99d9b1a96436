"""Fingerprints of a target: equal on both sides of a connection, or the session is refused (rule N7)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash
from transformers import PreTrainedTokenizerBase

from paceline.errors import TargetError
from paceline.target.hf.stored_tensors import read_tensor_table

SAMPLE_BYTES = 1024
"""Read of each tensor: enough to tell two trainings apart, and 100 GB in under 5 s."""
_CONFIG_NOISE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")
"""What saving a checkpoint again changes; the tensors' own dtypes are hashed."""
_PROBE_TEXT = "The quick brown fox, 3.14159 = pi?\n\n\tdéjà vu - naïve café; 你好世界 🚴 <|x|> 'tis   done\r\n"


def fingerprint_weights(checkpoint: Path) -> str:
    """16 hex digits of the configuration and of every tensor's name, dtype, shape and 1 KiB of its bytes.

    Copying or resharding does not change it; a change of one tensor does. The place of the 1 KiB is drawn from the
    tensor's name; smaller tensors are read whole.

    Raises:
        TargetError: files that are missing or damaged.
    """
    digest = xxhash.xxh3_64()
    digest.update(json.dumps(_config_facts(checkpoint / "config.json"), sort_keys=True).encode())
    table = read_tensor_table(checkpoint)
    streams = {file: file.open("rb") for file in {tensor.file for tensor in table.values()}}
    try:
        for name in sorted(table):
            tensor = table[name]
            room = max(tensor.num_bytes - SAMPLE_BYTES, 0)
            stream = streams[tensor.file]
            stream.seek(tensor.start + xxhash.xxh3_64_intdigest(name.encode()) % (room + 1))
            digest.update(f"|{name}|{tensor.dtype}|{tensor.shape}|".encode())
            digest.update(stream.read(min(SAMPLE_BYTES, tensor.num_bytes)))
    finally:
        for stream in streams.values():
            stream.close()
    return digest.hexdigest()


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hex digits of the vocabulary, the special ids and how a fixed text is split.

    Nothing in it depends on the versions of the libraries that read the tokenizer; the chat template is left out,
    since it changes no feature.
    """
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id]
    facts = [
        sorted(tokenizer.get_vocab().items()),
        special,
        tokenizer.encode(_PROBE_TEXT, add_special_tokens=False),
    ]
    return xxhash.xxh3_64_hexdigest(json.dumps(facts).encode())


def _config_facts(file: Path) -> Any:
    try:
        return _without_noise(json.loads(file.read_text()))
    except OSError as error:
        raise TargetError(f"{file} cannot be read ({error.strerror}): is this a transformers checkpoint?") from error
    except ValueError as error:
        raise TargetError(f"{file} is not JSON ({error}): download the checkpoint again") from error


def _without_noise(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_noise(item) for key, item in value.items() if key not in _CONFIG_NOISE}
    return value
