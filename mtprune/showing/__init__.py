"""Showing: a report as a page that needs nothing beside itself."""
