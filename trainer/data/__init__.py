"""From pictures with captions to exactly resumable batches of latents and text tokens."""
