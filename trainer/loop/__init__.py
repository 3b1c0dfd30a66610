"""The training loop: what a run does from its checks to its end, step by step."""
