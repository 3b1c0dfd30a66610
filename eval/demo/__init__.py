"""The embedded benchmark: a detector, prompts and controls for the drawn scenes."""
