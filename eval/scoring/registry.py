"""The suites by name. A further one is a file beside this one that defines `SUITE`, and a line here."""

SUITES = {
    "fid": "eval.suites.fid",
    "cmmd": "eval.suites.cmmd",
    "dino": "eval.suites.dino",
    "clip": "eval.suites.clip",
    "geneval": "eval.suites.geneval",
    "text": "eval.suites.text",
}
"""Name on the command line -> module with `SUITE`, which is imported when the suite is used."""
