"""Talk with a model: a session and a terminal."""
