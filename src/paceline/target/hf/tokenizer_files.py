"""A tokenizer as text files, for trainers that have no copy of it."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path

from transformers import PreTrainedTokenizerBase

_DATA = (".json", ".txt", ".jinja")
"""Never code: what a tokenizer of its own class computes cannot be sent."""


class TokenizerFiles:
    """Called, gives name -> text of the files that `AutoTokenizer.from_pretrained` needs."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write nothing yet."""
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._files: dict[str, str] | None = None

    def __call__(self) -> dict[str, str]:
        with self._lock:
            if self._files is None:
                self._files = self._save()
            return self._files

    def _save(self) -> dict[str, str]:
        with tempfile.TemporaryDirectory(prefix="paceline-tokenizer-") as directory:
            self._tokenizer.save_pretrained(directory)
            files = sorted(file for file in Path(directory).iterdir() if file.is_file() and file.suffix in _DATA)
            return {file.name: file.read_text(encoding="utf-8") for file in files}
