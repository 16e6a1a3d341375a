"""What can go wrong, as one tree.

    AOTError
    ├── SettingError (ValueError)        a setting or argument outside its range
    ├── ShapeError (ValueError)          a tensor that does not fit its grid or its companions
    └── UnsupportedError (RuntimeError)  a model or engine version the plugin does not know

Catch `AOTError` for everything raised on purpose; the second base keeps ordinary handlers working.
"""


class AOTError(Exception):
    """Base of every error this package raises on purpose."""


class SettingError(AOTError, ValueError):
    """A setting or argument is outside its range: `retention must be in (0, 1], got 1.5`."""


class ShapeError(AOTError, ValueError):
    """A tensor does not fit: `local_scores must have shape (32, 729), got (32, 196)`."""


class UnsupportedError(AOTError, RuntimeError):
    """The model or the engine version is not one the plugin can serve."""
