import pytest

from mask2dit.data.order import PositionSampler, sample_order


def test_every_epoch_is_another_permutation():
    orders = [sample_order(50, 0, epoch).tolist() for epoch in range(5)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 5
    assert sample_order(50, 0, 2).tolist() == orders[2]
    assert sample_order(50, 1, 2).tolist() != orders[2]


def test_samples_are_counted_through_from_epoch_to_epoch():
    assert list(PositionSampler(3, 1, 8)) == [(0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1)]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_step_takes_the_same_samples_with_any_number_of_ranks(world_size):
    ranks = [list(PositionSampler(5, 0, 16, rank, world_size)) for rank in range(world_size)]
    of_a_rank = 4 // world_size
    steps = [sorted(p for rank in ranks for p in rank[step * of_a_rank :][:of_a_rank]) for step in range(4)]
    everything = list(PositionSampler(5, 0, 16))
    assert steps == [everything[step * 4 :][:4] for step in range(4)]


def test_every_rank_gets_equally_many_samples():
    samplers = [PositionSampler(5, 3, 13, rank, 4) for rank in range(4)]
    assert [len(sampler) for sampler in samplers] == [2, 2, 2, 2]
    assert [len(list(sampler)) for sampler in samplers] == [2, 2, 2, 2]


def test_a_run_goes_on_where_it_stopped():
    whole = list(PositionSampler(5, 0, 20, rank=1, world_size=2))
    assert list(PositionSampler(5, 8, 20, rank=1, world_size=2)) == whole[4:]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((5, 0, 10, 2, 2), "rank=2 has to be one of 0 to 1"),
        ((0, 0, 10), "an epoch needs at least one sample"),
        ((5, 8, 9, 0, 2), "samples 8 to 8 are too few for 2 ranks"),
    ],
)
def test_a_sampler_that_cannot_serve_every_rank_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PositionSampler(*arguments)
