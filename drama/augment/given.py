"""Records that exist, as the kinds that start from pairs read them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from drama.augment.corpus import inputs_sha256, read_records
from drama.data.manifest import is_ours, read_manifest
from drama.data.records import Record
from drama.data.sources import Rows, Source
from drama.errors import UserError


class Given:
    """The records of sources of any layout, or of folders of shards, one after the other."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources

    def about(self) -> dict[str, Any]:
        """Plain values that change whenever a record may."""
        return {
            "records": [source.path for source in self._sources],
            "records_files": inputs_sha256(self._sources),
        }

    @cached_property
    def _rows(self) -> list[int]:
        return [_count(source) for source in self._sources]  # a file is read through for it

    def __len__(self) -> int:
        return sum(self._rows)

    def read(self, start: int) -> Iterator[Record]:
        """The records after the first `start`.

        Raises:
            UserError: a row that is no record with a query (its file and line).
        """
        for source, rows in zip(self._sources, self._rows, strict=True):
            if start < rows:
                for where, record in read_records(source, skip=start):
                    if isinstance(record, UserError):
                        raise UserError(f"{where}: {record}", record.reason)
                    if record.is_text:
                        raise UserError(f"{where}: a text without a query; give pairs")
                    yield record
            start = max(0, start - rows)


def _count(source: Source) -> int:
    if is_ours(Path(source.path)):
        return read_manifest(source.path).num_records
    return sum(1 for _ in Rows(source))
