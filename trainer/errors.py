"""The error that a user can mend, and the check that raises it."""


class ConfigError(ValueError):
    """A setting the user must change; the message is one sentence for a terminal."""


def require(condition: bool, message: str) -> None:
    """Raise ConfigError(message) unless `condition` holds."""
    if not condition:
        raise ConfigError(message)
