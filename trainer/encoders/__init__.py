"""Frozen encoders, a file each: image codecs (pictures to latents and back) and text encoders (captions to tokens)."""
