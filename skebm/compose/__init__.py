"""Densities behind transformers, in the units of the rows that a user has."""

from skebm.compose._function import InvertibleFunctionTransformer
from skebm.compose._pipeline import DensityPipeline

__all__ = ["DensityPipeline", "InvertibleFunctionTransformer"]
