"""`report.html`, the record of a pruned model to look at: one file that needs no network and runs no script.

    record  ->  panels (which layer stands where)  ->  pictures (tables and SVG)  ->  document (the page)

Everything but `folder` is pure: a record in, HTML out. Every text of a record is escaped.
"""

from statprune.page.document import render
from statprune.page.folder import PAGE, render_folder, write_page

__all__ = ["PAGE", "render", "render_folder", "write_page"]
