"""Numbers from features: pure float64 functions, one file each, and the statistics they are computed from."""
