"""What people read of runs and studies: HTML pages, Markdown, tables, model cards; made of `report.json` alone.

Invariant: a page is one file that asks for nothing else, and text from recipes and data never becomes markup.
"""
