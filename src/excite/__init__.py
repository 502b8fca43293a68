"""Channel and kernel attention for any convolutional network."""

__version__ = "0.1.0"
