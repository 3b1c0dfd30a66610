"""The settings of a run, each field with its meaning."""
