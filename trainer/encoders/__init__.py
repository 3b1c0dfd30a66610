"""Frozen networks between people and the model: pictures to latents, captions to text tokens."""
