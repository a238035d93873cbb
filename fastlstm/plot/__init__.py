"""Pictures of training, forecasts and what a recurrent layer does (needs matplotlib).

Every function draws on the Axes that it is given or makes a figure of its own, in light or dark style, saves it where
``path`` says, and returns the Figure, which pyplot does not know, so that it need not be closed.
"""

from .inside import gates, gradient_sizes, gradients
from .training import confusion_matrix, forecast, learning_curves

__all__ = ["confusion_matrix", "forecast", "gates", "gradient_sizes", "gradients", "learning_curves"]
