"""Pretrained models that turn videos, frames and texts into features: ViCLIP, CLIP, DINO, VideoMAE and I3D."""
