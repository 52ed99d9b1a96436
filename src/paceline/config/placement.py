"""`[placement]`, `[transport]`, `[pool]`: where the target runs, how rows travel, what happens when servers die."""

from typing import Literal, Self

from pydantic import Field, model_validator

from paceline.config.base import Config


class RayConfig(Config):
    """For launcher = "ray": a cluster that runs, or one for this run alone."""

    address: str | None = None
    """Of a running cluster, on a node of which the command runs: "auto" or "HOST:PORT"; None starts one on this host,
    for this run alone."""
    namespace: str = "paceline"
    """Of the run's actors."""
    num_gpus: int | None = Field(None, ge=0)
    """GPUs of the cluster started on this host; None is all. Not with `address`."""

    @model_validator(mode="after")
    def _num_gpus_of_our_own_cluster(self) -> Self:
        if self.address is not None and self.num_gpus is not None:
            raise ValueError("num_gpus is for a cluster that the run starts itself: leave it out, or leave out address")
        return self


class PlacementConfig(Config):
    """Where the target runs and who starts the processes."""

    target: Literal["inline", "servers", "urls", "recorded"] = "inline"
    """"inline": inside the trainer's process, on a thread of its own. "servers": processes that the run starts and
    stops. "urls": servers somebody else started. "recorded": features written before by `paceline record`."""
    launcher: Literal["local", "external", "ray"] = "local"
    """Who starts the run's processes: "local" this command, on this host; "external" torchrun or Slurm, one process a
    trainer rank; "ray" a Ray cluster (extra `ray`)."""
    num_trainers: int = Field(1, ge=1)
    """Trainer ranks. Under torchrun and Slurm their own number counts, and this one is left at 1."""
    trainer_devices: tuple[str, ...] = ()
    """The device of each trainer rank, e.g. ["cuda:2", "cuda:3"]; empty gives each a GPU that no server has."""
    ray: RayConfig = RayConfig()
    """For "ray": which cluster."""
    urls: tuple[str, ...] = ()
    """For "urls": http://HOST:PORT of each server; more may join by `servers.json` in the run directory."""
    num_servers: int = Field(1, ge=1)
    """For "servers": how many to start."""
    server_devices: tuple[str, ...] = ()
    """For "servers": the device of each, e.g. ["cuda:0"]; empty gives the first GPUs to servers, the next to the
    trainer, and the CPU where there is none."""
    start_timeout_s: float = Field(1800.0, gt=0)
    """For "servers": a server not ready by then ends the run, with its last log lines. Loading a large checkpoint
    from a network file system takes long, and the first time transformers computes the self-test's reference."""
    max_restarts: int = Field(5, ge=0)
    """For "servers": how often one server that died is started anew; after that the others do its work."""
    token_file: str | None = None
    """For "urls": a file (mode 0600) with the servers' token; None reads PACELINE_TOKEN."""
    tls_ca: str | None = None
    """For "urls" with https: a file of certificates to trust; None takes the system's."""

    @model_validator(mode="after")
    def _what_belongs_together(self) -> Self:
        if self.target == "urls" and not self.urls:
            raise ValueError('target = "urls" without urls: set placement.urls = ["http://HOST:PORT"]')
        if self.urls and self.target != "urls":
            raise ValueError(f'urls are set, but target = "{self.target}": set placement.target = "urls"')
        for url in self.urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"{url!r} is no address of a server: write http://HOST:PORT or https://HOST:PORT")
        if self.server_devices and len(self.server_devices) != self.num_servers:
            raise ValueError(f"{len(self.server_devices)} server_devices for {self.num_servers} servers: name one each")
        if self.trainer_devices and len(self.trainer_devices) != self.num_trainers:
            raise ValueError(
                f"{len(self.trainer_devices)} trainer_devices for {self.num_trainers} trainers: name one each"
            )
        return self


class TransportConfig(Config):
    """How rows travel, and how far the feature stream runs ahead of its trainer."""

    kind: Literal["auto", "http", "file", "nccl", "gloo"] = "auto"
    """"auto" takes the fastest that works between the two processes and says which; one asked for by name never
    falls back. Inline targets hand rows over without a transport."""
    prefetch_rows: int = Field(4, ge=1)
    """Rows asked for and not yet trained on; 1 is strictly serial."""
    prefetch_bytes: int = Field(8 << 30, ge=1)
    """Bytes of features in flight; a larger row travels alone."""
    row_timeout_s: float = Field(600.0, gt=0)
    """A row not answered for so long ends the run with the reason; a log line every 30 s before."""
    stall_timeout_s: float = Field(30.0, gt=0)
    """A reply that has begun and stands still for so long is lost, and its row is asked for again."""
    directory: str | None = None
    """file: where features lie on their way, seen by both sides; None is /dev/shm, on one host."""


class PoolConfig(Config):
    """When a row or a server is given up. The defaults suit rows of seconds."""

    row_retries: int = Field(5, ge=0)
    """How often a row that was lost or damaged on the way is asked for again."""
    connect_timeout_s: float = Field(10.0, gt=0)
    """A server that does not take a connection for so long is down."""
    health_every_s: float = Field(5.0, gt=0)
    """Between two looks at a server's /healthz; a busy server answers it all the same."""
    health_timeout_s: float = Field(10.0, gt=0)
    """A server that does not answer /healthz for so long hangs: its rows go to the others."""
    lease_s: float = Field(60.0, gt=0, le=3600)
    """A server forgets a client that it has not heard of for so long; renewed every third of it."""
    hedge_factor: float = Field(3.0, gt=1)
    """A row out longer than this times the 95th percentile is asked for from a second server as well; the first
    valid reply counts."""
    hedge_after_rows: int = Field(20, ge=1)
    """Rows that must have come before a percentile means something."""
    all_down_timeout_s: float = Field(600.0, ge=0)
    """With no server left the run waits so long for one to come back, with a log line every 30 s, then ends."""
