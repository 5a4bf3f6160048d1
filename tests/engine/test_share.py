import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from mask2dit.engine.share import IN_FLIGHT, MAX_LOSSES, Pool, Runner, in_batches, share


class DiedError(Exception):
    pass


class Machine:
    """Workers whose calls finish one at a time, in the order in which they were made; some batches kill their worker."""

    def __init__(self, deadly=(), deaths=1, dies_loading=False):
        self.deadly, self.deaths, self.dies_loading = deadly, deaths, dies_loading
        self.started: list[FakeWorker] = []
        self.killed: Counter = Counter()
        self.pool = Pool(self.start)

    def start(self, place):
        self.started.append(FakeWorker(self, place))
        return self.started[-1]

    def share(self, items, num_workers, process, batch=1):
        return share("stage", in_batches(items, batch), Runner(process, None), self.pool, ["place"] * num_workers)


class FakeWorker:
    lost = DiedError

    def __init__(self, machine, place):
        self.machine, self.place = machine, place
        self.is_dead = self.is_stopped = False

    def load(self, runner):
        self.runner = runner
        return self._future(runner.load, self.machine.dies_loading)

    def run(self, batch):
        dies = batch[0] in self.machine.deadly and self.machine.killed[batch[0]] < self.machine.deaths
        self.machine.killed[batch[0]] += bool(dies)
        return self._future(lambda: self.runner.run(batch), dies)

    def stop(self):
        self.is_stopped = True

    def _future(self, call, dies):
        future = Future()
        self.is_dead |= dies
        if self.is_dead:
            future.set_exception(DiedError("killed"))
        else:
            future.set_result(call())
        return future


def double(items):
    for item in items:
        yield 2 * item


def test_every_item_is_done_once_and_idle_workers_are_used_again():
    machine = Machine()
    for _ in range(2):
        assert sorted(machine.share(range(10), 3, double, batch=4)) == [2 * i for i in range(10)]
    assert len(machine.started) == 3 and not any(worker.is_stopped for worker in machine.started)


def test_workers_of_another_place_are_stopped_before_a_stage():
    machine = Machine()
    list(machine.share(range(3), 2, double))
    list(share("other", [[1]], Runner(double, None), machine.pool, ["elsewhere"]))
    assert [worker.is_stopped for worker in machine.started] == [True, True, False]


def test_the_batches_of_a_worker_that_dies_are_done_by_others():
    machine = Machine(deadly={3, 7})
    assert sorted(machine.share(range(10), 2, double)) == [2 * i for i in range(10)]
    assert sum(worker.is_dead for worker in machine.started) == 2


def test_a_batch_that_kills_every_worker_is_named_after_all_others_are_done():
    machine = Machine(deadly={3}, deaths=MAX_LOSSES)
    done = []
    with pytest.raises(OSError, match=f"stage: {MAX_LOSSES} workers died at each of these: 3. All others are done"):
        for result in machine.share(range(6), 2, double):
            done.append(result)
    assert sorted(done) == [0, 2, 4, 8, 10]


def test_workers_that_die_while_they_load_end_the_stage():
    with pytest.raises(OSError, match="3 workers in a row died before they could work"):
        list(Machine(dies_loading=True).share(range(4), 2, double))


def test_an_error_of_the_stage_comes_after_the_results_before_it():
    def fails(items):
        for item in items:
            if item == 2:
                raise ValueError("two is too many")
            yield item

    results = Machine().share(range(4), 1, fails, batch=4)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError) as error:
        next(results)
    assert str(error.value) == "two is too many"
    assert "in fails" in error.value.__notes__[0]


def test_no_more_than_a_few_batches_are_with_a_worker():
    waiting = []

    class Slow(FakeWorker):
        def run(self, batch):
            waiting.append((future := Future(), batch))
            return future

    machine = Machine()
    machine.pool = Pool(lambda place: Slow(machine, place))
    results = machine.share(range(100), 2, double)
    with ThreadPoolExecutor() as executor:
        for count in range(20):
            found = executor.submit(next, results)
            while len(waiting) <= count:
                time.sleep(0.001)
            assert len(waiting) - count <= 2 * IN_FLIGHT
            future, batch = waiting[count]
            future.set_result((batch, None))
            assert found.result() == count
    results.close()
