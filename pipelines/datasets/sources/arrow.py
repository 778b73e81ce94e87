"""Arrow's stream and file formats: what `save_to_disk` of Hugging Face's datasets writes."""

from __future__ import annotations

from collections.abc import Iterator

from cluster.errors import Reject, UserError, excerpt
from cluster.row_files import Row
from pipelines.datasets.sources.columns import Rows, find_column
from pipelines.datasets.sources.streams import FREE_BYTES, MAX_UNPACKED, Source, Unreadable

_EXTENSION = b"ARROW:extension:name"
_FILE = b"ARROW1"  # the file format is a stream behind this, and a footer


def arrow_rows(source: Source) -> Iterator[Row | Reject]:
    """Yields the rows, from a file that is mapped into memory rather than read.

    Raises:
        UserError: It lacks the first of `source.fields`.
    """
    import pyarrow as pa

    with source.local_file() as path:
        try:
            with pa.memory_map(str(path)) as file:
                start = 8 if file.read(len(_FILE)) == _FILE else 0
                file.seek(start)
                # Before Arrow makes the types, which may run their code.
                if _EXTENSION in pa.ipc.read_message(file).metadata.to_pybytes():
                    raise Unreadable("a column of an Arrow extension type, which may run code")
                file.seek(start)
                batches = pa.ipc.open_stream(file)
                if find_column(batches.schema, source.fields[0]) is None:
                    raise UserError(
                        f"corpus file {source.name} has no column {source.fields[0]!r}, only"
                        f" {excerpt(', '.join(batches.schema.names))}: set corpus.text_field"
                    )
                source.columns.update(dict.fromkeys(batches.schema.names))
                max_bytes = max(FREE_BYTES, MAX_UNPACKED * path.stat().st_size)
                rows = Rows(source.name, source.fields, max_bytes)
                for batch in batches:
                    yield from rows.of(batch)
        except (pa.ArrowException, OSError, EOFError, ValueError) as error:
            raise Unreadable(f"not a readable Arrow file: {excerpt(error)}") from error
