"""What a run needs of and says to the scheduler that starts it: outcomes, requeueing, nodes, health."""
