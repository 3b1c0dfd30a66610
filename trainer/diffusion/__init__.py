"""The model, its objective and how pictures are drawn from it."""
