"""One file per suite of `eval.scoring`, with check, prepare and score; imported when the suite is asked for."""
