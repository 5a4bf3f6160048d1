import json

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler

from mask2dit.training.objective import diffusion_loss, draw_timestep


@pytest.fixture
def inputs(random_inputs, scheduler_config):
    latents, text, _ = random_inputs()
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    return CogVideoXDDIMScheduler(**scheduler_config), latents, noise, text, torch.tensor([100, 900])


@pytest.mark.parametrize("name, mask", [("normal", None), ("conditional", torch.tensor([False, False, True]))])
def test_the_published_loss_is_reproduced(parity, name, mask):
    file = parity(f"loss_{name}_3scenes")
    scheduler = CogVideoXDDIMScheduler(**json.loads(file.settings["scheduler"]))
    tensors = (file[f"in.{key}"] for key in ("latents", "noise", "prompt_embeds", "timesteps"))
    with torch.no_grad():
        loss = diffusion_loss(file.transformer(), scheduler, *tensors, scene_mask=mask)
    torch.testing.assert_close(loss, file["out.loss"].squeeze(), atol=1e-5, rtol=0)


def test_given_scenes_are_clean_carry_timestep_0_and_do_not_count(make_transformer, inputs):
    scheduler, latents, noise, text, timesteps = inputs
    seen = {}

    class Watch(torch.nn.Module):
        def forward(self, **kwargs):
            seen.update(kwargs)
            return (torch.zeros_like(latents),)

    mask = torch.tensor([[False, True, True], [True, False, False]])
    loss = diffusion_loss(Watch(), scheduler, latents, noise, text, timesteps, mask, reduction="none")
    assert seen["timestep"].tolist() == [[0, 100, 100], [900, 0, 0]]
    assert torch.equal(seen["hidden_states"][0, :3], latents[0, :3])
    assert torch.equal(seen["hidden_states"][1, 3:], latents[1, 3:])
    velocity = scheduler.get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(loss, torch.stack([velocity[0, 3:].square().mean(), velocity[1, :3].square().mean()]))


def test_noised_given_scenes_carry_their_timestep_and_do_not_count(inputs):
    scheduler, latents, noise, text, timesteps = inputs
    seen = {}

    class Watch(torch.nn.Module):
        def forward(self, **kwargs):
            seen.update(kwargs)
            return (torch.zeros_like(latents),)

    mask, context = torch.tensor([[False, True, True], [True, False, False]]), torch.tensor([50, 0])
    arguments = (Watch(), scheduler, latents, noise, text, timesteps, mask)
    loss = diffusion_loss(*arguments, context_timesteps=context, reduction="none")
    assert seen["timestep"].tolist() == [[50, 100, 100], [900, 0, 0]]
    noised = scheduler.add_noise(latents, noise, context)
    torch.testing.assert_close(seen["hidden_states"][0, :3], noised[0, :3])
    assert torch.equal(seen["hidden_states"][1, 3:], latents[1, 3:])
    assert torch.equal(loss, diffusion_loss(*arguments, reduction="none"))


def test_no_mask_is_a_mask_of_all_scenes(make_transformer, inputs):
    transformer = make_transformer()
    with torch.no_grad():
        plain = diffusion_loss(transformer, *inputs)
        masked = diffusion_loss(transformer, *inputs, scene_mask=torch.tensor([True] * 3))
    torch.testing.assert_close(plain, masked)


def test_reduction_none_gives_each_sample_its_own_loss(make_transformer, inputs):
    transformer = make_transformer()
    mask = torch.tensor([[True, False, True], [False, True, False]])
    with torch.no_grad():
        each = diffusion_loss(transformer, *inputs, scene_mask=mask, scene_frames=(2, 4, 3), reduction="none")
        mean = diffusion_loss(transformer, *inputs, scene_mask=mask, scene_frames=(2, 4, 3))
    assert each.shape == (2,)
    torch.testing.assert_close(each.mean(), mean)


def test_what_is_noised_in_given_scenes_has_no_influence(make_transformer, inputs):
    scheduler, latents, noise, text, timesteps = inputs
    transformer, mask = make_transformer(), torch.tensor([False, True, True])
    other = noise.clone()
    other[:, :3] += 1
    with torch.no_grad():
        losses = [diffusion_loss(transformer, scheduler, latents, n, text, timesteps, mask) for n in (noise, other)]
    assert torch.equal(*losses)


