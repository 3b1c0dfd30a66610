"""The embedded data: scenes drawn at run time from OpenMoji pictures."""
