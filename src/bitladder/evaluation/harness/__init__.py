"""Tasks of lm-evaluation-harness whose questions lie in this folder: nothing is fetched.

They are multiple choice: an answer is the choice with the largest log-probability after the question (the harness's
`acc`). Every answer is kept, so that a checkpoint's can be paired with the original's. The harness is an extra,
`bitladder[tasks]`; nothing but `models` imports it.
"""

import importlib.util

from bitladder.errors import RecipeError

_NEEDED = ("lm_eval", "accelerate")  # modules of the extra


def check_installed() -> None:
    """Raise where the harness isn't there, without importing it.

    Raises:
        RecipeError: the extra is missing.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise RecipeError(
            f"tasks.names asks for tasks of lm-evaluation-harness, and {' and '.join(missing)} can't be imported; "
            "pip install 'bitladder[tasks]', or leave tasks out"
        )
