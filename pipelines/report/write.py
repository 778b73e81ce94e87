"""The report of a run: a page to be read, and the same figures for a program."""

from cluster.artifacts import Json
from cluster.plain_json import dump_json
from cluster.storage import join
from pipelines.report.collect import collect
from pipelines.report.page import render_page
from pipelines.report.run_folder import files_of_a_run, open_run_folder

PAGE = "report.html"
DOCUMENT = "report.json"


def write_report(run_uri: str) -> dict[str, Json]:
    """Writes `report.html` and `report.json` into a run folder, however much of it is finished.

    Returns:
        The content of report.json; `html` is the page's path or URI.

    Raises:
        UserError: The folder is not a run.
        ArtifactError: A finished step's files are not those that its manifest names, or not of the
            form that this version writes.
    """
    run = open_run_folder(run_uri)
    with files_of_a_run(run_uri):
        document = {**collect(run), "html": join(run.storage.uri, PAGE)}
        page = render_page(document, run.recipe_text)
    run.storage.write_bytes(PAGE, page.encode("utf-8", "replace"))
    run.storage.write_bytes(DOCUMENT, dump_json(document, indent=1).encode())
    return document
