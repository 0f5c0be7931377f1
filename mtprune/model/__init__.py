"""The model: its layers, their units and components, and what they cost."""
