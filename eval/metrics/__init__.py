"""Numbers from features: pure float64 functions, one file each, and the statistics they are computed from.

torchmetrics is what the tests and `benchmarks.eval` compare with, not what runs. Its classes gather features over
ranks and forget them, where ours stay in a store from which one process computes every metric; its FID takes twice
the time, and its edit distance is only a bound for texts that are far apart (a beam of 25 characters).
"""
