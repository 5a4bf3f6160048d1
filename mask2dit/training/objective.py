"""The training objective: the error of the predicted velocity in the generated scenes.

Shapes: B stories, S scenes, F latent frames per scene, C latent channels, h x w latent size, L text tokens per scene,
D text width.
"""

from collections.abc import Sequence

import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler

SMALLEST_SIGMA = 0.5  # limits the weight 1/sigma² of a clean-latent prediction's error to 4 instead of 1,200


def diffusion_loss(
    transformer: torch.nn.Module,
    scheduler: CogVideoXDDIMScheduler | CogVideoXDPMScheduler,
    latents: torch.Tensor,
    noise: torch.Tensor,
    prompt_embeds: torch.Tensor,
    timesteps: torch.Tensor,
    scene_mask: torch.Tensor | None = None,
    scene_frames: Sequence[int] | None = None,
    reduction: str = "mean",
    context_timesteps: torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss of Mask²DiT, L = E sum_i m_i ||v - v_theta(z_t, t, z_T)||² (arXiv 2503.19881), as a mean over elements.

    With `prediction_type: sample` in the scheduler, the transformer predicts the clean latents, and its error is weighted
    like that of the velocity which follows from them (arXiv 2511.13720). This suits tokens with as many numbers as the
    transformer is wide, since it cannot pass their noise through.

    Given scenes (m_i = 0) stay clean, have timestep 0 (but see `context_timesteps`) and do not count. Each sample's loss is
    the mean over the elements of its generated scenes, so that all samples have the same weight, whatever their number of
    generated scenes.

    Args:
        transformer: a Mask²DiT transformer, plain or wrapped (DDP, DeepSpeed).
        scheduler: the scheduler whose noise schedule is trained.
        latents: (B, S*F, C, h, w) clean scaled latents; the transformer receives them in the dtype of `prompt_embeds`.
        noise: standard normal noise of the same shape.
        prompt_embeds: (B, S*L, D) text embeddings.
        timesteps: (B,) integers in 0 … 999.
        scene_mask: (S,) or (B, S) bools, True where the scene is generated. None: all.
        scene_frames: latent frames of each scene. None: equal lengths.
        reduction: "mean" over samples, or "none".
        context_timesteps: (B,) timesteps at which given scenes are noised and which they carry; 0: clean. None: all 0.

    Returns:
        A scalar, or (B,) for "none"; float32.

    Raises:
        ValueError: for shapes that do not fit, a sample without a generated scene, an unknown reduction, or a scheduler
            with noise prediction.
    """
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction has to be mean or none, but is {reduction!r}")
    if scheduler.config.prediction_type not in ("v_prediction", "sample"):
        raise ValueError(
            f"prediction_type has to be v_prediction or sample, but the scheduler's is {scheduler.config.prediction_type}"
        )
    if latents.shape != noise.shape:
        raise ValueError(f"noise of the shape {tuple(noise.shape)} does not fit latents of {tuple(latents.shape)}")
    batch_size, num_frames = latents.shape[:2]
    if context_timesteps is None:
        context_timesteps = torch.zeros_like(timesteps)
    if scene_mask is None:
        scene_timesteps = timesteps
        frame_mask = torch.ones(batch_size, num_frames, dtype=torch.bool, device=latents.device)
    else:
        scene_mask = scene_mask.to(latents.device, torch.bool).expand(batch_size, -1)  # (B, S)
        if not scene_mask.any(dim=1).all():
            raise ValueError(f"scene_mask {scene_mask.tolist()} has a sample without a scene to generate")
        scene_timesteps = torch.where(scene_mask, timesteps[:, None], context_timesteps[:, None])
        lengths = _lengths(scene_mask.shape[1], num_frames, scene_frames)
        frame_mask = scene_mask.repeat_interleave(lengths.to(latents.device), dim=1)
    is_generated = frame_mask[:, :, None, None, None]  # (B, S*F, 1, 1, 1)

    # In float32, since small factors of the schedule lose most of their digits in bfloat16.
    clean, noise = latents.float(), noise.float()
    is_noised = context_timesteps[:, None, None, None, None] > 0  # timestep 0 has a little noise in the schedule
    given = torch.where(is_noised, scheduler.add_noise(clean, noise, context_timesteps), clean)
    noisy = torch.where(is_generated, scheduler.add_noise(clean, noise, timesteps), given)
    if scheduler.config.prediction_type == "sample":
        target = clean
        sigma = (1 - scheduler.alphas_cumprod.to(latents.device)[timesteps]).sqrt().float().clamp(min=SMALLEST_SIGMA)
    else:
        target = scheduler.get_velocity(clean, noise, timesteps)
        sigma = torch.ones(batch_size, device=latents.device)

    prediction = transformer(
        hidden_states=noisy.to(prompt_embeds.dtype),
        encoder_hidden_states=prompt_embeds,
        timestep=scene_timesteps,
        scene_frames=None if scene_frames is None else tuple(scene_frames),
        return_dict=False,
    )[0]
    error = (prediction.float() - target).square().mean(dim=(2, 3, 4))  # (B, S*F)
    loss = (error * frame_mask).sum(dim=1) / frame_mask.sum(dim=1) / sigma.square()  # (B,)
    return loss.mean() if reduction == "mean" else loss


def draw_timestep(num_train_timesteps: int, shift: float, generator: torch.Generator) -> torch.Tensor:
    """A random training timestep, (1,), shifted towards high noise (arXiv 2403.03206, equation 23).

    Args:
        num_train_timesteps: timesteps of the noise schedule.
        shift: s > 0 of u -> s u / (1 + (s - 1) u), where u is a timestep's share of the schedule. 1: uniform timesteps.
        generator: a CPU generator.
    """
    drawn = torch.randint(num_train_timesteps, (1,), generator=generator)
    share = (drawn + 0.5) / num_train_timesteps  # the middle of the timestep's interval, so that 1 shifts nothing
    return (shift * share / (1 + (shift - 1) * share) * num_train_timesteps).long()


def _lengths(num_scenes: int, num_frames: int, scene_frames: Sequence[int] | None) -> torch.Tensor:
    """The number of latent frames of each scene."""
    if scene_frames is None:
        if num_frames % num_scenes:
            raise ValueError(
                f"{num_frames} latent frames do not divide into {num_scenes} equal scenes: pass scene_frames"
            )
        scene_frames = [num_frames // num_scenes] * num_scenes
    if len(scene_frames) != num_scenes or sum(scene_frames) != num_frames:
        raise ValueError(
            f"scene_frames {tuple(scene_frames)} do not fit a mask of {num_scenes} scenes and {num_frames} latent frames"
        )
    return torch.tensor(scene_frames)
