"""hedgelab: find, measure and fix feature hedging in sparse autoencoders."""

__version__ = "0.1.0"
