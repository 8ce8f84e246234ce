"""Say under which name the value of --reward is logged: rl/ logs it so, and eval/ draws it so."""

from __future__ import annotations

import re

MIXTURE = "mixture"


def reward_name(text: str) -> str:
    """Return the name under which a value of --reward is logged.

    hard -> hard, my_rewards:FBeta -> FBeta, hard+0.5*weighted -> mixture.
    """
    return MIXTURE if re.search(r"[-+*]", text) else text.strip().rpartition(":")[2]
