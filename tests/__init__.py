"""Tests, one flat folder. A package, because an installed one has the same name and would be found in its place."""