def test_a_predicted_sample_costs_what_the_velocity_that_follows_from_it_costs(make_transformer, inputs):
    scheduler, latents, noise, text, _ = inputs
    timesteps = torch.tensor([300, 800])
    transformer = make_transformer()
    sample = transformer(scheduler.add_noise(latents, noise, timesteps), text, timesteps, return_dict=False)[0]
    alpha = scheduler.alphas_cumprod[timesteps].sqrt()[:, None, None, None, None]
    velocity = (alpha * scheduler.add_noise(latents, noise, timesteps) - sample) / (1 - alpha**2).sqrt()
    error = (velocity - scheduler.get_velocity(latents, noise, timesteps)).square().mean(dim=(1, 2, 3, 4))
    scheduler.register_to_config(prediction_type="sample")
    loss = diffusion_loss(transformer, scheduler, latents, noise, text, timesteps, reduction="none")
    torch.testing.assert_close(loss, error.float(), rtol=1e-4, atol=0)


def test_a_predicted_sample_of_hardly_noisy_latents_counts_4_times_at_most(make_transformer, inputs):
    scheduler, latents, noise, text, _ = inputs
    scheduler.register_to_config(prediction_type="sample")

    class Zero(torch.nn.Module):
        def forward(self, **kwargs):
            return (torch.zeros_like(latents),)

    loss = diffusion_loss(Zero(), scheduler, latents, noise, text, torch.tensor([0, 0]))
    torch.testing.assert_close(loss, 4 * latents.square().mean())


def test_a_scheduler_that_has_noise_predicted_is_refused(make_transformer, inputs):
    inputs[0].register_to_config(prediction_type="epsilon")
    with pytest.raises(ValueError, match="v_prediction or sample, but the scheduler's is epsilon"):
        diffusion_loss(make_transformer(), *inputs)


def test_bfloat16_latents_give_a_float32_loss_close_to_that_of_float32(make_transformer, inputs):
    scheduler, *tensors, timesteps = inputs
    transformer = make_transformer()
    with torch.no_grad():
        expected = diffusion_loss(transformer, scheduler, *tensors, timesteps)
        halves = [tensor.bfloat16() for tensor in tensors]
        loss = diffusion_loss(transformer.bfloat16(), scheduler, *halves, timesteps)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, atol=0, rtol=0.05)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"scene_mask": torch.tensor([False] * 3)}, "without a scene to generate"),
        ({"scene_mask": torch.tensor([True] * 2)}, "9 latent frames do not divide into 2 equal scenes"),
        ({"scene_mask": torch.tensor([True] * 3), "scene_frames": (4, 5)}, r"\(4, 5\) do not fit a mask of 3 scenes"),
        ({"reduction": "sum"}, "mean or none, but is 'sum'"),
        ({"noise": torch.zeros(2, 9, 4, 8, 10)}, r"\(2, 9, 4, 8, 10\) does not fit latents of \(2, 9, 4, 8, 12\)"),
    ],
)
def test_bad_input_is_refused(make_transformer, inputs, change, message):
    names = ("scheduler", "latents", "noise", "prompt_embeds", "timesteps")
    with pytest.raises(ValueError, match=message):
        diffusion_loss(make_transformer(), **{**dict(zip(names, inputs)), **change})


def test_unshifted_timesteps_are_the_uniform_ones():
    ours, torchs = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    for _ in range(2000):
        assert draw_timestep(1000, 1.0, ours) == torch.randint(1000, (1,), generator=torchs)


@pytest.mark.parametrize("shift, median", [(3.0, 750), (1 / 3, 250)])
def test_shifted_timesteps_stay_in_the_schedule_with_the_expected_median(shift, median):
    draw = torch.Generator().manual_seed(0)
    drawn = torch.cat([draw_timestep(1000, shift, draw) for _ in range(4000)])
    assert drawn.min() >= 0 and drawn.max() <= 999 and drawn.dtype == torch.int64
    assert abs(drawn.float().median() - median) < 20
