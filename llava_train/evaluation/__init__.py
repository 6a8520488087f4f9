"""How good is it: tasks, metrics, evaluation of a model folder."""
