"""The version of this package, which pictures carry; setup.cfg reads it from here."""

__version__ = "0.1.0"
