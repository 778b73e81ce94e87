"""Every schema that passes between steps, in one place."""

import pyarrow as pa

PASSAGE = pa.schema(
    [
        ("id", pa.string()),  # hash of title and text
        ("title", pa.string()),
        ("text", pa.string()),
        ("source", pa.string()),  # "<document>#<part>", parts counted from 1
        # Of a web page, as far as they are known.
        ("url", pa.string()),
        ("date", pa.string()),  # published, YYYY-MM-DD
        ("language", pa.string()),  # the first part of a BCP 47 tag
        ("headings", pa.list_(pa.string())),  # that it stands under, and within it
    ]
)

# The passages that queries are written for; from the documents of those that are held out comes no
# training query, so that the step `gate` can judge the student by theirs.
SEED = PASSAGE.append(pa.field("held_out", pa.bool_()))

QUERY = pa.schema(
    [
        ("id", pa.string()),  # hash of the seed passage's id, the query's kind and its number
        ("seed_id", pa.string()),  # the passage that it was written for or taken from
        ("task", pa.string()),
        ("query", pa.string()),
        ("dropped_by", pa.string()),  # why training may not use it; null: it may
    ]
)

# A row for each passage, in the shards and the order of `passages`, which has the texts.
EMBEDDING = pa.schema([("id", pa.string()), ("embedding", pa.list_(pa.float32()))])

# What is served: with texts, so that the folder can be copied alone.
EMBEDDED_PASSAGE = PASSAGE.append(EMBEDDING.field("embedding"))

CANDIDATES = pa.schema(
    [
        *QUERY,
        # Best first, the seed always among them; empty for a query that was dropped before.
        ("candidate_ids", pa.list_(pa.string())),
        ("similarities", pa.list_(pa.float32())),
        # By BM25, and the sum that orders them; empty without `candidates.lexical`.
        ("lexical", pa.list_(pa.float32())),
        ("hybrid", pa.list_(pa.float32())),
        ("seed_rank", pa.int32()),  # in this list from 1; 0: it was added
    ]
)

# The pairs that the LLM or a cross-encoder scores, a row for each passage, which the LLM reads once
# for all queries.
PAIRS = pa.schema(
    [
        ("passage_id", pa.string()),
        ("title", pa.string()),
        ("text", pa.string()),
        ("query_ids", pa.list_(pa.string())),
        ("queries", pa.list_(pa.string())),
        ("tasks", pa.list_(pa.string())),  # of the queries: their prompts depend on them
    ]
)

SCORES = pa.schema(
    [
        ("passage_id", pa.string()),
        ("query_ids", pa.list_(pa.string())),
        # One of each per query, in their order.
        ("query_likelihoods", pa.list_(pa.float32())),  # null: there is an error, or not asked for
        ("relevances", pa.list_(pa.float32())),  # null: there is an error, or not asked for
        ("errors", pa.list_(pa.string())),  # null: there is none
    ]
)

CROSS_SCORES = pa.schema(
    [
        ("passage_id", pa.string()),
        ("query_ids", pa.list_(pa.string())),
        # One of each per query, in their order.
        ("cross_scores", pa.list_(pa.float32())),  # null: there is an error
        ("errors", pa.list_(pa.string())),  # null: there is none
    ]
)

FRET = pa.schema(
    [
        *CANDIDATES,
        # Of the first candidates, which were scored; empty for a query dropped before, and those of
        # a judge that was not asked.
        ("query_likelihoods", pa.list_(pa.float32())),
        ("relevances", pa.list_(pa.float32())),
        ("cross_scores", pa.list_(pa.float32())),
        ("fused", pa.list_(pa.float32())),
        ("positive_id", pa.string()),
        ("positive_title", pa.string()),
        ("positive", pa.string()),
        ("positive_is_seed", pa.bool_()),
        # The worst first; empty: no candidate qualified.
        ("negative_ids", pa.list_(pa.string())),
        ("negative_titles", pa.list_(pa.string())),
        ("negatives", pa.list_(pa.string())),
    ]
)

# A row of embedding distillation: what the student reads, and the teacher's vector of it.
TEXT = pa.schema(
    [
        ("batch", pa.int32()),
        ("dataset", pa.string()),
        ("text", pa.string()),
        ("tokens", pa.list_(pa.int32())),
        ("embedding", pa.list_(pa.float32())),
    ]
)

# A row of training with fixed passages: a query with the stored vectors of its list, or a passage
# that is anchored to its own vector. A batch's queries come first.
FIXED_EXAMPLE = pa.schema(
    [
        ("batch", pa.int32()),
        ("dataset", pa.string()),
        ("text", pa.string()),
        ("tokens", pa.list_(pa.int32())),
        ("query_id", pa.string()),  # null: a passage
        # The fused scores of the positive and then of the others; empty: a passage.
        ("teacher_scores", pa.list_(pa.float32())),
        # float16 [list, dimensions], in their order, or a passage's one. As a list column they
        # would take Parquet 40 times as long to write, and to read.
        ("vectors", pa.binary()),
    ]
)

# The queries that decided what is exported.
GATE = pa.schema(
    [
        ("kind", pa.string()),  # who wrote it, or what it was of its passage
        ("query", pa.string()),
        ("group", pa.string()),  # its document; in a test set, the query's own id
        ("passage_id", pa.string()),  # that it has to find; null in a test set
        ("ndcg_at_10", pa.list_(pa.float32())),  # of each candidate, the start first
    ]
)

# A row of training. Texts are formatted with the student's templates, tokens are what it reads.
EXAMPLE = pa.schema(
    [
        ("batch", pa.int32()),
        ("dataset", pa.string()),
        ("query", pa.string()),
        ("positive", pa.string()),
        ("negatives", pa.list_(pa.string())),  # its hard negatives, or the rest of its list
        ("query_tokens", pa.list_(pa.int32())),
        ("positive_tokens", pa.list_(pa.int32())),
        ("negative_tokens", pa.list_(pa.list_(pa.int32()))),
        # The fused scores of the positive and then of each negative; empty: unscored.
        ("teacher_scores", pa.list_(pa.float32())),
        ("query_id", pa.string()),
        ("positive_id", pa.string()),
        ("symmetric", pa.bool_()),
    ]
)
