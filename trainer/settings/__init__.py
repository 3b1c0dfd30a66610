"""The settings of a run by concern, each described by the string below it; `describe` prints them."""
