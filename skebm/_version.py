"""The version, stated once: read by the build and by ``skebm.__version__``."""

__version__ = "0.1.0"
