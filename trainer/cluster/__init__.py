"""What surrounds a run on a cluster: checks of nodes, watching between processes, and what batch scripts decide."""
