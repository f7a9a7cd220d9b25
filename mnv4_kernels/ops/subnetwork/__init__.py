"""A part of any network, as one program of the engine over the parameters that the caller's graph holds."""

from .contract import subnetwork
from .recipe import Fold, Mean, Recipe

__all__ = ["Fold", "Mean", "Recipe", "subnetwork"]
