"""Evaluation suite: generate pictures from a checkpoint, score them, write the report."""
