"""Storage that needs no disk: rows and change log in Bigtable's emulator, payloads in fake-gcs-server."""

from __future__ import annotations

from dataclasses import dataclass

from bigtable_emulator import Emulator
from gcs_servers import NewBucket


@dataclass(frozen=True)
class Clouds:
    """The emulators of both tiers."""

    bigtable: Emulator
    new_bucket: NewBucket

    def storage(self) -> dict[str, dict[str, str]]:
        """Make a table and a bucket; return the configuration of storage in them."""
        endpoint, bucket = self.new_bucket()
        long_term = {"type": "gcs", "bucket": bucket, "prefix": "tier/", "endpoint": endpoint}
        return {**self.bigtable.storage(), "long_term": long_term}
