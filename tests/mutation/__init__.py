"""Planted faults that the tests must notice: the list, and the program that plants them."""
