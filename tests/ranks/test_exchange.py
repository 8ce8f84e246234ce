"""engine/ranks.py with real processes over gloo. What each of them checks is in exchange.py."""

from __future__ import annotations

import json
import signal

from tests.helpers.torchrun import torchrun

PROGRAM = "tests.ranks.exchange:exchange"
SHOWN = "shown by the first\n"


def test_two_ranks_exchange_and_one_of_them_raises():
    end = torchrun(2, PROGRAM, "raise")
    assert end.code == 1 and end.root_cause == (1, 1) and not end.left, end.told()
    assert end.out == (SHOWN + "checked\n", "checked\n"), end.told()
    # the traceback is the one of the rank that failed, and no second one
    assert end.tracebacks == [1] and end.err[1].endswith("its image\n"), end.told()
    assert "During handling" not in end.err[1] and "direct cause" not in end.err[1]
    line = "error: rank 1 failed: LookupError: rank 1 has lost its image\n"
    assert SHOWN in end.err[0] and line in end.err[0], end.told()


def test_four_ranks_exchange_and_one_of_them_is_killed():
    end = torchrun(4, PROGRAM, "kill")
    assert end.code == 1 and end.root_cause == (1, -signal.SIGKILL) and not end.left, end.told()
    assert end.tracebacks == [], end.told()
    for rank in (0, 2, 3):
        *_, checked, line = end.out[rank].splitlines()
        told = json.loads(line)
        assert checked == "checked" and told["told"].startswith("a rank has ended"), end.told()
        assert told["seconds"] < 20 and told["then"] == ["PeerError"] * 3, end.told()
    assert "error: a rank has ended" in end.err[0]
    assert not any("error:" in text for text in end.err[1:])
