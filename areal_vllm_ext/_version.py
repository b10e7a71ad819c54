"""The package's version. It is a file of its own so that every module may read it without importing the public API."""

__version__ = "0.1.0"
