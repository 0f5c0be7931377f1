"""Integrations: other people's trainers. Each is imported only when it is asked for."""
