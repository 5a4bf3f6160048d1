import pytest
from diffusers import FirstBlockCacheConfig

from mask2dit.models.parallel import check_degree

COMPILED = "ulysses, compiled blocks"


@pytest.mark.parametrize("num_processes", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4))])
def test_processes_that_share_a_pass_compute_the_output_and_gradients_of_one(run_checks, num_processes):
    results = run_checks(num_processes)
    assert len(results) >= 12
    assert {
        name: result for name, result in results.items() if not (isinstance(result, float) and result < 1e-5)
    } == {}


@pytest.mark.slow
def test_blocks_that_share_a_pass_compile_without_a_graph_break(run_checks):
    assert run_checks(2, COMPILED)[COMPILED] < 1e-5


@pytest.mark.parametrize("degree, nearest", [(4, "3 or 5"), (7, "6 or 10"), (31, "30"), (0, "1")])
def test_numbers_of_processes_that_do_not_divide_the_heads_are_refused_with_the_nearest(degree, nearest):
    with pytest.raises(
        ValueError, match=rf"sequence_parallel={degree} .* 30 attention heads .* nearest is {nearest}$"
    ):
        check_degree("sequence_parallel", degree, 30)
    check_degree("sequence_parallel", 15, 30)


def test_a_cache_that_decides_by_tokens_is_refused_where_processes_share_a_pass(make_transformer):
    transformer = make_transformer()
    transformer.ulysses_group = object()
    with pytest.raises(ValueError, match="FirstBlockCacheConfig decides by the tokens"):
        transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
