"""Training system: data, model, diffusion, DeepSpeed engine, checkpoints and sampling."""
