"""Latent shards (safetensors): what encoding writes and training reads."""
