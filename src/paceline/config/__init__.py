"""Configuration: frozen pydantic models, one TOML file, overrides on the command line."""
