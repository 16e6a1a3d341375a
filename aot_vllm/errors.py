"""Every error that the package raises on purpose, as one tree.

    AOTError
    ├── SettingError (ValueError)        a setting or argument outside its range
    ├── ShapeError (ValueError)          a tensor that does not fit its grid or the other tensors
    └── UnsupportedError (RuntimeError)  a model or an engine version that the plugin cannot serve

`AOTError` catches all of them. The built-in base in parentheses keeps ordinary handlers working.
"""


class AOTError(Exception):
    """Base of every error that this package raises on purpose."""


class SettingError(AOTError, ValueError):
    """A setting or argument is outside its range, as in `retention must be in (0, 1], got 1.5`."""


class ShapeError(AOTError, ValueError):
    """A tensor has the wrong shape or type, as in `local_scores must have shape (32, 729), got (32, 196)`."""


class UnsupportedError(AOTError, RuntimeError):
    """The plugin cannot serve this model, or cannot run on this version of the engine."""
