"""Densities behind transformers, in the units of the rows that a user has, and as transformers."""

from skebm.compose._function import InvertibleFunctionTransformer
from skebm.compose._imputer import DensityImputer
from skebm.compose._pipeline import DensityPipeline

__all__ = ["DensityImputer", "DensityPipeline", "InvertibleFunctionTransformer"]
