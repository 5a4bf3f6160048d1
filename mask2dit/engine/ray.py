"""The engine that runs stages on a Ray cluster."""

import logging
import os
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from mask2dit.engine.config import EngineConfig, Resources
from mask2dit.engine.share import Outcome, Pool, Process, Runner, Workers, in_batches, share
from mask2dit.optional import import_optional

logger = logging.getLogger(__name__)


class RayEngine:
    """Runs stages as actors of a Ray cluster to which this process is connected.

    Every stage has the whole cluster: actors that hold other resources than it needs are ended. Nodes that join later serve
    the next stage.

    Args:
        config: the number of workers and their resources.
    """

    def __init__(self, config: EngineConfig):
        self.config = config
        self.ray = import_optional("ray", "cluster")
        self._pool = Pool(lambda place: RayWorker(self.ray, *place))

    def run(self, name: str, process: Process, items: Sequence, workers: Workers) -> Iterator:
        """Yields the results of a stage over items, in any order; see `LocalEngine.run`.

        Raises:
            ValueError: if no node of the cluster has the resources of a worker.
        """
        resources = self.config.resources.get(name, Resources())
        batches = in_batches(items, resources.batch or workers.batch)
        needed = self._needed(resources, workers)
        count = self.config.num_workers or self._fitting(name, needed)
        logger.info("%s: %d items, up to %d workers", name, len(items), count)
        runner = self.ray.put(Runner(process, workers.load))  # once for all workers
        yield from share(name, batches, runner, self._pool, [(needed["CPU"], needed["GPU"])] * count)

    def close(self) -> None:
        """Ends the actors."""
        self._pool.stop_others()

    def _needed(self, resources: Resources, workers: Workers) -> dict[str, float]:
        gpus = resources.num_gpus
        if gpus is None:
            gpus = 1.0 if workers.uses_gpu and self.ray.cluster_resources().get("GPU") else 0.0
        return {"CPU": 1.0 if resources.num_cpus is None else resources.num_cpus, "GPU": gpus}

    def _fitting(self, name: str, needed: dict[str, float]) -> int:
        """The number of workers that fit the nodes."""
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        count = sum(
            int(min(node.get(kind, 0.0) / amount for kind, amount in needed.items() if amount)) for node in nodes
        )
        if not count:
            listed = " and ".join(f"{amount:g} {kind}" for kind, amount in needed.items() if amount)
            raise ValueError(
                f"no node of the Ray cluster has the {listed} that a worker of {name} takes: set resources.{name}.num_cpus "
                f"and resources.{name}.num_gpus, or add nodes"
            )
        return count


class _Actor:
    """A process of the cluster."""

    def load(self, runner: Runner) -> Outcome:
        self.runner = runner
        return runner.load()

    def run(self, batch: list) -> Outcome:
        return self.runner.run(batch)


class RayWorker:
    """An actor.

    Args:
        ray: the module.
        num_cpus: CPUs that it takes.
        num_gpus: GPUs that it takes.
    """

    def __init__(self, ray: ModuleType, num_cpus: float, num_gpus: float):
        errors = ray.exceptions
        self.lost = (errors.RayActorError, errors.WorkerCrashedError, errors.OutOfMemoryError, errors.ObjectLostError)
        self._ray = ray
        # `share` repeats what is lost.
        options = {"num_cpus": num_cpus, "num_gpus": num_gpus, "max_restarts": 0, "max_task_retries": 0}
        self._actor = ray.remote(_Actor).options(**options).remote()

    def load(self, runner: Any) -> Future:
        return self._actor.load.remote(runner).future()

    def run(self, batch: list) -> Future:
        return self._actor.run.remote(batch).future()

    def stop(self) -> None:
        self._ray.kill(self._actor)


@contextmanager
def cluster(address: str | None) -> Generator[None]:
    """Connects this process to a cluster, unless it is connected already.

    Args:
        address: see `RayConfig.address`.

    Raises:
        ConnectionError: if there is no cluster at the address.
    """
    ray = import_optional("ray", "cluster")
    if ray.is_initialized():
        yield
        return
    try:
        if address is None:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            ray.init("local", include_dashboard=False, logging_level=logging.WARNING)
        else:
            ray.init(address, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConnectionError(f"cannot join the Ray cluster ray.address={address!r}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()
