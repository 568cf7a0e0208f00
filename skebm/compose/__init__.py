"""Densities behind transformers, in the units of the rows that a user has; and in those of pyod."""

from skebm.compose._function import InvertibleFunctionTransformer
from skebm.compose._pipeline import DensityPipeline
from skebm.compose._pyod import PyODAdapter

__all__ = ["DensityPipeline", "InvertibleFunctionTransformer", "PyODAdapter"]
