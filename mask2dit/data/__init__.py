"""From a manifest to training samples: clips, their order, the frames to read, and the cache of latents and embeddings."""
