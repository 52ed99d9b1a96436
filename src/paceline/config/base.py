"""The base of every configuration section."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Frozen; unknown keys are refused; the docstring under a field is its description."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, protected_namespaces=()
    )
