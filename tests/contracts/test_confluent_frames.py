"""The recorded frames that the framing tests read are what Confluent's serializer writes today."""

from __future__ import annotations

import json

import pytest

from record_confluent_frames import FRAMES, record


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the serializer's own dependencies
def test_the_recorded_frames_are_what_the_serializer_writes() -> None:
    """It registers its schemas with our stub of a registry as it would with a real one, and frames by its own rules."""
    recorded, written = json.loads(FRAMES.read_text(encoding="utf-8")), record()

    assert len(written["frames"]) == 4
    for part in ("schemas", "frames"):
        assert written[part] == recorded[part]
