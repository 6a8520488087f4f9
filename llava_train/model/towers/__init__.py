"""Vision encoders: their shapes, how they are loaded, several as one, and what the connector reads of them."""
