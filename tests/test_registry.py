import pytest

from llava_train.errors import RecipeError
from llava_train.registry import Registry


def test_names_are_exact_and_unique() -> None:
    registry: Registry[int] = Registry("thing")
    registry.register("linear")(1)
    assert registry["linear"] == 1
    with pytest.raises(ValueError, match="registered twice"):
        registry.register("linear")(2)
    with pytest.raises(RecipeError, match="unknown thing 'linera'; did you mean 'linear'"):
        registry["linera"]
    with pytest.raises(RecipeError, match="choose one of linear"):
        registry["zzz"]
