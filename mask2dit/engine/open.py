"""Opens the engine that a configuration names."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Protocol

from mask2dit.engine.config import EngineConfig
from mask2dit.engine.local import LocalEngine
from mask2dit.engine.ray import RayEngine, cluster
from mask2dit.engine.share import Process, Workers


class Engine(Protocol):
    """Runs stages over items."""

    def run(self, name: str, process: Process, items: Sequence, workers: Workers) -> Iterator:
        """Yields the results of a stage over items, in any order; see `LocalEngine.run`."""

    def close(self) -> None:
        """Ends the workers."""


@contextmanager
def open_engine(config: EngineConfig) -> Generator[Engine]:
    """Yields the engine of a configuration. A Ray cluster that was started for it ends with it.

    Raises:
        ValueError: if Ray is not installed.
        ConnectionError: if there is no cluster at `ray.address`.
    """
    if config.engine == "local":
        with closing(LocalEngine(config)) as engine:
            yield engine
    else:
        with cluster(config.ray.address), closing(RayEngine(config)) as engine:
            yield engine
