"""Does expert choice pay? Dense, token choice and expert choice at equal activated FLOPs, with a protocol."""
