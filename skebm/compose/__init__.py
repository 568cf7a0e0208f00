"""Densities behind transformers, as transformers, and as detectors of pyod."""

from skebm.compose._function import InvertibleFunctionTransformer
from skebm.compose._imputer import DensityImputer
from skebm.compose._pipeline import DensityPipeline
from skebm.compose._pyod import PyODAdapter

__all__ = [
    "DensityImputer",
    "DensityPipeline",
    "InvertibleFunctionTransformer",
    "PyODAdapter",
]
