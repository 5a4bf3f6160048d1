import weakref

import pytest
import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch

from mask2dit import SceneLayout
from mask2dit.models import attention
from mask2dit.models.attention import ALL, Mask2DiTAttnProcessor, attention_groups, grouped_attention
from mask2dit.models.masks import MASK_VARIANTS, dense_mask

LAYOUTS = {
    "equal": SceneLayout((3, 3, 3), (5, 5, 5)),
    "unequal": SceneLayout((3, 4, 2), (5, 7, 6)),
    "two": SceneLayout((2, 2), (4, 1)),
    "one": SceneLayout((3,), (5,)),
}


def random_qkv(layout, dtype=torch.float32, batch_size=2):
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, layout.length, 2, 8)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


def oracle(query, key, value, layout, variant):
    q, k, v = (x.float().transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=dense_mask(layout, variant)).transpose(1, 2)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("variant", MASK_VARIANTS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_grouped_calls_equal_the_dense_mask_forward_and_backward(layout, variant, dtype, tolerance):
    qkv = random_qkv(layout, dtype)
    output = grouped_attention(*qkv, layout, variant)
    expected = oracle(*qkv, layout, variant)
    torch.testing.assert_close(output.float(), expected, atol=tolerance, rtol=tolerance)

    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((output.float() * weight).sum(), qkv)
    expected_gradients = torch.autograd.grad((expected * weight).sum(), qkv)
    for gradient, expected_gradient in zip(gradients, expected_gradients):
        torch.testing.assert_close(gradient.float(), expected_gradient.float(), atol=tolerance, rtol=tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("backend", ["native", "_native_flash", "_native_cudnn", "_native_efficient"])
@pytest.mark.parametrize("variant", MASK_VARIANTS)
def test_kernels_of_a_gpu_agree_in_bf16_with_the_dense_mask_on_the_cpu(variant, backend):
    layout = SceneLayout((16, 16, 16), (96, 64, 128))
    qkv = [torch.randn(2, layout.length, 4, 64, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    output = grouped_attention(*(x.to("cuda", torch.bfloat16) for x in qkv), layout, variant, backend)
    expected = oracle(*(x.bfloat16() for x in qkv), layout, variant)
    torch.testing.assert_close(output.float().cpu(), expected, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("variant", MASK_VARIANTS)
@pytest.mark.parametrize("num_scenes", [1, 2, 5])
def test_every_block_is_a_query_of_exactly_one_call(num_scenes, variant):
    queries = [block for runs, _ in attention_groups(num_scenes, variant) for run in runs for block in range(*run)]
    assert sorted(queries) == list(range(2 * num_scenes))


def test_no_call_carries_a_mask_and_v2_makes_two_calls_a_scene(monkeypatch):
    calls = []
    monkeypatch.setattr(
        attention,
        "dispatch_attention_fn",
        lambda q, k, v, **kwargs: calls.append((q.shape[1], k.shape[1], kwargs)) or torch.zeros_like(q),
    )
    layout = LAYOUTS["unequal"]
    grouped_attention(*random_qkv(layout), layout, "v2")
    assert [call[:2] for call in calls] == [(3, 8), (4, 11), (2, 8), (5, 21), (7, 22), (6, 20)]
    assert all(kwargs.get("attn_mask") is None for _, _, kwargs in calls)


def test_full_attention_and_a_single_scene_are_one_call_without_a_copy():
    assert attention_groups(3, "v5") == [(((0, 6),), (ALL, ALL))]
    for variant in MASK_VARIANTS:
        assert attention_groups(1, variant) == [(((0, 2),), (ALL, ALL))]


@pytest.mark.parametrize("variant", MASK_VARIANTS)
def test_in_inference_one_concatenation_of_keys_is_alive_at_a_time(variant, monkeypatch):
    layout = LAYOUTS["unequal"]
    query, key, value = random_qkv(layout)
    copies, most_alive = [], 0

    def watch(query, keys, values, **kwargs):
        nonlocal most_alive
        if keys.untyped_storage().data_ptr() != key.untyped_storage().data_ptr():
            copies.append(weakref.ref(keys))
        most_alive = max(most_alive, sum(copy() is not None for copy in copies))
        return torch.zeros_like(query)

    monkeypatch.setattr(attention, "dispatch_attention_fn", watch)
    with torch.no_grad():
        grouped_attention(query, key, value, layout, variant)
    assert most_alive == (0 if variant == "v5" else 1)


def test_set_attention_backend_chooses_the_kernel_of_the_dual_mask(make_transformer, random_inputs, monkeypatch):
    latents, text, timesteps = random_inputs()
    transformer = make_transformer()
    used = []
    backends = attention_dispatch._AttentionBackendRegistry._backends
    name = attention_dispatch.AttentionBackendName._NATIVE_MATH
    kernel = backends[name]
    monkeypatch.setitem(backends, name, lambda *args, **kwargs: used.append(name) or kernel(*args, **kwargs))
    with torch.no_grad():
        expected = transformer(latents, text, timesteps).sample
        transformer.set_attention_backend("_native_math")
        torch.testing.assert_close(transformer(latents, text, timesteps).sample, expected, atol=1e-5, rtol=1e-5)
        assert len(used) == 2 * 6  # layers x calls of v2 with three scenes
        assert torch.equal(make_transformer()(latents, text, timesteps).sample, expected)
    assert len(used) == 2 * 6  # other models keep theirs


def test_the_processor_refuses_a_mask_and_an_unknown_variant(make_transformer):
    block = make_transformer().transformer_blocks[0]
    with pytest.raises(ValueError, match="v9"):
        Mask2DiTAttnProcessor("v9")
    with pytest.raises(ValueError, match="attention_mask"):
        block.attn1(
            torch.zeros(1, 5, 32), torch.zeros(1, 3, 32), layout=LAYOUTS["one"], attention_mask=torch.ones(1, 8)
        )
