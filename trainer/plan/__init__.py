"""What a job needs before it runs: memory, traffic, time and disk, by closed formulas."""
