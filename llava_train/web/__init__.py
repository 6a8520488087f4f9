"""Talk with one or two models in a browser."""
