"""Half a minute of the fuzzer; `make fuzz` runs it for longer."""

from __future__ import annotations

import fuzz


def test_damaged_files_are_refused_or_read() -> None:
    table, wrong = fuzz.run(inputs=100_000, seconds=30, seed=1)
    assert not wrong, "\n".join(wrong)
    assert len(table) > 40
