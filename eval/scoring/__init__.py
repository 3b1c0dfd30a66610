"""From prompts to a report: settings, drawing, each rank's share, what is kept on disk, the registry of suites."""
