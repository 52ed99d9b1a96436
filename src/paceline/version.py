"""The version of this package, readable without importing anything heavy."""

VERSION = "0.1.0"
