"""Define the errors that this package raises on purpose.

Every message names the argument, the expected and the given value, and ends with how to fix it.
"""

from ._secrets import masked


class BlueprintError(ValueError):
    """Base of every error this package raises on purpose. Tokens and passwords in its message are masked."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(masked(arg) if isinstance(arg, str) else arg for arg in args))


class FormatError(BlueprintError):
    """A file or record is not a blueprint: not JSON, truncated, a wrong type, a newer schema, NaN."""


class MismatchError(BlueprintError):
    """A blueprint and a model, or two blueprints, do not belong together."""


class MeasurementError(BlueprintError):
    """A measurement cannot be made or came out unusable: no data, no targets, infinite gradients."""


class PlacementError(BlueprintError):
    """A placement was asked for that cannot be: two selectors, a fraction outside (0, 1], a 4-bit block unfrozen."""


class DriftError(BlueprintError):
    """A local blueprint is too far from the published one and the policy was to stop."""
