"""The demo: search the documentation of this Python environment.

`questions.jsonl` is its test set: questions in the words of someone who does not know the name of
what they need, each with every documentation passage that answers it. They were written by hand
from the passages, before any training, and are never trained on. The answers were completed by
judging what a keyword search and two encoders found for each question, so that a passage which is
not listed can be counted as wrong. A third of the questions is for development, the rest for the
published figures; the split is drawn by a hash of the id within each area of the documentation.

An answer is the `source` of a passage, `<document>#<part>`: see `python_documentation`. Parts of
the language reference that changed between releases of Python 3.11 are not used as answers.
"""
