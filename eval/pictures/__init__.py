"""Prompts, the pictures drawn for them, and how they were drawn."""
