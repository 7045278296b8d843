"""Recipes: what a run is to do, from TOML to checked, frozen values. Nothing heavy is imported here."""
