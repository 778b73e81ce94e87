"""Every schema that passes between steps, in one place."""

import pyarrow as pa

PASSAGE = pa.schema(
    [
        ("id", pa.string()),  # hash of title and text
        ("title", pa.string()),
        ("text", pa.string()),
        ("source", pa.string()),  # "<document>#<part>", parts counted from 1
    ]
)

QUERY = pa.schema(
    [
        ("id", pa.string()),  # hash of the seed passage's id and the sample's number
        ("seed_id", pa.string()),
        ("task", pa.string()),
        ("query", pa.string()),
        ("dropped_by", pa.string()),  # why training may not use it; null: it may
    ]
)

EMBEDDED_PASSAGE = PASSAGE.append(pa.field("embedding", pa.list_(pa.float32())))

CANDIDATES = pa.schema(
    [
        *QUERY,
        # Nearest first, the seed always among them; empty for a query that was dropped before.
        ("candidate_ids", pa.list_(pa.string())),
        ("similarities", pa.list_(pa.float32())),
        ("seed_rank", pa.int32()),  # in the retriever's list from 1; 0: it was put in
    ]
)

SCORES = pa.schema(
    [
        *CANDIDATES,
        # Of the first `num_scored` candidates; empty for a query that was dropped before.
        ("query_likelihoods", pa.list_(pa.float32())),
        ("relevances", pa.list_(pa.float32())),
    ]
)

FRET = pa.schema(
    [
        *QUERY,
        ("positive_id", pa.string()),
        ("positive_title", pa.string()),
        ("positive", pa.string()),
        ("negative_id", pa.string()),  # null: no candidate was fit
        ("negative_title", pa.string()),
        ("negative", pa.string()),
        ("positive_is_seed", pa.bool_()),
        ("seed_rank", pa.int32()),
        ("candidate_ids", pa.list_(pa.string())),
        ("similarities", pa.list_(pa.float32())),
        ("query_likelihoods", pa.list_(pa.float32())),
        ("relevances", pa.list_(pa.float32())),
        ("fused", pa.list_(pa.float32())),
    ]
)

EXAMPLE = pa.schema(
    [
        ("batch", pa.int32()),
        ("dataset", pa.string()),
        ("query", pa.string()),  # formatted with the student's template
        ("positive", pa.string()),
        ("negative", pa.string()),  # null: none
        ("query_id", pa.string()),
        ("positive_id", pa.string()),
        ("symmetric", pa.bool_()),
    ]
)
