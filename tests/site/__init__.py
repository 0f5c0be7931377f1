"""The documentation as a site: ``python -m tests.site --out DIR``."""
