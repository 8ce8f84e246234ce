"""Hold the shipped recipes, TOML files of settings."""

DEMO_RECIPES = ("demo", "demo-quick", "demo-gemma")  # those that name their model and data
