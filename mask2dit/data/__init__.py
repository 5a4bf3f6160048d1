"""From a manifest to training samples: clips, their order, what is read of them, and what is computed ahead."""
