"""`target.num_threads` counts in a server's own process, for threads that begin later, too."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from paceline.config.target import TargetConfig
from paceline.errors import PacelineError
from paceline.launch.serve import ServeOptions, serve_target
from paceline.target.server.settings import ServerSettings


def test_a_server_computes_with_as_many_threads_as_it_is_told(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    signals: Any = SimpleNamespace(grace_s=0.0, stop=threading.Event())
    config = TargetConfig(model=str(tmp_path), device="cpu", num_threads=before + 2)
    seen: list[int] = []
    try:
        with pytest.raises(PacelineError, match="no tokenizer files"):
            serve_target(config, ServerSettings(), ServeOptions(), signals, print)
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(before)
    assert seen == [before + 2]
