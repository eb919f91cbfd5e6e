"""The first inputs of the fuzzer, the same on every machine; `make fuzz` runs more of them."""

from __future__ import annotations

import fuzz


INPUTS = 400
SECONDS = 90  # for a machine on which they would take longer: the rest is left out


def test_damaged_files_are_refused_or_read() -> None:
    _, wrong = fuzz.run(range(INPUTS), SECONDS, seed=1)
    assert not wrong, "\n".join(wrong)
