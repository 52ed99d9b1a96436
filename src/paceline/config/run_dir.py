"""The name of every artifact of a run; nobody else spells these paths."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class RunDir:
    """Paths inside one run directory; creates nothing."""

    root: Path

    @property
    def resolved_config(self) -> Path:
        return self.root / "resolved.toml"

    @property
    def versions(self) -> Path:
        return self.root / "versions.json"

    @property
    def lock(self) -> Path:
        return self.root / "lock"

    @property
    def target_info(self) -> Path:
        return self.root / "target.json"

    @property
    def trained_data(self) -> Path:
        return self.root / "trained_data.npz"

    @property
    def servers(self) -> Path:
        """Which servers there are now; replaced as a whole by whoever starts and stops them."""
        return self.root / "servers.json"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer, where it came from a server."""
        return self.root / "tokenizer"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    def log(self, role: str, rank: int) -> Path:
        return self.logs / f"{role}-{rank}.log"

    def output(self, role: str, rank: int) -> Path:
        """What a process without a terminal wrote to it."""
        return self.logs / f"{role}-{rank}.out"

    @property
    def nonce(self) -> Path:
        """Random words by which a process on another node knows that it sees this directory."""
        return self.root / "nonce"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}"

    @property
    def prepared(self) -> Path:
        return self.root / "prepared"

    @property
    def recording(self) -> Path:
        """Features of all rows, unless `recording.output` says where."""
        return self.root / "recording"

    @property
    def regenerated(self) -> Path:
        return self.root / "regenerated.jsonl"

    @property
    def evaluation(self) -> Path:
        return self.root / "evaluation.json"

    def export(self, draft: str) -> Path:
        return self.root / "export" / draft

    @property
    def profile(self) -> Path:
        return self.root / "profile"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def report(self) -> Path:
        return self.root / "report.html"
